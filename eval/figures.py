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
_OUTSIDE = {  # position of a legend on the right of its panel
    "loc": "center left",
    "bbox_to_anchor": (1, 0.5),
}
_SHOWN = {
    "learned": "learned, %",
    "op": "OP, %",
    "base_kept": "base ability retained, %",
}


def draw_figures(folder: Path, validation: Runs, test: Runs) -> list[Path]:
    """Draw every plot that the runs have data for; return the files."""
    matplotlib.use("Agg")
    files = []
    if validation:
        file = folder / "frontier.png"
        files.append(draw_frontier(file, validation))

    if test:
        file = folder / "curves.png"
        files.append(draw_curves(file, test))
    if test and all(_is_named_by_density(run) for run in test):
        file = folder / "densities.png"
        files.append(draw_densities(file, test))

    # runs from before masks were located have no places
    placed = [run for run in test if any(run.get("places", ()))]
    if placed:
        file = folder / "atlas.png"
        files.append(draw_atlas(file, placed))
    return files


def draw_frontier(file: Path, runs: Runs) -> Path:
    """Draw base ability against learning, and against OP: a line per method over its rates."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1,
        2,
        figsize=(12, 4.8),
        layout="constrained",
        sharey=True,
    )
    groups = _group_runs(("method",), runs)
    for number, (method, group) in enumerate(groups.items()):
        line = sorted(group, key=itemgetter("rate"))
        rates_text = ", ".join(f"{run['rate']:g}" for run in line)
        label = f"{method}: {rates_text}"
        style = _line_style(number)
        ys = [100 * run["base_kept"] for run in line]
        marker_sizes = [15 + 25 * place for place in range(len(line))]
        for axes, key in zip(panels, ("learned", "op"), strict=True):
            xs = [100 * run[key] for run in line]
            axes.plot(xs, ys, **style, label=label, markersize=4, linewidth=1)
            axes.scatter(xs, ys, **style, s=marker_sizes)

    left, right = panels
    left.set(
        xlabel="learned: mean of the diagonal, %",
        ylabel="base ability retained at the end, %",
    )
    right.set(xlabel="OP: mean of the last row, %")
    for axes in panels:
        axes.grid(alpha=0.3)
    right.legend(
        title="marks grow with the rate",
        title_fontsize=7,
        fontsize=7,
        **_OUTSIDE,
    )
    return _save_figure(figure, file)


def draw_curves(file: Path, runs: Runs) -> Path:
    """Draw over positions the mean score of the tasks learned so far, and the base ability."""
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    groups = _group_runs(("method", "rate"), runs)
    for number, (method, group) in enumerate(groups.items()):
        style = {**_line_style(number), "label": method, "markersize": 4}
        learned = [_mean_learned_scores(run["matrix"]) for run in group]
        abilities = [run["base_ability"] for run in group]
        # at position 0 nothing is learned yet, so that this curve begins at 1
        _plot_mean_curve(left, learned, 1, style)
        _plot_mean_curve(right, abilities, 0, style)

    left.set(xlabel="position", ylabel="mean score of the tasks learned so far, %")
    right.set(xlabel="position", ylabel="base ability, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend(fontsize=7, **_OUTSIDE)
    return _save_figure(figure, file)


def _mean_learned_scores(matrix: list[list[float]]) -> list[float]:
    """Return for each position from 1 on the mean over the tasks learned by then."""
    means = []
    for position in range(1, len(matrix)):
        learned = matrix[position][:position]
        means.append(fmean(learned))
    return means


def _plot_mean_curve(
    axes: Any,
    values: list[list[float]],
    start: int,
    style: dict[str, Any],
) -> None:
    """Plot the mean over runs, in percent, from position `start` on."""
    means = 100 * np.mean(values, axis=0)  # (positions,)
    positions = range(start, start + len(means))
    axes.plot(positions, means, **style)


def draw_densities(file: Path, runs: Runs) -> Path:
    """Draw scores over the density, a line per selection; and base ability against OP.

    The dotted line is the Pareto front: no other point is ahead of its points in both.
    """
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    last = panels[3]
    ends = []
    groups = _group_by_selection(runs)
    for number, (method, group) in enumerate(groups.items()):
        style = {**_line_style(number), "label": method, "markersize": 4}
        percents = [100 * density for density in group]
        scores = {key: _mean_percents(group, key) for key in _SHOWN}
        for axes, key in zip(panels, _SHOWN, strict=False):
            axes.plot(percents, scores[key], **style)
            axes.set(xscale="log", xlabel="density, %", ylabel=_SHOWN[key])

        xs = scores["op"]
        ys = scores["base_kept"]
        last.plot(xs, ys, **style)
        points = list(zip(xs, ys, strict=True))
        for percent, point in zip(percents, points, strict=True):
            last.annotate(f" {percent:g}", point, fontsize=6)
        ends += points

    front = pareto_front(ends)
    front_xs, front_ys = zip(*front, strict=True)
    last.plot(front_xs, front_ys, color="grey", linestyle=":", linewidth=4, zorder=0)
    last.set(xlabel=_SHOWN["op"], ylabel=_SHOWN["base_kept"])
    for axes in panels:
        axes.grid(alpha=0.3)
    last.legend(title="numbers: density, %", title_fontsize=7, fontsize=7)
    return _save_figure(figure, file)


def _mean_percents(group: dict[float, Runs], key: str) -> list[float]:
    """Return the mean of a score over the runs of each density."""
    means = []
    for runs in group.values():
        mean = fmean(run[key] for run in runs)
        means.append(100 * mean)
    return means


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other dominates, sorted by the first coordinate.

    A point dominates another if it is ahead in one coordinate and not behind in the other.
    """
    front: list[tuple[float, float]] = []
    # from the largest x on: a point is in the front if its y is larger than all before
    for point in sorted(set(points), reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]


