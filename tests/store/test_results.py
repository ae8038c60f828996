"""Results grow by rows, a row at a time, and never lose what they do not know."""

import pytest
from made_store import make

from mm_piece.errors import LockedError, StoreError
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.records import BaseRecord
from mm_piece.store.results import (
    MeasuredRow,
    add_row,
    add_task_facts,
    drop_columns,
    truncate_results,
)

FIRST = MeasuredRow({"a": 0.0, "b": 0.25}, {"x": 1.0, "y": 0.5}, {"colour": 1.0, "shape": 0.5})
SECOND = MeasuredRow({"a": 1.0, "b": 0.25}, {"x": 0.5, "y": 0.5}, {"colour": 0.5, "shape": 0.5})
THIRD = MeasuredRow({"a": 0.5, "b": 1.0}, {"x": 0.0, "y": 0.5}, {"colour": 0.0, "shape": 0.5})


@pytest.fixture
def results():
    found = {}
    for position, row in enumerate((FIRST, SECOND, THIRD)):
        found = add_row(found, position, row)
    for task in "ab":
        found = add_task_facts(found, "seconds", task, {"train": 1.0})
    return found | {"of our own": [1]}


def test_a_row_at_a_time(results):
    assert results == {
        "tasks": ["a", "b"],
        "general": ["x", "y"],
        "matrix": [[0.0, 0.25], [1.0, 0.25], [0.5, 1.0]],
        "base_ability": [0.75, 0.5, 0.25],
        "base_ability_name": "x, y",
        "base_kinds": {"colour": [1.0, 0.5, 0.0], "shape": [0.5, 0.5, 0.5]},
        "seconds": {"a": {"train": 1.0}, "b": {"train": 1.0}},
        "of our own": [1],
    }


def test_a_row_measured_again_ends_the_results(results):
    again = add_row(results, 1, THIRD)
    assert again["matrix"] == [[0.0, 0.25], [0.5, 1.0]]
    assert (again["base_ability"], again["base_kinds"]["colour"]) == ([0.75, 0.25], [1.0, 0.0])
    assert again["of our own"] == [1]
    assert len(results["matrix"]) == 3  # those before are as they were


def test_without_general_tasks_there_is_no_base_ability():
    assert add_row({}, 0, MeasuredRow({"a": 0.5}, {}, {})) == {
        "tasks": ["a"],
        "general": [],
        "matrix": [[0.5]],
    }


def test_the_first_positions_alone(results):
    first = truncate_results(results, ["a"])
    assert first["matrix"] == [[0.0, 0.25], [1.0, 0.25]]
    assert (first["base_ability"], first["seconds"]) == ([0.75, 0.5], {"a": {"train": 1.0}})
    assert drop_columns(first, ["a"])["matrix"] == [[0.0], [1.0]]
    assert drop_columns(first, ["other"]) == first


def test_an_update_is_one_step(tmp_path):
    """What another writer wrote in between is not lost: nobody can write in between."""
    store = make(tmp_path, deltas=1)

    def change(results):
        with pytest.raises(LockedError):
            DeltaStore.open(tmp_path).write_results({})
        return add_row(results, 0, FIRST)

    store.update_results(change)
    assert DeltaStore.open(tmp_path).results()["matrix"] == [[0.0, 0.25]]

    with pytest.raises(StoreError, match="matrix has 3 rows"):
        store.update_results(lambda found: found | {"matrix": [[0, 0]] * 3})
    assert store.results()["matrix"] == [[0.0, 0.25]]


def test_a_base_s_record_is_what_the_manifest_says():
    record = BaseRecord({"fingerprint": "ab" * 32, "folder": "../base", "of our own": 1})
    assert (record.folder, record.hub, record.digest) == ("../base", None, None)
    assert record.without_folder().facts == {"fingerprint": "ab" * 32, "of our own": 1}
    assert record.with_facts({"folder": "b"}).facts == {**record.facts, "folder": "b"}
    with pytest.raises(AttributeError):
        record.facts = {}
