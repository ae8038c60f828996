"""The benches run, and their results hold what makes them comparable."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from forking import start_fork
from launching import done

from eval.bench.distributed.setup import read_sent_bytes

ROOT = Path(__file__).parents[2]
FIELDS = {"bench", "quick", "seed", "commit", "dirty", "cpu", "threads", "versions", "seconds"}
GOAL = {"section", "what", "sense", "limit", "found", "met"}


def run(name, folder, *options, module=None):
    """The numbers of a quick run."""
    module = module or f"eval.bench.{name}"
    file = folder / f"{name}.json"
    process = start_fork("-m", *module.split(), "--quick", "--out", str(file), *options)
    assert "Goals" in done(process)
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found.keys() == {*FIELDS, "goals", "sections"}
    assert found["bench"] == name
    return found


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The numbers of the two sections that start no further processes."""
    folder = tmp_path_factory.mktemp("bench")
    return run("delta", folder, "--only", "size", "--only", "apply")


@pytest.mark.slow
def test_a_result_says_where_it_comes_from(result):
    assert result.keys() == {*FIELDS, "goals", "sections"}
    assert {"python", "torch", "numpy", "transformers", "mm-piece"} <= result["versions"].keys()
    assert result["quick"] is True
    assert str(ROOT) not in json.dumps(result)


@pytest.mark.slow
def test_every_goal_is_judged(result):
    assert {goal["section"] for goal in result["goals"]} == {"size", "apply"}
    for goal in result["goals"]:
        assert goal.keys() == GOAL
        over, under = goal["found"] > goal["limit"], goal["found"] < goal["limit"]
        assert goal["met"] is not (over if goal["sense"] == "at most" else under)


@pytest.mark.slow
def test_sizes_stand_beside_bounds_and_rivals(result):
    for case in result["sections"]["size"]["cases"]:
        sizes = case["per_entry"]
        assert sizes["index_B"] + sizes["value_B"] <= sizes["file_B"]
        assert case["file_B"]["gap"] == pytest.approx(sizes["file_B"])
        assert case["file_B"]["gap"] < case["file_B"]["int32 + values, safetensors"]
        assert case["kind"] != "uniform" or case["index_to_bound"] >= 1


@pytest.mark.slow
def test_applying_stands_beside_a_copy_and_is_undone(result):
    found = result["sections"]["apply"]
    assert found["undo_exact"] is True
    assert {"memcpy", "write", "apply", "undo", "swap", "compose 10"} <= found["times"].keys()
    assert all(row["wall_s"] > 0 and row["rounds"] >= 2 for row in found["times"].values())


@pytest.mark.slow
def test_training_stands_beside_its_rivals(tmp_path):
    found = run("train", tmp_path)["sections"]
    for dtype in ("fp32", "bf16"):
        assert {"full", "floor", "LoRA r=8", "SHiRA", "gradient mask", "ours"} <= found["steps"][
            dtype
        ]["backward"].keys()
    memory = found["steps"]["memory"]
    assert memory["full"]["peak_B"] > memory["nothing"]["peak_B"]
    assert memory["floor"]["kept_B"] <= memory["ours"]["kept_B"] <= memory["full"]["kept_B"]
    assert [row["density"] for row in found["growth"]["density"]] == [0.0001, 0.001, 0.01, 0.05]
    assert all(row["held_B"] > 20 * row["entries"] for row in found["entries"]["rows"])


@pytest.mark.slow
def test_importance_stands_beside_the_loop_and_keeps_budgets(tmp_path):
    found = run("importance", tmp_path)
    differs = found["sections"]["time"]["differs"]
    assert all(differs[name] < 1e-5 for name in differs), differs
    assert len(differs) >= 4
    rows = found["sections"]["budget"]["rows"]
    assert all(row["held_B"] <= row["budget_B"] for row in rows)
    assert len({row["scores"] for row in rows}) == 1
    assert [row["passes"] for row in rows] == sorted({row["passes"] for row in rows})


@pytest.mark.slow
def test_top_k_finds_what_torch_finds(tmp_path):
    rows = run("topk", tmp_path)["sections"]["topk"]["rows"]
    assert all(row["same_scores"] for row in rows)


@pytest.mark.slow
def test_stability_stands_beside_fresh_examples(tmp_path):
    rows = run("stability", tmp_path)["sections"]["overlap"]["rows"]
    assert {row["method"] for row in rows} == {"piece-f", "piece-s"}
    assert {row["examples"] for row in rows} == {8, 16, 32}
    assert all(0 < row["told"] <= 1 and 0 < row["found"] <= 1 for row in rows)


@pytest.mark.slow
def test_models_of_published_shapes_go_the_whole_way(tmp_path):
    for row in run("gpu", tmp_path, module="eval.bench.whole_path gpu")["sections"]["path"]["rows"]:
        assert row["exact"] is True
        assert row["accumulators_B"] <= row["memory"]
        assert row["passes"] > 1
        assert row["trained"] == int(0.001 * row["eligible"]) > 0
    row = run("memory", tmp_path, module="eval.bench.whole_path cpu")["sections"]["path"]["row"]
    assert row["exact"] is True
    assert {"estimate, select", "train", "delta", "checkout 1"} <= row["stages"].keys()


def test_committed_results_are_drawn():
    results = ROOT / "eval" / "results" / "bench"
    for name in ("train", "importance", "topk"):
        assert (results / f"{name}.json").is_file()
        assert (results / f"{name}.png").is_file()


TALK = """
import socket
with (
    socket.create_server(("127.0.0.1", 0)) as door,
    socket.create_connection(door.getsockname()) as here,
    door.accept()[0] as there,
):
    here.sendall(bytes(5_000))
    there.sendall(bytes(300))
    told = sent()
"""


@pytest.mark.slow
def test_bytes_sent_are_this_process_s_own():
    before, told = read_sent_bytes(), {"sent": read_sent_bytes}
    other = "sent = lambda: None" + TALK
    subprocess.run([sys.executable, "-W", "error", "-c", other], check=True)
    exec(TALK, told)
    assert told["told"] - before == 5_300


@pytest.mark.slow
def test_engines_stand_beside_each_other(tmp_path):
    found = run("distributed", tmp_path, "--only", "steps", "--only", "plan")["sections"]
    rows = found["steps"]["rows"]
    assert [row["engine"] for row in rows] == ["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
    for row in rows:
        ours, lora, full = (row["ways"][way]["sent_B"] for way in ("ours", "LoRA r=8", "full"))
        assert ours < lora < full
        if row["engine"] == "DDP":
            assert full == pytest.approx(4 * found["steps"]["parameters"], rel=0.1)
            assert ours >= 4 * found["steps"]["k"]
    assert {row["model"] for row in found["plan"]["rows"]} >= {"LLaVA-1.5-7B"}
