"""How a training step grows with density, model size and tokens, beside full fine-tuning.

Forward and backward in fp32, CPU time, uniform and clustered masks.
"""

from typing import Any

from rich.table import Table

from eval.bench.harness.models import batch, mask, stack
from eval.bench.harness.timing import Bench, interleaved
from eval.bench.harness.tuners import TUNERS, Tuner

DENSITIES = (0.0001, 0.001, 0.01, 0.05)
LAYERS = (1, 2, 4, 8)
TOKENS = (64, 256, 1024)


def measure(bench: Bench) -> dict[str, Any]:
    """Measure each of the three with the others fixed."""
    depth, length = (1, 32) if bench.quick else (2, 256)
    return {
        "goals": [],
        "depth": depth,
        "length": length,
        "density": [_density(bench, d, depth, length) for d in DENSITIES],
        "layers": [_size(bench, n, length) for n in LAYERS[: 2 if bench.quick else None]],
        "tokens": [_size(bench, depth, n) for n in TOKENS[: 1 if bench.quick else None]],
    }


def _density(bench: Bench, density: float, layers: int, tokens: int) -> dict[str, Any]:
    bench.say(f"density {density:.2%}")
    tuners = {name: _tuner(bench, name, layers) for name in ("full", "floor")}
    for kind in ("uniform", "clustered"):
        tuners[kind] = _tuner(bench, "ours", layers, kind, density)
    return {"density": density, **_times(bench, tuners, tokens)}


def _size(bench: Bench, layers: int, tokens: int) -> dict[str, Any]:
    bench.say(f"{layers} layers, {tokens} tokens")
    tuners = {name: _tuner(bench, name, layers) for name in ("full", "floor", "LoRA r=8", "ours")}
    parameters = sum(p.numel() for p in tuners["full"].parameters)
    found = {"layers": layers, "parameters": parameters, "tokens": tokens}
    return {**found, **_times(bench, tuners, tokens)}


def _tuner(
    bench: Bench, name: str, layers: int, kind: str = "uniform", density: float = 0.001
) -> Tuner:
    model = stack(layers, quick=bench.quick)
    return TUNERS[name](model, mask(model, kind, density))


def _times(bench: Bench, tuners: dict[str, Tuner], tokens: int) -> dict[str, Any]:
    inputs = batch(tokens)
    work = {name: (lambda tuner=tuner: tuner.backward(inputs)) for name, tuner in tuners.items()}
    times = interleaved(work, 2 if bench.quick else 3)
    return {"cpu_s": {name: row["cpu_s"] for name, row in times.items()}}


def tables(result: dict[str, Any]) -> list[Table]:
    """Return what a terminal shows."""
    return [
        _table("density", result["density"], lambda row: f"{row['density']:.2%}"),
        _table("model size", result["layers"], lambda row: f"{row['parameters'] / 1e6:.0f} M"),
        _table("tokens", result["tokens"], lambda row: str(row["tokens"])),
    ]


def _table(title: str, rows: list[dict[str, Any]], label: Any) -> Table:
    table = Table(title=f"Forward + backward over full, by {title}", title_justify="left")
    names = [name for name in rows[0]["cpu_s"] if name != "full"]
    for column in (title, "full, s", *names):
        table.add_column(column, justify="right")
    for row in rows:
        times = row["cpu_s"]
        shares = (f"{times[name] / times['full']:.3f}" for name in names)
        table.add_row(label(row), f"{times['full']:.3f}", *shares)
    return table
