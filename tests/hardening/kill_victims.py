"""Writers of delta stores that are made to be killed, and what must be true of what they leave.

VICTIMS    name -> a call that prepares a folder and returns the victim: a call with the store
end_of     what an uninterrupted run repeats, bit for bit
inspect    what is listed is whole and right, whenever the writer died
"""

import hashlib
import os
import socket
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fuzz_stores import BASE, answers, delta_at, results

from mm_piece.deltas.delta import Delta
from mm_piece.store.delta_store import DeltaStore

POSITIONS = 30
ENTRIES = 2000

Report = Callable[
    [int], None
]  # says that the work began, then each position that is there for good
Victim = Callable[[Path, Report], None]
End = dict[str, Any]
Chosen = tuple[str, float, int]  # method, density, seed

TRAINED: dict[str, Chosen] = {
    "train": ("piece-s", 0.02, 3),
    # So few entries that of a norm's weight and bias often one alone is trained.
    "train-random": ("random", 0.005, 12),
    "train-few": ("piece-f", 0.005, 47),
}


# --- victims --------------------------------------------------------------------------------------


def write_store(folder: Path, report: Report) -> None:
    """Append deltas and results until all are there; go on where an earlier writer died."""
    report(0)
    store = _open_or_create(folder)
    while len(store) < POSITIONS or _measured(store) <= POSITIONS:
        if _measured(store) > len(store):
            parent = store.entries[-1].sha256 if len(store) else ""
            report(store.append(delta_at(len(store) + 1, parent, ENTRIES)).position)
        position = _measured(store)
        store.write_answers(position, answers(position))
        store.write_results(results(POSITIONS, position))


def _open_or_create(folder: Path) -> DeltaStore:
    if (folder / "store.json").exists():
        return DeltaStore.open(folder)
    return DeltaStore.create(folder, {"fingerprint": BASE}, "base: x\n")


def _measured(store: DeltaStore) -> int:
    """Return the first position that has no results."""
    return len(store.results().get("matrix", []))


def train(base: Path, chosen: Chosen, folder: Path, report: Report) -> None:
    """Train the three tasks of `test_laws`; go on where an earlier training died."""
    from tiny_recipe import recipe_for

    import mm_piece

    method, density, seed = chosen
    recipe = recipe_for(base, folder, method)
    select = recipe.select.model_copy(update={"density": density})
    recipe = recipe.model_copy(update={"select": select, "seed": seed})
    report(0)
    mm_piece.train(recipe)


def train_together(
    base: Path, section: dict[str, Any] | None, folder: Path, report: Report
) -> None:
    """The same in two processes, which this one has started and waits for."""
    from engines import config_of
    from tiny_recipe import recipe_for

    recipe = recipe_for(base, folder, "piece-s")
    engine = {} if section is None else {"deepspeed": config_of(section)}
    half = recipe.train["per_device_train_batch_size"] // 2
    together = {**recipe.train, **engine, "per_device_train_batch_size": half}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = get_context("fork").Process
    recipe = recipe.model_copy(update={"train": together})
    ranks = [fork(target=_rank, args=(recipe, rank, port)) for rank in range(2)]
    for process in ranks:
        process.start()
    report(0)
    for process in ranks:
        process.join()
    failed = [rank for rank, process in enumerate(ranks) if process.exitcode]
    if failed:
        raise RuntimeError(f"processes {failed} failed")


def _rank(recipe: Any, rank: int, port: int) -> None:
    import mm_piece
    from mm_piece import distributed

    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
        **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    try:
        mm_piece.train(recipe)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        distributed.exit_process(1)
    distributed.exit_process(0)


def make_base(folder: Path, report: Report) -> None:
    """Make the tiny LLaVA that is trained."""
    from tiny_llava import make_llava

    report(0)
    make_llava(folder)


def prepare_store(folder: Path, run: Callable[[Callable[[Report], None]], None]) -> Victim:
    """Return the writer; it needs nothing."""
    return write_store


def prepare_train(
    folder: Path, run: Callable[[Callable[[Report], None]], None], chosen: Chosen = TRAINED["train"]
) -> Victim:
    """Return the training; import and read here what no victim shall spend its time on."""
    import tiny_recipe  # noqa: F401

    from mm_piece.data import read

    read("scenes:digits/train[:1]")
    run(partial(make_base, folder / "base"))
    return partial(train, folder / "base", chosen)


def prepare_ddp(folder: Path, run: Callable[[Callable[[Report], None]], None]) -> Victim:
    """Return the training in two processes."""
    prepare_train(folder, run)
    return partial(train_together, folder / "base", None)


def prepare_zero3(folder: Path, run: Callable[[Callable[[Report], None]], None]) -> Victim:
    """Return the training in two processes, each with its part of every weight."""
    import deepspeed  # noqa: F401 - no victim shall spend its time on it
    from engines import ENGINES

    prepare_train(folder, run)
    return partial(train_together, folder / "base", ENGINES["zero3"])


VICTIMS = {
    "store": prepare_store,
    **{name: partial(prepare_train, chosen=chosen) for name, chosen in TRAINED.items()},
    **{"ddp": prepare_ddp, "zero3": prepare_zero3},
}


# --- what must be true ----------------------------------------------------------------------------


class Finding(Exception):
    """Something that must not happen."""


def require(sound: bool, problem: str) -> None:
    """Raise a finding unless all is well."""
    if not sound:
        raise Finding(problem)


def end_of(folder: Path) -> End:
    """Return everything about a store that an uninterrupted run repeats."""
    store = DeltaStore.open(folder)
    store.verify()
    measured = {key: value for key, value in store.results().items() if key != "seconds"}
    said = [store.answers(position) for position in range(len(store) + 1)]
    return {"deltas": [e.sha256 for e in store.entries], "results": measured, "answers": said}


def inspect(folder: Path, acknowledged: int, whole: End) -> str:
    """Return where the writer died; raise unless all that is listed is whole and right."""
    if not (folder / "store.json").exists():
        require(acknowledged == 0, "a store that was acknowledged is gone")
        return "before the store was there"
    store = DeltaStore.open(folder)
    store.verify()
    require(len(store) >= acknowledged, f"{acknowledged} deltas acknowledged, {len(store)} there")
    for entry in store.entries:
        data = (folder / entry.file).read_bytes()
        require(hashlib.sha256(data).hexdigest() == entry.sha256, f"{entry.file} is not whole")
        Delta.from_bytes(data)
    listed = [entry.sha256 for entry in store.entries]
    require(listed == whole["deltas"][: len(store)], "deltas other than those of a whole run")
    matrix = store.results().get("matrix", [])
    require(matrix == whole["results"]["matrix"][: len(matrix)], "results of another run")
    require(len(matrix) <= len(store) + 1, "results of positions that are not there")
    return _place_of_death(folder, store)


def _place_of_death(folder: Path, store: DeltaStore) -> str:
    """Tell from what lies around."""
    listed = {entry.file for entry in store.entries}
    signs = {
        "in the middle of a file": any(folder.rglob(".*.tmp")),
        "between a delta and the manifest": {f.name for f in folder.glob("0*.s*")} > listed,
        f"in the middle of task {len(store) + 1}": any(
            file.is_file() for file in (folder / "work").rglob("*")
        ),
        "between a delta and its results": _measured(store) <= len(store),
    }
    return next((place for place, there in signs.items() if there), "between two positions")
