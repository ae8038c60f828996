"""Section `size`: bytes for each entry, beside what is possible and what others need; coding rates.

    uniform     every entry of a 7B layer's matrices alike, at five densities
    clustered   score = row · column · |noise|, rows and columns log-normal; exact global top-k
    real        the five deltas of checkpoints/tiny

Bounds are those of module `bounds`; what other ways of coding would save, of module `ideas`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from eval.bench.delta.bounds import mask_bits, value_bits
from eval.bench.delta.ideas import measure_ideas
from eval.bench.delta.other_codecs import baseline_codecs
from eval.bench.delta.stores import LARGE, SMALL, layer_shapes, make_delta, sample_indices
from eval.bench.harness.shira import bytes_per_entry, is_peft_installed
from eval.bench.harness.timing import BenchContext, make_goal, time_interleaved
from mm_piece import select
from mm_piece.deltas import codec
from mm_piece.deltas.delta import Delta
from mm_piece.dtypes import view_bits
from mm_piece.store.delta_store import DeltaStore

TINY = Path(__file__).parents[3] / "checkpoints" / "tiny"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
UNIFORM = (0.0001, 0.001, 0.01, 0.05, 0.1)
CLUSTERED = (0.001, 0.01)
DENSE = 0.01  # from here on two matrices are enough entries
HEADLINE = "uniform 0.1 % bf16"
SHOWN = (HEADLINE, "uniform 5 % bf16", "clustered 0.1 % bf16", "real 10 % fp32 (tiny)")


@dataclass(frozen=True)
class Case:
    """Deltas that are measured as one; only real ones are several."""

    kind: str
    name: str
    deltas: list[Delta]


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Measure sizes and rates of all cases."""
    rows = []
    for case in _iter_cases(bench):
        bench.show_progress(case.name)
        rows.append(_measure_case(case, rounds=2 if bench.quick else 5))
    bench.show_progress("peft")
    shira = bytes_per_entry(bench.folder) if is_peft_installed() else None
    bench.show_progress("ideas")
    return {
        "cases": rows,
        "shira_file_B": shira,
        "ideas": measure_ideas(TINY),
        "goals": _make_goals(rows),
    }


def _iter_cases(bench: BenchContext) -> Iterator[Case]:
    sizes = SMALL if bench.quick else LARGE
    for density in UNIFORM[1::2] if bench.quick else UNIFORM:
        shapes = layer_shapes(sizes)
        shapes = dict(list(shapes.items())[: 2 if density >= DENSE else None])
        mask = _make_uniform_mask(shapes, density, bench.seed)
        for name, dtype in DTYPES.items():
            title = f"uniform {100 * density:g} % {name}"
            yield Case("uniform", title, [make_delta(mask, shapes, dtype, bench.seed)])
    shapes = dict(list(layer_shapes(sizes).items())[2:5])
    scores = _clustered_scores(shapes, bench.seed)
    for density in CLUSTERED[:1] if bench.quick else CLUSTERED:
        mask = {name: row.to(torch.int32) for name, row in select(scores, density).items()}
        title = f"clustered {100 * density:g} % bf16"
        yield Case("clustered", title, [make_delta(mask, shapes, torch.bfloat16, bench.seed)])
    yield Case("real", "real 10 % fp32 (tiny)", DeltaStore.open(TINY).deltas())


