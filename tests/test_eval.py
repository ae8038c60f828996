"""The comparison: peers learn, rates are chosen on validation, tables count right."""

import json
import sys
from pathlib import Path

import pytest
import torch

from mm_piece.models import load_base, tensors
from mm_piece.tasks import encode, read
from mm_piece.trainer import arguments

EVAL = Path(__file__).parent.parent / "eval"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(EVAL))
    import compare
    import tables

    yield compare, tables
    for name in ("compare", "tables"):
        sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # PEFT asks transformers for it
@pytest.mark.parametrize(("peer", "options"), [("full", {}), ("lora", {"rank": 2})])
def test_peers_learn_and_hand_on_a_plain_model(base, tmp_path, monkeypatch, peer, options):
    monkeypatch.syspath_prepend(str(EVAL))
    module = __import__(f"peers.{peer}", fromlist=["learn"])
    model, processor = load_base(base)
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    examples = [encode(example, processor) for example in read("scenes:digits/train[:8]")]
    settings = {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True}
    entries = module.trainable(model, **options)
    learned = module.learn(model, examples, arguments(settings, tmp_path, 0), 0, **options)
    after = tensors(learned)
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    total = sum(tensor.numel() for tensor in before.values())
    assert entries == total if peer == "full" else 0 < entries < total


def run_of(method, rate, seed, split, op, kept):
    numbers = {"learned": 0.5, "op": op, "bwt": -0.1, "base_kept": kept}
    return (
        {"method": method, "rate": rate, "seed": seed, "split": split}
        | numbers
        | {
            "bytes": [100, 200],
            "trainable": 1000,
        }
    )


def test_the_best_rate_is_chosen_on_validation(scripts, tmp_path):
    compare, _ = scripts
    for run in (
        run_of("full", 1e-4, 0, "validation", 0.2, 0.5),
        run_of("full", 3e-4, 0, "validation", 0.3, 0.6),
        run_of("full", 1e-3, 1, "test", 0.9, 0.9),
    ):
        compare._file(tmp_path, run).write_text(json.dumps(run))
    assert compare.best_rate(tmp_path, "full") == 3e-4


def test_tables_give_mean_and_deviation(scripts, tmp_path, monkeypatch):
    _, tables = scripts
    folder = tmp_path / "eval" / "results" / "x"
    folder.mkdir(parents=True)
    for seed, op in ((1, 0.1), (2, 0.2), (3, 0.3)):
        run = run_of("full", 1e-4, seed, "test", op, 0.5)
        (folder / f"full-{seed}-test.json").write_text(json.dumps(run))
        (folder / f"full-{seed}-validation.json").write_text(json.dumps(run))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    line = tables.table("x").splitlines()[-1]
    assert line == (
        "| full | 0.0001 | 50.0 ± 0.0 | 20.0 ± 10.0 | -10.0 ± 0.0 | 50.0 ± 0.0 | 1,000 | 150 |"
    )
    assert tables.plot(folder).is_file()
