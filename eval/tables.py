"""Tables and plots from the committed results; documents show them between their markers.

Run:   python -m eval.tables          rewrite the tables and the plots
       python -m eval.tables --check  only compare, exit status 1 if they differ
"""

import importlib
import json
import sys
from pathlib import Path
from statistics import correlation, mean, median
from typing import Any

import click

from eval.figures import draw
from mm_piece.metrics.intervals import interval, shown

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "eval/experiments.md", "eval/scale.md")
HEADER = (
    "| method | seeds | rate | learned | OP | BWT | base kept | trained entries | bytes a task |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
SHOWN = ("learned", "op", "bwt", "base_kept")


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; fail if a table is out of date.")
def main(check: bool) -> None:
    """Bring the documents' tables and the plots up to date with the committed results."""
    files = [ROOT / name for name in DOCUMENTS]
    before = [file.read_text(encoding="utf-8") for file in files]
    after = [fill(text) for text in before]
    if check:
        sys.exit(int(before != after))
    for file, text in zip(files, after, strict=True):
        file.write_text(text, encoding="utf-8")
    for folder in sorted({p.parent for p in ROOT.glob("eval/results/*/*-test.json")}):
        draw(folder, runs(folder, "validation"), runs(folder, "test"))


def fill(text: str) -> str:
    """A document with every block `<!-- table: NAME -->` … `<!-- end -->` built anew."""
    parts = text.split("<!-- table: ")
    for number, part in enumerate(parts[1:], start=1):
        name, _, rest = part.partition(" -->")
        _, _, tail = rest.partition("<!-- end -->")
        parts[number] = f"{name} -->\n{table(name)}\n<!-- end -->{tail}"
    return "<!-- table: ".join(parts)


def runs(folder: Path, split: str) -> list[dict[str, Any]]:
    """The committed runs of one experiment on one split."""
    files = sorted(folder.glob(f"*-{split}.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def table(name: str) -> str:
    """What NAME stands for.

    `bench/FILE`: the goals of a bench; `bench/FILE SECTION`: what it prints of a section;
    `EXPERIMENT`: its methods; `EXPERIMENT against METHOD RATE`: what each has more than that one;
    `EXPERIMENT costs`: what a run took; `EXPERIMENT overlaps`: what masks share, and forgetting;
    `EXPERIMENT,EXPERIMENT METHOD RATE over METHOD RATE,METHOD RATE`: what one has more than others.
    """
    file, _, section = name.partition(" ")
    if " over " in section:
        ahead, _, controls = section.partition(" over ")
        return _over(file.split(","), ahead, controls.split(","))
    if section.startswith("against "):
        return _differences(file, section.removeprefix("against "))
    if not name.startswith("bench/"):
        return {"": _methods, "costs": _costs, "overlaps": _overlaps}[section](file)
    return _section(file.removeprefix("bench/"), section) if section else _goals(file)


def _section(bench: str, section: str) -> str:
    """The tables that a bench prints of a section."""
    sections = importlib.import_module(f"eval.bench.{bench}.__main__").SECTIONS
    module = importlib.import_module(sections[section])
    file = ROOT / "eval" / "results" / "bench" / f"{bench}.json"
    found = json.loads(file.read_text(encoding="utf-8"))["sections"][section]
    return "\n\n".join(map(_markdown, module.tables(found)))


def _markdown(table: Any) -> str:
    """A table that rich would print."""
    sides = ("---:" if column.justify == "right" else "---" for column in table.columns)
    lines = [[column.header for column in table.columns], list(sides)]
    lines += [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]
    return "\n".join([f"*{table.title}*\n", *(f"| {' | '.join(line)} |" for line in lines)])


def _goals(name: str) -> str:
    """One line per goal: what was found, and what it was to be."""
    result = json.loads((ROOT / "eval" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    rows = [
        f"| {goal['section']} | {goal['what']} | {goal['found']:.3g} | "
        f"{'≤' if goal['sense'] == 'at most' else '≥'} {goal['limit']:g} | "
        f"{'yes' if goal['met'] else '**no**'} |"
        for goal in result["goals"]
    ]
    return "\n".join(["| | measured | found | goal | met |\n|---|---|---|---|---|", *rows])


def _methods(name: str) -> str:
    """One line per method and rate: mean over seeds, ± half the 95 % confidence interval."""
    return "\n".join([HEADER, *map(_line, by_rate(name).values())])


def by_rate(name: str) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """The test runs of an experiment by method and rate, the highest OP first."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for run in runs(ROOT / "eval" / "results" / name, "test"):
        found.setdefault((run["method"], run["rate"]), []).append(run)
    return dict(sorted(found.items(), key=lambda item: -mean(run["op"] for run in item[1])))


def _line(group: list[dict[str, Any]]) -> str:
    cells = [shown([run[key] for run in group]) for key in SHOWN]
    size = mean(mean(run["bytes"]) for run in group)
    first = group[0]
    entries = f"{first['trainable']:,}"
    return (
        f"| {first['method']} | {len(group)} | {first['rate']:g} | {' | '.join(cells)} | "
        f"{entries} | {size:,.0f} |"
    )


def _differences(name: str, control: str) -> str:
    """One line per method and rate: what it has more than a control with the same seed.

    Bold where the 95 % confidence interval of the paired differences leaves out zero.
    """
    found = by_rate(name)
    base = found.pop(_key(control))
    lines = [
        f"| {method} | {rate:g} | {_paired(group, base)} |"
        for (method, rate), group in found.items()
    ]
    head = (
        f"| against {control} | rate | seeds | learned | OP | BWT | base kept |\n"
        "|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *lines])


def _over(names: list[str], ahead: str, controls: list[str]) -> str:
    """One line per experiment and control: what a method has more, as in `_differences`."""
    lines = []
    for name in names:
        found = by_rate(name)
        others = [(control, found[_key(control)]) for control in controls if _key(control) in found]
        group = found[_key(ahead)]
        lines += [f"| {name} | {control} | {_paired(group, other)} |" for control, other in others]
    head = (
        f"| {ahead} on | more than | seeds | learned | OP | BWT | base kept |\n"
        "|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *lines])


def _key(written: str) -> tuple[str, float]:
    """`METHOD RATE` as `by_rate` has it."""
    method, _, rate = written.partition(" ")
    return method, float(rate)


def _paired(group: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    """Cells: the seeds that both have, and the differences between runs with the same seed."""
    other = {run["seed"]: run for run in base}
    pairs = [(run, other[run["seed"]]) for run in group if run["seed"] in other]
    columns = [[run[key] - partner[key] for run, partner in pairs] for key in SHOWN]
    return " | ".join([str(len(pairs)), *map(_marked, columns)])


def _costs(name: str) -> str:
    """One line per method: medians over runs of one core's minutes, peak memory, bytes a task."""
    found = runs(ROOT / "eval" / "results" / name, "test")
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in found:
        groups.setdefault(run["method"], []).append(run)
    middle = {
        method: [median(run[key] for run in group) for key in ("seconds", "peak_mib")]
        for method, group in groups.items()
    }
    lines = []
    for method, (seconds, memory) in sorted(middle.items(), key=lambda item: item[1]):
        size = median(mean(run["bytes"]) for run in groups[method])
        lines.append(f"| {method} | {seconds / 60:.1f} | {memory:,.0f} | {size:,.0f} |")
    head = "| method | minutes a run | peak memory, MiB | bytes a task |\n|---|---|---|---|"
    return "\n".join([head, *lines])


def _overlaps(name: str) -> str:
    """One line per method and rate: what masks of two tasks share; whether forgetting follows it.

    The correlation, over all pairs of tasks, of Jaccard overlap and what the earlier task lost
    while the later one was learned; mean over seeds ± half its 95 % confidence interval.
    """
    lines = []
    for (method, rate), group in sorted(by_rate(name).items()):
        pairs = [_pairs(run) for run in group if "overlaps" in run]
        if not pairs:
            continue
        varied = [p for p in pairs if all(len(set(column)) > 1 for column in zip(*p, strict=True))]
        shared = shown([mean(shared for shared, _ in run) for run in pairs])
        together = [correlation(*zip(*run, strict=True)) for run in varied]
        middle, half = interval(together) if together else (0.0, float("inf"))
        told = f"{middle:+.2f} ± {half:.2f}" if len(together) > 1 else "–"
        lines.append(f"| {method} | {rate:g} | {len(pairs)} | {shared} | {told} |")
    head = (
        "| method | rate | seeds | shared by two tasks, % (Jaccard) | correlation with loss |"
        "\n|---|---|---|---|---|"
    )
    return "\n".join([head, *lines])


def _pairs(run: dict[str, Any]) -> list[tuple[float, float]]:
    """Of each pair of tasks: what they share, what the earlier lost while the later was learned."""
    matrix, shared = run["matrix"], run["overlaps"]
    return [
        (shared[first][second], matrix[second][first] - matrix[second + 1][first])
        for second in range(len(shared))
        for first in range(second)
    ]


def _marked(differences: list[float]) -> str:
    middle, half = interval(differences)
    text = shown(differences, "+")
    return f"**{text}**" if abs(middle) > half else text


if __name__ == "__main__":
    main()