def _make_uniform_mask(shapes: dict[str, Any], density: float, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    return {name: sample_indices(size, int(density * size), random) for name, size in sizes.items()}


def _clustered_scores(shapes: dict[str, Any], seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    scores = {}
    for name, shape in shapes.items():
        rows, columns = (torch.randn(length, generator=random).exp() for length in shape)
        noise = torch.randn(shape, generator=random).abs_()
        scores[name] = noise.mul_(rows[:, None]).mul_(columns)
    return scores


def _measure_case(case: Case, rounds: int) -> dict[str, Any]:
    deltas = case.deltas
    entries = sum(delta.entries for delta in deltas)
    parts = [_encode_rows(delta) for delta in deltas]
    sizes = {
        "index_B": sum(len(row) for part in parts for row, _ in part.values()),
        "value_B": sum(len(row) for part in parts for _, row in part.values()),
        "file_B": sum(len(delta.to_bytes()) for delta in deltas),
        "index_bound_B": sum(map(mask_bits, deltas)) / 8,
        "value_bound_B": sum(value_bits(delta.values) for delta in deltas) / 8,
    }
    return {
        "case": case.name,
        "kind": case.kind,
        "entries": entries,
        "per_entry": {name: size / entries for name, size in sizes.items()},
        "index_to_bound": sizes["index_B"] / sizes["index_bound_B"],
        "each_index_to_bound": [
            8 * sum(len(row) for row, _ in part.values()) / mask_bits(delta)
            for part, delta in zip(parts, deltas, strict=True)
        ],
        "value_to_bound": sizes["value_B"] / sizes["value_bound_B"],
        **_measure_speeds(deltas, entries, rounds),
    }


def _encode_rows(delta: Delta) -> dict[str, tuple[bytes, bytes]]:
    """Return the coded rows, the way the file holds them."""
    return {
        name: (codec.encode_indices(index.numpy()), codec.encode_values(_bit_patterns(delta, name)))
        for name, index in delta.indices.items()
    }


def _bit_patterns(delta: Delta, name: str) -> Any:
    values = delta.values[name]
    return view_bits(values).numpy().view(f"<u{values.itemsize}")


def _measure_speeds(deltas: list[Delta], entries: int, rounds: int) -> dict[str, Any]:
    """Time our coders and the rivals' in turns; rates are in million entries a CPU second."""
    work, sizes = _make_coders(deltas), {}
    codecs = {"gap": (Delta.to_bytes, lambda data, _: Delta.from_bytes(data)), **baseline_codecs()}
    for name, baseline in codecs.items():
        if baseline:
            files = [baseline[0](delta) for delta in deltas]
            sizes[name] = sum(map(len, files)) / entries
            work[f"{name} encode"] = _call_on_all(baseline[0], [(delta,) for delta in deltas])
            work[f"{name} decode"] = _call_on_all(
                baseline[1], list(zip(files, deltas, strict=True))
            )
    found = time_interleaved(work, rounds)
    speeds = {name: entries / 1e6 / times["cpu_s"] for name, times in found.items()}
    return {"file_B": sizes, "M_entries_per_cpu_s": speeds, "times": found}


def _make_coders(deltas: list[Delta]) -> dict[str, Callable[[], Any]]:
    """Return index and value coding alone."""
    coded = [(delta, name, *rows) for delta in deltas for name, rows in _encode_rows(delta).items()]
    indices = [(delta.indices[name].numpy(),) for delta, name, _, _ in coded]
    patterns = [(_bit_patterns(delta, name),) for delta, name, _, _ in coded]
    index_rows = [
        (row, len(delta.indices[name]), math.prod(delta.shapes[name]))
        for delta, name, row, _ in coded
    ]
    value_rows = [
        (row, len(delta.values[name]), delta.values[name].itemsize) for delta, name, _, row in coded
    ]
    return {
        "encode_index": _call_on_all(codec.encode_indices, indices),
        "encode_value": _call_on_all(codec.encode_values, patterns),
        "decode_index": _call_on_all(codec.decode_indices, index_rows),
        "decode_value": _call_on_all(codec.decode_values, value_rows),
    }


def _call_on_all(
    function: Callable[..., Any], arguments: list[tuple[Any, ...]]
) -> Callable[[], Any]:
    return lambda: [function(*row) for row in arguments]


def _make_goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_kind = {kind: [r for r in rows if r["kind"] == kind] for kind in ("uniform", "real")}
    headline = next(row for row in rows if row["case"] == HEADLINE)
    speeds = headline["M_entries_per_cpu_s"]
    both = {
        direction: [_combined_speed(row, direction) for row in rows if row["kind"] != "clustered"]
        for direction in ("encode", "decode")
    }
    return [
        *(
            make_goal(f"index / bound, {kind}", max(r["index_to_bound"] for r in found), 1.02)
            for kind, found in by_kind.items()
        ),
        make_goal(f"file, bytes an entry, {HEADLINE}", headline["per_entry"]["file_B"], 2.9),
        make_goal(f"to_bytes, M/s, {HEADLINE}", speeds["gap encode"], 20, "at least"),
        make_goal(f"from_bytes, M/s, {HEADLINE}", speeds["gap decode"], 40, "at least"),
        make_goal("index + value encoding, M/s, slowest case", min(both["encode"]), 20, "at least"),
        make_goal("index + value decoding, M/s, slowest case", min(both["decode"]), 40, "at least"),
    ]


def _combined_speed(row: dict[str, Any], direction: str) -> float:
    speeds = row["M_entries_per_cpu_s"]
    return 1 / (1 / speeds[f"{direction}_index"] + 1 / speeds[f"{direction}_value"])


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return the tables of this section."""
    return [
        _make_own_table(result["cases"]),
        _make_baseline_table(result),
        _make_idea_table(result["ideas"]),
    ]


def _make_own_table(rows: list[dict[str, Any]]) -> Table:
    columns = (
        "entries",
        "index B",
        "/ bound",
        "value B",
        "/ bound",
        "file B",
        "enc M/s",
        "dec M/s",
    )
    coders = ("codec enc", "codec dec")
    table = _make_table(
        "Size of a delta file, per entry; rates per core", "case", *columns, *coders
    )
    for row in rows:
        size, speed = row["per_entry"], row["M_entries_per_cpu_s"]
        table.add_row(
            *(row["case"], f"{row['entries']:,}"),
            *(f"{size['index_B']:.3f}", f"{row['index_to_bound']:.3f}"),
            *(f"{size['value_B']:.3f}", f"{row['value_to_bound']:.3f}", f"{size['file_B']:.3f}"),
            *(f"{speed['gap encode']:.1f}", f"{speed['gap decode']:.1f}"),
            *(f"{_combined_speed(row, direction):.1f}" for direction in ("encode", "decode")),
        )
    return table


def _make_baseline_table(result: dict[str, Any]) -> Table:
    title = "Bytes per entry (encode / decode, M entries a second)"
    shown = [row for row in result["cases"] if row["case"] in SHOWN]
    table = _make_table(title, "stored as", *(row["case"] for row in shown))
    for name in ("gap", *baseline_codecs()):
        cells = [_format_cell(row, name) for row in shown]
        table.add_row("ours (gap)" if name == "gap" else name, *cells)
    shira = result["shira_file_B"]
    table.add_row("PEFT SHiRA", *([f"{shira:.2f}" if shira else "not installed"] * len(shown)))
    return table


def _format_cell(row: dict[str, Any], name: str) -> str:
    if name not in row["file_B"]:
        return "not installed"
    speed = row["M_entries_per_cpu_s"]
    speeds = " / ".join(f"{speed[f'{name} {direction}']:.1f}" for direction in ("encode", "decode"))
    return f"{row['file_B'][name]:.2f} ({speeds})"


def _make_idea_table(rows: list[dict[str, float]]) -> Table:
    table = _make_table("Real deltas: bits per entry, bounds", "position", *rows[0])
    for position, row in enumerate(rows, 1):
        table.add_row(str(position), *(f"{bits_:.3f}" for bits_ in row.values()))
    return table


def _make_table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table
