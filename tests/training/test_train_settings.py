"""Every setting of `train:` acts, is refused by name, or changes nothing: all of them, by list."""

import inspect
import json
import re
import shutil
import sys
from contextlib import contextmanager
from dataclasses import fields
from enum import Enum
from itertools import cycle
from types import NoneType, SimpleNamespace
from typing import get_args, get_origin, get_type_hints

import pytest
import tiny_families as families
import torch
import torch.nn.functional as F
from tiny_families import TEXT
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

import mm_piece
from mm_piece.data import IGNORE_INDEX, EncodedList, Example, collate, encode
from mm_piece.errors import RecipeError
from mm_piece.families import group_of, weights
from mm_piece.models.base import load_base
from mm_piece.recipe import parse_recipe
from mm_piece.sparse.tuning import sparse_tuning
from mm_piece.training.arguments import arguments
from mm_piece.training.dry_run import dry_run_step
from mm_piece.training.effects import RECOMPUTE_OPTIONS, REQUIREMENTS
from mm_piece.training.known_arguments import (
    ALIASES,
    FIELDS,
    HARMLESS,
    HONOURED,
    REFUSED,
    default_of,
)
from mm_piece.training.optimizers import OPTIMIZERS
from mm_piece.training.trainer import fit
from mm_piece.training.values import require_values

ANSWERS = ("red", "a green ball", "blue", "one two", "dog")

