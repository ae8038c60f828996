"""The comparison: baselines learn, rates are chosen on validation, tables count right."""

import json
import os
import shutil
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from click.testing import CliRunner
from transformers import LlavaForConditionalGeneration

from eval import compare, tables
from eval.experiment import Experiment, Method
from mm_piece import importance
from mm_piece.data import encode, read
from mm_piece.models.base import load_base, tensors
from mm_piece.recipe import SelectionSettings, load_recipe
from mm_piece.training.arguments import arguments

EVAL = Path(__file__).parents[2] / "eval"


def method_of(**content):
    """A method of an experiment."""
    return Method.model_validate({"rates": [1e-3], **content})


def experiment_of(methods, **content):
    """An experiment on the tiny recipe."""
    tiny = {
        "recipe": "pipelines/tiny-published.yaml",
        "seeds": [1, 2],
        "tune": {"seed": 0, "rows": 1},
    }
    return Experiment.model_validate({**tiny, "methods": methods, **content})


BASELINES = {
    "zero": ("zero_shot.Zero", {}),
    "full": ("full.Full", {}),
    "multitask": ("multitask.MultiTask", {}),
    "replay": ("replay.Replay", {"share": 0.5}),
    "agem": ("agem.AGem", {"share": 0.5}),
    "ewc": ("ewc.Ewc", {"strength": 1e3, "samples": 4}),
    "lwf": ("lwf.LwF", {}),
    "lora": ("lora.Lora", {"rank": 2}),
    "olora": ("olora.OLora", {"rank": 2}),
    "shira": ("shira.Shira", {"rank": 2}),
}
ADAPTERS = ("lora", "olora", "shira")


def test_baselines_see_and_answer_rows_of_the_same_length(base, tmp_path, monkeypatch):
    """What `max_length` cuts off for ours is cut off for them too."""
    rows = [{"prompt": "why " * 60, "answer": "so"}] * 8
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    task = {"train": str(tmp_path / "rows.json"), "test": str(tmp_path / "rows.json")}
    recipe = {
        "base": str(base),
        "store": str(tmp_path / "store"),
        "tasks": [{"name": "long", **task, "max_length": 24, "max_new_tokens": 1}],
        "general": [{"name": "too", "test": task["test"], "max_length": 24, "max_new_tokens": 1}],
        "train": {"max_steps": 1},
    }
    file, seen = tmp_path / "recipe.yaml", []
    file.write_text(json.dumps(recipe))
    forward = LlavaForConditionalGeneration.forward

    def noted(model, *args, **inputs):
        seen.append(inputs["input_ids"].shape[1])
        return forward(model, *args, **inputs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", noted)
    found = compare._train_baseline(
        load_recipe(file), method_of(baseline="eval.baselines.full.Full"), tmp_path
    )
    assert seen and max(seen) <= 24
    assert len(found["matrix"]) == 2


@pytest.fixture
def learner(base, tmp_path, monkeypatch):
    """A baseline before two tasks of eight rows, and a function that has it learn one."""
    model, processor = load_base(base)
    sources = ("scenes:digits/train[:8]", "scenes:words/train[:8]")
    tasks = [[encode(example, processor) for example in read(source)] for source in sources]
    settings = {"max_steps": 3, "save_strategy": "no", "disable_tqdm": True}

    def make(baseline, rate=1e-3, **options):
        settings["learning_rate"] = rate
        module, _, kind = BASELINES[baseline][0].partition(".")
        found = getattr(import_module(f"eval.baselines.{module}"), kind)
        made = found(model, tasks, 0, **{**BASELINES[baseline][1], **options})
        return made, lambda number: made.learn_task(number, arguments(settings, tmp_path, number))

    return make


def copies(model):
    return {name: tensor.detach().clone() for name, tensor in tensors(model).items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # PEFT asks transformers for it
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # PEFT's SHiRA
@pytest.mark.parametrize("baseline", BASELINES)
def test_baselines_learn_and_hand_on_a_plain_model(learner, baseline):
    found, learn = learner(baseline)
    before = copies(found.model)
    total, entries = sum(tensor.numel() for tensor in before.values()), found.num_entries
    if baseline in ADAPTERS:
        assert entries < total
    else:
        assert entries == (0 if baseline == "zero" else total)
    for number in (0, 1):
        learn(number)
        assert not found.model.training
        assert type(found.model) is LlavaForConditionalGeneration
    after = copies(found.model)
    assert after.keys() == before.keys()
    moved = any(not torch.equal(after[name], before[name]) for name in before)
    assert moved == (baseline != "zero")


def seen(monkeypatch, found):
    """What a baseline trains on, task by task, without training."""
    calls = []
    monkeypatch.setattr(found, "train", lambda model, examples, args: calls.append(examples))
    return calls


def test_multitask_learns_everything_at_once(learner, monkeypatch):
    found, learn = learner("multitask")
    calls = seen(monkeypatch, found)
    learn(0), learn(1)
    assert [len(call) for call in calls] == [16]


@pytest.mark.parametrize(("share", "kept"), [(0.5, 4), (0.01, 1)])
def test_replay_adds_a_share_of_every_earlier_task(learner, monkeypatch, share, kept):
    found, learn = learner("replay", share=share)
    calls = seen(monkeypatch, found)
    learn(0), learn(1)
    assert [len(call) for call in calls] == [8, 8 + kept]
    assert all(any(one is row for row in found.tasks[0]) for one in calls[1][8:])


def along(found, examples):
    """The product of a model's gradients with those of some examples, and these gradients."""
    now = {name: p.grad.clone() for name, p in found.model.named_parameters() if p.grad is not None}
    found.model.zero_grad()
    found.model(**found.collate_batch(examples)).loss.backward()
    named = found.model.named_parameters()
    there = {name: p.grad.clone() for name, p in named if p.grad is not None}
    return sum(float((now[name] * there[name]).sum()) for name in now), now


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_agem_takes_out_what_raises_the_loss_on_memory(learner, monkeypatch, sign):
    found, learn = learner("agem", share=1.0)
    seen(monkeypatch, found)
    learn(1)
    found.memory_batch_size = len(found.memory)
    found.model(**found.collate_batch(found.memory)).loss.backward()
    for parameter in found.model.parameters():
        if parameter.grad is not None:
            parameter.grad = sign * parameter.grad + 1e-3
    before = {n: p.grad.clone() for n, p in found.model.named_parameters() if p.grad is not None}
    found.adjust_gradients(found.model)
    product, after = along(found, found.memory)
    if sign > 0:
        assert product > 0
        assert all(torch.equal(after[name], before[name]) for name in before)
    else:
        norm = sum(float(g.square().sum()) for g in before.values())
        assert abs(product) < 1e-3 * norm
        assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])