def draw_atlas(file: Path, runs: Runs) -> Path:
    """Draw the density of masks by module and layer (down) and task (across), shaded by its root.

    For a method without masks: the entries that a task moved farthest, as many as a mask has.
    """
    from matplotlib import pyplot

    groups = _group_runs(("method", "rate"), runs)
    places = set()
    for run in runs:
        for densities in run["places"]:
            places.update(densities)
    rows = sorted(places, key=_depth_key)

    width = 1.6 + 1.1 * len(groups)
    height = 1 + 0.16 * len(rows)
    figure, grid = pyplot.subplots(
        1,
        len(groups),
        figsize=(width, height),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    all_axes = grid[0]
    for axes, (method, group) in zip(all_axes, groups.items(), strict=True):
        tasks = range(len(group[0]["places"]))
        density = _mean_densities(group, rows)  # (rows, tasks)
        # the root shows differences between small densities
        shades = np.sqrt(density)
        axes.imshow(shades, aspect="auto", cmap="viridis", vmin=0, vmax=1)
        axes.set_title(method.replace(" ", "\n"), fontsize=8)
        labels = [str(task + 1) for task in tasks]
        axes.set_xticks(tasks, labels, fontsize=7)
    all_axes[0].set_yticks(range(len(rows)), rows, fontsize=6)
    figure.supxlabel("task", fontsize=8)
    return _save_figure(figure, file)


def _mean_densities(group: Runs, rows: list[str]) -> list[list[float]]:
    """Return the mean density over runs, by place and task."""
    num_tasks = len(group[0]["places"])
    table = []
    for place in rows:
        means = []
        for task in range(num_tasks):
            found = [run["places"][task].get(place, 0.0) for run in group]
            means.append(fmean(found))
        table.append(means)
    return table


def _line_style(number: int) -> dict[str, Any]:
    """Return a marker and a colour; the pair differs for each of many lines."""
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    return {
        "marker": _MARKERS[number % len(_MARKERS)],
        "color": colours[number % len(colours)],
    }


def _group_runs(keys: Sequence[str], runs: Runs) -> dict[str, Runs]:
    """Return the runs by their values of some keys; a label joins the values."""
    found: dict[str, Runs] = {}
    for run in sorted(runs, key=itemgetter(*keys)):
        label = " ".join(str(run[key]) for key in keys)
        found.setdefault(label, []).append(run)
    return found


def _is_named_by_density(run: dict[str, Any]) -> bool:
    """Whether a run's method ends in its density in percent: `random-0.1`."""
    select = run["settings"].get("select", {})
    density = select.get("density")
    if not isinstance(density, float):
        return False
    return run["method"].endswith(f"-{100 * density:g}")


def _group_by_selection(runs: Runs) -> dict[str, dict[float, Runs]]:
    """Return the runs by their methods' names without the density, then by rising density."""

    def density_of(run: dict[str, Any]) -> float:
        return run["settings"]["select"]["density"]

    found: dict[str, dict[float, Runs]] = {}
    for run in sorted(runs, key=density_of):
        method, _, _ = run["method"].rpartition("-")
        by_density = found.setdefault(method, {})
        by_density.setdefault(density_of(run), []).append(run)
    return found


def _depth_key(place: str) -> tuple[int, int, str]:
    """Return a sort key: vision, projector, language; in each of them from the input on."""
    group, layer, module = place.split(" ")
    order = (
        "vision",
        "projector",
        "language",
        "embedding",
        "head",
    )
    depth = -1 if layer == "-" else int(layer)
    return order.index(group), depth, module


def _save_figure(figure: Any, file: Path) -> Path:
    from matplotlib import pyplot

    # without the version of matplotlib, so that equal plots are equal files
    figure.savefig(file, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return file
