"""One plot for each committed bench of training, importance and top-k, beside its JSON.

Run:   python -m eval.bench.harness.plots
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

RESULTS = Path(__file__).parents[2] / "results" / "bench"


def main() -> None:
    """Draw every bench that has a result."""
    matplotlib.use("Agg")
    for name, draw in PLOTS.items():
        file = RESULTS / f"{name}.json"
        if file.is_file():
            result = json.loads(file.read_text(encoding="utf-8"))
            _save_plot(draw, result["sections"], name)


def _save_plot(draw: Callable[[Any, Any], None], sections: dict[str, Any], name: str) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.8, 3.6), layout="constrained")
    draw(axes, sections)
    axes.grid(alpha=0.3, axis="x")
    # without the version of matplotlib, so that equal plots are equal files
    file = RESULTS / f"{name}.png"
    figure.savefig(file, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def _plot_training(axes: Any, sections: dict[str, Any]) -> None:
    times = sections["steps"]["fp32"]["backward"]
    full = times["full"]["cpu_s"]
    shares = {name: row["cpu_s"] / full for name, row in times.items()}
    _plot_bars(axes, shares, "forward + backward in fp32, of full fine-tuning")


def _plot_importance(axes: Any, sections: dict[str, Any]) -> None:
    rows = sections["time"]["rows"]
    names = list(rows[0]["times"])
    names.remove("forward + backward")
    positions = range(len(names))

    # a bar for each shape of batch, 0.8 high together
    height = 0.8 / len(rows)
    for place, row in enumerate(rows):
        times = row["times"]
        base = times["forward + backward"]["cpu_s"]
        shares = [times[name]["cpu_s"] / base for name in names]
        offset = place * height
        bars = [position + offset for position in positions]
        label = f"{row['examples']} x {row['tokens']} tokens"
        axes.barh(bars, shares, height, label=label)

    middles = [position + 0.4 - height / 2 for position in positions]
    axes.set_yticks(middles, names)
    axes.invert_yaxis()
    # the goal
    axes.axvline(1.15, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("squared gradients of every example, over a batched forward + backward")
    axes.legend()


def _plot_topk(axes: Any, sections: dict[str, Any]) -> None:
    topk = sections["topk"]
    (row,) = [row for row in topk["rows"] if row["density"] == 0.001]
    seconds = {name: times["cpu_s"] for name, times in row["times"].items()}
    _plot_bars(axes, seconds, f"seconds, {topk['scores']:,} scores, density 0.1 %")


def _plot_bars(axes: Any, values: dict[str, float], title: str) -> None:
    colours = []
    for name in values:
        is_ours = name.startswith("ours")
        colours.append("tab:orange" if is_ours else "tab:gray")

    names = list(values)
    lengths = list(values.values())
    bars = axes.barh(names, lengths, color=colours)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(title)


PLOTS = {
    "train": _plot_training,
    "importance": _plot_importance,
    "topk": _plot_topk,
}

if __name__ == "__main__":
    main()
