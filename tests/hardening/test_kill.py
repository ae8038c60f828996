"""A slice of the killing, and proof that its inspection sees what it is there for."""

import json
from pathlib import Path

import kill_victims
import pytest
from forking import start_fork
from kill_victims import Finding, end_of, inspect, write_store
from launching import done

from mm_piece.errors import PieceError

KILL = Path(__file__).parent / "kill.py"


@pytest.mark.slow
@pytest.mark.parametrize(("what", "kills"), [("store", 15), ("train", 3), ("train-random", 3)])
def test_killed_writers_leave_whole_stores_and_come_to_the_same_end(tmp_path, what, kills):
    out = tmp_path / "out.json"
    done(start_fork(str(KILL), "--kills", str(kills), "--what", what, "--out", str(out)))
    result = json.loads(out.read_text())[what]
    assert result["findings"] == []
    assert result["kills"] == sum(result["died"].values()) == kills
    assert result["rounds"] > 0


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(kill_victims, "POSITIONS", 3)
    write_store(tmp_path / "store", lambda position: None)
    return tmp_path / "store"


def test_a_finished_store_is_whole(store):
    assert inspect(store, 3, end_of(store)) == "between two positions"


def test_the_place_of_death_shows(store):
    whole = end_of(store)
    (store / "0004-x.safetensors").write_bytes(b"unlisted")
    assert inspect(store, 3, whole) == "between a delta and the manifest"
    (store / ".store.json.1.tmp").write_bytes(b"half")
    assert inspect(store, 3, whole) == "in the middle of a file"


def test_what_is_not_whole_is_found(store):
    whole = end_of(store)
    with pytest.raises(Finding, match="4 deltas acknowledged"):
        inspect(store, 4, whole)
    with pytest.raises(Finding, match="other than those"):
        inspect(store, 3, whole | {"deltas": whole["deltas"][::-1]})
    with pytest.raises(Finding, match="results of another run"):
        inspect(store, 3, whole | {"results": {"matrix": whole["results"]["matrix"][::-1]}})
    file = next(store.glob("0002-*"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(PieceError):
        inspect(store, 3, whole)
    (store / "store.json").unlink()
    with pytest.raises(Finding, match="gone"):
        inspect(store, 3, whole)
