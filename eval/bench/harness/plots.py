"""One picture for each committed bench of training, importance and top-k, beside its JSON.

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
            _save_plot(draw, json.loads(file.read_text(encoding="utf-8"))["sections"], name)


def _save_plot(draw: Callable[[Any, Any], None], sections: dict[str, Any], name: str) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.8, 3.6), layout="constrained")
    draw(axes, sections)
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(RESULTS / f"{name}.png", dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def _plot_training(axes: Any, sections: dict[str, Any]) -> None:
    times = sections["steps"]["fp32"]["backward"]
    shares = {name: row["cpu_s"] / times["full"]["cpu_s"] for name, row in times.items()}
    _plot_bars(axes, shares, "forward + backward in fp32, of full fine-tuning")


def _plot_importance(axes: Any, sections: dict[str, Any]) -> None:
    rows = sections["time"]["rows"]
    names = [name for name in rows[0]["times"] if name != "forward + backward"]
    height = 0.8 / len(rows)
    for place, row in enumerate(rows):
        base = row["times"]["forward + backward"]["cpu_s"]
        shares = [row["times"][name]["cpu_s"] / base for name in names]
        label = f"{row['examples']} x {row['tokens']} tokens"
        axes.barh([n + place * height for n in range(len(names))], shares, height, label=label)
    axes.set_yticks([n + 0.4 - height / 2 for n in range(len(names))], names)
    axes.invert_yaxis()
    axes.axvline(1.15, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("squared gradients of every example, over a batched forward + backward")
    axes.legend()


def _plot_topk(axes: Any, sections: dict[str, Any]) -> None:
    (row,) = [row for row in sections["topk"]["rows"] if row["density"] == 0.001]
    seconds = {name: times["cpu_s"] for name, times in row["times"].items()}
    _plot_bars(axes, seconds, f"seconds, {sections['topk']['scores']:,} scores, density 0.1 %")


def _plot_bars(axes: Any, values: dict[str, float], title: str) -> None:
    colours = ["tab:orange" if name.startswith("ours") else "tab:gray" for name in values]
    bars = axes.barh(list(values), list(values.values()), color=colours)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(title)


PLOTS = {"train": _plot_training, "importance": _plot_importance, "topk": _plot_topk}

if __name__ == "__main__":
    main()
