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

from eval.figures import draw_figures
from mm_piece.metrics.intervals import compute_interval, format_interval

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "eval/experiments.md", "eval/scale.md")
HEADER = (
    "| method | seeds | rate | learned | OP | BWT | base ability retained | trained entries "
    "| bytes a task |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
SHOWN = ("learned", "op", "bwt", "base_kept")


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; fail if a table is out of date.")
def main(check: bool) -> None:
    """Bring the documents' tables and the plots up to date with the committed results."""
    files = [ROOT / name for name in DOCUMENTS]
    before = [file.read_text(encoding="utf-8") for file in files]
    after = [fill_tables(text) for text in before]
    if check:
        sys.exit(int(before != after))
    for file, text in zip(files, after, strict=True):
        file.write_text(text, encoding="utf-8")
    for folder in sorted({p.parent for p in ROOT.glob("eval/results/*/*-test.json")}):
        draw_figures(folder, read_runs(folder, "validation"), read_runs(folder, "test"))


def fill_tables(text: str) -> str:
    """A document with every block `<!-- table: NAME -->` … `<!-- end -->` built anew."""
    parts = text.split("<!-- table: ")
    for number, part in enumerate(parts[1:], start=1):
        name, _, rest = part.partition(" -->")
        _, _, tail = rest.partition("<!-- end -->")
        parts[number] = f"{name} -->\n{build_table(name)}\n<!-- end -->{tail}"
    return "<!-- table: ".join(parts)


def read_runs(folder: Path, split: str) -> list[dict[str, Any]]:
    """The committed runs of one experiment on one split."""
    files = sorted(folder.glob(f"*-{split}.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def build_table(name: str) -> str:
    """What NAME stands for.

    `bench/FILE`: the goals of a bench; `bench/FILE SECTION`: what it prints of a section;
    `EXPERIMENT`: its methods; `EXPERIMENT against METHOD RATE`: what each has more than that one;
    `EXPERIMENT costs`: what a run took; `EXPERIMENT overlaps`: what masks share, and forgetting;
    `EXPERIMENT,EXPERIMENT METHOD RATE over METHOD RATE,METHOD RATE`: what one has more than others.
    """
    file, _, section = name.partition(" ")
    if " over " in section:
        ahead, _, baselines = section.partition(" over ")
        return _format_comparison(file.split(","), ahead, baselines.split(","))
    if section.startswith("against "):
        return _format_differences(file, section.removeprefix("against "))
    if not name.startswith("bench/"):
        return {"": _format_methods, "costs": _format_costs, "overlaps": _format_overlaps}[section](
            file
        )
    return _format_section(file.removeprefix("bench/"), section) if section else _format_goals(file)


def _format_section(bench: str, section: str) -> str:
    """The tables that a bench prints of a section."""
    sections = importlib.import_module(f"eval.bench.{bench}.__main__").SECTIONS
    module = importlib.import_module(sections[section])
    file = ROOT / "eval" / "results" / "bench" / f"{bench}.json"
    found = json.loads(file.read_text(encoding="utf-8"))["sections"][section]
    return "\n\n".join(map(_format_markdown, module.make_tables(found)))


def _format_markdown(table: Any) -> str:
    """A table that rich would print."""
    sides = ("---:" if column.justify == "right" else "---" for column in table.columns)
    lines = [[column.header for column in table.columns], list(sides)]
    lines += [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]
    return "\n".join([f"*{table.title}*\n", *(f"| {' | '.join(line)} |" for line in lines)])


def _format_goals(name: str) -> str:
    """One line per goal: what was found, and what it was to be."""
    result = json.loads((ROOT / "eval" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    rows = [
        f"| {goal['section']} | {goal['what']} | {goal['found']:.3g} | "
        f"{'≤' if goal['sense'] == 'at most' else '≥'} {goal['limit']:g} | "
        f"{'yes' if goal['met'] else '**no**'} |"
        for goal in result["goals"]
    ]
    return "\n".join(["| | measured | found | goal | met |\n|---|---|---|---|---|", *rows])


def _format_methods(name: str) -> str:
    """One line per method and rate: mean over seeds, ± half the 95 % confidence interval."""
    return "\n".join([HEADER, *map(_format_method, group_by_learning_rate(name).values())])


def group_by_learning_rate(name: str) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """The test runs of an experiment by method and rate, the highest OP first."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for run in read_runs(ROOT / "eval" / "results" / name, "test"):
        found.setdefault((run["method"], run["rate"]), []).append(run)
    return dict(sorted(found.items(), key=lambda item: -mean(run["op"] for run in item[1])))


def _format_method(group: list[dict[str, Any]]) -> str:
    cells = [format_interval([run[key] for run in group]) for key in SHOWN]
    size = mean(mean(run["bytes"]) for run in group)
    first = group[0]
    entries = f"{first['trainable']:,}"
    return (
        f"| {first['method']} | {len(group)} | {first['rate']:g} | {' | '.join(cells)} | "
        f"{entries} | {size:,.0f} |"
    )


def _format_differences(name: str, baseline: str) -> str:
    """One line per method and rate: what it has more than a control with the same seed.

    Bold where the 95 % confidence interval of the paired differences leaves out zero.
    """
    found = group_by_learning_rate(name)
    base = found.pop(_parse_key(baseline))
    lines = [
        f"| {method} | {learning_rate:g} | {_format_paired(group, base)} |"
        for (method, learning_rate), group in found.items()
    ]
    head = (
        f"| against {baseline} | rate | seeds | learned | OP | BWT | base ability retained |\n"
        "|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *lines])


def _format_comparison(names: list[str], ahead: str, baselines: list[str]) -> str:
    """One line per experiment and control: what a method has more, as in `_differences`."""
    lines = []
    for name in names:
        found = group_by_learning_rate(name)
        others = [
            (baseline, found[_parse_key(baseline)])
            for baseline in baselines
            if _parse_key(baseline) in found
        ]
        group = found[_parse_key(ahead)]
        lines += [
            f"| {name} | {baseline} | {_format_paired(group, other)} |"
            for baseline, other in others
        ]
    head = (
        f"| {ahead} on | more than | seeds | learned | OP | BWT | base ability retained |\n"
        "|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *lines])


def _parse_key(written: str) -> tuple[str, float]:
    """`METHOD RATE` as `by_rate` has it."""
    method, _, learning_rate = written.partition(" ")
    return method, float(learning_rate)


def _format_paired(group: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    """Cells: the seeds that both have, and the differences between runs with the same seed."""
    other = {run["seed"]: run for run in base}
    pairs = [(run, other[run["seed"]]) for run in group if run["seed"] in other]
    columns = [[run[key] - partner[key] for run, partner in pairs] for key in SHOWN]
    return " | ".join([str(len(pairs)), *map(_mark_significant, columns)])


def _format_costs(name: str) -> str:
    """One line per method: medians over runs of one core's minutes, peak memory, bytes a task."""
    found = read_runs(ROOT / "eval" / "results" / name, "test")
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


def _format_overlaps(name: str) -> str:
    """One line per method and rate: what masks of two tasks share; whether forgetting follows it.

    The correlation, over all pairs of tasks, of Jaccard overlap and what the earlier task lost
    while the later one was learned; mean over seeds ± half its 95 % confidence interval.
    """
    lines = []
    for (method, learning_rate), group in sorted(group_by_learning_rate(name).items()):
        pairs = [_overlap_pairs(run) for run in group if "overlaps" in run]
        if not pairs:
            continue
        varied = [p for p in pairs if all(len(set(column)) > 1 for column in zip(*p, strict=True))]
        shared = format_interval([mean(shared for shared, _ in run) for run in pairs])
        correlations = [correlation(*zip(*run, strict=True)) for run in varied]
        middle, half = compute_interval(correlations) if correlations else (0.0, float("inf"))
        correlation_text = f"{middle:+.2f} ± {half:.2f}" if len(correlations) > 1 else "–"
        lines.append(
            f"| {method} | {learning_rate:g} | {len(pairs)} | {shared} | {correlation_text} |"
        )
    head = (
        "| method | rate | seeds | shared by two tasks, % (Jaccard) | correlation with loss |"
        "\n|---|---|---|---|---|"
    )
    return "\n".join([head, *lines])


def _overlap_pairs(run: dict[str, Any]) -> list[tuple[float, float]]:
    """Of each pair of tasks: what they share, what the earlier lost while the later was learned."""
    matrix, shared = run["matrix"], run["overlaps"]
    return [
        (shared[first][second], matrix[second][first] - matrix[second + 1][first])
        for second in range(len(shared))
        for first in range(second)
    ]


def _mark_significant(differences: list[float]) -> str:
    middle, half = compute_interval(differences)
    text = format_interval(differences, "+")
    return f"**{text}**" if abs(middle) > half else text


if __name__ == "__main__":
    main()
