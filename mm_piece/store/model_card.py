"""The model card of a store on the Hub: its positions, its scores, how to load it."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from mm_piece.metrics import continual
from mm_piece.plaintext import make_printable
from mm_piece.store.records import BaseRecord, ManifestEntry
from mm_piece.store.results import Results

GENERATED_MARK = (
    "<!-- Written by mm-piece at every push; without this line the file is left as it is. -->"
)
# Characters with a meaning in Markdown; a dot after www would make a link.
_MARKDOWN_SPECIAL = re.compile(r"[\\`*_\[\]<>#!|~&:@$]|(?<=www)\.", re.IGNORECASE)


def format_model_card(
    base: BaseRecord,
    entries: Sequence[ManifestEntry],
    results: Results,
    repository: str,
) -> str:
    """Return README.md of a repository: metadata, base, positions, scores, how to load it."""
    # the Hub reads the YAML between the dashes
    metadata = yaml.safe_dump(_build_metadata(base), sort_keys=False)
    sections = [
        f"---\n{metadata}---\n{GENERATED_MARK}",
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


def _build_metadata(base: BaseRecord) -> dict[str, Any]:
    """Return the card's metadata; the Hub links the base if it is a repository."""
    metadata: dict[str, Any] = {}
    if base.hub:
        metadata["base_model"] = base.hub
    metadata["library_name"] = "mm-piece"
    metadata["tags"] = ["mm-piece", "continual-learning", "sparse-delta"]
    return metadata


def _format_base(base: BaseRecord) -> str:
    """Return the facts of the base, one a line; a store may lack all but the fingerprint."""
    source = base.hub or "a local folder; name yours when loading"
    revision = f" at revision {base.revision}" if base.revision else ""
    lines = [f"Base: {_escape_markdown(source + revision)}"]

    if base.family is not None:
        lines.append(f"family: {_escape_markdown(base.family)}")
    if base.dtype is not None:
        lines.append(f"dtype: {_escape_markdown(base.dtype)}")
    if base.parameters is not None:
        lines.append(f"{base.parameters:,} parameters")
    lines.append(f"fingerprint {base.fingerprint[:12]}")
    return "  \n".join(lines)  # two blanks break a line in Markdown


def _format_positions(
    base: BaseRecord,
    entries: Sequence[ManifestEntry],
) -> str:
    """Return a table of the deltas, and their total size."""
    parameters = base.parameters  # a base record may lack it
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
    table = _format_table(header, rows)
    total = sum(entry.bytes for entry in entries)
    return f"{table}\n\nTotal: {total:,} bytes in {len(entries)} deltas."


def _format_scores(
    entries: Sequence[ManifestEntry],
    results: Results,
) -> list[str]:
    """Return sections with the accuracy matrix and its metrics; none before the first row."""
    matrix = results.get("matrix", [])
    if not matrix:
        return []

    ability = results.get("base_ability")
    names = ["base", *(_escape_markdown(entry.task) for entry in entries)]
    rows = [
        (f"{position} {names[position]}", *(f"{100 * score:.1f}" for score in row))
        for position, row in enumerate(matrix)
    ]
    # base ability is one more column, measured at every position
    if ability:
        rows = [(*row, f"{100 * score:.1f}") for row, score in zip(rows, ability, strict=True)]

    tasks = [_escape_markdown(task) for task in results.get("tasks", [])]
    header = ["after", *tasks]
    if ability:
        header.append("base ability")
    sections = ["## Accuracy, %", _format_table(header, rows)]

    metrics = continual.summarise_matrix(matrix)
    figures = []
    for name in ("op", "bwt"):
        value = metrics[name]
        # backward transfer needs two tasks
        if value is not None:
            convention = continual.CONVENTIONS[name]
            figures.append(f"* {name.upper()} {100 * value:.1f}: {convention}")
    if figures:
        sections.append("\n".join(figures))
    return sections


def _format_usage(
    base: BaseRecord,
    last: int,
    repository: str,
) -> str:
    """Return the commands that load the store; a base on the Hub need not be named."""
    base_argument = "" if base.hub else '"path/to/base", '
    base_option = "" if base.hub else " --base path/to/base"
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


def _format_table(
    header: Iterable[object],
    rows: Iterable[Iterable[object]],
) -> str:
    """Return a table in Markdown; cells are escaped already."""
    header = list(header)  # it is needed twice
    rule = ["---"] * len(header)
    lines = []
    for row in (header, rule, *rows):
        cells = " | ".join(map(str, row))
        lines.append(f"| {cells} |")
    return "\n".join(lines)


def _escape_markdown(text: str) -> str:
    """Return text as Markdown that shows just this text, on one line."""
    line = " ".join(text.split())
    return _MARKDOWN_SPECIAL.sub(r"\\\g<0>", make_printable(line))
