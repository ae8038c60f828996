"""Trainer's settings from a recipe's `train:`."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, enable_full_determinism

from mm_piece.errors import RecipeError, format_error
from mm_piece.training.effects import require_effects, require_recomputing
from mm_piece.training.known_arguments import FIELDS, HARMLESS, HONOURED, REFUSED, default_of
from mm_piece.training.optimizers import require_optimizer
from mm_piece.training.reporters import require_reporters
from mm_piece.training.schedules import require_schedule
from mm_piece.training.values import require_values, with_current_names

# What `accelerate launch` hands on beside a recipe, and what a recipe says instead.
_LAUNCHER_VARIABLES = {
    "ACCELERATE_MIXED_PRECISION": "train: {bf16: true}",
    "ACCELERATE_DYNAMO_BACKEND": "nothing: a compiled run would not go on bit for bit",
    "ACCELERATE_USE_FSDP": "train: {deepspeed: …}",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "train: {deepspeed: …}",
}


def arguments(settings: dict[str, Any], folder: Path, seed: int) -> TrainingArguments:
    """TrainingArguments from a recipe's `train:` as it stands; RecipeError for what is refused."""
    settings = with_current_names(settings)
    given = {"output_dir": str(folder), "seed": seed, "remove_unused_columns": False}
    _require_known(settings, given)
    require_values(settings)
    _require_no_launched_settings(settings)
    try:
        found = TrainingArguments(**{**_with_defaults(settings), **given})
    except Exception as error:  # it may trip over a value in ways of its own
        message = format_error(error).removeprefix("TrainingArguments.__init__() ")
        raise RecipeError(f"train: {message}") from error
    _require_supported(found)
    _checkpoint_activations(found)
    require_optimizer(found)
    require_schedule(found)
    require_reporters(found)
    require_effects(found, settings, _with_defaults({}))
    if found.full_determinism:  # scores come before Trainer, in a run that goes on as in another
        enable_full_determinism(seed)
    return found


def _require_known(settings: dict[str, Any], given: dict[str, Any]) -> None:
    for key, value in settings.items():
        if key not in FIELDS:
            close = get_close_matches(key, FIELDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see transformers.TrainingArguments"
            raise RecipeError(f"train: unknown key {key!r}; {hint}")
        if key in REFUSED and value != given.get(key, default_of(key)):
            raise RecipeError(f"train: {key!r} is not a setting here: {REFUSED[key]}")
        if key not in HONOURED | HARMLESS | REFUSED:
            raise RecipeError(
                f"train: {key!r} is new in transformers, and it is not known what it does here"
            )


def _require_no_launched_settings(settings: dict[str, Any]) -> None:
    """Raise RecipeError for what a launcher would change behind a recipe's back."""
    precision = next((half for half in ("bf16", "fp16") if settings.get(half)), "no")
    for name, instead in _LAUNCHER_VARIABLES.items():
        given = os.environ.get(name, "").lower()
        if given not in ("", "no", "false", precision):
            raise RecipeError(f"{name}={given} is not read: the recipe must say {instead}")


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, and what is taken here where they say nothing."""
    found: dict[str, Any] = {"report_to": "none", "save_total_limit": 2, "logging_steps": 10}
    found["dataloader_pin_memory"] = torch.accelerator.is_available()
    # Every process reaches every value in every step (see `feeding`), so none need be looked for.
    found["ddp_find_unused_parameters"] = False
    found |= settings
    # Without it every process on a CPU would train on the same rows, and nothing would say so.
    found["use_cpu"] = bool(settings.get("use_cpu")) or not torch.accelerator.is_available()
    return found


def _require_supported(found: TrainingArguments) -> None:
    """Raise RecipeError for settings that transformers takes and that make no sense here."""
    if found.save_strategy == "best":
        raise RecipeError("train: save_strategy must be no, steps or epoch; none is the best here")
    if found.max_steps <= 0 and found.num_train_epochs <= 0:
        raise RecipeError("train: num_train_epochs and max_steps leave no step to train")


def _checkpoint_activations(found: TrainingArguments) -> None:
    """Say how activations are computed again, or torch would take the reentrant way by default."""
    options: Any = found.gradient_checkpointing_kwargs or {}
    require_recomputing(options)
    for key in FIELDS.keys() & {
        "activation_checkpointing_kwargs",
        "gradient_checkpointing_kwargs",
    }:
        setattr(found, key, {"use_reentrant": False, **options})
