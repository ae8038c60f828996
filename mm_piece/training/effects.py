"""Settings that act only beside another one: what each of them needs."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments

from mm_piece.errors import RecipeError, format_value
from mm_piece.training.known_arguments import default_of


class Requirement(NamedTuple):
    """When a setting acts, and how a message says what is missing."""

    is_met: Callable[[TrainingArguments], bool]
    description: str


def _is_saving(args: TrainingArguments) -> bool:
    return args.save_strategy != "no"


def _is_saving_by_steps(args: TrainingArguments) -> bool:
    return args.save_strategy == "steps"


def _is_logging_by_steps(args: TrainingArguments) -> bool:
    return args.logging_strategy == "steps"


def _has_workers(args: TrainingArguments) -> bool:
    return args.dataloader_num_workers > 0


def _is_recomputing(args: TrainingArguments) -> bool:
    return bool(args.gradient_checkpointing)


def _is_accelerated(args: TrainingArguments) -> bool:
    return args.device.type != "cpu"


def _reporter_requirement(*names: str) -> Requirement:
    def is_reporting(args: TrainingArguments) -> bool:
        return bool({*names} & {*(args.report_to or ())})

    return Requirement(is_reporting, f"report_to: {' or '.join(names)}")


_ACCELERATED = Requirement(_is_accelerated, "an accelerator, and this training runs on a CPU")
_CHECKPOINTING = Requirement(_is_recomputing, "activation_checkpointing: true")
# What depends on the number of processes or nodes alone, or on a device's cache, is not among
# them: one recipe serves all machines, and such a setting changes no result.
REQUIREMENTS = {
    "fp16": _ACCELERATED,
    "tf32": _ACCELERATED,
    "save_steps": Requirement(_is_saving_by_steps, "save_strategy: steps"),
    "save_total_limit": Requirement(_is_saving, "save_strategy: steps or epoch"),
    "logging_steps": Requirement(_is_logging_by_steps, "logging_strategy: steps"),
    "dataloader_persistent_workers": Requirement(_has_workers, "dataloader_num_workers above 0"),
    "dataloader_prefetch_factor": Requirement(_has_workers, "dataloader_num_workers above 0"),
    "activation_checkpointing_kwargs": _CHECKPOINTING,
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
    "run_name": _reporter_requirement(
        "wandb", "trackio", "comet_ml", "mlflow", "dagshub", "swanlab"
    ),
    "project": _reporter_requirement("trackio"),
    "trackio_space_id": _reporter_requirement("trackio"),
    "trackio_bucket_id": _reporter_requirement("trackio"),
    "trackio_static_space_id": _reporter_requirement("trackio"),
}
# What torch's `checkpoint` takes of a recipe -> the values; `context_fn` is a function.
RECOMPUTE_OPTIONS: dict[str, tuple[Any, ...]] = {
    "use_reentrant": (False,),
    "preserve_rng_state": (True, False),
    "determinism_check": ("default", "none"),
    "debug": (True, False),
    "early_stop": (True, False),
    "respect_saved_tensors_hooks": (True, False),
}


def require_effects(
    args: TrainingArguments, settings: dict[str, Any], our_defaults: dict[str, Any]
) -> None:
    """Raise RecipeError for one of the `settings` that does nothing among the others.

    What holds by default, transformers' or `ours`, or asks for nothing, may be written.
    """
    for (
        key,
        requirement,
    ) in REQUIREMENTS.items():  # in this order, so that all processes say the same
        if key not in settings:
            continue
        neutral_values = (None, False, {}, default_of(key), our_defaults.get(key))
        if settings[key] not in neutral_values and not requirement.is_met(args):
            raise RecipeError(
                f"train: {key} does nothing without {requirement.description}; leave it out"
            )


def require_recomputing(options: Any) -> None:
    """Raise RecipeError for what torch would not read of `activation_checkpointing_kwargs`."""
    name = "activation_checkpointing_kwargs"
    if not isinstance(options, dict):
        raise RecipeError(f"train: {name} must be a mapping, not {format_value(options)}")
    if options.get("use_reentrant", False) is not False:
        raise RecipeError(
            "train: use_reentrant must be false: the other way finds no gradients where a layer's "
            "inputs have none, as those of a frozen tower"
        )
    read = inspect.signature(checkpoint).parameters
    known_options = [key for key in RECOMPUTE_OPTIONS if key in read]  # a later torch reads more
    for key, value in options.items():
        if key not in known_options:
            raise RecipeError(
                f"train: {name}: unknown key {key!r}; allowed: {', '.join(known_options)}"
            )
        if not any(
            value is one or value == one and isinstance(value, str)
            for one in RECOMPUTE_OPTIONS[key]
        ):
            allowed = " or ".join(str(one).lower() for one in RECOMPUTE_OPTIONS[key])
            raise RecipeError(f"train: {name}: {key} must be {allowed}, not {format_value(value)}")