# What changes the values that are learned, each with a value that is not the default.
ACT = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 1,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 2,
    "optim": "sgd",
    "weight_decay": 0.1,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 0.1,
    "max_grad_norm": 0.01,
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "bf16": True,
    "data_seed": 11,
    "dataloader_drop_last": True,
}
# What may change how, but not what is learned.
SAME = {
    **dict.fromkeys(("do_train", "use_cache", "dataloader_pin_memory", "logging_first_step"), True),
    **dict.fromkeys(("skip_memory_metrics", "logging_nan_inf_filter", "log_on_each_node"), False),
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"preserve_rng_state": True},
    "torch_empty_cache_steps": 1,
    "save_steps": 3,
    "save_strategy": "steps",
    "save_total_limit": 1,
    "save_on_each_node": True,
    "logging_strategy": "steps",
    "logging_steps": 1,
    "include_num_input_tokens_seen": "all",
    "log_level": "error",
    "log_level_replica": "error",
    "disable_tqdm": True,
    "report_to": "tensorboard",
    "ddp_timeout": 60,
    "ddp_find_unused_parameters": True,
    "ddp_bucket_cap_mb": 1,
    "ddp_broadcast_buffers": True,
    "full_determinism": True,
    "use_cpu": True,
    "dataloader_num_workers": 1,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 3,
}
ELSEWHERE = {
    *ALIASES,
    *("optim_args", "lr_scheduler_kwargs"),  # below
    *("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    "per_device_eval_batch_size",  # test_evaluation: answers do not depend on it
    *("fp16", "tf32"),  # of accelerators
    "deepspeed",  # test_engines
}


@pytest.fixture(scope="module")
def learn(family_base, tmp_path_factory):
    """A function that learns a few examples from scratch, or from a checkpoint, and its values."""
    base = family_base("llama")
    logs = tmp_path_factory.mktemp("logs")

    def _learn(folder, **settings):
        model, processor = load_base(base)
        examples = [encode(asked(n, a), processor) for n, a in enumerate(ANSWERS)]
        mask = {
            n: torch.arange(9) for n in weights(model) if n.endswith(("up_proj.weight", "norm"))
        }
        defaults = {"per_device_train_batch_size": 2, "num_train_epochs": 2, "learning_rate": 1e-2}
        defaults |= {"save_strategy": "no", "disable_tqdm": True}
        with sparse_tuning(model, mask) as tuning:
            args = arguments({**defaults, **settings}, folder, seed=0)
            fit(tuning, EncodedList(examples, 0), args, logs)
            assert not model.get_input_embeddings()._forward_hooks
            return torch.cat([*tuning.detach_values().values()]).clone()

    return _learn


@pytest.fixture(scope="module")
def plain(learn, tmp_path_factory):
    """What is learned by the defaults."""
    return learn(tmp_path_factory.mktemp("plain"))


def asked(row, answer, images=()):
    """A question and its answer; questions have different lengths."""
    content = [*({"type": "image"} for _ in images)]
    content.append({"type": "text", "text": f"Which{' dog cat' * row} is it?"})
    turns = [{"role": "user", "content": content}]
    turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return Example(row, turns, list(images), "settings")


def test_every_setting_is_known():
    """A later version's further setting fails here: find out what it does, then list it."""
    names = [field.name for field in fields(TrainingArguments)]
    assert not set(names) - (HONOURED | HARMLESS | REFUSED).keys()
    assert not HONOURED.keys() & REFUSED.keys()
    assert not HARMLESS.keys() & (HONOURED | REFUSED).keys()
    assert HONOURED.keys() | HARMLESS.keys() == ACT.keys() | SAME.keys() | ELSEWHERE


def test_a_setting_that_nobody_has_looked_at(tmp_path, monkeypatch):
    monkeypatch.delitem(HARMLESS, "use_cache")
    with pytest.raises(RecipeError, match="^train: 'use_cache' is new in transformers"):
        arguments({"use_cache": True}, tmp_path, seed=1)


def other_than(default):
    """A value of a setting that is not the one it has by default."""
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1
    return "another" if default is None or isinstance(default, str | Enum) else {"a": 1}


@pytest.mark.parametrize("key", sorted((REFUSED.keys() & FIELDS) - {"remove_unused_columns"}))
def test_what_would_do_nothing_or_harm_is_refused(tmp_path, key):
    with pytest.raises(RecipeError) as caught:
        arguments({key: other_than(default_of(key))}, tmp_path, seed=1)
    assert str(caught.value) == f"train: {key!r} is not a setting here: {REFUSED[key]}"


def test_what_is_so_anyway_may_be_written(tmp_path):
    beside = {"output_dir", "seed", "remove_unused_columns"}
    usual = {k: default_of(k) for k in REFUSED if k in FIELDS and k not in beside}
    assert arguments({**usual, "remove_unused_columns": False}, tmp_path, seed=1).seed == 1
    with pytest.raises(RecipeError, match="'seed' is not a setting here: it is a key beside"):
        arguments({"seed": 42}, tmp_path, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("key", ACT)
def test_settings_act(key, learn, plain, tmp_path):
    assert not torch.equal(learn(tmp_path, **{key: ACT[key]}), plain)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*os.fork:DeprecationWarning")
def test_settings_that_change_nothing(learn, plain, tmp_path):
    """Everything at once that is about speed, memory, files and reports."""
    missing = {"dataloader_pin_memory"} - ({"cuda"} if torch.cuda.is_available() else set())
    settings = {key: value for key, value in SAME.items() if key in FIELDS.keys() - missing}
    try:
        assert torch.equal(learn(tmp_path / "work", **settings), plain)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not [*tmp_path.rglob("events*")]  # not beside what is thrown away when a task ends


_SCHEDULES = {
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 2},
}
_OPTIONS = {"sgd": "momentum=0.9,nesterov=true", "adagrad": "eps=1e-6", "rmsprop": "alpha=0.9"}
_SCORED = ("reduce_lr_on_plateau", "greedy")


def stops():
    """Settings under which a training stops: all optimizers and schedules, what draws numbers."""
    schedules = sorted({kind.value for kind in SchedulerType} - {*_SCORED, "linear"})
    assert len(schedules) >= len(OPTIMIZERS)
    for schedule, optimizer in zip(schedules, cycle(OPTIMIZERS), strict=False):
        kind = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": _SCHEDULES.get(schedule)}
        by = {"optim": optimizer, "optim_args": _OPTIONS.get(optimizer)}
        by["warmup_steps"] = int(schedule != "constant")
        yield pytest.param({**kind, **by}, id=f"{optimizer}-{schedule}")
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    yield pytest.param({"neftune_noise_alpha": 5.0}, id="noise")
    yield pytest.param({"neftune_noise_alpha": 5.0, "save_steps": 3, **workers}, id="workers")
    yield pytest.param({"bf16": True, "label_smoothing_factor": 0.1}, id="halves")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*os.fork:DeprecationWarning")
@pytest.mark.parametrize("settings", [*stops()])
def test_a_stopped_training_goes_on_bit_for_bit(settings, learn, plain, tmp_path):
    """In the middle of an epoch and, for what draws numbers when one begins, between two."""
    settings = {"save_strategy": "steps", "save_steps": 2, **settings}
    whole = learn(tmp_path / "whole", **settings)
    last = f"checkpoint-{4 if settings['save_steps'] == 2 else 3}"
    shutil.copytree(tmp_path / "whole" / last, tmp_path / "cut" / last)
    assert torch.equal(learn(tmp_path / "cut", **settings), whole)
    assert not torch.equal(whole, plain)


two_names = pytest.mark.skipif(
    "activation_checkpointing" not in FIELDS, reason="this transformers knows one name"
)


@pytest.mark.parametrize("name", [o.value for o in OptimizerNames if o.value not in OPTIMIZERS])
def test_optimizers_that_nobody_has_looked_at(tmp_path, name):
    with pytest.raises(RecipeError, match=f"^train: optim '{name}' is not known .*adamw_torch"):
        arguments({"optim": name}, tmp_path, seed=1)


@pytest.mark.parametrize("name", _SCORED)
def test_schedules_that_need_scores(tmp_path, name):
    with pytest.raises(RecipeError, match=f"^train: lr_scheduler_type {name} requires an eval"):
        arguments({"lr_scheduler_type": name}, tmp_path, seed=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "sgd", "adam_beta1": 0.5}, "adam_beta1 does nothing with optim 'sgd'"),
        ({"optim_args": "momentum=0.9"}, "adamw_torch_fused reads nothing there, not 'momentum'"),
        ({"optim": "sgd", "optim_args": "weight_decay=1"}, "reads momentum, .* not 'weight_decay'"),
        ({"optim": "sgd", "optim_args": "momentum"}, "'momentum' must be key=value"),
        (
            {"label_smoothing_factor": 1},
            "label_smoothing_factor must be a number of at least 0 and below 1",
        ),
        ({"label_smoothing_factor": -0.1}, "of at least 0 and below 1, not -0.1"),
        pytest.param(
            {"gradient_checkpointing": True, "activation_checkpointing": False},
            "gradient_checkpointing and activation_checkpointing are one setting, and disagree",
            marks=two_names,
        ),
        ({"gradient_checkpointing_kwargs": '{"use_reentrant": true}'}, "use_reentrant must be"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": None}}, "use_reentrant must be false"),
        ({"report_to": "nobody"}, "report_to: nobody: nobody is not supported"),
        ({"report_to": ["tensorboard", "flyte"]}, "report_to: flyte: .* requires"),
        ({"accelerator_config": "absent.json"}, "'accelerator_config' is not a setting here"),
    ],
)
def test_settings_that_would_be_ignored(tmp_path, settings, message):
    with pytest.raises(RecipeError, match=f"^train: .*{message}") as caught:
        arguments(settings, tmp_path, seed=1)
    assert "\n" not in str(caught.value)