@pytest.mark.slow
def test_ewc_holds_what_the_fisher_holds_dear(learner):
    moved = {}
    for strength in (0.0, 1e8):
        found, learn = learner("ewc", strength=strength)
        learn(0)
        before = copies(found.model)
        assert set(found.fisher) == set(importance.estimate(found.model, found.tasks[0]))
        learn(1)
        after = copies(found.model)
        moved[strength] = sum(
            float((f * (after[name] - before[name]).square()).sum())
            for name, f in found.fisher.items()
            if name in after
        )
    assert 0 < moved[1e8] < 0.5 * moved[0.0]


def test_lwf_keeps_what_the_model_said(learner):
    moved = {}
    for strength in (0.0, 100.0):
        found, learn = learner("lwf", strength=strength)
        inputs = found.collate_batch(found.tasks[0])
        with torch.no_grad():
            before = found.model(**inputs).logits
            found.teacher = found.model
            assert float(found.compute_penalty(found.model, inputs, before)) == 0
        learn(0)
        with torch.no_grad():
            moved[strength] = float((found.model(**inputs).logits - before).square().mean())
    assert 0 < moved[100.0] < 0.8 * moved[0.0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_olora_turns_away_from_earlier_adapters(learner):
    overlaps = {}
    for strength in (0.0, 10.0):
        torch.manual_seed(0)
        found, learn = learner("olora", rate=1e-2, strength=strength)
        learn(0), learn(1)
        overlaps[strength] = sum(
            float((first @ second.t()).abs().sum()) for first, second in found.earlier.values()
        )
    assert overlaps[10.0] < 0.9 * overlaps[0.0]


def run_of(method, rate, seed, split, op, kept):
    numbers = {"learned": 0.5, "op": op, "bwt": -0.1, "base_kept": kept}
    numbers["matrix"] = [[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.5, 0.5, 0.0], [op, op, op]]
    return (
        {"method": method, "rate": rate, "seed": seed, "split": split}
        | numbers
        | {
            "bytes": [100, 200],
            "trainable": 1000,
            "settings": {"select": {"method": method}},
        }
    )


def test_the_best_rate_is_chosen_on_validation(tmp_path):
    for run in (
        run_of("full", 1e-5, 0, "validation", 0.0, 1.0),  # learned nothing, lost nothing
        run_of("full", 1e-4, 0, "validation", 0.2, 0.5),
        run_of("full", 3e-4, 0, "validation", 0.31, 0.4),
        run_of("full", 1e-3, 1, "test", 0.9, 0.9),
        run_of("full", 2e-3, 0, "validation", 0.9, 0.9),  # no rate of it
        run_of("full-own", 1e-4, 0, "validation", 0.9, 0.9),  # another method
    ):
        compare._result_file(tmp_path, run).write_text(json.dumps(run))
    full = {"baseline": "eval.baselines.full.Full"}
    methods = {"full": {**full, "rates": [1e-5, 1e-4, 3e-4]}, "full-own": {**full, "rates": [7e-4]}}
    plan = experiment_of(methods)
    assert compare.choose_learning_rate(plan, tmp_path, "full") == 3e-4
    assert compare.choose_learning_rate(plan, tmp_path, "full-own") == 7e-4  # there is no other


def test_the_test_split_is_used_at_the_chosen_rate_and_at_named_ones(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(compare, "_run_all", lambda plan, jobs, out, workers: asked.append(jobs))
    for number, rate in enumerate((1e-4, 3e-4)):
        run = run_of("full", rate, 0, "validation", 0.1 * number, 0.5)
        compare._result_file(tmp_path, run).write_text(json.dumps(run))
    full = {"baseline": "eval.baselines.full.Full"}
    methods = {
        "full": {**full, "rates": [1e-4, 3e-4], "also": [3e-4, 1e-4]},
        "lora": {**full, "rates": [2e-3]},
        "own": {**full, "rates": [5e-3], "seeds": [1, 3]},
        "left": {**full, "rates": [1e-3]},
    }
    compare._compare_methods(experiment_of(methods), tmp_path, 1, ("full", "lora", "own"))
    tuning, final = ([(j["method"], j["rate"], j["seed"], j["split"]) for j in a] for a in asked)
    assert tuning == [("full", rate, 0, "validation") for rate in (1e-4, 3e-4)]
    both, own = (("full", 3e-4), ("full", 1e-4), ("lora", 2e-3)), ("own", 5e-3)
    seeds = {1: (*both, own), 2: both, 3: (own,)}
    assert final == [(*one, seed, "test") for seed, each in seeds.items() for one in each]


@pytest.mark.slow
def test_runs_end_with_the_command(tmp_path):
    plan = {
        "recipe": "pipelines/tiny-published.yaml",
        "seeds": [1, 2],
        "tune": {"seed": 0, "rows": 1},
        "methods": {"full": {"baseline": "eval.baselines.full.Full", "rates": [1e-4]}},
    }
    file, script = tmp_path / "plan.yaml", tmp_path / "compare.py"
    file.write_text(json.dumps(plan))
    shutil.copy(EVAL / "compare.py", script)  # results go beside it
    found = os.environ | {"PYTHONPATH": str(EVAL.parent)}
    started = psutil.Popen([sys.executable, script, file], cwd=EVAL.parent, env=found)
    deadline = time.monotonic() + 300
    while len(runs := started.children(recursive=True)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    started.terminate()
    assert started.wait(300)
    assert len(runs) >= 2
    _, alive = psutil.wait_procs(runs, timeout=120)
    assert not alive


EXPERIMENTS = sorted((EVAL / "experiments").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_each_experiment_can_be_run(file, tmp_path, monkeypatch):
    """Its methods exist, and recipes take what they are given."""
    text = file.read_text(encoding="utf-8")
    assert all(f"\n# {part}" in text for part in ("Run:", "Needs:", "Expect:"))
    monkeypatch.chdir(EVAL.parent)
    plan = compare.load_experiment(file)
    names = tuple(task.name for task in load_recipe(plan.recipe).tasks)
    for name, method in plan.methods.items():
        recipe = compare.make_recipe(plan, method, method.rates[0], 1, tmp_path / "store")
        assert tuple(task.name for task in recipe.tasks) == (plan.order or names), name
        assert recipe.general
        assert all(isinstance(value, int | float) for value in method.options.values()), name


FULL = {"baseline": "eval.baselines.full.Full", "rates": [1e-4]}


def with_options(baseline, **options):
    """An experiment of one baseline with options of its own."""
    return {
        "methods": {"m": {**FULL, "baseline": f"eval.baselines.{baseline}", "options": options}}
    }


WRONG = {
    "order": (
        {"order": ["digits", "nope"]},
        "methods.m: order: unknown task 'nope'; allowed: digits",
    ),
    "twice": ({"order": ["digits", "digits"]}, "methods.m: order: 'digits' stands twice"),
    "rows": ({"tune": {"seed": 0}}, "missing key 'tune.rows'"),
    "key": (
        {"methods": {"m": {**FULL, "rate": 1}}},
        "unknown key 'methods.m.rate'; did you mean 'rates'?",
    ),
    "rates": ({"methods": {"m": {**FULL, "rates": []}}}, "methods.m.rates"),
    "negative": ({"methods": {"m": {**FULL, "rates": [-1e-4]}}}, "above 0"),
    "infinite": ({"methods": {"m": {**FULL, "rates": [float("inf")]}}}, "finite number"),
    "also": ({"methods": {"m": {**FULL, "also": [float("nan")]}}}, "finite number"),
    "doubled": ({"methods": {"m": {**FULL, "rates": [1e-3, 1.0000001e-3]}}}, "0.001 stands twice"),
    "seeds": ({"seeds": [1, 2, 1]}, "seeds: 1 stands twice"),
    "seed": ({"seeds": [True]}, "seeds.0: must be a whole number, not True"),
    "below": (
        {"methods": {"m": {**FULL, "seeds": [-1]}}},
        "methods.m.seeds.0: must be at least 0, not -1",
    ),
    "store": ({"methods": {"m": {**FULL, "set": {"seed": 7}}}}, "set: 'seed' is the run's own"),
    "penalty": (
        {"methods": {"m": {**FULL, "set": {"penalty": 1}}}},
        "no baseline looks at 'penalty'",
    ),
    "function": ({"methods": {"m": {**FULL, "baseline": "os.getcwd"}}}, "'os.getcwd' is no class"),
    "rank": (
        with_options("lora.Lora", rank=-4),
        "options of eval.baselines.lora.Lora: rank: must be above 0, not -4",
    ),
    "half": (
        with_options("olora.OLora", rank=2.5),
        "options of eval.baselines.olora.OLora: rank: must be a whole number, not 2.5",
    ),
    "text": (
        with_options("ewc.Ewc", strength="100"),
        "options of eval.baselines.ewc.Ewc: strength: must be a number, not '100'",
    ),
    "strength": (
        with_options("ewc.Ewc", strength=0),
        "options of eval.baselines.ewc.Ewc: strength: must be above 0, not 0",
    ),
    "whole": (
        with_options("agem.AGem", share=7),
        "options of eval.baselines.agem.AGem: share: must be at most 1, not 7",
    ),
    "neither": ({"methods": {"m": {"rates": [1e-3]}}}, "either `select` or `baseline`"),
    "both": ({"methods": {"m": {**FULL, "select": {}}}}, "either `select` or `baseline`"),
    "options": (
        {"methods": {"m": {"select": {}, "rates": [1], "options": {"x": 1}}}},
        "a baseline's",
    ),
    "name": ({"methods": {"../m": FULL}}, "'../m' is no name"),
    "method": (
        {"methods": {"m": {"select": {"method": "nope"}, "rates": [1e-3]}}},
        "methods.m: pipelines/tiny-published.yaml: select.method: unknown method 'nope'",
    ),
    "baseline": (
        {"methods": {"m": {**FULL, "baseline": "eval.baselines.nope.Nope"}}},
        "unknown baseline 'eval.baselines.nope.Nope'",
    ),
    "share": (
        {"methods": {"m": {**FULL, "options": {"share": 1}}}},
        "options of eval.baselines.full.Full: got an unexpected keyword argument 'share'",
    ),
    "recipe": ({"recipe": "nope.yaml"}, "cannot read recipe nope.yaml"),
    "validation": (
        {
            "recipe": "pipelines/tiny-pictures.yaml",
            "methods": {"m": {**FULL, "rates": [1e-4, 1e-3]}},
        },
        "no validation split beside 'data/cifar10/test.json[:200]' of 'objects'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_in_an_experiment_is_one_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(EVAL.parent)
    monkeypatch.setattr(compare, "HERE", tmp_path)
    change, told = WRONG[case]
    base = {"recipe": "pipelines/tiny-published.yaml", "seeds": [1], "tune": {"seed": 0, "rows": 1}}
    file = tmp_path / "wrong.yaml"
    file.write_text(json.dumps({**base, "methods": {"m": FULL}, **change}))
    done = CliRunner().invoke(compare.main, [str(file)])
    assert done.exit_code == 1
    assert done.output.startswith(f"Error: {file}: ")
    assert told in done.output
    assert done.output.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_at_least_one_run_at_a_time():
    done = CliRunner().invoke(compare.main, [str(EXPERIMENTS[0]), "--jobs", "0"])
    assert done.exit_code == 2
    assert "'--jobs': 0 is not in the range x>=1" in done.output


def test_validation_rows_are_those_of_the_split():
    from eval.experiment import with_validation_split

    recipe = load_recipe(
        EVAL.parent / "pipelines" / "tiny-published.yaml", ["tasks.0.test=hf:a/b:c/test[:9]"]
    )
    moved = with_validation_split(recipe, 7)
    assert moved.tasks[0].test == "hf:a/b:c/validation[:7]"
    assert moved.tasks[1].test == "scenes:textures/validation[:7]"
    assert moved.general[0].test == "scenes:base/validation[:7]"
    assert [task.train for task in moved.tasks] == [task.train for task in recipe.tasks]


def test_an_order_is_that_of_the_experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(EVAL.parent)
    order = ["words", "charts", "digits"]
    method = method_of(select={"xi": 0.5}, set={"rehearsal": 0.2})
    plan = experiment_of({"m": method}, order=order, base="bases/other")
    recipe = compare.make_recipe(plan, method, 1e-3, 7, tmp_path / "store")
    assert [task.name for task in recipe.tasks] == order
    assert (recipe.select.xi, recipe.seed, recipe.base) == (0.5, 7, "bases/other")
    assert recipe.rehearsal == 0.2


def test_tables_give_mean_and_interval(tmp_path, monkeypatch):
    folder = tmp_path / "eval" / "results" / "x"
    folder.mkdir(parents=True)
    for seed, op in ((1, 0.1), (2, 0.2), (3, 0.3)):
        run = run_of("full", 1e-4, seed, "test", op, 0.5)
        (folder / f"full-{seed}-test.json").write_text(json.dumps(run))
        lower = run_of("full", 1e-5, seed, "test", op + 0.1, 0.5)
        (folder / f"full-low-{seed}-test.json").write_text(json.dumps(lower))
        (folder / f"full-{seed}-validation.json").write_text(json.dumps(run))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    *_, lower, line = tables.build_table("x").splitlines()
    assert lower.startswith("| full | 3 | 1e-05 | 50.0 ± 0.0 | 30.0 ± 24.8 |")
    assert line == (
        "| full | 3 | 0.0001 | 50.0 ± 0.0 | 20.0 ± 24.8 | -10.0 ± 0.0 | 50.0 ± 0.0 | 1,000 | 150 |"
    )  # 4.303 is Student's t with two degrees of freedom: 4.303 * 10 / sqrt(3)


def test_differences_are_paired_by_seed(tmp_path, monkeypatch):
    folder = tmp_path / "eval" / "results" / "x"
    folder.mkdir(parents=True)
    for seed, op in ((1, 0.1), (2, 0.2), (3, 0.3)):
        for method, more in (("random", 0.0), ("ours", 0.05 + 0.01 * seed), ("noisy", 0.4 - op)):
            run = run_of(method, 1e-4, seed, "test", op + more, 0.5)
            (folder / f"{method}-{seed}-test.json").write_text(json.dumps(run))
    lower = run_of("random", 1e-5, 1, "test", 0.9, 0.5)  # another rate than the control's
    (folder / "random-low-1-test.json").write_text(json.dumps(lower))
    extra = run_of("ours", 1e-4, 4, "test", 0.9, 0.5)  # without a partner
    (folder / "ours-4-test.json").write_text(json.dumps(extra))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    head, _, low, ours, noisy = tables.build_table("x against random 0.0001").splitlines()
    assert head.startswith("| against random 0.0001 | rate | seeds |")
    assert low.startswith("| random | 1e-05 | 1 |")
    assert ours == "| ours | 0.0001 | 3 | +0.0 ± 0.0 | **+7.0 ± 2.5** | +0.0 ± 0.0 | +0.0 ± 0.0 |"
    assert noisy.startswith("| noisy | 0.0001 | 3 | +0.0 ± 0.0 | +20.0 ± 24.8 |")
    over = tables.build_table("x ours 0.0001 over random 0.0001,absent 1,random 1e-5").splitlines()
    assert over[0].startswith("| ours 0.0001 on | more than | seeds |")
    assert over[2] == "| x | random 0.0001 " + ours.removeprefix("| ours | 0.0001 ")
    assert over[3].startswith("| x | random 1e-5 | 1 |") and len(over) == 4


def measured(seed, matrix, overlaps):
    run = run_of("ours", 1e-3, seed, "test", 0.2, 0.5)
    places = [{"language 0 q_proj": 0.25, "vision - proj": 0.01 * seed} for _ in overlaps]
    ability = {
        "base_ability": [1.0] * len(matrix),
        "seconds": 60.0 * seed**2,
        "peak_mib": 1000 * seed,
    }
    return run | ability | {"matrix": matrix, "overlaps": overlaps, "places": places}


def test_overlaps_stand_beside_what_was_lost(tmp_path, monkeypatch):
    folder = tmp_path / "eval" / "results" / "x"
    folder.mkdir(parents=True)
    # What a task loses while another is learned: 1 loses .1 to 2 and .4 to 3, 2 loses .3 to 3.
    matrix = [[0, 0, 0], [0.9, 0, 0], [0.8, 0.7, 0], [0.4, 0.4, 0.9]]
    for seed, shares in ((1, (0.1, 0.4, 0.3)), (2, (0.4, 0.1, 0.2)), (3, (0.2, 0.2, 0.2))):
        one, two, three = shares
        overlaps = [[1, one, two], [one, 1, three], [two, three, 1]]
        run = measured(seed, matrix, overlaps)
        (folder / f"ours-{seed}-test.json").write_text(json.dumps(run))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    line = tables.build_table("x overlaps").splitlines()[-1]
    # Seed 1: correlation 1; seed 2: -1; seed 3 shares alike, so that there is none.
    assert line.startswith("| ours | 0.001 | 3 | 23.3 ± ") and line.endswith("| +0.00 ± 12.71 |")
    assert tables.build_table("x costs").splitlines()[-1] == "| ours | 4.0 | 2,000 | 150 |"


@pytest.mark.slow
def test_every_plot_is_drawn_from_what_runs_have(tmp_path):
    from eval.figures import draw_figures

    matrix, overlaps = [[0.0, 0.0], [0.5, 0.0], [0.4, 0.6]], [[1, 0.2], [0.2, 1]]
    runs = [measured(seed, matrix, overlaps) for seed in (1, 2)]
    names = [file.name for file in draw_figures(tmp_path, runs, runs)]
    assert names == ["frontier.png", "curves.png", "atlas.png"]
    named = {"method": "held-0.1", "settings": {"select": {"density": 0.001}}}
    names = [file.name for file in draw_figures(tmp_path, [], [run | named for run in runs])]
    assert names == ["curves.png", "densities.png", "atlas.png"]
    bare = [{k: v for k, v in run.items() if k != "places"} for run in runs]
    assert [file.name for file in draw_figures(tmp_path, [], bare)] == ["curves.png"]


def test_the_front_is_what_nothing_is_ahead_of():
    from eval.figures import pareto_front

    points = [(1, 9), (2, 9), (3, 5), (2, 6), (3, 4), (5, 1), (4, 1), (3, 5)]
    assert pareto_front(points) == [(2, 9), (3, 5), (5, 1)]


def test_masks_are_located_and_compared():
    shapes = {
        "language_model.model.layers.1.mlp.up_proj.weight": (4, 5),
        "vision_tower.vision_model.post_layernorm.weight": (10,),
    }
    first, second = (
        {name: np.array(index) for name, index in zip(shapes, chosen, strict=True)}
        for chosen in (([0, 3, 4, 19], [9]), ([3, 4, 5, 6], []))
    )
    found = compare._describe_masks([first, second, {}], shapes)
    assert found["places"] == [
        {"language 1 up_proj": 0.2, "vision - post_layernorm": 0.1},
        {"language 1 up_proj": 0.2},
        {},
    ]
    assert found["overlaps"][0][1] == round(2 / 7, 4)


def test_what_moved_farthest_is_as_much_as_a_mask():
    names = ("language_model.model.layers.0.mlp.up_proj.weight", "language_model.lm_head.weight")
    before = {name: torch.zeros(10, 10) for name in names}
    after = {name: torch.arange(100.0).view(10, 10) * (-1) ** i for i, name in enumerate(names)}
    (kept,) = compare._select_most_moved(before, after, SelectionSettings(density=0.05)).items()
    assert (kept[0], kept[1].tolist()) == (names[0], [95, 96, 97, 98, 99])
    assert compare._select_most_moved(before, before, SelectionSettings(density=0.05)) == {}
