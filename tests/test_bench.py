"""The benches run, and their results hold what makes them comparable."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "eval" / "bench"
FIELDS = {"bench", "quick", "seed", "commit", "dirty", "cpu", "threads", "versions", "seconds"}
GOAL = {"section", "what", "sense", "limit", "found", "met"}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The numbers of a quick run of the two sections that start no further processes."""
    file = tmp_path_factory.mktemp("bench") / "delta.json"
    command = [sys.executable, str(BENCH / "delta.py"), "--quick", "--out", str(file)]
    command += ["--only", "size", "--only", "apply"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Goals" in done.stdout
    return json.loads(file.read_text(encoding="utf-8"))


def test_a_result_says_where_it_comes_from(result):
    assert result.keys() == {*FIELDS, "goals", "sections"}
    assert {"python", "torch", "numpy", "transformers", "mm-piece"} <= result["versions"].keys()
    assert result["quick"] is True
    assert str(BENCH.parent.parent) not in json.dumps(result)


def test_every_goal_is_judged(result):
    assert {goal["section"] for goal in result["goals"]} == {"size", "apply"}
    for goal in result["goals"]:
        assert goal.keys() == GOAL
        over, under = goal["found"] > goal["limit"], goal["found"] < goal["limit"]
        assert goal["met"] is not (over if goal["sense"] == "at most" else under)


def test_sizes_stand_beside_bounds_and_rivals(result):
    for case in result["sections"]["size"]["cases"]:
        sizes = case["per_entry"]
        assert sizes["index_B"] + sizes["value_B"] <= sizes["file_B"]
        assert case["file_B"]["gap"] == pytest.approx(sizes["file_B"])
        assert case["file_B"]["gap"] < case["file_B"]["int32 + values, safetensors"]
        assert case["kind"] != "uniform" or case["index_to_bound"] >= 1


def test_applying_stands_beside_a_copy_and_is_undone(result):
    found = result["sections"]["apply"]
    assert found["undo_exact"] is True
    assert {"memcpy", "write", "apply", "undo", "swap", "compose 10"} <= found["times"].keys()
    assert all(row["wall_s"] > 0 and row["rounds"] >= 2 for row in found["times"].values())
