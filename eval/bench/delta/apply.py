"""Section `apply`: moving a model between positions in memory, against copying the model once.

The model is a Llama with layers of a 7B's shape (--quick: smaller), 0.1 % of each matrix changed,
uniformly. Before each timed run the base is put back and the caches are filled with other bytes.

    memcpy           copy_ of every tensor
    write            put_all of a decoded delta, nothing checked
    apply            Delta.apply: shapes, dtypes and the values it replaces are checked first
    undo             put_all of the values that were there
    raw index_copy_  indices and values ready as int64 and bit patterns
    swap             one delta undone, another one of the same base applied with its checks
    swap, write      the same without the checks
    checkout 1 -> 2  mm_piece.checkout: opens the store, reads, decodes, verifies, then applies
    checkout 2 -> 1  the way back: opens the store, puts back what was there
    SHiRA            PEFT's merge_adapter and unmerge_adapter on the same weights
    compose T        merges T deltas into one; write T writes the result
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import mm_piece
from eval.bench.delta.stores import (
    LARGE,
    LINEARS,
    SMALL,
    bytes_in_memory,
    empty_model,
    layer_matrices,
    make_model,
    make_random_delta,
    make_store,
)
from eval.bench.harness import shira
from eval.bench.harness.timing import BenchContext, Candidate, make_goal, time_interleaved
from mm_piece.deltas.delta import Delta, gather_entries, scatter_entries
from mm_piece.deltas.merging import collect_indices, compose_deltas
from mm_piece.dtypes import view_bits
from mm_piece.models.base import tensors
from mm_piece.store.attachment import attach_base
from mm_piece.store.delta_store import DeltaStore

COMPOSED = (1, 3, 10, 30, 100)
LAYERS = {True: 2, False: 3}
CACHES = 2**28  # bytes; more than any cache holds
SIZES = {sizes["hidden_size"]: sizes for sizes in (SMALL, LARGE)}


@dataclass(frozen=True)
class ApplyFixture:
    """A model, a pristine copy, a store of two deltas on it, and memory to fill caches with."""

    model: Any
    live: dict[str, Tensor]
    pristine: dict[str, Tensor]
    store: DeltaStore
    filler: Tensor

    def restore_base(self) -> None:
        """Put the base back."""
        for name, row in self.live.items():
            row.copy_(self.pristine[name])

    def flush_caches(self) -> None:
        """Push the model out of the caches."""
        self.filler.add_(1)

    def is_intact(self) -> bool:
        """Whether every bit is the base's."""
        return all(
            torch.equal(view_bits(row), view_bits(self.pristine[name]))
            for name, row in self.live.items()
        )


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Measure applying, undoing, swapping and composing."""
    fixture = _make_fixture(bench)
    deltas = fixture.store.deltas()
    rounds = 3 if bench.quick else 9
    bench.show_progress("ours")
    exact = _is_undo_exact(fixture, deltas[0])
    shira_candidates, facts = (
        _shira_candidates(fixture) if shira.is_peft_installed() else ({}, "not installed")
    )
    candidates = {
        **_delta_candidates(fixture, deltas),
        **_swap_candidates(fixture),
        **shira_candidates,
    }
    times = time_interleaved(candidates, rounds, fixture.flush_caches)
    bench.show_progress("compose")
    fixture.restore_base()
    times |= _time_composing(fixture, 2 if bench.quick else 3, bench.quick)
    return {
        "bytes": sum(row.nbytes for row in fixture.live.values()),
        "entries": deltas[0].entries,
        "entries_union": sum(len(index) for index in collect_indices(deltas).values()),
        "delta_bytes_in_memory": bytes_in_memory(deltas[:1]),
        "undo_exact": exact,
        "shira": facts,
        "times": times,
        "goals": _make_goals(times, exact),
    }


def _make_fixture(bench: BenchContext) -> ApplyFixture:
    bench.show_progress("a model and a store")
    sizes = SMALL if bench.quick else LARGE
    model = make_model(sizes, LAYERS[bench.quick], bench.seed)
    pristine = {name: row.clone() for name, row in tensors(model).items()}
    (bench.folder / "base").mkdir()
    store = make_store(bench.folder / "store", model, bench.folder / "base", positions=2)
    filler = torch.zeros(CACHES, dtype=torch.uint8)
    fixture = ApplyFixture(model, tensors(model), pristine, store, filler)
    fixture.restore_base()
    attach_base(model, store)
    return fixture


def _is_undo_exact(stage: ApplyFixture, delta: Delta) -> bool:
    """Whether a delta changes the model, and its undoing leaves the base."""
    before = {
        name: gather_entries(stage.live[name], index) for name, index in delta.indices.items()
    }
    delta.apply(stage.live)
    changed = not stage.is_intact()
    scatter_entries(_entries_to_write(stage, delta.indices, before))
    return changed and stage.is_intact()


def _delta_candidates(stage: ApplyFixture, deltas: Sequence[Delta]) -> dict[str, Candidate]:
    first = deltas[0]
    before = {
        name: gather_entries(stage.live[name], index) for name, index in first.indices.items()
    }
    ready = [
        (view_bits(stage.live[name]), index.long(), view_bits(first.values[name]))
        for name, index in first.indices.items()
    ]

    def apply_delta() -> None:
        first.apply(stage.live)

    def apply_after_reset() -> None:
        stage.restore_base()
        apply_delta()

    def copy_weights() -> None:
        for name, row in stage.live.items():
            stage.pristine[name].copy_(row)  # equal, so nothing is lost

    def scatter_values() -> None:
        for row, index, patterns in ready:
            row.index_copy_(0, index, patterns)

    return {
        "memcpy": Candidate(copy_weights, stage.restore_base),
        "write": Candidate(_make_writer(stage, first.indices, first.values), stage.restore_base),
        "apply": Candidate(apply_delta, stage.restore_base),
        "undo": Candidate(_make_writer(stage, first.indices, before), apply_after_reset),
        "raw index_copy_": Candidate(scatter_values, stage.restore_base),
    }


def _swap_candidates(stage: ApplyFixture) -> dict[str, Candidate]:
    ours, theirs = (make_random_delta(layer_matrices(stage.live), seed) for seed in (101, 102))
    before = ours.require_applicable(stage.live)
    undo, write = (
        _make_writer(stage, ours.indices, before),
        _make_writer(stage, theirs.indices, theirs.values),
    )

    def swap_deltas() -> None:
        undo()
        theirs.apply(stage.live)

    def make_checkout(at: int) -> Callable[[], None]:
        return lambda: mm_piece.checkout(stage.model, at)

    def apply_first() -> None:
        stage.restore_base()
        ours.apply(stage.live)

    def attach_anew() -> None:
        stage.restore_base()
        attach_base(stage.model, stage.store)

    return {
        "swap, write": Candidate(_run_in_sequence(undo, write), apply_first),
        "swap": Candidate(swap_deltas, apply_first),
        "checkout 1 -> 2": Candidate(
            make_checkout(2), _run_in_sequence(attach_anew, make_checkout(1))
        ),
        "checkout 2 -> 1": Candidate(
            make_checkout(1), _run_in_sequence(attach_anew, make_checkout(2))
        ),
    }


def _run_in_sequence(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def run_both() -> None:
        first()
        second()

    return run_both


def _make_writer(
    stage: ApplyFixture, index: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> Callable[[], None]:
    return lambda: scatter_entries(_entries_to_write(stage, index, values))


def _entries_to_write(
    stage: ApplyFixture, index: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> Any:
    return [(stage.live[name], row, values[name]) for name, row in index.items()]


def _shira_candidates(stage: ApplyFixture) -> tuple[dict[str, Candidate], dict[str, int]]:
    """Return PEFT's SHiRA on a second model that shares the first one's memory, and its facts."""
    config = stage.model.config
    twin = empty_model(SIZES[config.hidden_size], config.num_hidden_layers)
    twin.load_state_dict(stage.model.state_dict(), assign=True)
    model = shira.add_shira_adapter(twin, LINEARS)
    model.merge_adapter()
    model.unmerge_adapter()
    changed = [
        view_bits(row) != view_bits(stage.pristine[name]) for name, row in stage.live.items()
    ]
    stage.restore_base()
    pair = {
        "SHiRA merge": Candidate(model.merge_adapter, stage.restore_base),
        "SHiRA unmerge": Candidate(model.unmerge_adapter),
    }
    left = sum(int(row.sum()) for row in changed)
    return pair, {"entries": shira.count_entries(model), "entries_not_restored": left}


def _time_composing(stage: ApplyFixture, rounds: int, quick: bool) -> dict[str, dict[str, float]]:
    counts = COMPOSED[:3] if quick else COMPOSED
    part = layer_matrices(stage.live)
    deltas = [make_random_delta(part, seed) for seed in range(max(counts))]
    made = {count: compose_deltas(deltas[:count]) for count in counts}

    def make_composer(count: int) -> Callable[[], Any]:
        return lambda: compose_deltas(deltas[:count])

    def make_merged_writer(count: int) -> Callable[[], None]:
        entries = made[count]
        index = {name: row for name, (row, _) in entries.items()}
        return _make_writer(stage, index, {name: row for name, (_, row) in entries.items()})

    candidates: dict[str, Any] = {f"compose {count}": make_composer(count) for count in counts}
    candidates |= {
        f"write {count}": Candidate(make_merged_writer(count), stage.restore_base)
        for count in counts
    }
    return time_interleaved(candidates, rounds, stage.flush_caches)


def _make_goals(times: Mapping[str, Mapping[str, float]], exact: bool) -> list[dict[str, Any]]:
    def time_share(name: str) -> float:
        return times[name]["cpu_s"] / times["memcpy"]["cpu_s"]

    return [
        make_goal("write / memcpy", time_share("write"), 0.12),
        make_goal("apply with its checks / memcpy", time_share("apply"), 0.12),
        make_goal("swap, the write alone / memcpy", time_share("swap, write"), 0.2),
        make_goal("swap with its checks / memcpy", time_share("swap"), 0.2),
        make_goal("checkout 2 -> 1 / memcpy", time_share("checkout 2 -> 1"), 0.2),
        make_goal("undo exact", exact, 1, "at least"),
    ]


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return the table of this section."""
    memcpy = result["times"]["memcpy"]
    title = f"A model of {result['bytes'] / 1e9:.2f} GB, {result['entries']:,} entries a delta"
    table = Table("", title=title, title_justify="left")
    for column in ("CPU ms", "/ memcpy", "wall ms", "/ memcpy"):
        table.add_column(column, justify="right")
    for name, found in result["times"].items():
        cells = [
            cell
            for key in ("cpu_s", "wall_s")
            for cell in (f"{1000 * found[key]:.1f}", f"{found[key] / memcpy[key]:.3f}")
        ]
        table.add_row(name, *cells)
    return [table]