ON_A_CPU = {"use_cpu": True}
# A setting with a value of its own -> what must stand beside it to act, and what it needs.
IDLE = {
    "fp16": (True, None, "an accelerator"),
    "tf32": (True, None, "tf32"),
    "save_steps": (3, {"save_strategy": "steps"}, "save_strategy: steps"),
    "save_total_limit": (1, {"save_strategy": "epoch"}, "save_strategy: steps or epoch"),
    "logging_steps": (3, {"logging_strategy": "steps"}, "logging_strategy: steps"),
    "dataloader_persistent_workers": (True, {"dataloader_num_workers": 1}, "dataloader_num_work"),
    "dataloader_prefetch_factor": (3, {"dataloader_num_workers": 1}, "dataloader"),
    "gradient_checkpointing_kwargs": (
        {"use_reentrant": False},
        {"gradient_checkpointing": True},
        "activation_checkpointing: true",
    ),
    "activation_checkpointing_kwargs": (
        {"preserve_rng_state": False},
        {"gradient_checkpointing": True},
        "activation_checkpointing: true",
    ),
    "run_name": ("one", {"report_to": "trackio"}, "report_to: wandb or trackio"),
    "project": ("one", {"report_to": "trackio"}, "report_to: trackio"),
    "trackio_space_id": ("one", {"report_to": "trackio"}, "report_to: trackio"),
    "trackio_bucket_id": ("one", {"report_to": ["trackio"]}, "report_to: trackio"),
    "trackio_static_space_id": ("one", {"report_to": ["trackio"]}, "report_to: trackio"),
}
WITHOUT = {"save_strategy": "no", "logging_strategy": "epoch", **ON_A_CPU}


