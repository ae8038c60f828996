"""Tables and plots from the committed results, which documents show between markers.

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

Run = dict[str, Any]
Group = list[Run]  # runs that differ in their seeds alone

ROOT = Path(__file__).parent.parent
DOCUMENTS = (
    "README.md",
    "docs/results/comparison.md",
    "docs/results/performance.md",
    "docs/results/scaling.md",
)
HEADER = (
    "| method | seeds | rate | learned | OP | BWT | base ability retained | trained entries "
    "| bytes a task |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
SHOWN = (
    "learned",
    "op",
    "bwt",
    "base_kept",
)


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

    results = ROOT.glob("eval/results/*/*-test.json")
    folders = {file.parent for file in results}
    for folder in sorted(folders):
        validation = read_runs(folder, "validation")
        test = read_runs(folder, "test")
        draw_figures(folder, validation, test)


def fill_tables(text: str) -> str:
    """Return a document with every block `<!-- table: NAME -->` … `<!-- end -->` built anew."""
    parts = text.split("<!-- table: ")
    # the first part is what stands before the first block
    for number, part in enumerate(parts[1:], start=1):
        name, _, rest = part.partition(" -->")
        _, _, tail = rest.partition("<!-- end -->")
        table = build_table(name)
        parts[number] = f"{name} -->\n{table}\n<!-- end -->{tail}"
    return "<!-- table: ".join(parts)


def read_runs(folder: Path, split: str) -> list[dict[str, Any]]:
    """Read the committed runs of one experiment on one split."""
    files = sorted(folder.glob(f"*-{split}.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def build_table(name: str) -> str:
    """Return the Markdown table that a document calls NAME.

    `bench/FILE`: the goals of a bench; `bench/FILE SECTION`: the tables of one of its sections;
    `EXPERIMENT`: its methods; `EXPERIMENT only METHOD RATE,METHOD RATE`: some of them, in columns
    for a reader in a hurry; `EXPERIMENT against METHOD RATE`: differences from that one;
    `EXPERIMENT costs`: time and memory of a run; `EXPERIMENT overlaps`: shared entries, forgetting;
    `EXPERIMENT,EXPERIMENT METHOD RATE over METHOD RATE,METHOD RATE`: differences from others.
    """
    file, _, section = name.partition(" ")
    if " over " in section:
        ahead, _, baselines = section.partition(" over ")
        return _format_comparison(file.split(","), ahead, baselines.split(","))
    if section.startswith("against "):
        baseline = section.removeprefix("against ")
        return _format_differences(file, baseline)

    if section.startswith("only "):
        chosen = section.removeprefix("only ").split(",")
        return _format_summary(file, chosen)

    if name.startswith("bench/"):
        if not section:
            return _format_goals(file)
        bench = file.removeprefix("bench/")
        return _format_section(bench, section)

    formatters = {
        "": _format_methods,
        "costs": _format_costs,
        "overlaps": _format_overlaps,
    }
    return formatters[section](file)


def _format_section(bench: str, section: str) -> str:
    """Return the tables that a bench prints of a section."""
    sections = importlib.import_module(f"eval.bench.{bench}.__main__").SECTIONS
    module = importlib.import_module(sections[section])
    result = _read_bench(f"bench/{bench}")
    tables = module.make_tables(result["sections"][section])
    return "\n\n".join(map(_format_markdown, tables))


def _read_bench(name: str) -> dict[str, Any]:
    file = ROOT / "eval" / "results" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))


def _format_markdown(table: Any) -> str:
    """Return a table of `rich` as Markdown."""
    headers = []
    sides = []
    columns = []
    for column in table.columns:
        headers.append(column.header)
        sides.append("---:" if column.justify == "right" else "---")
        columns.append(column.cells)

    lines = [f"*{table.title}*\n"]
    for cells in (headers, sides, *zip(*columns, strict=True)):
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _format_goals(name: str) -> str:
    """Return one line per goal: the measured value and its limit."""
    lines = ["| | measured | found | goal | met |\n|---|---|---|---|---|"]
    for goal in _read_bench(name)["goals"]:
        sign = "≤" if goal["sense"] == "at most" else "≥"
        met = "yes" if goal["met"] else "**no**"
        lines.append(
            f"| {goal['section']} | {goal['what']} | {goal['found']:.3g} | "
            f"{sign} {goal['limit']:g} | {met} |"
        )
    return "\n".join(lines)


def _format_methods(name: str) -> str:
    """Return one line per method and rate: mean over seeds, ± half the 95 % confidence interval."""
    groups = group_by_learning_rate(name)
    lines = [_format_method(group) for group in groups.values()]
    return "\n".join([HEADER, *lines])


def group_by_learning_rate(name: str) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """Return the test runs of an experiment by method and rate, the highest OP first."""
    found: dict[tuple[str, float], Group] = {}
    for run in read_runs(ROOT / "eval" / "results" / name, "test"):
        key = (run["method"], run["rate"])
        found.setdefault(key, []).append(run)

    def negative_op(item: tuple[tuple[str, float], Group]) -> float:
        _, group = item
        return -mean(run["op"] for run in group)

    return dict(sorted(found.items(), key=negative_op))


def _format_summary(name: str, chosen: list[str]) -> str:
    """Return one line for each chosen method and rate, in the order of their OP."""
    lines = [
        "| method | seeds | learned, % | OP, % | base ability retained, % | MB a task |\n"
        "|---|---|---|---|---|---|"
    ]
    keys = {_parse_key(written) for written in chosen}
    for key, group in group_by_learning_rate(name).items():
        if key not in keys:
            continue
        cells = []
        for column in ("learned", "op", "base_kept"):
            values = [run[column] for run in group]
            cells.append(format_interval(values))
        size = mean(mean(run["bytes"]) for run in group) / 1e6
        lines.append(f"| {key[0]} | {len(group)} | {' | '.join(cells)} | {size:.2f} |")
    return "\n".join(lines)


def _format_method(group: list[dict[str, Any]]) -> str:
    cells = []
    for key in SHOWN:
        values = [run[key] for run in group]
        cells.append(format_interval(values))

    size = mean(mean(run["bytes"]) for run in group)
    first = group[0]
    return (
        f"| {first['method']} | {len(group)} | {first['rate']:g} | {' | '.join(cells)} | "
        f"{first['trainable']:,} | {size:,.0f} |"
    )


def _format_differences(name: str, baseline: str) -> str:
    """Return one line per method and rate: its difference from a baseline with the same seed.

    Bold where the 95 % confidence interval of the paired differences leaves out zero.
    """
    found = group_by_learning_rate(name)
    base = found.pop(_parse_key(baseline))
    lines = [
        f"| against {baseline} | rate | seeds | learned | OP | BWT | base ability retained |\n"
        "|---|---|---|---|---|---|---|"
    ]
    for (method, learning_rate), group in found.items():
        cells = _format_paired(group, base)
        lines.append(f"| {method} | {learning_rate:g} | {cells} |")
    return "\n".join(lines)


def _format_comparison(names: list[str], ahead: str, baselines: list[str]) -> str:
    """Return one line per experiment and baseline: differences as in `_format_differences`."""
    lines = [
        f"| {ahead} on | more than | seeds | learned | OP | BWT | base ability retained |\n"
        "|---|---|---|---|---|---|---|"
    ]
    for name in names:
        found = group_by_learning_rate(name)
        group = found[_parse_key(ahead)]
        for baseline in baselines:
            # not every experiment has every baseline
            other = found.get(_parse_key(baseline))
            if other is not None:
                cells = _format_paired(group, other)
                lines.append(f"| {name} | {baseline} | {cells} |")
    return "\n".join(lines)


def _parse_key(written: str) -> tuple[str, float]:
    """Parse `METHOD RATE` into a key of `group_by_learning_rate`."""
    method, _, learning_rate = written.partition(" ")
    return method, float(learning_rate)


def _format_paired(group: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    """Return cells: the number of seeds in both, and the differences of runs with the same seed."""
    by_seed = {run["seed"]: run for run in base}
    pairs = []
    for run in group:
        partner = by_seed.get(run["seed"])
        if partner is not None:
            pairs.append((run, partner))

    cells = [str(len(pairs))]
    for key in SHOWN:
        differences = [run[key] - partner[key] for run, partner in pairs]
        cells.append(_mark_significant(differences))
    return " | ".join(cells)


def _format_costs(name: str) -> str:
    """Return one line per method: medians over runs of time on one core, peak memory, bytes."""
    groups: dict[str, Group] = {}
    for run in read_runs(ROOT / "eval" / "results" / name, "test"):
        groups.setdefault(run["method"], []).append(run)

    rows = []
    for method, group in groups.items():
        seconds = median(run["seconds"] for run in group)
        memory = median(run["peak_mib"] for run in group)
        size = median(mean(run["bytes"]) for run in group)
        rows.append((method, seconds, memory, size))
    rows.sort(key=lambda row: row[1:3])

    lines = ["| method | minutes a run | peak memory, MiB | bytes a task |\n|---|---|---|---|"]
    for method, seconds, memory, size in rows:
        lines.append(f"| {method} | {seconds / 60:.1f} | {memory:,.0f} | {size:,.0f} |")
    return "\n".join(lines)


def _format_overlaps(name: str) -> str:
    """Return one line per method and rate: shared entries of masks; whether forgetting follows.

    The correlation, over all pairs of tasks, of Jaccard overlap and the earlier task's loss of
    score while the model learns the later one; mean over seeds ± half its 95 % confidence interval.
    """
    lines = [
        "| method | rate | seeds | shared by two tasks, % (Jaccard) | correlation with loss |"
        "\n|---|---|---|---|---|"
    ]
    groups = group_by_learning_rate(name)
    for (method, learning_rate), group in sorted(groups.items()):
        pairs = [_overlap_pairs(run) for run in group if "overlaps" in run]
        if not pairs:
            continue

        mean_overlaps = [mean(shared for shared, _ in run) for run in pairs]
        shared = format_interval(mean_overlaps)
        correlation_text = _format_correlation(pairs)
        lines.append(
            f"| {method} | {learning_rate:g} | {len(pairs)} | {shared} | {correlation_text} |"
        )
    return "\n".join(lines)


def _format_correlation(pairs: list[list[tuple[float, float]]]) -> str:
    """Return the mean correlation over runs with its interval, or a dash for fewer than two."""
    correlations = []
    for run in pairs:
        overlaps, losses = zip(*run, strict=True)
        # a constant has no correlation with anything
        if len(set(overlaps)) > 1 and len(set(losses)) > 1:
            correlations.append(correlation(overlaps, losses))

    if len(correlations) < 2:
        return "–"
    middle, half = compute_interval(correlations)
    return f"{middle:+.2f} ± {half:.2f}"


def _overlap_pairs(run: dict[str, Any]) -> list[tuple[float, float]]:
    """Return for each pair of tasks the overlap, and the earlier one's loss during the later."""
    matrix = run["matrix"]
    shared = run["overlaps"]
    pairs = []
    for second in range(len(shared)):
        for first in range(second):
            # row t of the matrix is measured after task t; tasks count from 0
            loss = matrix[second][first] - matrix[second + 1][first]
            pairs.append((shared[first][second], loss))
    return pairs


def _mark_significant(differences: list[float]) -> str:
    middle, half = compute_interval(differences)
    text = format_interval(differences, "+")
    return f"**{text}**" if abs(middle) > half else text


if __name__ == "__main__":
    main()
