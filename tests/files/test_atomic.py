"""Files and folders are there whole or not at all; a disk that refuses is told by their name."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mm_piece.errors import StoreError
from mm_piece.files import atomic
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.manifest import require_folders_inside

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_link_that_was_planted_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr(atomic.secrets, "randbelow", lambda most: 7)
    planted = tmp_path / ".new.7.tmp"
    for target in (victim, tmp_path / "nowhere"):
        planted.symlink_to(target)
        with pytest.raises(OSError, match="File exists.*new'$"):
            atomic.write_atomically(tmp_path / "new", b"x")
        assert planted.is_symlink()  # it was not ours to remove
        planted.unlink()
    assert victim.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]


def test_temporary_names_cannot_be_foreseen(tmp_path):
    names = set()
    for _ in range(20):
        with atomic.writing_atomically(tmp_path / "a"):
            (temporary,) = tmp_path.glob(".a.*.tmp")
            names.add(temporary.name)
    assert len(names) == 20
    assert not any(str(os.getpid()) == name.split(".")[2] for name in names)


def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "path"
    victim.write_text("mine")
    path.symlink_to(victim)
    atomic.write_atomically(path, b"new")
    assert (victim.read_text(), path.read_bytes(), path.is_symlink()) == ("mine", b"new", False)


def test_a_file_is_as_open_as_others(tmp_path):
    before = os.umask(0o022)
    try:
        atomic.write_atomically(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("durable", [True, False])
def test_an_error_without_a_name_gets_one(tmp_path, durable):
    path = tmp_path / "a"
    for error in (FULL, OSError(errno.EIO, "Input/output error", str(tmp_path / "other"))):
        with (
            pytest.raises(OSError) as caught,
            atomic.writing_atomically(path, durable=durable) as file,
        ):
            file.write(b"half")
            raise error
        assert caught.value.errno == error.errno
        assert caught.value.filename == (error.filename or str(path))
        assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="no/a'$"):
        atomic.write_atomically(tmp_path / "no" / "a", b"")


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    to = tmp_path / "to"
    copied = OSError(errno.ENOSPC, "No space left on device", "from", None, "to")
    for error in (FULL, copied):
        with pytest.raises(OSError) as caught, atomic.creating_folder(to) as folder:
            (folder / "a").write_text("half")
            if error is copied:
                error.filename2 = str(folder / "a")
            raise error
        assert caught.value.filename == str(to)
        assert not list(tmp_path.iterdir())
    to.mkdir()
    with atomic.creating_folder(to) as folder:
        (folder / "a").write_text("whole")
    assert (to / "a").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["to"]


# --- links in a store -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["work", "logs", "kept", "work/0001", "work/0001/encoded/x"])
def test_a_training_writes_through_no_link_out_of_its_store(tmp_path, name):
    store = DeltaStore.create(tmp_path / "store", {"fingerprint": "ab" * 32}, "")
    (tmp_path / "outside").mkdir()
    link = store.path / name
    link.parent.mkdir(parents=True, exist_ok=True)
    require_folders_inside(store.path)
    link.symlink_to(tmp_path / "outside")
    with pytest.raises(StoreError, match=f"{name}: leads out of the store"):
        require_folders_inside(store.path)


def test_a_lock_is_not_taken_through_a_link(tmp_path):
    store = DeltaStore.create(tmp_path / "store", {"fingerprint": "ab" * 32}, "")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (store.path / ".lock").unlink(missing_ok=True)
    (store.path / ".lock").symlink_to(victim)
    with pytest.raises(StoreError, match=r"\.lock"):
        DeltaStore.open(store.path).write_results({})
    assert victim.read_text() == "mine"


# --- a full disk ----------------------------------------------------------------------------------

FULL_DISK = """
import os, re, resource, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from click.testing import CliRunner
from derived_store import made_store
from mm_piece.cli import main
from mm_piece.files.atomic import write_atomically

base, here = {base!r}, Path.cwd()
store, _ = made_store(here / "store", base)
first, second = (str(here / "store" / entry.file) for entry in store.entries[:2])
store.write_answers(0, {{"t": [dict(row=0, prompt="x" * 9000, answer="", prediction="", score=1)]}})
for command in (["convert", first, "coo", "--format", "coo"], ["squash", "store", "one"]):
    assert CliRunner().invoke(main, command).exit_code == 0
before = sorted(os.listdir())
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
for line in {commands!r}:
    command = [{{"FIRST": first, "BASE": base}}.get(word, word) for word in line.split()]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2, (line, done.output, done.exception)
    told = done.stderr
    assert told.startswith("Error: ") and told.count("\\n") == 1, (line, told)
    assert re.search(r"\\bto(/[^:]*)?:( cannot be written:)? File too large", told), (line, told)
    left = sorted(set(os.listdir()) - set(before))
    if left:  # a store that is there without what did not fit
        assert left == ["to"] and line.split()[0] in ("push", "pull", "fork", "without"), left
        assert CliRunner().invoke(main, ["verify", "to"]).exit_code == 0
        assert not list(Path("to").rglob(".*.tmp"))
        import shutil
        shutil.rmtree("to")
assert CliRunner().invoke(main, ["verify", "store"]).exit_code == 0
"""
COMMANDS = (
    "export store to",
    "export store to --shard-size 20KB",
    "squash store to",
    "merge BASE to FIRST",
    "extract BASE BASE2 to",
    "convert FIRST to --format raw",
    "convert FIRST to --format vllm",
    "import coo BASE to --format coo",
    "fork store to --at 2",
    "push store ./to",
    "pull ./store to",
    "report store --to to",
)


@pytest.mark.slow
def test_a_full_disk_is_told_by_the_name_of_the_file(base, tmp_path):
    other = tmp_path / "other"
    from tiny_llava import make_llava

    make_llava(other, seed=3)
    commands = [command.replace("BASE2", str(other)) for command in COMMANDS]
    code = FULL_DISK.format(
        tests=str(Path(__file__).parents[1] / "support"), base=str(base), commands=commands
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