def test_every_need_is_tried():
    assert REQUIREMENTS.keys() == IDLE.keys()


@pytest.mark.parametrize("key", sorted(IDLE.keys() & FIELDS))
def test_settings_that_need_another_one(tmp_path, monkeypatch, key):
    """By name where it is not there; with it, or with the value that holds anyway, they may be."""
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", TrainerCallback)
    value, beside, needed = IDLE[key]
    with pytest.raises(RecipeError, match=f"^train: .*{needed}") as caught:
        arguments({**WITHOUT, key: value}, tmp_path, seed=1)
    assert "\n" not in str(caught.value)
    arguments({**WITHOUT, key: default_of(key)}, tmp_path, seed=1)
    if beside:
        assert arguments({**WITHOUT, key: value, **beside}, tmp_path, seed=1)


def test_reporters_read_what_is_said_of_them():
    """The table has every reporter of transformers whose source reads a setting."""
    sources = {
        name: "".join(inspect.getsource(kind) for kind in callback.__mro__[:-2])
        for name, callback in integration_utils.INTEGRATION_TO_CALLBACK.items()
    }
    for key in ("run_name", "project", *(k for k in FIELDS if k.startswith("trackio_"))):
        readers = {name for name, source in sources.items() if f"args.{key}" in source}
        assert (
            f"report_to: {' or '.join(sorted(readers, key=ORDER.index))}"
            == REQUIREMENTS[key].description
        )


ORDER = ("wandb", "trackio", "comet_ml", "mlflow", "dagshub", "swanlab")


def test_the_table_of_recomputing_is_complete():
    taken = inspect.signature(torch.utils.checkpoint.checkpoint).parameters
    assert taken.keys() - {"function", "args", "kwargs", "context_fn"} <= RECOMPUTE_OPTIONS.keys()


def test_schedules_read_what_is_said_of_them(tmp_path):
    for settings in (
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3},
        {"lr_scheduler_type": "constant", "warmup_steps": 0, "lr_scheduler_kwargs": {}},
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"num_cycles": 2}'},
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 0.5}},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}},
        {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 20}},
        {"warmup_steps": 0.1},
        {"warmup_steps": 2_000_000},
        {
            "lr_scheduler_type": "warmup_stable_decay",
            "warmup_steps": 5000,
            "lr_scheduler_kwargs": {"num_decay_steps": 3000, "decay_type": "linear"},
        },
    ):
        assert arguments(settings, tmp_path, seed=1).lr_scheduler_type


