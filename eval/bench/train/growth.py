"""How a training step grows with density, model size and tokens, beside full fine-tuning.

Forward and backward in fp32, CPU time, uniform and clustered masks.
"""

from typing import Any

from rich.table import Table

from eval.bench.harness.models import make_batch, make_mask, make_stack
from eval.bench.harness.timing import BenchContext, time_interleaved
from eval.bench.harness.tuners import TUNERS, Tuner

DENSITIES = (0.0001, 0.001, 0.01, 0.05)
LAYERS = (1, 2, 4, 8)
TOKENS = (64, 256, 1024)


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Measure each of the three with the others fixed."""
    depth, length = (1, 32) if bench.quick else (2, 256)
    return {
        "goals": [],
        "depth": depth,
        "length": length,
        "density": [_measure_density(bench, d, depth, length) for d in DENSITIES],
        "layers": [_measure_size(bench, n, length) for n in LAYERS[: 2 if bench.quick else None]],
        "tokens": [_measure_size(bench, depth, n) for n in TOKENS[: 1 if bench.quick else None]],
    }


def _measure_density(
    bench: BenchContext, density: float, layers: int, tokens: int
) -> dict[str, Any]:
    bench.show_progress(f"density {density:.2%}")
    tuners = {name: _make_tuner(bench, name, layers) for name in ("full", "floor")}
    for kind in ("uniform", "clustered"):
        tuners[kind] = _make_tuner(bench, "ours", layers, kind, density)
    return {"density": density, **_time_tuners(bench, tuners, tokens)}


def _measure_size(bench: BenchContext, layers: int, tokens: int) -> dict[str, Any]:
    bench.show_progress(f"{layers} layers, {tokens} tokens")
    tuners = {
        name: _make_tuner(bench, name, layers) for name in ("full", "floor", "LoRA r=8", "ours")
    }
    parameters = sum(p.numel() for p in tuners["full"].parameters)
    found = {"layers": layers, "parameters": parameters, "tokens": tokens}
    return {**found, **_time_tuners(bench, tuners, tokens)}


def _make_tuner(
    bench: BenchContext, name: str, layers: int, kind: str = "uniform", density: float = 0.001
) -> Tuner:
    model = make_stack(layers, quick=bench.quick)
    return TUNERS[name](model, make_mask(model, kind, density))


def _time_tuners(bench: BenchContext, tuners: dict[str, Tuner], tokens: int) -> dict[str, Any]:
    inputs = make_batch(tokens)
    work = {name: (lambda tuner=tuner: tuner.backward(inputs)) for name, tuner in tuners.items()}
    times = time_interleaved(work, 2 if bench.quick else 3)
    return {"cpu_s": {name: row["cpu_s"] for name, row in times.items()}}


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return what a terminal shows."""
    return [
        _make_growth_table("density", result["density"], lambda row: f"{row['density']:.2%}"),
        _make_growth_table(
            "model size", result["layers"], lambda row: f"{row['parameters'] / 1e6:.0f} M"
        ),
        _make_growth_table("tokens", result["tokens"], lambda row: str(row["tokens"])),
    ]


def _make_growth_table(title: str, rows: list[dict[str, Any]], label: Any) -> Table:
    table = Table(title=f"Forward + backward over full, by {title}", title_justify="left")
    names = [name for name in rows[0]["cpu_s"] if name != "full"]
    for column in (title, "full, s", *names):
        table.add_column(column, justify="right")
    for row in rows:
        times = row["cpu_s"]
        shares = (f"{times[name] / times['full']:.3f}" for name in names)
        table.add_row(label(row), f"{times['full']:.3f}", *shares)
    return table
