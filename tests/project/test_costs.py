"""The cost model of many processes: what its formulas say, what a fit finds, what is committed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from eval.bench.distributed import cost_model, plan, prediction

EVAL = Path(__file__).parents[2] / "eval"


def test_bytes_are_those_of_rings():
    model = replace(plan.MODELS[0], k=1000, width=2)
    assert (
        cost_model.predict_sent_bytes(model, "DDP", 1)
        == cost_model.predict_sent_bytes(model, "ZeRO-3", 1)
        == 0
    )
    assert cost_model.predict_sent_bytes(model, "DDP", 2) == 4000  # each sends every gradient once
    assert cost_model.predict_sent_bytes(model, "DDP", 4) == 6000
    assert cost_model.predict_sent_bytes(model, "ZeRO-1", 2) == 6000
    twice = 2 * 2 * model.weights - 2 * model.looked_up
    assert cost_model.predict_sent_bytes(model, "ZeRO-3", 2) == (twice + 16 * 1000) / 2


def test_memory_is_divided_as_far_as_the_engine_divides():
    model = replace(plan.MODELS[0], k=1000, tokens=1024)
    entries = [
        cost_model.predict_memory(model, engine, 4)["entries"] for engine in cost_model.ENGINES
    ]
    assert entries == [1000 * n for n in (22, 6 + 8 + 2 + 1, 6 + 4 + 1 + 2 + 1, 6 + 4 + 1)]
    whole, parts = (
        cost_model.predict_memory(model, engine, 4)["weights"] for engine in ("DDP", "ZeRO-3")
    )
    assert whole == 2 * model.weights == 4 * parts


def test_a_fit_finds_the_speed_that_made_the_times():
    speed = cost_model.ProcessSpeed(3e10, 5e8, 2e-3, 1e-3)
    points = []
    for engine in ("DDP", "ZeRO-3"):
        for layers, small in ((1, False), (4, False), (2, True), (8, True)):
            for tokens in (64, 256):
                size = 12_000 if small else 12_000_000
                row = {"parameters": 6_300_000 + layers * size, "layers": layers, "small": small}
                row |= {"tokens": tokens, "k": 1000, "engine": engine, "processes": 2}
                time = sum(
                    cost_model.predict_step_seconds(
                        prediction._make_model_sizes(row), engine, 2, speed
                    )
                )
                points.append({**row, "measured_s": time})
    found = prediction._fit_speed(points)
    assert vars(found) == pytest.approx(vars(speed), rel=1e-3)


def test_the_committed_plan_is_what_the_formulas_say():
    file = EVAL / "results" / "bench" / "distributed.json"
    committed = json.loads(file.read_text(encoding="utf-8"))["sections"]["plan"]
    found = json.loads(json.dumps(plan.measure_section(None)))
    assert committed == {key: value for key, value in found.items() if key != "goals"}
