"""transformers' TrainingArguments from a recipe's `train:`.

A setting is taken, or refused with a RecipeError of one line before anything is written.
"""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, enable_full_determinism

from mm_piece.errors import RecipeError, format_error
from mm_piece.recipe import Task
from mm_piece.recipe.problems import find_home
from mm_piece.recipe.reading import KEY_PLACES
from mm_piece.recipe.train_keys import TASK_KEYS
from mm_piece.training.effects import require_effects, require_recomputing
from mm_piece.training.known_arguments import (
    FIELDS,
    HARMLESS,
    HONOURED,
    REFUSED,
    default_of,
)
from mm_piece.training.optimizers import require_optimizer
from mm_piece.training.reporters import require_reporters
from mm_piece.training.schedules import require_schedule
from mm_piece.training.values import require_values, with_current_names

# Variables by which `accelerate launch` changes a run, and what a recipe says instead.
_LAUNCHER_VARIABLES = {
    "ACCELERATE_MIXED_PRECISION": "train: {bf16: true}",
    "ACCELERATE_DYNAMO_BACKEND": "nothing: a compiled run would not go on bit for bit",
    "ACCELERATE_USE_FSDP": "train: {deepspeed: …}",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "train: {deepspeed: …}",
}


def arguments(settings: dict[str, Any], folder: Path, seed: int) -> TrainingArguments:
    """Build TrainingArguments from a recipe's `train:` as it stands.

    Raises RecipeError for whatever is refused.
    """
    # from here on, a setting has one name
    settings = with_current_names(settings)
    given = {
        "output_dir": str(folder),
        "seed": seed,
        "remove_unused_columns": False,
    }
    _require_known(settings, given)
    require_values(settings)
    _require_no_launched_settings(settings)

    keywords = _with_defaults(settings) | given
    try:
        found = TrainingArguments(**keywords)
    except Exception as error:  # it may trip over a value in ways of its own
        message = format_error(error).removeprefix("TrainingArguments.__init__() ")
        raise RecipeError(f"train: {message}") from error

    # effects come last: they depend on reporters, from which TensorBoard is taken out before
    _require_supported(found)
    _checkpoint_activations(found)
    require_optimizer(found)
    require_schedule(found)
    require_reporters(found)
    require_effects(found, settings, _with_defaults({}))

    # Trainer turns it on when it is made. In a run that goes on, scores may come before that, and
    # must be those of a run that was never stopped.
    if found.full_determinism:
        enable_full_determinism(seed)
    return found


def require_task_settings(task: Task) -> None:
    """Raise RecipeError for one of a task's own settings that only a whole run can have."""
    for key in task.train_settings:
        if key in FIELDS and key not in TASK_KEYS:
            raise RecipeError(
                f"task {task.name!r}: train_settings: {key!r} is a setting of the whole run: "
                f"write it under `train`; a task may have {', '.join(sorted(TASK_KEYS))}"
            )


def _require_known(settings: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise RecipeError for a key that is unknown, refused or newer than the tables here."""
    for key, value in settings.items():
        if key not in FIELDS:
            hint = "see transformers.TrainingArguments"
            if close := get_close_matches(key, FIELDS, n=1):
                hint = f"did you mean {close[0]!r}?"
            if home := find_home(key, KEY_PLACES):
                hint = f"it belongs {home}"
            raise RecipeError(f"train: unknown key {key!r}; {hint}")

        # the value that is used anyway may be written
        if key in REFUSED and value != given.get(key, default_of(key)):
            raise RecipeError(f"train: {key!r} is not a setting here: {REFUSED[key]}")

        if key not in HONOURED | HARMLESS | REFUSED:
            raise RecipeError(
                f"train: {key!r} is new in transformers, and it is not known what it does here"
            )


def _require_no_launched_settings(settings: dict[str, Any]) -> None:
    """Raise RecipeError for variables by which a launcher would change what a recipe says."""
    precision = "no"
    if settings.get("bf16"):
        precision = "bf16"
    elif settings.get("fp16"):
        precision = "fp16"

    for name, instead in _LAUNCHER_VARIABLES.items():
        given = os.environ.get(name, "").lower()
        if given not in ("", "no", "false", precision):
            raise RecipeError(f"{name}={given} is not read: the recipe must say {instead}")


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings, completed by the defaults of this library."""
    has_accelerator = torch.accelerator.is_available()
    found: dict[str, Any] = {
        "report_to": "none",
        "save_total_limit": 2,
        "logging_steps": 10,
        "dataloader_pin_memory": has_accelerator,  # without one torch only warns
        # Every value receives a gradient on every process in every step (see `batches`).
        "ddp_find_unused_parameters": False,
    }
    found |= settings

    # Without it every process on a CPU would train on the same rows, and nothing would say so.
    asked = bool(settings.get("use_cpu"))
    found["use_cpu"] = asked or not has_accelerator
    return found


def _require_supported(found: TrainingArguments) -> None:
    """Raise RecipeError for settings that transformers takes and that make no sense here."""
    if found.save_strategy == "best":
        raise RecipeError("train: save_strategy must be no, steps or epoch; none is the best here")

    if found.max_steps <= 0 and found.num_train_epochs <= 0:
        raise RecipeError("train: num_train_epochs and max_steps leave no step to train")


def _checkpoint_activations(found: TrainingArguments) -> None:
    """Have activation checkpointing recompute without torch's reentrant backward pass."""
    options: Any = found.gradient_checkpointing_kwargs or {}
    require_recomputing(options)

    # one setting has an old and a new name, and transformers versions read the one or the other
    names = {"activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"}
    for key in FIELDS.keys() & names:
        setattr(found, key, {"use_reentrant": False, **options})
