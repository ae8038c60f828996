"""Laws of stores that travel: what arrives is whole and the same, nothing is overwritten."""

import errno
import os
from pathlib import Path

import pytest
from full_store import RESULTS, TASKS, answers, content, full
from made_store import BASE, delta_for, make

from mm_piece.errors import LockedError, PieceError, PositionError, StoreError
from mm_piece.files import atomic
from mm_piece.store.copying import fork, transfer_positions
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.sharing import pull, push


@pytest.fixture
def store(tmp_path):
    return full(tmp_path / "store")


def refused(act, *parts: str, error: type[PieceError] = StoreError) -> None:
    with pytest.raises(error) as caught:
        act()
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


# --- transfer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [[3], [None], [0, 1, 3], [1, 2, None], [2, 2, 1, 3, 0]])
def test_a_copy_is_the_same_whatever_the_steps(store, tmp_path, steps):
    for at in steps:
        transfer_positions(store, tmp_path / "copy", at)
    copy = DeltaStore.open(tmp_path / "copy")
    assert copy.verify() == store.entries
    assert (copy.results(), copy.answers(2), copy.base.facts) == (RESULTS, answers(2), BASE)
    kept = {n: data for n, data in content(store.path).items() if n[:4] not in ("logs", "work")}
    del kept["base/model.safetensors"]
    assert content(copy.path) == kept


def test_a_part_is_measured_up_to_its_end(store, tmp_path):
    copy = transfer_positions(store, str(tmp_path / "copy"), at=1)
    assert (copy.verify(), copy.recipe) == (store.entries[:1], store.recipe)
    cut = {"matrix": RESULTS["matrix"][:2], "base_ability": [1, 0.75]}
    cut |= {"base_kinds": {"colour": [1, 1]}, "seconds": {"Task 1!": {"train": 1.5}}}
    assert copy.results() == {**RESULTS, **cut}
    assert sorted(path.name for path in copy.path.glob("answers/*")) == ["0000.json", "0001.json"]


def test_a_copy_that_is_ahead_or_measured_further_keeps_what_it_has(store, tmp_path):
    bare = make(tmp_path / "bare", deltas=3)
    before = content(store.path)
    for at in (0, 2, None):
        assert len(transfer_positions(bare, store.path, at)) == 3
    assert content(store.path) == before
    for part in (store, transfer_positions(store, tmp_path / "part", 1)):
        assert len(transfer_positions(part, store.path)) == 3
    assert content(store.path) == before
    transfer_positions(store, bare.path)  # only the measurements were missing
    assert bare.results() == RESULTS


def test_another_base_and_another_history_are_refused(store, tmp_path):
    other = make(tmp_path / "other", deltas=1)
    other.append(delta_for(other, "x"))
    branch = DeltaStore.create(tmp_path / "base", BASE | {"fingerprint": "cd" * 32}, "")
    digest = [DeltaStore.create(tmp_path / d, BASE | {"digest": d * 32}, "") for d in ("ab", "cd")]
    before = content(tmp_path)
    first, second = (s.entries[1].sha256[:12] for s in (other, store))
    refused(lambda: transfer_positions(store, other.path), "diverged at position 2", first, second)
    refused(lambda: transfer_positions(other, store.path), "diverged at position 2", first, second)
    refused(
        lambda: transfer_positions(store, branch.path),
        "another base",
        "cdcdcdcdcdcd",
        "abababababab",
    )
    refused(lambda: transfer_positions(digest[0], digest[1].path), "another base: digest")
    refused(lambda: transfer_positions(store, tmp_path / "new", 4), "0…3", error=PositionError)
    refused(lambda: transfer_positions(store, tmp_path / "new", -1), "0…3", error=PositionError)
    assert content(tmp_path) == before
    assert len(transfer_positions(store, other.path, at=1)) == 2  # up to there they agree
    assert (
        len(transfer_positions(store, digest[0].path)) == 3
    )  # a digest that is not known differs from none


