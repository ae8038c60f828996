"""Every setting of `train:` acts, is refused by name, or changes nothing: all of them, by list."""

import shutil
import sys
from dataclasses import fields
from enum import Enum
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from families import TEXT
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from mm_piece.errors import RecipeError
from mm_piece.models import load_base
from mm_piece.names import weights
from mm_piece.sparse import sparse_tuning
from mm_piece.tasks import IGNORED, Example, collate, encode
from mm_piece.trainer import arguments, fit, rehearse
from mm_piece.trainer.effects import NEEDS, RECOMPUTING
from mm_piece.trainer.known import ALIASES, FIELDS, HARMLESS, HONOURED, REFUSED, default_of
from mm_piece.trainer.optimizers import OPTIMIZERS

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
            fit(tuning, examples, 0, args, logs)
            assert not model.get_input_embeddings()._forward_hooks
            return torch.cat([*tuning.values().values()]).clone()

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


@pytest.mark.parametrize("key", ACT)
def test_settings_act(key, learn, plain, tmp_path):
    assert not torch.equal(learn(tmp_path, **{key: ACT[key]}), plain)


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
        by = {"optim": optimizer, "optim_args": _OPTIONS.get(optimizer), "warmup_steps": 1}
        yield pytest.param({**kind, **by}, id=f"{optimizer}-{schedule}")
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    yield pytest.param({"neftune_noise_alpha": 5.0}, id="noise")
    yield pytest.param({"neftune_noise_alpha": 5.0, "save_steps": 3, **workers}, id="workers")
    yield pytest.param({"bf16": True, "label_smoothing_factor": 0.1}, id="halves")


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
        (
            {"gradient_checkpointing": True, "activation_checkpointing": False},
            "gradient_checkpointing and activation_checkpointing are one setting, and disagree",
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
        rehearse(model, examples, {"report_to": "swanlab"}, 0)


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
    minus = -F.log_softmax(logits[:, :-1][following != IGNORED], -1)
    right = minus.gather(1, following[following != IGNORED][:, None])
    expected = float(0.9 * right.mean() + 0.1 * minus.mean())
    name = next(n for n in weights(model) if n.endswith("up_proj.weight"))
    for each, times in ((4, 1), (2, 2), (1, 4)):
        settings = {"per_device_train_batch_size": each, "gradient_accumulation_steps": times}
        settings |= {"max_steps": 1, "learning_rate": 0.0, "save_strategy": "no"}
        settings["disable_tqdm"] = True
        args = arguments({**settings, "label_smoothing_factor": 0.1}, tmp_path, seed=0)
        with sparse_tuning(model, {name: torch.arange(3)}) as tuning:
            found = fit(tuning, examples, 0, args, tmp_path / "logs")["train_loss"]
        assert found == pytest.approx(expected, abs=2e-5)
