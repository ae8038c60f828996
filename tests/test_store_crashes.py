"""Laws of the store: one writer at a time, and what is listed is whole, whoever dies."""

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
from test_store import delta_for, make

from mm_piece.errors import LockedError, MismatchError, StoreError
from mm_piece.store import DeltaStore


@pytest.fixture
def store(tmp_path):
    return make(tmp_path / "store", deltas=3)


# --- one writer ---------------------------------------------------------------------------------


def test_a_second_writer_is_turned_away(store):
    other = DeltaStore.open(store.path)
    with store.writing():
        for act in (
            lambda: other.append(delta_for(other)),
            lambda: other.write_results({}),
            lambda: other.write_answers(0, {}),
            lambda: other.writing().__enter__(),
        ):
            with pytest.raises(LockedError) as caught:
                act()
            assert "\n" not in str(caught.value)
        assert len(other.verify()) == 3  # reading needs no lock
    other.append(delta_for(other))


def test_writing_nests_and_ends(store):
    with store.writing():
        with store.writing():
            store.append(delta_for(store))
        store.write_results({"matrix": []})
        store.append(delta_for(store))
        with pytest.raises(LockedError):
            DeltaStore.open(store.path).write_results({})
    with pytest.raises(RuntimeError), store.writing():
        raise RuntimeError
    DeltaStore.open(store.path).append(delta_for(store))


def test_a_writer_sees_what_others_added_before(store):
    late = delta_for(store)
    other = DeltaStore.open(store.path)
    other.append(delta_for(other))
    with pytest.raises(MismatchError, match="parent of position 5"):
        store.append(late)
    assert len(store) == 4
    store.append(delta_for(store))
    assert len(DeltaStore.open(store.path).verify()) == 5


# --- crashes ------------------------------------------------------------------------------------


class Crash(BaseException):
    """What no `except OSError` stops."""


@pytest.mark.parametrize("error", [Crash(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("step", range(6))
def test_a_failure_at_any_step_loses_nothing(store, monkeypatch, step, error):
    """An append syncs, renames and syncs the directory, for the delta and for the manifest."""
    countdown = iter(range(step, -1, -1))

    def failing(call):
        def wrapped(*arguments):
            if next(countdown, None) == 0:
                raise error
            return call(*arguments)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync))
        patch.setattr(Path, "replace", failing(Path.replace))
        with pytest.raises((Crash, StoreError)):
            store.append(delta_for(store, "new"))
    opened = DeltaStore.open(store.path)
    assert len(opened.verify()) == (4 if step == 5 else 3)
    opened.append(delta_for(opened, "again"))
    assert opened.verify()[-1].task == "again"
    assert not list(store.path.glob(".*.tmp"))


def test_an_append_has_just_these_steps(store, monkeypatch):
    steps = []
    sync, rename = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (steps.append("sync"), sync(file)))
    monkeypatch.setattr(Path, "replace", lambda *a: (steps.append(a[1].name), rename(*a)))
    entry = store.append(delta_for(store))
    assert steps == ["sync", entry.file, "sync", "sync", "store.json", "sync"]


def test_leftovers_of_a_crash_are_swept_by_the_next_writer(store):
    (store.path / ".0004-x.safetensors.1.tmp").write_bytes(b"half")
    (store.path / "0004-other.safetensors").write_bytes(b"unlisted")
    DeltaStore.open(store.path).append(delta_for(store))
    assert not list(store.path.glob(".*.tmp"))
    assert len(DeltaStore.open(store.path).verify()) == 4


def write_forever(path: str, acknowledged) -> None:
    store = DeltaStore.open(path)
    while True:
        entry = store.append(delta_for(store, entries=20_000))
        store.write_results({"matrix": [[0.5]] * entry.position})
        acknowledged.send(entry.position)


def test_a_killed_writer_leaves_a_sound_store(tmp_path):
    """Ten times: kill -9 at a random instant, then open, verify, go on."""
    path = make(tmp_path / "store").path
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["mm_piece.store"])
    chance = random.Random(0)
    for _ in range(10):
        receiver, sender = forks.Pipe(duplex=False)
        writer = forks.Process(target=write_forever, args=(str(path), sender))
        writer.start()
        assert receiver.poll(60)
        time.sleep(chance.random() * 0.05)
        writer.kill()
        writer.join()
        sender.close()
        store = DeltaStore.open(path)
        assert len(store.verify()) >= last_of(receiver)
        assert len(store.results()["matrix"]) <= len(store)
        store.append(delta_for(store, "by the heir"))
        assert not list(path.glob(".*.tmp"))
    assert sum(entry.task == "by the heir" for entry in store.entries) == 10


def last_of(receiver) -> int:
    """The last position that a writer acknowledged before it died."""
    position = 0
    while receiver.poll():
        try:
            position = receiver.recv()
        except EOFError:
            break
    return position