@pytest.mark.parametrize("name", ["0003-task-3.safetensors", "results.json", "answers/0002.json"])
def test_nothing_is_written_unless_all_is_sound(store, tmp_path, name):
    data = bytearray((store.path / name).read_bytes())
    data[len(data) // 2] ^= 255
    (store.path / name).write_bytes(data)
    copy = transfer_positions(make(tmp_path / "copy", deltas=1), tmp_path / "copy")
    before = content(copy.path)
    for to in (copy.path, tmp_path / "new"):
        refused(lambda to=to: transfer_positions(store, to), name, error=PieceError)
        refused(lambda to=to: pull(store.path, to), name, error=PieceError)
        refused(lambda to=to: push(store, to), name, error=PieceError)
    assert content(copy.path) == before
    assert not (tmp_path / "new").exists()


def test_the_base_is_named_from_the_new_place(store, tmp_path):
    inside = DeltaStore.create(tmp_path / "in", BASE | {"folder": "../store/base"}, "")
    assert transfer_positions(inside, tmp_path / "a" / "b").base.folder == "../../store/base"
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert transfer_positions(inside, tmp_path / "link" / "c").base.folder == "../../store/base"
    hub = DeltaStore.create(tmp_path / "hub", BASE | {"hub": "a/b", "revision": "1"}, "")
    assert transfer_positions(hub, tmp_path / "d").base == hub.base


class Crash(BaseException):
    """What no `except OSError` stops."""


@pytest.mark.parametrize("start", [None, 1])
def test_a_crash_at_any_file_leaves_a_sound_store(store, tmp_path, monkeypatch, start):
    write, written = atomic.write_atomically, 0
    transfer_positions(store, tmp_path / "whole")
    for crash_at in range(20):
        to, written = tmp_path / f"copy{crash_at}", 0
        if start:
            transfer_positions(store, to, start)

        def failing(path, data, last=crash_at):
            nonlocal written
            written += 1
            if written > last:
                raise Crash
            write(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(atomic, "write_atomically", failing)
            try:
                transfer_positions(store, to)
                break
            except Crash:
                pass
        if (to / "store.json").exists():
            assert len(DeltaStore.open(to).verify()) in (start or 0, 3)
        assert transfer_positions(store, to).verify() == store.entries
        assert content(to) == content(tmp_path / "whole")
    assert crash_at == {None: 12, 1: 9}[start]  # every file was the last one once


@pytest.mark.parametrize("act", [transfer_positions, push, lambda store, to: fork(store, to, 2)])
def test_a_new_store_is_there_whole_or_not_at_all(store, tmp_path, monkeypatch, act):
    write, to = atomic.write_atomically, tmp_path / "to"
    act(store, tmp_path / "whole")
    for last in range(20):
        left = iter(range(last))

        def failing(path, data, left=left):
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            write(path, data)

        before = sorted(tmp_path.iterdir())
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "write_atomically", failing)
            try:
                act(store, to)
                break
            except StoreError as error:
                assert str(error).startswith(str(to)) and "No space left" in str(error)
        assert sorted(tmp_path.iterdir()) == before
    assert last > 5
    assert content(to).keys() == content(tmp_path / "whole").keys()


def test_a_store_that_somebody_writes_to_is_not_continued(store, tmp_path):
    copy = transfer_positions(store, tmp_path / "copy", 1)
    with copy.writing():
        refused(
            lambda: transfer_positions(store, tmp_path / "copy"),
            "another writer",
            error=LockedError,
        )
    with store.writing():  # reading needs no lock
        assert len(transfer_positions(store, tmp_path / "copy")) == 3


# --- fork ---------------------------------------------------------------------------------------


def test_branches_share_their_past_and_nothing_else(store, tmp_path):
    branch = fork(store, tmp_path / "branch", 2)
    assert branch.verify() == store.entries[:2]
    assert [branch.data(t) for t in (1, 2)] == [store.data(t) for t in (1, 2)]
    assert branch.recipe == store.recipe  # no recipe of `train`: it stays
    tasks = {"tasks": TASKS[:2], "matrix": [[0, 0], [1, 0], [0.5, 1]]}
    assert {key: branch.results()[key] for key in tasks} == tasks
    store.write_recipe("{base: b, store: s, tasks: [{name: x, train: t, test: t}]}")
    assert fork(store, tmp_path / "foreign recipe", 1).recipe == store.recipe
    store.append(delta_for(store, "old way"))
    branch.append(delta_for(branch, "new way"))
    assert [entry.task for entry in branch.verify()] == [*TASKS[:2], "new way"]
    assert [entry.task for entry in store.verify()] == [*TASKS, "old way"]
    refused(lambda: transfer_positions(branch, store.path), "diverged at position 3")


def test_what_cannot_be_forked(store, tmp_path):
    for at in (0, -1, 4):
        refused(lambda at=at: fork(store, tmp_path / "new", at), "1…3", error=PositionError)
    before = content(store.path)
    refused(lambda: fork(store, store.path, 1), "is a store already")
    refused(lambda: fork(store, tmp_path / "store" / "store.json", 1), "store.json")
    assert content(store.path) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_fork_is_trained_differently(base, tmp_path):
    from tiny_recipe import recipe_for

    import mm_piece

    whole = recipe_for(base, tmp_path / "whole").model_copy(update={"general": ()})
    digits, words, charts = whole.tasks
    store = mm_piece.train(whole.model_copy(update={"tasks": (digits, words)}))
    branch = fork(store, tmp_path / "deep" / "branch", 1)
    other = {"store": str(branch.path), "tasks": (digits, charts)}
    trained = mm_piece.train(whole.model_copy(update=other))
    assert [entry.task for entry in trained.verify()] == ["digits", "charts"]
    assert trained.entries[0] == store.entries[0]
    assert trained.entries[1].parent == store.entries[1].parent
    assert trained.results()["tasks"] == ["digits", "charts"]
    assert len(trained.results()["matrix"]) == 3
    direct = {"store": str(tmp_path / "direct"), "tasks": (digits, charts)}
    assert mm_piece.train(whole.model_copy(update=direct)).entries == trained.entries
    refused(lambda: mm_piece.train(whole.model_copy(update={"store": str(branch.path)})), "tasks")


# --- places -------------------------------------------------------------------------------------


def test_folders_in_all_their_forms(store, tmp_path, monkeypatch):
    (tmp_path / "user" / "there").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    forms = ["./a/b", "../" + tmp_path.name + "/c", "plain", "a/b/c", "user/there", "~/d"]
    forms += [
        str(tmp_path / "e"),
        (tmp_path / "with space").as_uri(),
        f"file://localhost{tmp_path}/f",
    ]
    for place in [*forms, Path("user/new")]:
        assert "a store with positions 0…3" in push(store, place)
    places = [
        "a/b",
        "c",
        "plain",
        "a/b/c",
        "user/there",
        "home/d",
        "e",
        "with space",
        "f",
        "user/new",
    ]
    for place in places:
        assert len(DeltaStore.open(tmp_path / place).verify()) == 3
    assert len(pull("file://" + str(tmp_path / "c"), "got")) == 3
    assert not (tmp_path / "c" / "README.md").exists()  # a card is for the Hub


def test_what_is_no_place(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = content(tmp_path)
    for place in ("", "https://some.where/user/name", "hf://user/name", "file://far/x"):
        refused(lambda p=place: push(store, p), "allowed: user/name on the Hub")
    for place in ("user/", "us er/name", "user/näme", "-user/name", "user/name?x"):
        refused(lambda p=place: pull(p, "new"), "allowed: user/name on the Hub")
    refused(lambda: push(store, "file:relative?x=1/y/z?", revision="main"), "Hub", "folder")
    refused(lambda: push(store, "./a", private=True), "Hub", "folder")
    refused(lambda: pull("./store", "a", revision="main"), "Hub", "folder")
    refused(lambda: pull("./nothing", "a"), "not a delta store")
    assert content(tmp_path) == before


def test_user_name_is_of_the_hub_which_is_switched_off(store, tmp_path):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    refused(lambda: push(store, "user/name"), "user/name: ", "unset HF_HUB_OFFLINE")
    refused(lambda: pull("user/name", tmp_path / "new"), "user/name: ", "unset HF_HUB_OFFLINE")
    assert not (tmp_path / "new").exists()


def test_a_copy_onto_a_damaged_store_says_so(store, tmp_path):
    target = transfer_positions(store, tmp_path / "target")
    (target.path / target.entries[0].file).write_bytes(b"short")
    with pytest.raises(PieceError, match="position 1"):
        pull(store.path, target.path)


def test_a_fork_that_was_cut_off_is_finished_by_the_same_call(store, tmp_path):
    (fork(store, tmp_path / "branch", 2).path / "results.json").unlink()
    assert (
        fork(store, tmp_path / "branch", 2).results() == fork(store, tmp_path / "b2", 2).results()
    )
    with pytest.raises(StoreError, match="is a store already"):
        fork(store, tmp_path / "branch", 2)
