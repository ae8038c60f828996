"""Laws of the store: what is listed is whole, whoever dies, and nothing foreign gets in or out."""

import json
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_store import BASE, RECIPE, delta_for, make, rewrite

from mm_piece.errors import (
    BaseError,
    DamageError,
    MismatchError,
    OrderError,
    PieceError,
    PositionError,
    StoreError,
    TruncatedError,
)
from mm_piece.store.delta_store import DeltaStore

# --- the ordinary way ---------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path):
    return make(tmp_path / "store", deltas=3)


def test_what_is_appended_is_there_after_opening(store):
    opened = DeltaStore.open(str(store.path))
    assert (opened.base.facts, opened.recipe, len(opened)) == (BASE, RECIPE, 3)
    assert opened.entries == store.entries == opened.verify()
    assert [delta.task for delta in opened.deltas()] == ["Task 1!", "Task 2!", "Task 3!"]
    assert [entry.file for entry in opened.entries] == [
        f"000{position}-task-{position}.safetensors" for position in (1, 2, 3)
    ]
    for position, (entry, delta) in enumerate(zip(opened.entries, opened.deltas(), strict=True), 1):
        assert (entry.position, entry.entries, entry.parent) == (position, 4, delta.parent)
        assert entry.bytes == (store.path / entry.file).stat().st_size
        assert delta.values["w"].tolist() == [position] * 4


def test_stores_and_deltas_say_what_they_are(store):
    assert repr(store) == (
        f"<DeltaStore {str(store.path)!r} of 3 deltas: Task 1!, Task 2!, Task 3!>"
    )
    assert repr(store.delta(2)) == "<Delta 'Task 2!': 4 entries in 1 tensors>"


def test_log_is_plain_json(store):
    log = json.loads(json.dumps(store.log()))
    assert (list(log), log["base"]) == (["base", "deltas"], BASE)
    fields = ["position", "task", "file", "sha256", "entries", "bytes"]
    assert [list(delta) for delta in log["deltas"]] == [fields] * 3


@settings(max_examples=30)
@given(st.lists(st.text(min_size=1, max_size=90).filter(str.isprintable), max_size=3))
@example(["x" * 200, "/", "é/.."])
def test_any_task_name_gets_a_plain_file_name(tmp_path_factory, tasks):
    store = make(tmp_path_factory.mktemp("names") / "store")
    for task in tasks:
        store.append(delta_for(store, task))
    opened = DeltaStore.open(store.path)
    assert [entry.task for entry in opened.verify()] == tasks
    for entry in opened.entries:
        assert re.fullmatch(r"\d{4}-[a-z0-9-]{1,60}\.safetensors", entry.file)


def test_a_store_may_be_made_beside_other_files(tmp_path):
    (tmp_path / "base").mkdir()
    make(tmp_path, deltas=1)
    assert len(DeltaStore.open(tmp_path)) == 1
    with pytest.raises(StoreError, match="already"):
        make(tmp_path)


def test_positions_outside_are_refused(store):
    assert store.deltas(0) == []
    assert len(store.deltas(2)) == 2
    for position in (0, -1, 4):
        with pytest.raises(PositionError, match="allowed: 1…3"):
            store.delta(position)
    for at in (-1, 4):
        with pytest.raises(PositionError, match="allowed: 0…3"):
            store.deltas(at)


def test_an_empty_store_has_no_delta(tmp_path):
    store = make(tmp_path)
    assert store.deltas() == store.deltas(0) == store.verify() == []
    with pytest.raises(PositionError, match="empty"):
        store.delta(1)


def test_results_and_answers_come_back(store):
    assert (store.results(), store.answers(0)) == ({}, {})
    results = {"tasks": ["a"], "matrix": [[0.1], [1 / 3]], "base_ability": [0.5, 1]}
    answers = {
        "a": [{"row": 3, "prompt": "?\n", "answer": "é", "prediction": "猫\ud800", "score": 1}]
    }
    store.write_results(results)
    store.write_answers(3, answers)
    opened = DeltaStore.open(store.path)
    assert (opened.results(), opened.answers(3), opened.answers(2)) == (results, answers, {})
    assert (store.path / "answers" / "0003.json").is_file()
    with pytest.raises(PositionError, match="0…3"):
        store.write_answers(4, answers)
    with pytest.raises(StoreError, match="plain JSON"):
        store.write_results({"tasks": ["a"], "matrix": [[float("nan")]]})
    with pytest.raises(StoreError, match="at most 2"):
        store.write_results({"tasks": ["a"], "matrix": [[1]] * 3})
    with pytest.raises(StoreError, match="'a', answer 0: expected the fields row, prompt"):
        store.write_answers(3, {"a": [{"row": 3}]})
    assert (store.results(), store.answers(3)) == (results, answers)


def test_work_is_only_a_place(store):
    assert store.work_folder(2) == store.path / "work" / "0002"
    assert not store.work_folder(2).exists()


