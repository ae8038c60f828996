"""Section `size`: bytes for each entry, beside lower bounds and other codecs; coding speeds.

    uniform     every entry of a 7B layer's matrices is equally likely, at five densities
    clustered   score = row · column · |noise|, rows and columns log-normal; exact global top-k
    real        the five deltas of checkpoints/tiny

Module `bounds` has the lower bounds, module `ideas` the savings of other codes.
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
SHOWN = (
    HEADLINE,
    "uniform 5 % bf16",
    "clustered 0.1 % bf16",
    "real 10 % fp32 (tiny)",
)


@dataclass(frozen=True)
class Case:
    """Deltas measured as one; only the real case has several."""

    kind: str
    name: str
    deltas: list[Delta]


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Measure sizes and speeds of all cases."""
    rounds = 1 if bench.quick else 5
    rows = []
    for case in _iter_cases(bench):
        bench.show_progress(case.name)
        rows.append(_measure_case(case, rounds))

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
    uniform = UNIFORM[1:2] if bench.quick else UNIFORM
    clustered = CLUSTERED[:1] if bench.quick else CLUSTERED
    sizes = SMALL if bench.quick else LARGE
    layer = list(layer_shapes(sizes).items())

    for density in uniform:
        shapes = dict(layer[:2] if density >= DENSE else layer)
        mask = _make_uniform_mask(shapes, density, bench.seed)
        for name, dtype in DTYPES.items():
            title = f"uniform {100 * density:g} % {name}"
            delta = make_delta(mask, shapes, dtype, bench.seed)
            yield Case("uniform", title, [delta])

    # two square matrices and a wide one
    shapes = dict(layer[2:5])
    scores = _clustered_scores(shapes, bench.seed)
    for density in clustered:
        selected = select(scores, density)
        mask = {name: row.to(torch.int32) for name, row in selected.items()}
        title = f"clustered {100 * density:g} % bf16"
        delta = make_delta(mask, shapes, torch.bfloat16, bench.seed)
        yield Case("clustered", title, [delta])

    store = DeltaStore.open(TINY)
    deltas = store.deltas()
    yield Case("real", "real 10 % fp32 (tiny)", deltas[:1] if bench.quick else deltas)