_WSD = {"lr_scheduler_type": "warmup_stable_decay"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "warmup_steps does nothing with"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 0.1}, "warmup_steps does nothing with"),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}}, "nothing there, not"),
        (
            {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {"num_cycles": 2}},
            "constant_with_warmup reads nothing there, not 'num_cycles'",
        ),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}},
            "cosine reads num_cycles there, not 'cycles'",
        ),
        ({"lr_scheduler_kwargs": {"last_epoch": 3}}, "linear reads nothing there"),
        ({"lr_scheduler_kwargs": "cosine"}, "lr_scheduler_kwargs must be a mapping"),
        ({"lr_scheduler_kwargs": "{"}, ""),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "two"}},
            "lr_scheduler_type cosine: could not convert",
        ),
        ({**_WSD}, "lr_scheduler_type warmup_stable_decay: TypeError: .*num_decay_steps"),
        (
            {**_WSD, "lr_scheduler_kwargs": {"num_decay_steps": 9, "warmup_type": "cosine"}},
            "warmup_type does nothing with lr_scheduler_type 'warmup_stable_decay'",
        ),
        (
            {
                **_WSD,
                "lr_scheduler_kwargs": {
                    "num_decay_steps": 9,
                    "decay_type": "linear",
                    "num_cycles": 3.0,
                },
            },
            "num_cycles does nothing with",
        ),
        ({"optim": "sgd", "optim_args": {"dampening": 0.5}}, "dampening does nothing without mom"),
        ({"optim": "sgd", "optim_args": "momentum=fast"}, "momentum must be a number, not 'fast'"),
        ({"optim": "sgd", "optim_args": {"momentum": float("nan")}}, "must be a number, not 'nan'"),
        ({"optim": "sgd", "optim_args": {"momentum": [0.9]}}, "momentum must be a number or true"),
        ({"optim": "sgd", "optim_args": {"nesterov": "maybe"}}, "nesterov must be true or false"),
        ({"optim": "sgd", "optim_args": {"nesterov": True}}, "optim sgd: Nesterov"),
        ({"optim": "sgd", "optim_args": {"momentum": -1}}, "optim sgd: Invalid momentum"),
        ({"optim": "sgd", "optim_args": "momentum=.9,momentum=.5"}, "'momentum' stands twice"),
        ({"optim_args": ["momentum"]}, "optim_args must be text"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"nope": 1}},
            "unknown key 'nope'; allowed: use_reentrant, preserve_rng_state",
        ),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"debug": 1}},
            "debug must be true or false, not 1",
        ),
        (
            {
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"determinism_check": "no"},
            },
            "determinism_check must be default or none, not 'no'",
        ),
        ({"include_num_input_tokens_seen": "foo"}, "unknown 'foo' .allowed: .*non_padding"),
        ({"log_level": "nope"}, "log_level: unknown 'nope' .allowed: .*error, .*passive"),
        ({"log_level_replica": "warn"}, "unknown 'warn'; did you mean 'warning'. .allowed: "),
    ],
)
def test_parts_of_settings_that_would_be_ignored(tmp_path, settings, message):
    with pytest.raises(RecipeError, match=f"^train: .*{message}") as caught:
        arguments(settings, tmp_path, seed=1)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_options_of_an_optimizer_as_a_mapping(learn, plain, tmp_path):
    text, mapping = "momentum=0.9,nesterov=true", {"momentum": 0.9, "nesterov": True}
    first = learn(tmp_path / "a", optim="sgd", optim_args=text)
    assert torch.equal(first, learn(tmp_path / "b", optim="sgd", optim_args=mapping))
    assert not torch.equal(first, learn(tmp_path / "c", optim="sgd"))


def kinds_of(key):
    """The types that a setting's field names."""
    hint = get_type_hints(TrainingArguments)[key]
    return {get_origin(kind) or kind for kind in get_args(hint) or (hint,)}


# One value of each type; what a setting's field does not name is refused.
SAMPLES = {bool: True, int: 3, float: 2.5, str: "text", dict: {"a": 1}, list: ["a"], tuple: (1,)}


@pytest.mark.parametrize("key", sorted((HONOURED | HARMLESS).keys() & FIELDS))
def test_settings_of_another_type(tmp_path, key):
    kinds = kinds_of(key) | ({dict} if key == "optim_args" else set())
    kinds |= {int} if float in kinds else set()
    for kind, value in SAMPLES.items():
        if kind not in kinds:
            with pytest.raises(RecipeError, match=f"^train: {TODAYS.get(key, key)} must be "):
                arguments({key: value}, tmp_path, seed=1)
    if NoneType not in kinds:
        with pytest.raises(RecipeError, match=f"^train: {TODAYS.get(key, key)} must be .*not None"):
            arguments({key: None}, tmp_path, seed=1)


TODAYS = {old: new for old, new in ALIASES.items() if new in FIELDS}


