"""Trainer's settings from a recipe's `train:`."""

from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from mm_piece.errors import RecipeError

_TAKEN = {
    *("resume_from_checkpoint", "push_to_hub", "load_best_model_at_end"),
    *("eval_strategy", "do_eval", "eval_steps", "metric_for_best_model"),
}
_KWARGS = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
_COUNTS = {
    *("per_device_train_batch_size", "per_device_eval_batch_size"),
    "gradient_accumulation_steps",
}
_POSITIVE = {"save_steps", "logging_steps", "ddp_timeout"}


def arguments(settings: dict[str, Any], folder: Path, seed: int) -> TrainingArguments:
    """TrainingArguments from a recipe's `train:` as it stands; RecipeError for what they refuse."""
    known = [field.name for field in fields(TrainingArguments)]
    if unknown := [key for key in settings if key not in known]:
        close = get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see transformers.TrainingArguments"
        raise RecipeError(f"train: unknown key {unknown[0]!r}; {hint}")
    ours = {"output_dir": str(folder), "seed": seed, "remove_unused_columns": False}
    if taken := sorted((ours.keys() | _TAKEN) & settings.keys()):
        raise RecipeError(
            f"train: {taken[0]!r} is not a setting here; a run has its `store` and `seed`, goes on "
            "where it stopped, and measures every position (`test`, `general`)"
        )
    require_numbers(settings)
    asked = (settings.get(key) for key in _KWARGS)
    if any(isinstance(given, dict) and given.get("use_reentrant") for given in asked):
        raise RecipeError(
            "train: use_reentrant must be false: the other way finds no gradients where a layer's "
            "inputs have none, as those of a frozen tower"
        )
    if settings.get("save_strategy") == "best":
        raise RecipeError("train: save_strategy must be no, steps or epoch; none is the best here")
    defaults: dict[str, Any] = {"report_to": "none", "save_total_limit": 2, "logging_steps": 10}
    defaults["dataloader_pin_memory"] = torch.accelerator.is_available()
    # Every process reaches every value in every step (see `feeding`), so none need be looked for.
    defaults["ddp_find_unused_parameters"] = False
    # Without it every process on a CPU would train on the same rows, and nothing would say so.
    defaults["use_cpu"] = not torch.accelerator.is_available()
    try:
        found = TrainingArguments(**{**defaults, **settings, **ours})
    except (TypeError, ValueError, ImportError) as error:
        message = " ".join(str(error).removeprefix("TrainingArguments.__init__() ").split())
        raise RecipeError(f"train: {message}") from error
    if found.max_steps <= 0 and found.num_train_epochs <= 0:
        raise RecipeError("train: num_train_epochs and max_steps leave no step to train")
    return found


def require_numbers(settings: dict[str, Any]) -> None:
    """Raise RecipeError for what should be a number or a flag and is none, or is out of range."""
    for key, value in settings.items():
        if wanted := _wanted(key, value):
            raise RecipeError(f"train: {key} must be {wanted}, not {value!r}")


def _wanted(key: str, value: Any) -> str:
    """What a setting must be, if its value is not that."""
    kind = type(_DEFAULTS.get(key))
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool and not isinstance(value, bool):
        return "true or false"
    if kind in (int, float) and not plain:
        return "" if value is None else "a number"
    if key in _COUNTS and not (isinstance(value, int) and value > 0):
        return "a whole number of at least 1"
    if plain and key in _POSITIVE and value <= 0:
        return "above 0"
    return "at least 0 (no clipping)" if plain and key == "max_grad_norm" and value < 0 else ""


_DEFAULTS = {field.name: field.default for field in fields(TrainingArguments)}
