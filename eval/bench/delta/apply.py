"""Section `apply`: moving a model between positions in memory, against copying the model once.

The model is a Llama with layers of a 7B's shape (--quick: smaller), 0.1 % of each matrix changed,
uniformly. Each timed run begins at the base, with caches full of other bytes.

    memcpy           copy_ of every tensor
    write            scatter_entries of a decoded delta, without checks
    apply            Delta.apply: it first checks shapes, dtypes and the values that it replaces
    undo             scatter_entries of the previous values
    raw index_copy_  indices and values ready as int64 and bit patterns
    swap             undo one delta, apply another one of the same base with its checks
    swap, write      the same without the checks
    checkout 1 -> 2  mm_piece.checkout: opens the store, reads, decodes, verifies, then applies
    checkout 2 -> 1  the way back: opens the store, restores the previous values
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
    SMALL,
    bytes_in_memory,
    empty_model,
    layer_matrices,
    make_model,
    make_random_delta,
    make_store,
)
from eval.bench.harness import shira
from eval.bench.harness.models import LINEARS
from eval.bench.harness.timing import BenchContext, Candidate, make_goal, time_interleaved
from mm_piece.deltas.delta import Delta
from mm_piece.deltas.merging import collect_indices, compose_deltas
from mm_piece.dtypes import view_bits
from mm_piece.entries import read_entries, write_entries
from mm_piece.models.base import tensors
from mm_piece.store.attachment import attach_base
from mm_piece.store.delta_store import DeltaStore

COMPOSED = (1, 3, 10, 30, 100)
LAYERS = {True: 2, False: 3}  # by --quick
CACHES = 2**28  # bytes; more than any cache holds
SIZES = {sizes["hidden_size"]: sizes for sizes in (SMALL, LARGE)}


@dataclass(frozen=True)
class ApplyFixture:
    """A model, a copy of its base, a store of two deltas on it, and memory to fill caches with."""

    model: Any
    live: dict[str, Tensor]
    pristine: dict[str, Tensor]
    store: DeltaStore
    filler: Tensor

    def restore_base(self) -> None:
        """Copy the base's values into the model."""
        for name, row in self.live.items():
            row.copy_(self.pristine[name])

    def flush_caches(self) -> None:
        """Push the model out of the caches."""
        self.filler.add_(1)

    def is_intact(self) -> bool:
        """Whether every bit is the base's."""
        # bits, because -0.0 == 0.0 and nan != nan
        for name, row in self.live.items():
            base = self.pristine[name]
            if not torch.equal(view_bits(row), view_bits(base)):
                return False
        return True


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Measure applying, undoing, swapping and composing."""
    fixture = _make_fixture(bench)
    deltas = fixture.store.deltas()
    rounds, composing_rounds = (3, 2) if bench.quick else (9, 3)

    bench.show_progress("ours")
    exact = _is_undo_exact(fixture, deltas[0])
    candidates = {}
    facts: Any = "not installed"
    if shira.is_peft_installed():
        candidates, facts = _shira_candidates(fixture)
    candidates = {
        **_delta_candidates(fixture, deltas),
        **_swap_candidates(fixture),
        **candidates,
    }
    times = time_interleaved(candidates, rounds, fixture.flush_caches)

    bench.show_progress("compose")
    fixture.restore_base()
    times |= _time_composing(fixture, composing_rounds, bench.quick)
    union = collect_indices(deltas)
    return {
        "bytes": sum(row.nbytes for row in fixture.live.values()),
        "entries": deltas[0].entries,
        "entries_union": sum(len(index) for index in union.values()),
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
    live = tensors(model)
    pristine = {name: row.clone() for name, row in live.items()}

    # the store names a base, which no candidate reads: an empty folder will do
    base = bench.folder / "base"
    base.mkdir()
    store = make_store(bench.folder / "store", model, base, positions=2)
    filler = torch.zeros(CACHES, dtype=torch.uint8)

    fixture = ApplyFixture(model, live, pristine, store, filler)
    # making the store left the model at its last position
    fixture.restore_base()
    attach_base(model, store)
    return fixture


def _is_undo_exact(stage: ApplyFixture, delta: Delta) -> bool:
    """Whether a delta changes the model, and undoing it leaves the base."""
    before = _current_values(stage, delta)
    delta.apply(stage.live)
    changed = not stage.is_intact()
    write_entries(_entries_to_write(stage, delta.indices, before))
    return changed and stage.is_intact()


def _current_values(stage: ApplyFixture, delta: Delta) -> dict[str, Tensor]:
    """Return the model's values at a delta's indices."""
    found = {}
    for name, index in delta.indices.items():
        found[name] = read_entries(stage.live[name], index)
    return found


def _delta_candidates(stage: ApplyFixture, deltas: Sequence[Delta]) -> dict[str, Candidate]:
    first = deltas[0]
    before = _current_values(stage, first)

    # what index_copy_ needs, prepared outside of the timed run
    ready = []
    for name, index in first.indices.items():
        row = view_bits(stage.live[name])
        patterns = view_bits(first.values[name])
        ready.append((row, index.long(), patterns))

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

    write_delta = _make_writer(stage, first.indices, first.values)
    undo_delta = _make_writer(stage, first.indices, before)
    return {
        "memcpy": Candidate(copy_weights, stage.restore_base),
        "write": Candidate(write_delta, stage.restore_base),
        "apply": Candidate(apply_delta, stage.restore_base),
        "undo": Candidate(undo_delta, apply_after_reset),
        "raw index_copy_": Candidate(scatter_values, stage.restore_base),
    }


def _swap_candidates(stage: ApplyFixture) -> dict[str, Candidate]:
    matrices = layer_matrices(stage.live)
    ours = make_random_delta(matrices, 101)
    theirs = make_random_delta(matrices, 102)
    before = ours.require_applicable(stage.live)
    undo = _make_writer(stage, ours.indices, before)
    write = _make_writer(stage, theirs.indices, theirs.values)

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

    swap_without_checks = _run_in_sequence(undo, write)
    start_at_1 = _run_in_sequence(attach_anew, make_checkout(1))
    start_at_2 = _run_in_sequence(attach_anew, make_checkout(2))
    return {
        "swap, write": Candidate(swap_without_checks, apply_first),
        "swap": Candidate(swap_deltas, apply_first),
        "checkout 1 -> 2": Candidate(make_checkout(2), start_at_1),
        "checkout 2 -> 1": Candidate(make_checkout(1), start_at_2),
    }


def _run_in_sequence(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def run_both() -> None:
        first()
        second()

    return run_both


def _make_writer(
    stage: ApplyFixture, index: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> Callable[[], None]:
    return lambda: write_entries(_entries_to_write(stage, index, values))


def _entries_to_write(
    stage: ApplyFixture, index: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> Any:
    return [(stage.live[name], row, values[name]) for name, row in index.items()]


def _shira_candidates(stage: ApplyFixture) -> tuple[dict[str, Candidate], dict[str, int]]:
    """Return PEFT's SHiRA on a second model that shares the first one's memory, and its facts."""
    # assign: PEFT changes the model's modules, so that it needs some of its own
    config = stage.model.config
    twin = empty_model(SIZES[config.hidden_size], config.num_hidden_layers)
    twin.load_state_dict(stage.model.state_dict(), assign=True)
    model = shira.add_shira_adapter(twin, LINEARS)

    # w + v - v is not always w in floating point
    model.merge_adapter()
    model.unmerge_adapter()
    num_different = 0
    for name, row in stage.live.items():
        different = view_bits(row) != view_bits(stage.pristine[name])
        num_different += int(different.sum())
    stage.restore_base()

    # unmerge has nothing to prepare: it runs right after merge
    pair = {
        "SHiRA merge": Candidate(model.merge_adapter, stage.restore_base),
        "SHiRA unmerge": Candidate(model.unmerge_adapter),
    }
    facts = {
        "entries": shira.count_entries(model),
        "entries_not_restored": num_different,
    }
    return pair, facts


def _time_composing(stage: ApplyFixture, rounds: int, quick: bool) -> dict[str, dict[str, float]]:
    counts = COMPOSED[:3] if quick else COMPOSED
    matrices = layer_matrices(stage.live)
    deltas = [make_random_delta(matrices, seed) for seed in range(max(counts))]
    composed = {count: compose_deltas(deltas[:count]) for count in counts}

    def make_composer(count: int) -> Callable[[], Any]:
        return lambda: compose_deltas(deltas[:count])

    def make_merged_writer(count: int) -> Callable[[], None]:
        entries = composed[count]
        indices = {name: index for name, (index, _) in entries.items()}
        values = {name: row for name, (_, row) in entries.items()}
        return _make_writer(stage, indices, values)

    candidates: dict[str, Any] = {}
    for count in counts:
        candidates[f"compose {count}"] = make_composer(count)
    for count in counts:
        writer = make_merged_writer(count)
        candidates[f"write {count}"] = Candidate(writer, stage.restore_base)
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
        cells = []
        for key in ("cpu_s", "wall_s"):
            milliseconds = 1000 * found[key]
            ratio = found[key] / memcpy[key]
            cells += [f"{milliseconds:.1f}", f"{ratio:.3f}"]
        table.add_row(name, *cells)
    return [table]
