"""Growth of a training step with density, model size and tokens, beside full fine-tuning.

Forward and backward in fp32, CPU time, uniform and clustered masks.
"""

from functools import partial
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
    layers = LAYERS[:2] if bench.quick else LAYERS
    tokens = TOKENS[:1] if bench.quick else TOKENS
    return {
        "goals": [],
        "depth": depth,
        "length": length,
        "density": [_measure_density(bench, density, depth, length) for density in DENSITIES],
        "layers": [_measure_size(bench, number, length) for number in layers],
        "tokens": [_measure_size(bench, depth, number) for number in tokens],
    }


def _measure_density(
    bench: BenchContext, density: float, layers: int, tokens: int
) -> dict[str, Any]:
    bench.show_progress(f"density {density:.2%}")
    tuners = {}
    for name in ("full", "floor"):
        tuners[name] = _make_tuner(bench, name, layers)
    for kind in ("uniform", "clustered"):
        tuners[kind] = _make_tuner(bench, "ours", layers, kind, density)
    return {"density": density, **_time_tuners(bench, tuners, tokens)}


def _measure_size(bench: BenchContext, layers: int, tokens: int) -> dict[str, Any]:
    bench.show_progress(f"{layers} layers, {tokens} tokens")
    tuners = {}
    for name in ("full", "floor", "LoRA r=8", "ours"):
        tuners[name] = _make_tuner(bench, name, layers)
    return {
        "layers": layers,
        "parameters": sum(p.numel() for p in tuners["full"].parameters),
        "tokens": tokens,
        **_time_tuners(bench, tuners, tokens),
    }


def _make_tuner(
    bench: BenchContext, name: str, layers: int, kind: str = "uniform", density: float = 0.001
) -> Tuner:
    # a model of its own for each tuner, all with the same weights
    model = make_stack(layers, quick=bench.quick)
    mask = make_mask(model, kind, density)
    return TUNERS[name](model, mask)


def _time_tuners(bench: BenchContext, tuners: dict[str, Tuner], tokens: int) -> dict[str, Any]:
    inputs = make_batch(tokens)
    rounds = 2 if bench.quick else 3
    work = {name: partial(tuner.backward, inputs) for name, tuner in tuners.items()}
    times = time_interleaved(work, rounds)
    return {"cpu_s": {name: row["cpu_s"] for name, row in times.items()}}


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return the tables of this section."""

    def format_density(row: dict[str, Any]) -> str:
        return f"{row['density']:.2%}"

    def format_size(row: dict[str, Any]) -> str:
        return f"{row['parameters'] / 1e6:.0f} M"

    def format_tokens(row: dict[str, Any]) -> str:
        return str(row["tokens"])

    return [
        _make_growth_table("density", result["density"], format_density),
        _make_growth_table("model size", result["layers"], format_size),
        _make_growth_table("tokens", result["tokens"], format_tokens),
    ]


def _make_growth_table(title: str, rows: list[dict[str, Any]], label: Any) -> Table:
    table = Table(title=f"Forward + backward over full, by {title}", title_justify="left")
    names = [name for name in rows[0]["cpu_s"] if name != "full"]
    for column in (title, "full, s", *names):
        table.add_column(column, justify="right")
    for row in rows:
        times = row["cpu_s"]
        full = times["full"]
        shares = [f"{times[name] / full:.3f}" for name in names]
        table.add_row(label(row), f"{full:.3f}", *shares)
    return table
