"""Plots of an experiment's committed results: frontier, curves, densities, an atlas of masks."""

from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np

Runs = list[dict[str, Any]]
_MARKERS = "osD^vP*X<>hpd8"


def draw_figures(folder: Path, validation: Runs, test: Runs) -> list[Path]:
    """Every plot that the runs have something for; the files."""
    matplotlib.use("Agg")
    files = []
    if validation:
        files.append(draw_frontier(folder / "frontier.png", validation))
    if test:
        files.append(draw_curves(folder / "curves.png", test))
    if test and all(_is_named_by_density(run) for run in test):
        files.append(draw_densities(folder / "densities.png", test))
    if placed := [run for run in test if any(run.get("places", ()))]:
        files.append(draw_atlas(folder / "atlas.png", placed))
    return files


def draw_frontier(file: Path, runs: Runs) -> Path:
    """Base ability against what was learned, and against OP: a line per method over its rates."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained", sharey=True)
    for number, (method, group) in enumerate(_group_runs(("method",), runs).items()):
        line = sorted(group, key=lambda run: run["rate"])
        style, rates_text = _line_style(number), ", ".join(f"{run['rate']:g}" for run in line)
        ys = [100 * run["base_kept"] for run in line]
        for axes, key in zip(panels, ("learned", "op"), strict=True):
            xs = [100 * run[key] for run in line]
            axes.plot(xs, ys, **style, label=f"{method}: {rates_text}", markersize=4, linewidth=1)
            axes.scatter(xs, ys, **style, s=[15 + 25 * place for place in range(len(line))])
    panels[0].set(
        xlabel="learned: mean of the diagonal, %", ylabel="base ability retained at the end, %"
    )
    panels[1].set(xlabel="OP: mean of the last row, %")
    for axes in panels:
        axes.grid(alpha=0.3)
    legend_position = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    panels[1].legend(
        title="marks grow with the rate", title_fontsize=7, fontsize=7, **legend_position
    )
    return _save_figure(figure, file)


def draw_curves(file: Path, runs: Runs) -> Path:
    """Over the positions: the mean score of the tasks seen so far, and the base ability."""
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for number, (method, group) in enumerate(_group_runs(("method", "rate"), runs).items()):
        seen = [[fmean(row[:at]) for at, row in enumerate(r["matrix"]) if at] for r in group]
        style = {**_line_style(number), "label": method, "markersize": 4}
        for axes, values in ((left, seen), (right, [run["base_ability"] for run in group])):
            means = 100 * np.mean(values, axis=0)
            axes.plot(range(axes is left, len(means) + (axes is left)), means, **style)
    left.set(xlabel="position", ylabel="mean score of the tasks learned so far, %")
    right.set(xlabel="position", ylabel="base ability, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return _save_figure(figure, file)


def draw_densities(file: Path, runs: Runs) -> Path:
    """Scores over the density, a line per selection; and base ability against OP.

    The dotted line is the Pareto front: what nothing else is ahead of in both.
    """
    from matplotlib import pyplot

    shown = {"learned": "learned, %", "op": "OP, %", "base_kept": "base ability retained, %"}
    figure, panels = pyplot.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    ends = []
    for number, (method, group) in enumerate(_group_by_selection(runs).items()):
        style = {**_line_style(number), "label": method, "markersize": 4}
        scores = {
            key: [100 * fmean(r[key] for r in part) for part in group.values()] for key in shown
        }
        for axes, key in zip(panels, shown, strict=False):
            axes.plot([100 * density for density in group], scores[key], **style)
            axes.set(xscale="log", xlabel="density, %", ylabel=shown[key])
        points = list(zip(scores["op"], scores["base_kept"], strict=True))
        panels[3].plot(*zip(*points, strict=True), **style)
        for density, point in zip(group, points, strict=True):
            panels[3].annotate(f" {100 * density:g}", point, fontsize=6)
        ends += points
    front = list(zip(*pareto_front(ends), strict=True))
    panels[3].plot(*front, color="grey", linestyle=":", linewidth=4, zorder=0)
    panels[3].set(xlabel=shown["op"], ylabel=shown["base_kept"])
    for axes in panels:
        axes.grid(alpha=0.3)
    panels[3].legend(title="numbers: density, %", title_fontsize=7, fontsize=7)
    return _save_figure(figure, file)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is ahead of in one coordinate and level in the other, sorted."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]


def draw_atlas(file: Path, runs: Runs) -> Path:
    """Density of the masks by module and layer (down) and task (across); the root is shaded.

    Of methods that have no mask, the entries that a task moved farthest, as many as a mask has.
    """
    from matplotlib import pyplot

    groups = _group_runs(("method", "rate"), runs)
    rows = sorted(
        {place for run in runs for part in run["places"] for place in part}, key=_depth_key
    )
    size = (1.6 + 1.1 * len(groups), 1 + 0.16 * len(rows))
    figure, all_axes = pyplot.subplots(
        1, len(groups), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for axes, (method, group) in zip(all_axes[0], groups.items(), strict=True):
        tasks = len(group[0]["places"])
        density = [
            [fmean(run["places"][task].get(place, 0.0) for run in group) for task in range(tasks)]
            for place in rows
        ]
        axes.imshow(np.sqrt(density), aspect="auto", cmap="viridis", vmin=0, vmax=1)
        axes.set_title(method.replace(" ", "\n"), fontsize=8)
        axes.set_xticks(range(tasks), [str(task + 1) for task in range(tasks)], fontsize=7)
    all_axes[0][0].set_yticks(range(len(rows)), rows, fontsize=6)
    figure.supxlabel("task", fontsize=8)
    return _save_figure(figure, file)


def _line_style(number: int) -> dict[str, Any]:
    """A marker and a colour; the pair is another one for each of many lines."""
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    return {"marker": _MARKERS[number % len(_MARKERS)], "color": colours[number % len(colours)]}


def _group_runs(keys: Sequence[str], runs: Runs) -> dict[str, Runs]:
    """Runs by the values of some keys, which are the labels."""
    found: dict[str, Runs] = {}
    for run in sorted(runs, key=itemgetter(*keys)):
        found.setdefault(" ".join(str(run[key]) for key in keys), []).append(run)
    return found


def _is_named_by_density(run: dict[str, Any]) -> bool:
    """Whether a run's method ends in its density in percent: `random-0.1`."""
    density = run["settings"].get("select", {}).get("density")
    return isinstance(density, float) and run["method"].endswith(f"-{100 * density:g}")


def _group_by_selection(runs: Runs) -> dict[str, dict[float, Runs]]:
    """Runs by what their methods' names begin with, then by density from the least on."""
    found: dict[str, dict[float, Runs]] = {}
    for run in sorted(runs, key=lambda run: run["settings"]["select"]["density"]):
        method, density = run["method"].rpartition("-")[0], run["settings"]["select"]["density"]
        found.setdefault(method, {}).setdefault(density, []).append(run)
    return found


def _depth_key(place: str) -> tuple[int, int, str]:
    """Vision, projector, language; in each from the input on."""
    group, layer, module = place.split(" ")
    order = ("vision", "projector", "language", "embedding", "head")
    return order.index(group), -1 if layer == "-" else int(layer), module


def _save_figure(figure: Any, file: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(file, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return file