@pytest.mark.parametrize("key", sorted(k for k in HONOURED.keys() & FIELDS if k not in ALIASES))
def test_every_number_has_a_range(tmp_path, key):
    if not {int, float} & kinds_of(key):
        return
    wrong = [-3, *([float("nan"), float("-inf")] if float in kinds_of(key) else [])]
    wrong += [] if key == "max_grad_norm" or float not in kinds_of(key) else [float("inf")]
    for value in wrong:
        with pytest.raises(RecipeError, match=f"^train: {key} must be a .*number .*not {value}$"):
            arguments({key: value}, tmp_path, seed=1)
    require_values({key: default_of(key)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 2.5}, r"max_steps must be a whole number of at least 1 \(or -1.*, not 2.5"),
        ({"max_steps": 0}, "max_steps must be .* not 0"),
        ({"warmup_steps": 2.5}, "warmup_steps must be a number of at least 0, whole or below 1"),
        ({"adam_beta1": 1.0}, "adam_beta1 must be a number of at least 0 and below 1, not 1.0"),
        (
            {"save_total_limit": 0},
            r"save_total_limit must be a whole number of at least 1 \(or null\), not 0",
        ),
        ({"run_name": 5}, r"run_name must be text \(or null\), not 5"),
        ({"report_to": {"wandb": 1}}, r"report_to must be text or a list \(or null\)"),
        ({"bf16": "yes"}, "bf16 must be true or false, not 'yes'"),
    ],
)
def test_values_that_are_none(tmp_path, settings, message):
    with pytest.raises(RecipeError, match=f"^train: {message}"):
        arguments(settings, tmp_path, seed=1)


def test_a_cpu_that_is_there_alone(tmp_path):
    """`use_cpu: false`, which is the default, takes what there is."""
    found = arguments({"use_cpu": False}, tmp_path, seed=1)
    assert found.use_cpu is not torch.accelerator.is_available()


@two_names
def test_two_names_of_one_setting(tmp_path):
    """The older one, both where they agree, and `no` without quotes, which YAML calls false."""
    for settings in ({}, {"activation_checkpointing": True}):
        given = {"gradient_checkpointing": True, "save_strategy": False, **settings}
        found = arguments(given, tmp_path, seed=1)
        assert found.gradient_checkpointing
        assert found.save_strategy == "no"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"),
    ],
)
def test_what_a_launcher_says_beside_the_recipe(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=f"^{name}={value.lower()} is not read: the recipe must"):
        arguments({}, tmp_path, seed=1)
    monkeypatch.setenv(name, "no")
    arguments({}, tmp_path, seed=1)


def test_a_reporter_without_a_login(tmp_path, monkeypatch):
    def refuse():
        raise LookupError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=refuse))
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", TrainerCallback)
    with pytest.raises(RecipeError, match="^train: report_to: wandb: No API key .*log in.$"):
        arguments({"report_to": "wandb"}, tmp_path, seed=1)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert arguments({"report_to": ["wandb"]}, tmp_path, seed=1).report_to == ["wandb"]


class Unreachable(TrainerCallback):
    """A reporter whose server does not answer."""

    def on_train_begin(self, args, state, control, **_):
        raise LookupError("no answer from\nreports.example")


def test_a_reporter_that_cannot_begin(family_base, monkeypatch):
    """Found by the rehearsal, before a store is made."""
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "swanlab", Unreachable)
    model, processor = load_base(family_base("llama"))
    examples = [encode(asked(0, "red"), processor)]
    with pytest.raises(RecipeError, match="^train: LookupError: no answer from reports.example$"):
        dry_run_step(model, EncodedList(examples, 0), {"report_to": "swanlab"})


def refuse_backward(module):
    """Have a backward pass through a module's output fail, as attention of some kinds does."""

    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            raise NotImplementedError("no backward\nhere")

    def hook(module, args, output):
        if isinstance(output, tuple):
            return Refusing.apply(output[0]), *output[1:]
        return Refusing.apply(output)

    return module.register_forward_hook(hook)


