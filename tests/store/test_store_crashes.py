"""Laws of the store: one writer, what is listed is whole, whoever dies, and the rest can go."""

import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_store import delta_for, make, write_forever

from mm_piece.errors import LockedError, MismatchError, StoreError
from mm_piece.store.delta_store import DeltaStore


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
            lambda: other.extend([], []),
            lambda: other.gc(),
            lambda: other.gc(dry_run=True),
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
        store.write_results({"tasks": [], "matrix": []})
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


@pytest.mark.slow
def test_a_killed_writer_leaves_a_sound_store(tmp_path):
    """Ten times: kill -9 at a random instant, then open, verify, go on."""
    path = make(tmp_path / "store").path
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["mm_piece.store.delta_store"])
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


# --- a system that refuses ----------------------------------------------------------------------

PREAMBLE = f"""
import os, resource, signal, sys
import filelock  # a store imports it late, and the user without rights cannot read it
sys.path.insert(0, {str(Path(__file__).parents[1] / "support")!r})
from pathlib import Path
from made_store import delta_for
from mm_piece.errors import StoreError
from mm_piece.store.copying import transfer_positions
from mm_piece.store.delta_store import DeltaStore

def refused(act, reason):
    try:
        act()
    except StoreError as error:
        assert reason in str(error) and "\\n" not in str(error), error
    else:
        raise AssertionError("it was allowed")

"""
NO_RIGHTS = """
if os.getuid() == 0:
    os.setuid(65534)  # permissions bind everybody else
store = DeltaStore.open("store")
assert len(store.verify()) == 3 and store.results() == {} and "base" in store.recipe
for act in (
    lambda: store.append(delta_for(store)),
    lambda: store.write_results({}),
    lambda: store.gc(),
    lambda: transfer_positions(store, "new"),
    lambda: transfer_positions(store, "store/inner"),
):
    refused(act, "Permission denied")
"""
NO_SPACE = """
store, large = DeltaStore.open("store"), DeltaStore.open("large")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
refused(lambda: store.append(delta_for(store, info={"long": "x" * 5000})), "File too large")
refused(lambda: transfer_positions(large, "store"), "File too large")
assert len(DeltaStore.open("store").verify()) == 3
assert sorted(os.listdir("store")) == sys.argv[1:], os.listdir("store")
store.append(delta_for(store))
refused(lambda: transfer_positions(large, "new"), "File too large")
assert not os.path.lexists("new")
"""


def run_in(folder: Path, code: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_store_without_rights_can_be_read_and_says_so_in_one_line(store):
    for folder in (store.path, store.path.parent):
        folder.chmod(0o555)
    try:
        run_in(store.path.parent, NO_RIGHTS)
    finally:
        for folder in (store.path.parent, store.path):
            folder.chmod(0o755)


@pytest.mark.slow
def test_a_full_disk_changes_nothing(store, tmp_path):
    large = make(tmp_path / "large")
    for entry in store.entries:
        large.extend([entry], [store.data(entry.position)])
    large.append(delta_for(large, info={"long": "x" * 5000}))
    run_in(tmp_path, NO_SPACE, *sorted(path.name for path in store.path.iterdir()))


# --- what nothing lists -------------------------------------------------------------------------


def plant(store: DeltaStore, *names: str, content: bytes = b"") -> list[Path]:
    paths = [store.path / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return paths


def listing(store: DeltaStore) -> list[str]:
    return sorted(path.relative_to(store.path).as_posix() for path in store.path.rglob("*"))


def test_gc_removes_what_the_library_made_and_nothing_lists(store):
    store.write_answers(3, {})
    delta = store.data(2)
    kept = ["README.md", "base/model.safetensors", "report.html", "notes.tmp", ".hidden.tmp"]
    kept += ["0009-Mine.safetensors", "009-mine.safetensors", "0009-mine.bin", "0000.json"]
    kept += ["work/0004/mask.safetensors", "work/0005/x", "work/notes", "answers/notes.json"]
    kept += ["kept/0003.safetensors", "kept/0004.json", "answers/0004.safetensors"]
    kept += ["logs/0001/events", "answers/0004.txt", "base/0004-x.safetensors", "work/0001.txt"]
    plant(store, *kept)
    (store.path / "0008-link.safetensors").symlink_to(store.entries[0].file)
    (store.path / "answers" / "0007.json").mkdir()
    before = listing(store)
    files = ["0002-task-3.safetensors", "0004-other.safetensors"]
    garbage = plant(store, *files, content=delta)
    garbage += plant(store, "0009-damaged.safetensors")
    garbage += plant(store, ".0004-x.safetensors.1.tmp", "answers/.0003.json.77.tmp")
    garbage += plant(store, "answers/0004.json", "answers/10000.json")
    garbage += plant(store, "kept/0004.safetensors", "kept/.0003.safetensors.77.tmp")
    plant(store, "work/0001/checkpoint-2/model", "work/0003/x")
    garbage += [store.path / "work" / "0001", store.path / "work" / "0003"]
    littered = listing(store)
    assert DeltaStore.open(store.path).gc(dry_run=True) == sorted(garbage)
    assert listing(store) == littered
    assert store.gc() == sorted(garbage)
    assert listing(store) == before
    assert store.gc() == []
    assert len(store.verify()) == 3


def test_gc_counts_what_others_appended(store):
    other = DeltaStore.open(store.path)
    plant(store, "work/0004/x")
    other.append(delta_for(other))
    assert store.gc() == [store.path / "work" / "0004"]
    assert len(store) == 4


def test_gc_and_writers_leave_linked_folders_alone(store, tmp_path):
    outside = tmp_path / "outside"
    for name in ("work", "answers"):
        plant(store, f"../outside/{name}/0001/x", f"../outside/{name}/.0009.json.1.tmp")
        (store.path / name).symlink_to(outside / name)
    (outside / "answers" / "0000.json").write_text('{"a": []}')
    before = sorted(outside.rglob("*"))
    assert store.gc() == []
    store.append(delta_for(store))
    for act in (lambda: store.answers(0), lambda: store.write_answers(0, {}), store.verify):
        with pytest.raises(StoreError, match="leads out of the store"):
            act()
    assert sorted(outside.rglob("*")) == before
