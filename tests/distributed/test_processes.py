"""Several processes: the same masks as one, the same deltas within rounding, and going on."""

import json
import sys

import pytest
import torch
from launching import LIMIT, SUPPORT, done, launch, started

import mm_piece
from mm_piece.store.delta_store import DeltaStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * LIMIT)]


def test_three_processes_choose_what_one_does():
    assert "same" in done(launch(3, str(SUPPORT / "process_cases.py")))


@pytest.fixture
def recipe(base, tmp_path):
    """A recipe of two tasks, one of pictures and one where some rows have none."""
    rows = [{"prompt": f"{n} + 1?", "answer": str(n + 1)} for n in range(8)]
    (tmp_path / "text.json").write_text(json.dumps(rows))
    text = f"{tmp_path}/text.json"
    content = {
        "base": str(base),
        "store": str(tmp_path / "store"),
        "tasks": [
            {
                "name": "digits",
                "train": "scenes:digits/train[:24]",
                "test": "scenes:digits/test[:5]",
            },
            {"name": "sums", "train": text, "test": f"{text}[:3]"},
        ],
        "general": [{"name": "base", "test": "scenes:base/test[:4]", "max_new_tokens": 2}],
        "select": {"method": "piece-s", "density": 0.02, "samples": 12},
        "train": {
            "learning_rate": 1e-2,
            "max_steps": 4,
            "save_steps": 2,
            "per_device_train_batch_size": 4,
        },
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    return tmp_path / "recipe.yaml"


def arguments_for(recipe, store, processes):
    per_process = f"train.per_device_train_batch_size={4 // processes}"
    return ["-m", "mm_piece", "train", str(recipe), "--set", f"store={store}", "--set", per_process]


def test_two_processes_learn_what_one_does(recipe, tmp_path):
    """Law 6: masks equal, deltas within rounding, the same answers at the base."""
    together = tmp_path / "together"
    process = launch(2, *arguments_for(recipe, together, 2))
    alone = mm_piece.train(recipe)
    said = done(process)
    assert said.count("position 2") == said.count(f"mm-piece report {together} ") == 1
    other = DeltaStore.open(together)
    other.verify()
    assert len(other) == len(alone) == 2
    for position in (1, 2):
        one, two = alone.delta(position), other.delta(position)
        for key in ("k", "patchable", "stability", "data", "samples"):
            assert one.info.get(key) == two.info.get(key), key
        shared = [name for name in one.indices if name in two.indices]
        assert len(shared) >= 0.99 * len(one.indices)
        same = sum(torch.isin(one.indices[n], two.indices[n]).sum() for n in shared)
        assert int(same) >= 0.99 * one.entries  # the rest moved by too little for one of them
        for name in shared:
            if torch.equal(one.indices[name], two.indices[name]):
                torch.testing.assert_close(one.values[name], two.values[name], rtol=0, atol=2e-4)
    assert other.answers(0) == alone.answers(0)
    assert other.results()["matrix"][0] == alone.results()["matrix"][0]


def test_the_first_process_alone_speaks_however_late(recipe, tmp_path):
    """The launcher ends all when one ends: another one must not be the first to."""
    late = [str(SUPPORT / "late.py"), "train", str(recipe), "--set", "select.density=2"]
    assert done(launch(2, *late), 1).count("density 2.0 is out of (0, 1]") == 1
    assert not (tmp_path / "store").exists()


def test_a_mistake_of_another_process_is_told(tmp_path):
    """Here: a launcher that started the second of two only."""
    alone = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "mm_piece", "train", str(tmp_path / "absent.yaml")]
    process = started(command, **alone)
    assert "absent.yaml" in done(process, 2)
    assert process.returncode == 2
