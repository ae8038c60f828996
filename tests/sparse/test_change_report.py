"""The change report: what a task moved in each group, and what it left alone."""

import pytest
import torch

import mm_piece
from mm_piece import sparse_tuning
from mm_piece.families import group_of, weights
from mm_piece.models.base import load_base
from mm_piece.recipe import parse_recipe
from mm_piece.sparse.change_measurement import measure_changes
from mm_piece.sparse.change_report import (
    COLUMNS,
    find_change_rows,
    format_rounding_warning,
)


def test_every_group_has_its_numbers(base):
    model = load_base(base)[0]
    named = weights(model)
    tower = next(n for n in named if "vision_tower" in n and n.endswith("q_proj.weight"))
    norm = next(n for n in named if "vision_tower" in n and n.endswith("layer_norm1.weight"))
    mask = {tower: torch.tensor([1, 5, 9]), norm: torch.tensor([0])}
    sizes = {tower: named[tower].numel(), norm: named[norm].numel()}
    totals = {g: sum(p.numel() for n, p in named.items() if group_of(n) == g) for g in COUNTED}
    before = {name: weight.detach().clone() for name, weight in named.items()}
    with sparse_tuning(model, mask) as tuning:
        with torch.no_grad():
            tuning.detach_values()[tower][:2] += torch.tensor([3.0, 4.0])
        tuning.write_back()
        report = measure_changes(tuning, sizes)
    assert list(report) == COUNTED
    assert {group: row["entries"] for group, row in report.items()} == totals
    assert report["vision"]["patchable"] == sum(sizes.values())
    assert (report["vision"]["selected"], report["vision"]["changed"]) == (4, 2)
    assert report["vision"]["norm"] == 5.0
    after = torch.cat(
        [weights(model)[n].flatten() for n in named if group_of(n) == "vision"]
    ).detach()
    assert abs(report["vision"]["share"] - 5 / float(after.norm())) < 1e-5
    for group in COUNTED[1:]:
        assert report[group] == {**dict.fromkeys(COLUMNS, 0), "entries": totals[group]}
    assert not torch.equal(before[tower], weights(model)[tower])


def test_what_the_dtype_rounds_away_is_counted(base):
    model = load_base(base, dtype="bfloat16")[0]
    name = "language_model.model.norm.weight"  # ones
    with sparse_tuning(model, {name: torch.tensor([0, 3, 5, 7])}) as tuning:
        with torch.no_grad():
            tuning.detach_values()[name][:3] += torch.tensor([1e-4, 1.0, -1e-4])
        tuning.write_back()
        row = measure_changes(tuning, {name: 24})["language"]
    assert (row["selected"], row["changed"], row["rounded"]) == (4, 1, 2)


COUNTED = ["vision", "projector", "language", "embedding", "head"]


def test_other_programs_may_say_anything():
    assert find_change_rows({}) == {}
    assert find_change_rows({"groups": 3}) == {}
    assert find_change_rows({"groups": {"vision": [1], "other": {"changed": 1}}}) == {}
    assert find_change_rows({"groups": {"head": {"changed": 1, "norm": "x"}}}) == {
        "head": {"changed": 1}
    }


def test_most_of_a_task_is_rounded_away(base):
    """More than half of what moved; what never moved is no matter of the dtype."""
    model = load_base(base, dtype="bfloat16")[0]
    name = "language_model.model.norm.weight"  # ones
    for moves, lost in (([1e-4, -1e-4, 1.0], True), ([1e-4, 1.0, 1.0], False), ([], False)):
        with sparse_tuning(model, {name: torch.arange(9)}) as tuning:
            with torch.no_grad():
                tuning.detach_values()[name][: len(moves)] += torch.tensor(moves)
            tuning.write_back()
            said = format_rounding_warning(measure_changes(tuning, {name: 24}))
        assert bool(said) == lost
        if lost:
            assert said.startswith("warning: of 3 values that moved, 2 were rounded back")
            assert "model: {dtype: float32}" in said and "learning_rate" in said


@pytest.mark.slow
def test_train_says_what_the_dtype_takes(base, tmp_path, capsys):
    task = "{name: t, train: 'scenes:digits/train[:4]', test: 'scenes:digits/test[:1]'}"
    for dtype, rate in (("bfloat16", "1e-6"), ("float32", "1e-6")):
        mm_piece.train(
            parse_recipe(
                f"{{base: '{base}', store: '{tmp_path}/{dtype}-{rate}', tasks: [{task}], "
                f"model: {{dtype: {dtype}}}, select: {{method: random, density: 0.05}}, "
                f"train: {{learning_rate: {rate}, max_steps: 2, disable_tqdm: true}}}}"
            )
        )
        lines = [
            line for line in capsys.readouterr().out.splitlines() if line.startswith("t: warning: ")
        ]
        assert len(lines) == (dtype == "bfloat16")
