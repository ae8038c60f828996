"""Trainer's settings from a recipe's `train:`."""

import os
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, enable_full_determinism

from mm_piece.errors import RecipeError
from mm_piece.trainer.known import ALIASES, HARMLESS, HONOURED, REFUSED
from mm_piece.trainer.optimizers import require_optimizer
from mm_piece.trainer.reporting import require_reporters

_COUNTS = {
    *("per_device_train_batch_size", "per_device_eval_batch_size"),
    "gradient_accumulation_steps",
}
_POSITIVE = {"save_steps", "logging_steps", "ddp_timeout"}
# What `accelerate launch` hands on beside a recipe, and what a recipe says instead.
_LAUNCHED = {
    "ACCELERATE_MIXED_PRECISION": "train: {bf16: true}",
    "ACCELERATE_DYNAMO_BACKEND": "nothing: a compiled run would not go on bit for bit",
    "ACCELERATE_USE_FSDP": "train: {deepspeed: …}",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "train: {deepspeed: …}",
}


def arguments(settings: dict[str, Any], folder: Path, seed: int) -> TrainingArguments:
    """TrainingArguments from a recipe's `train:` as it stands; RecipeError for what is refused."""
    settings = _under_todays_names(settings)
    ours = {"output_dir": str(folder), "seed": seed, "remove_unused_columns": False}
    _require_known(settings, ours)
    require_numbers(settings)
    _require_no_launched_settings(settings)
    try:
        found = TrainingArguments(**{**_defaults(), **settings, **ours})
    except (TypeError, ValueError, ImportError, OSError) as error:
        message = " ".join(str(error).removeprefix("TrainingArguments.__init__() ").split())
        raise RecipeError(f"train: {message}") from error
    _require_sense(found)
    _checkpoint_activations(found)
    require_optimizer(found)
    require_reporters(found)
    if found.full_determinism:  # scores come before Trainer, in a run that goes on as in another
        enable_full_determinism(seed)
    return found


def _under_todays_names(settings: dict[str, Any]) -> dict[str, Any]:
    # YAML reads a bare `no` as false.
    found = {k: "no" if v is False and k.endswith("_strategy") else v for k, v in settings.items()}
    for old, new in ALIASES.items():
        if old in found and new in _FIELDS:
            value = found.pop(old)
            if found.setdefault(new, value) != value:
                raise RecipeError(f"train: {old} and {new} are one setting, and disagree")
    return found


def _require_known(settings: dict[str, Any], ours: dict[str, Any]) -> None:
    for key, value in settings.items():
        if key not in _FIELDS:
            close = get_close_matches(key, _FIELDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see transformers.TrainingArguments"
            raise RecipeError(f"train: unknown key {key!r}; {hint}")
        if key in REFUSED and value != ours.get(key, _default(_FIELDS[key])):
            raise RecipeError(f"train: {key!r} is not a setting here: {REFUSED[key]}")
        if key not in HONOURED | HARMLESS | REFUSED:
            raise RecipeError(
                f"train: {key!r} is new in transformers, and it is not known what it does here"
            )


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _require_no_launched_settings(settings: dict[str, Any]) -> None:
    """Raise RecipeError for what a launcher would change behind a recipe's back."""
    precision = next((half for half in ("bf16", "fp16") if settings.get(half)), "no")
    for name, instead in _LAUNCHED.items():
        given = os.environ.get(name, "").lower()
        if given not in ("", "no", "false", precision):
            raise RecipeError(f"{name}={given} is not read: the recipe must say {instead}")


def _defaults() -> dict[str, Any]:
    defaults: dict[str, Any] = {"report_to": "none", "save_total_limit": 2, "logging_steps": 10}
    defaults["dataloader_pin_memory"] = torch.accelerator.is_available()
    # Every process reaches every value in every step (see `feeding`), so none need be looked for.
    defaults["ddp_find_unused_parameters"] = False
    # Without it every process on a CPU would train on the same rows, and nothing would say so.
    defaults["use_cpu"] = not torch.accelerator.is_available()
    return defaults


def _require_sense(found: TrainingArguments) -> None:
    """Raise RecipeError for settings that transformers takes and that make no sense here."""
    if found.save_strategy == "best":
        raise RecipeError("train: save_strategy must be no, steps or epoch; none is the best here")
    if found.max_steps <= 0 and found.num_train_epochs <= 0:
        raise RecipeError("train: num_train_epochs and max_steps leave no step to train")


def _checkpoint_activations(found: TrainingArguments) -> None:
    """Say how activations are computed again, or torch would take the reentrant way by default."""
    given = found.gradient_checkpointing_kwargs or {}
    if not isinstance(given, dict) or given.get("use_reentrant", False) is not False:
        raise RecipeError(
            "train: use_reentrant must be false: the other way finds no gradients where a layer's "
            "inputs have none, as those of a frozen tower"
        )
    for key in _FIELDS.keys() & {
        "activation_checkpointing_kwargs",
        "gradient_checkpointing_kwargs",
    }:
        setattr(found, key, {"use_reentrant": False, **given})


def require_numbers(settings: dict[str, Any]) -> None:
    """Raise RecipeError for what should be a number or a flag and is none, or is out of range."""
    for key, value in settings.items():
        if wanted := _wanted(key, value):
            raise RecipeError(f"train: {key} must be {wanted}, not {value!r}")


def _wanted(key: str, value: Any) -> str:
    """What a setting must be, if its value is not that."""
    kind = type(_FIELDS[key].default) if key in _FIELDS else None
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool and not isinstance(value, bool):
        return "true or false"
    if kind in (int, float) and not plain:
        return "" if value is None else "a number"
    if key in _COUNTS and not (isinstance(value, int) and value > 0):
        return "a whole number of at least 1"
    return _out_of_range(key, value) if plain else ""


def _out_of_range(key: str, value: float) -> str:
    if key in _POSITIVE and value <= 0:
        return "above 0"
    if key == "label_smoothing_factor" and not 0 <= value < 1:
        return "at least 0 and below 1"
    return "at least 0 (no clipping)" if key == "max_grad_norm" and value < 0 else ""


_FIELDS: dict[str, Field] = {field.name: field for field in fields(TrainingArguments)}