def _make_uniform_mask(shapes: dict[str, Any], density: float, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    mask = {}
    for name, (rows, columns) in shapes.items():
        size = rows * columns
        mask[name] = sample_indices(size, int(density * size), random)
    return mask


def _clustered_scores(shapes: dict[str, Any], seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    scores = {}
    for name, shape in shapes.items():
        num_rows, num_columns = shape
        rows = torch.randn(num_rows, generator=random).exp()
        columns = torch.randn(num_columns, generator=random).exp()
        noise = torch.randn(shape, generator=random).abs_()  # (rows, columns)
        scores[name] = noise.mul_(rows[:, None]).mul_(columns)
    return scores


def _measure_case(case: Case, rounds: int) -> dict[str, Any]:
    deltas = case.deltas
    entries = sum(delta.entries for delta in deltas)
    index_sizes = []
    value_sizes = []
    for delta in deltas:
        coded = _encode_rows(delta)
        index_sizes.append(sum(len(row) for row, _ in coded.values()))
        value_sizes.append(sum(len(row) for _, row in coded.values()))

    index_bounds = [mask_bits(delta) for delta in deltas]
    each_index_to_bound = []
    for size, bits in zip(index_sizes, index_bounds, strict=True):
        each_index_to_bound.append(8 * size / bits)
    sizes = {
        "index_B": sum(index_sizes),
        "value_B": sum(value_sizes),
        "file_B": sum(len(delta.to_bytes()) for delta in deltas),
        "index_bound_B": sum(index_bounds) / 8,
        "value_bound_B": sum(value_bits(delta.values) for delta in deltas) / 8,
    }
    return {
        "case": case.name,
        "kind": case.kind,
        "entries": entries,
        "per_entry": {name: size / entries for name, size in sizes.items()},
        "index_to_bound": sizes["index_B"] / sizes["index_bound_B"],
        "each_index_to_bound": each_index_to_bound,
        "value_to_bound": sizes["value_B"] / sizes["value_bound_B"],
        **_measure_speeds(deltas, entries, rounds),
    }


def _encode_rows(delta: Delta) -> dict[str, tuple[bytes, bytes]]:
    """Return the coded rows as the file stores them."""
    coded = {}
    for name, index in delta.indices.items():
        index_row = codec.encode_indices(index.numpy())
        value_row = codec.encode_values(_bit_patterns(delta, name))
        coded[name] = (index_row, value_row)
    return coded


def _bit_patterns(delta: Delta, name: str) -> Any:
    """Return a tensor's values as unsigned little-endian integers of their width."""
    values = delta.values[name]
    bits = view_bits(values).numpy()
    return bits.view(f"<u{values.itemsize}")


def _measure_speeds(deltas: list[Delta], entries: int, rounds: int) -> dict[str, Any]:
    """Time our coders and the baselines' in turns; speeds in million entries a CPU second."""
    work = _make_coders(deltas)
    sizes = {}
    ours = (Delta.to_bytes, lambda data, _: Delta.from_bytes(data))
    codecs = {"gap": ours, **baseline_codecs()}
    for name, pair in codecs.items():
        if pair is None:
            continue
        encode, decode = pair
        files = [encode(delta) for delta in deltas]
        sizes[name] = sum(map(len, files)) / entries
        encode_arguments = [(delta,) for delta in deltas]
        decode_arguments = list(zip(files, deltas, strict=True))
        work[f"{name} encode"] = _call_on_all(encode, encode_arguments)
        work[f"{name} decode"] = _call_on_all(decode, decode_arguments)

    found = time_interleaved(work, rounds)
    speeds = {name: entries / 1e6 / times["cpu_s"] for name, times in found.items()}
    return {
        "file_B": sizes,
        "M_entries_per_cpu_s": speeds,
        "times": found,
    }


def _make_coders(deltas: list[Delta]) -> dict[str, Callable[[], Any]]:
    """Return index and value coding alone."""
    indices = []
    patterns = []
    index_rows = []
    value_rows = []
    for delta in deltas:
        for name, (index_row, value_row) in _encode_rows(delta).items():
            index = delta.indices[name]
            values = delta.values[name]
            size = math.prod(delta.shapes[name])
            indices.append((index.numpy(),))
            patterns.append((_bit_patterns(delta, name),))
            index_rows.append((index_row, len(index), size))
            value_rows.append((value_row, len(values), values.itemsize))
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
    # the bound assumes no clusters, so that clustered masks have no goal
    goals = []
    for kind in ("uniform", "real"):
        worst = max(row["index_to_bound"] for row in rows if row["kind"] == kind)
        goals.append(make_goal(f"index / bound, {kind}", worst, 1.02))

    headline = next(row for row in rows if row["case"] == HEADLINE)
    size = headline["per_entry"]["file_B"]
    speeds = headline["M_entries_per_cpu_s"]
    judged = [row for row in rows if row["kind"] != "clustered"]
    encoding = min(_combined_speed(row, "encode") for row in judged)
    decoding = min(_combined_speed(row, "decode") for row in judged)
    return [
        *goals,
        make_goal(f"file, bytes an entry, {HEADLINE}", size, 2.9),
        make_goal(f"to_bytes, M/s, {HEADLINE}", speeds["gap encode"], 20, "at least"),
        make_goal(f"from_bytes, M/s, {HEADLINE}", speeds["gap decode"], 40, "at least"),
        make_goal("index + value encoding, M/s, slowest case", encoding, 20, "at least"),
        make_goal("index + value decoding, M/s, slowest case", decoding, 40, "at least"),
    ]


def _combined_speed(row: dict[str, Any], direction: str) -> float:
    """Return the speed of indices and values one after the other: times add up."""
    speeds = row["M_entries_per_cpu_s"]
    index_time = 1 / speeds[f"{direction}_index"]
    value_time = 1 / speeds[f"{direction}_value"]
    return 1 / (index_time + value_time)


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
        "codec enc",
        "codec dec",
    )
    title = "Size of a delta file, per entry; rates per core"
    table = _make_table(title, "case", *columns)
    for row in rows:
        size = row["per_entry"]
        speed = row["M_entries_per_cpu_s"]
        table.add_row(
            row["case"],
            f"{row['entries']:,}",
            f"{size['index_B']:.3f}",
            f"{row['index_to_bound']:.3f}",
            f"{size['value_B']:.3f}",
            f"{row['value_to_bound']:.3f}",
            f"{size['file_B']:.3f}",
            f"{speed['gap encode']:.1f}",
            f"{speed['gap decode']:.1f}",
            f"{_combined_speed(row, 'encode'):.1f}",
            f"{_combined_speed(row, 'decode'):.1f}",
        )
    return table


def _make_baseline_table(result: dict[str, Any]) -> Table:
    title = "Bytes per entry (encode / decode, M entries a second)"
    shown = [row for row in result["cases"] if row["case"] in SHOWN]
    names = [row["case"] for row in shown]
    table = _make_table(title, "stored as", *names)
    for name in ("gap", *baseline_codecs()):
        label = "ours (gap)" if name == "gap" else name
        cells = [_format_cell(row, name) for row in shown]
        table.add_row(label, *cells)

    # SHiRA's file has the same size for every entry, whatever the mask
    shira = result["shira_file_B"]
    cell = f"{shira:.2f}" if shira else "not installed"
    cells = [cell] * len(shown)
    table.add_row("PEFT SHiRA", *cells)
    return table


def _format_cell(row: dict[str, Any], name: str) -> str:
    if name not in row["file_B"]:
        return "not installed"
    size = row["file_B"][name]
    speeds = row["M_entries_per_cpu_s"]
    encode = speeds[f"{name} encode"]
    decode = speeds[f"{name} decode"]
    return f"{size:.2f} ({encode:.1f} / {decode:.1f})"


def _make_idea_table(rows: list[dict[str, float]]) -> Table:
    table = _make_table("Real deltas: bits per entry, bounds", "position", *rows[0])
    for position, row in enumerate(rows, 1):
        cells = [f"{bits:.3f}" for bits in row.values()]
        table.add_row(str(position), *cells)
    return table


def _make_table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table