def towers_and_layers(model):
    """The first block of the vision tower, if there is one, and that of the language model."""
    named = dict(model.named_modules())
    first = [n for n in named if re.search(r"(?:layers|blocks)\.0$", n)]
    tower = next((n for n in first if re.search("vis", n)), None)
    layer = next(n for n in first if not re.search("vis", n))
    return tower and named[tower], named[layer]


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(families.BUILDERS))
def test_a_rehearsal_goes_back_through_all_layers(family, family_base):
    """Down to the first weight that is trained and reached, and leaves no trace."""
    from PIL import Image

    model, processor = load_base(family_base(family))
    tower, layer = towers_and_layers(model)
    assert (tower is None) == (family in TEXT)
    before = {name: weight.clone() for name, weight in weights(model).items()}
    settings = {"max_steps": 1, "learning_rate": 0.1}
    texts, language = [encode(asked(0, "red"), processor)], [n for n in before if is_language(n)]
    cases = [(layer, texts, None), (layer, texts, language)]
    if tower is not None:
        image = Image.new("RGB", (24, 24), (255, 0, 0))
        mixed = [encode(asked(0, "red", [image]), processor)]
        cases += [(tower, mixed, None), (layer, mixed, language)]
        with closing(refuse_backward(tower)):
            dry_run_step(
                model, EncodedList(mixed, 0), settings, language
            )  # as far as the training goes
    for module, examples, trained in cases:
        dry_run_step(model, EncodedList(examples, 0), settings, trained)
        failing = pytest.raises(RecipeError, match="^train: no backward here$")
        with closing(refuse_backward(module)), failing:
            dry_run_step(model, EncodedList(examples, 0), settings, trained)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler that it calls
def test_attention_without_a_backward_pass_is_found_before_there_is_a_store(family_base, tmp_path):
    """As flex_attention's on a CPU, which `check` cannot see: it runs no model."""
    if torch.accelerator.is_available():
        pytest.skip("it has one on accelerators")
    rows = tmp_path / "rows.json"
    content = [{"prompt": "Which?", "answer": "red"}] * 4
    rows.write_text(json.dumps(content), encoding="utf-8")
    recipe = {"base": str(family_base("qwen2")), "store": str(tmp_path / "store")}
    recipe |= {"tasks": [{"name": "a", "train": str(rows), "test": str(rows)}]}
    recipe |= {"model": {"attn_implementation": "flex_attention"}, "train": {"max_steps": 1}}
    with pytest.raises(RecipeError, match="^train: FlexAttention does not support backward on CPU"):
        mm_piece.train(parse_recipe(json.dumps(recipe)))
    assert not (tmp_path / "store" / "store.json").exists()


def is_language(name):
    return group_of(name) == "language"


@contextmanager
def closing(handle):
    """Context of a hook."""
    yield
    handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_vl"])
def test_label_smoothing(family, family_base, tmp_path):
    """Over the tokens of a whole step, on the labels of the next tokens, for every family."""
    from PIL import Image

    model, processor = load_base(family_base(family))
    images = [] if family in TEXT else [Image.new("RGB", (24, 24), (255, 0, 0))]
    examples = [encode(asked(n, a, images), processor) for n, a in enumerate(ANSWERS[:4])]
    batch = collate(examples, 0)
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()
    following = batch["labels"][:, 1:]
    minus = -F.log_softmax(logits[:, :-1][following != IGNORE_INDEX], -1)
    right = minus.gather(1, following[following != IGNORE_INDEX][:, None])
    expected = float(0.9 * right.mean() + 0.1 * minus.mean())
    name = next(n for n in weights(model) if n.endswith("up_proj.weight"))
    for each, times in ((4, 1), (2, 2), (1, 4)):
        settings = {"per_device_train_batch_size": each, "gradient_accumulation_steps": times}
        settings |= {"max_steps": 1, "learning_rate": 0.0, "save_strategy": "no"}
        settings["disable_tqdm"] = True
        args = arguments({**settings, "label_smoothing_factor": 0.1}, tmp_path, seed=0)
        with sparse_tuning(model, {name: torch.arange(3)}) as tuning:
            (found,) = fit(tuning, EncodedList(examples, 0), args, tmp_path / "logs")
        assert found == pytest.approx(expected, abs=2e-5)
