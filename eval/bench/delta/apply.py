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
    make_model,
    make_store,
    patchable,
    random_delta,
)
from eval.bench.harness import shira
from eval.bench.harness.timing import Bench, Contestant, goal, interleaved
from mm_piece.deltas.delta import Delta, put_all, take
from mm_piece.deltas.merging import compose, union
from mm_piece.dtypes import bits
from mm_piece.models.base import tensors
from mm_piece.store.attachment import attach_base
from mm_piece.store.delta_store import DeltaStore

COMPOSED = (1, 3, 10, 30, 100)
LAYERS = {True: 2, False: 3}
CACHES = 2**28  # bytes; more than any cache holds
SIZES = {sizes["hidden_size"]: sizes for sizes in (SMALL, LARGE)}


@dataclass(frozen=True)
class Stage:
    """A model, a pristine copy, a store of two deltas on it, and memory to fill caches with."""

    model: Any
    live: dict[str, Tensor]
    pristine: dict[str, Tensor]
    store: DeltaStore
    filler: Tensor

    def reset(self) -> None:
        """Put the base back."""
        for name, row in self.live.items():
            row.copy_(self.pristine[name])

    def flush(self) -> None:
        """Push the model out of the caches."""
        self.filler.add_(1)

    def intact(self) -> bool:
        """Whether every bit is the base's."""
        return all(
            torch.equal(bits(row), bits(self.pristine[name])) for name, row in self.live.items()
        )


def measure(bench: Bench) -> dict[str, Any]:
    """Measure applying, undoing, swapping and composing."""
    stage = _stage(bench)
    deltas = stage.store.deltas()
    rounds = 3 if bench.quick else 9
    bench.say("ours")
    exact = _undo_is_exact(stage, deltas[0])
    peer, facts = _shira(stage) if shira.installed() else ({}, "not installed")
    contestants = {**_ours(stage, deltas), **_swaps(stage), **peer}
    times = interleaved(contestants, rounds, stage.flush)
    bench.say("compose")
    stage.reset()
    times |= _composed(stage, 2 if bench.quick else 3, bench.quick)
    return {
        "bytes": sum(row.nbytes for row in stage.live.values()),
        "entries": deltas[0].entries,
        "entries_union": sum(len(index) for index in union(deltas).values()),
        "delta_bytes_in_memory": bytes_in_memory(deltas[:1]),
        "undo_exact": exact,
        "shira": facts,
        "times": times,
        "goals": _goals(times, exact),
    }


def _stage(bench: Bench) -> Stage:
    bench.say("a model and a store")
    sizes = SMALL if bench.quick else LARGE
    model = make_model(sizes, LAYERS[bench.quick], bench.seed)
    pristine = {name: row.clone() for name, row in tensors(model).items()}
    (bench.folder / "base").mkdir()
    store = make_store(bench.folder / "store", model, bench.folder / "base", positions=2)
    filler = torch.zeros(CACHES, dtype=torch.uint8)
    stage = Stage(model, tensors(model), pristine, store, filler)
    stage.reset()
    attach_base(model, store)
    return stage


def _undo_is_exact(stage: Stage, delta: Delta) -> bool:
    """Whether a delta changes the model, and its undoing leaves the base."""
    before = {name: take(stage.live[name], index) for name, index in delta.indices.items()}
    delta.apply(stage.live)
    changed = not stage.intact()
    put_all(_writes(stage, delta.indices, before))
    return changed and stage.intact()


def _ours(stage: Stage, deltas: Sequence[Delta]) -> dict[str, Contestant]:
    first = deltas[0]
    before = {name: take(stage.live[name], index) for name, index in first.indices.items()}
    ready = [
        (bits(stage.live[name]), index.long(), bits(first.values[name]))
        for name, index in first.indices.items()
    ]

    def apply() -> None:
        first.apply(stage.live)

    def apply_after_reset() -> None:
        stage.reset()
        apply()

    def copy() -> None:
        for name, row in stage.live.items():
            stage.pristine[name].copy_(row)  # equal, so nothing is lost

    def scatter() -> None:
        for row, where, patterns in ready:
            row.index_copy_(0, where, patterns)

    return {
        "memcpy": Contestant(copy, stage.reset),
        "write": Contestant(_writer(stage, first.indices, first.values), stage.reset),
        "apply": Contestant(apply, stage.reset),
        "undo": Contestant(_writer(stage, first.indices, before), apply_after_reset),
        "raw index_copy_": Contestant(scatter, stage.reset),
    }


