"""The model card of a store on the Hub: what it holds, how it scored, how to load it."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from mm_piece.metrics import continual
from mm_piece.plaintext import make_printable
from mm_piece.store.manifest import ManifestEntry

GENERATED_MARK = (
    "<!-- Written by mm-piece at every push; without this line the file is left as it is. -->"
)
# What Markdown could take for its own.
_MARKDOWN_SPECIAL = re.compile(r"[\\`*_\[\]<>#!|~&:@$]|(?<=www)\.", re.IGNORECASE)


def format_model_card(
    base: dict[str, Any], entries: Sequence[ManifestEntry], results: dict[str, Any], repository: str
) -> str:
    """Return README.md of a repository: metadata, base, positions, scores, how to load it."""
    sections = [
        f"---\n{yaml.safe_dump(_build_metadata(base), sort_keys=False)}---\n{GENERATED_MARK}",
        f"# {_escape_markdown(repository)}",
        "One base and a sequence of tasks, each stored as a sparse exact delta: base + deltas 1…*t*"
        " is the model after task *t*, bit for bit. Made with mm-piece.",
        _format_base(base),
        "## Positions",
        _format_positions(base, entries),
        *_format_scores(entries, results),
        "## Use",
        _format_usage(base, len(entries), repository),
    ]
    return "\n\n".join(sections) + "\n"


def _build_metadata(base: dict[str, Any]) -> dict[str, Any]:
    model = {"base_model": base["hub"]} if "hub" in base else {}
    tags = ["mm-piece", "continual-learning", "sparse-delta"]
    return {**model, "library_name": "mm-piece", "tags": tags}


def _format_base(base: dict[str, Any]) -> str:
    source = base.get("hub", "a local folder; name yours when loading")
    revision = f" at revision {base['revision']}" if base.get("revision") else ""
    lines = [f"Base: {_escape_markdown(source + revision)}"]
    lines += [f"{key}: {_escape_markdown(base[key])}" for key in ("family", "dtype") if key in base]
    lines += [f"{base['parameters']:,} parameters"] if "parameters" in base else []
    lines.append(f"fingerprint {base['fingerprint'][:12]}")
    return "  \n".join(lines)


def _format_positions(base: dict[str, Any], entries: Sequence[ManifestEntry]) -> str:
    parameters = base.get("parameters")
    rows = [
        (
            entry.position,
            _escape_markdown(entry.task),
            f"{entry.entries:,}",
            f"{100 * entry.entries / parameters:.3g} %" if parameters else "–",
            f"{entry.bytes:,}",
            entry.sha256[:12],
        )
        for entry in entries
    ]
    header = ("position", "task", "entries", "share of the model", "bytes", "SHA-256")
    total = sum(entry.bytes for entry in entries)
    return f"{_format_table(header, rows)}\n\nTotal: {total:,} bytes in {len(entries)} deltas."


def _format_scores(entries: Sequence[ManifestEntry], results: dict[str, Any]) -> list[str]:
    """The accuracy matrix and what it comes to; nothing before the first measurement."""
    if not results.get("matrix"):
        return []
    matrix, ability = results["matrix"], results.get("base_ability")
    names = ["base", *(_escape_markdown(entry.task) for entry in entries)]
    rows = [
        (f"{position} {names[position]}", *(f"{100 * score:.1f}" for score in row))
        for position, row in enumerate(matrix)
    ]
    if ability:
        rows = [(*row, f"{100 * score:.1f}") for row, score in zip(rows, ability, strict=True)]
    tasks = [_escape_markdown(task) for task in results["tasks"]]
    header = ("after", *tasks, *(["base ability"] if ability else []))
    summary = continual.summarise_matrix(matrix)
    figures = [
        f"* {name.upper()} {100 * value:.1f}: {continual.CONVENTIONS[name]}"
        for name in ("op", "bwt")
        if (value := summary[name]) is not None
    ]
    return [
        "## Accuracy, %",
        _format_table(header, rows),
        *(["\n".join(figures)] if figures else []),
    ]


def _format_usage(base: dict[str, Any], last: int, repository: str) -> str:
    base_argument = "" if "hub" in base else '"path/to/base", '
    base_option = "" if "hub" in base else " --base path/to/base"
    return f"""```python
import mm_piece

mm_piece.pull("{repository}", "my-store")
model, processor = mm_piece.load({base_argument}store="my-store", at={last})  # any position from 0
```

```console
mm-piece pull {repository} my-store
mm-piece verify my-store
mm-piece ask picture.png "What is this?" --store my-store --at {last}{base_option}
```"""


def _format_table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _escape_markdown(text: str) -> str:
    """Return text as Markdown that shows just this text, on one line."""
    return _MARKDOWN_SPECIAL.sub(r"\\\g<0>", make_printable(" ".join(text.split())))