# --- what does not belong is refused ------------------------------------------------------------


def test_only_the_next_delta_of_this_base_is_appended(store):
    first = store.entries[0].sha256
    for error, fields in (
        (OrderError, {"parent": ""}),
        (OrderError, {"parent": first}),
        (BaseError, {"base": "other"}),
    ):
        with pytest.raises(error, match="expected .*, found"):
            store.append(delta_for(store, **fields))
    assert DeltaStore.open(store.path).verify() == store.entries
    assert len(list(store.path.glob("*.safetensors"))) == 3


def test_every_altered_byte_of_a_delta_is_found(store):
    file = store.path / store.entries[1].file
    data = file.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.choice(len(data), 100, replace=False):
        altered = bytearray(data)
        altered[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(altered)
        with pytest.raises(DamageError, match=file.name):
            store.delta(2)
    for length in (0, 1, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(PieceError, match=file.name):
            store.verify()
    file.write_bytes(data)
    assert len(store.verify()) == 3


def test_exchanged_and_missing_files_are_found(store):
    second, third = (store.path / entry.file for entry in store.entries[1:])
    second_bytes = second.read_bytes()
    second.write_bytes(third.read_bytes())
    with pytest.raises(DamageError):
        store.verify()
    second.unlink()
    with pytest.raises(StoreError, match=second.name):
        store.verify()
    second.write_bytes(second_bytes)
    assert len(store.verify()) == 3


@pytest.mark.parametrize("field", ["task", "entries", "bytes"])
def test_a_manifest_that_contradicts_its_files_is_found(store, field):
    other = {"task": "other", "entries": 5, "bytes": 5}[field]
    rewrite(store, lambda manifest: manifest["deltas"][1].update({field: other}))
    with pytest.raises(MismatchError, match=f"position 2: .*0002-task-2.safetensors: {field}"):
        DeltaStore.open(store.path).verify()


def test_verify_reads_everything_and_names_the_first_problem(store):
    last = store.path / store.entries[2].file
    last.write_bytes(last.read_bytes()[:-1])
    assert store.verify(2) == store.entries[:2]
    with pytest.raises(TruncatedError, match="position 3: .*0003-task-3.safetensors: .* expected"):
        store.verify()
    (store.path / "answers").mkdir()
    (store.path / "answers" / "0002.json").write_text('{"a": 3}')
    with pytest.raises(StoreError, match="position 2: .*0002.json: task 'a' has no list"):
        store.verify()
    (store.path / "results.json").write_text('{"tasks": []}')
    assert store.answers(1) == {}
    with pytest.raises(StoreError, match="results.json: it has no matrix"):
        store.verify(1)
    with pytest.raises(PositionError, match="0…3"):
        store.verify(4)


def test_another_base_in_the_manifest_is_found(store):
    rewrite(store, lambda manifest: manifest["base"].update(fingerprint="cd" * 32))
    with pytest.raises(BaseError, match="0001-task-1.safetensors: base"):
        DeltaStore.open(store.path).verify()


def test_a_store_may_be_reached_through_a_link(store, tmp_path):
    (tmp_path / "link").symlink_to(store.path)
    assert len(DeltaStore.open(tmp_path / "link").verify()) == 3


def test_errors_are_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    for act in (
        lambda: DeltaStore.open(tmp_path),
        lambda: DeltaStore.open(tmp_path / "none"),
        lambda: DeltaStore.open(tmp_path / "file"),
        lambda: make(tmp_path / "file"),
        lambda: make(tmp_path / "file" / "store"),
        lambda: DeltaStore.create(tmp_path / "a", {}, RECIPE),
        lambda: DeltaStore.create(tmp_path / "a", {"fingerprint": "ab"}, RECIPE),
        lambda: DeltaStore.open(tmp_path / ("x" * 300)),
        lambda: DeltaStore.create(tmp_path / "a", BASE | {"x": {1}}, RECIPE),
    ):
        with pytest.raises(StoreError, match=re.escape(str(tmp_path)) + "|plain JSON") as caught:
            act()
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


# --- further deltas as files --------------------------------------------------------------------


def test_files_of_another_store_are_added_all_or_none(store, tmp_path):
    other = make(tmp_path / "other", deltas=1)
    files = [store.data(position) for position in (1, 2, 3)]
    for entries, content, problem in (
        (store.entries, files, "position 2: position is 1"),
        (store.entries[2:], files[2:], "position 2: position is 3"),
        (store.entries[1:], [files[1], files[1]], "expected SHA-256"),
        (store.entries[1:], [files[1], files[2] + b"x"], "expected SHA-256"),
    ):
        with pytest.raises(PieceError, match=problem):
            other.extend(entries, content)
        assert DeltaStore.open(other.path).entries == other.entries == store.entries[:1]
    other.extend(store.entries[1:], files[1:])
    assert DeltaStore.open(other.path).verify() == store.entries == other.entries