def _swaps(stage: Stage) -> dict[str, Contestant]:
    ours, theirs = (random_delta(patchable(stage.live), seed) for seed in (101, 102))
    before = ours.check(stage.live)
    undo, write = (
        _writer(stage, ours.indices, before),
        _writer(stage, theirs.indices, theirs.values),
    )

    def swap() -> None:
        undo()
        theirs.apply(stage.live)

    def start(at: int) -> Callable[[], None]:
        return lambda: mm_piece.checkout(stage.model, at)

    def first() -> None:
        stage.reset()
        ours.apply(stage.live)

    def anew() -> None:
        stage.reset()
        attach_base(stage.model, stage.store)

    return {
        "swap, write": Contestant(_both(undo, write), first),
        "swap": Contestant(swap, first),
        "checkout 1 -> 2": Contestant(start(2), _both(anew, start(1))),
        "checkout 2 -> 1": Contestant(start(1), _both(anew, start(2))),
    }


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        first()
        second()

    return run


def _writer(
    stage: Stage, index: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> Callable[[], None]:
    return lambda: put_all(_writes(stage, index, values))


def _writes(stage: Stage, index: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Any:
    return [(stage.live[name], row, values[name]) for name, row in index.items()]


def _shira(stage: Stage) -> tuple[dict[str, Contestant], dict[str, int]]:
    """Return PEFT's SHiRA on a second model that shares the first one's memory, and its facts."""
    config = stage.model.config
    twin = empty_model(SIZES[config.hidden_size], config.num_hidden_layers)
    twin.load_state_dict(stage.model.state_dict(), assign=True)
    model = shira.adapted(twin, LINEARS)
    model.merge_adapter()
    model.unmerge_adapter()
    changed = [bits(row) != bits(stage.pristine[name]) for name, row in stage.live.items()]
    stage.reset()
    pair = {
        "SHiRA merge": Contestant(model.merge_adapter, stage.reset),
        "SHiRA unmerge": Contestant(model.unmerge_adapter),
    }
    left = sum(int(row.sum()) for row in changed)
    return pair, {"entries": shira.entries(model), "entries_not_restored": left}


def _composed(stage: Stage, rounds: int, quick: bool) -> dict[str, dict[str, float]]:
    counts = COMPOSED[:3] if quick else COMPOSED
    part = patchable(stage.live)
    deltas = [random_delta(part, seed) for seed in range(max(counts))]
    made = {count: compose(deltas[:count]) for count in counts}

    def composer(count: int) -> Callable[[], Any]:
        return lambda: compose(deltas[:count])

    def writer(count: int) -> Callable[[], None]:
        entries = made[count]
        index = {name: row for name, (row, _) in entries.items()}
        return _writer(stage, index, {name: row for name, (_, row) in entries.items()})

    contestants: dict[str, Any] = {f"compose {count}": composer(count) for count in counts}
    contestants |= {f"write {count}": Contestant(writer(count), stage.reset) for count in counts}
    return interleaved(contestants, rounds, stage.flush)


def _goals(times: Mapping[str, Mapping[str, float]], exact: bool) -> list[dict[str, Any]]:
    def share(name: str) -> float:
        return times[name]["cpu_s"] / times["memcpy"]["cpu_s"]

    return [
        goal("write / memcpy", share("write"), 0.12),
        goal("apply with its checks / memcpy", share("apply"), 0.12),
        goal("swap, the write alone / memcpy", share("swap, write"), 0.2),
        goal("swap with its checks / memcpy", share("swap"), 0.2),
        goal("checkout 2 -> 1 / memcpy", share("checkout 2 -> 1"), 0.2),
        goal("undo exact", exact, 1, "at least"),
    ]


def tables(result: dict[str, Any]) -> list[Table]:
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
