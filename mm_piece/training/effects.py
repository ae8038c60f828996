"""Settings that act only beside another one: what each of them needs."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments

from mm_piece.errors import RecipeError, short
from mm_piece.training.known_arguments import default_of


class Need(NamedTuple):
    """When a setting acts, and how a message says what is missing."""

    met: Callable[[TrainingArguments], bool]
    words: str


def _saves(args: TrainingArguments) -> bool:
    return args.save_strategy != "no"


def _saves_by_steps(args: TrainingArguments) -> bool:
    return args.save_strategy == "steps"


def _logs_by_steps(args: TrainingArguments) -> bool:
    return args.logging_strategy == "steps"


def _has_workers(args: TrainingArguments) -> bool:
    return args.dataloader_num_workers > 0


def _checkpoints(args: TrainingArguments) -> bool:
    return bool(args.gradient_checkpointing)


def _is_accelerated(args: TrainingArguments) -> bool:
    return args.device.type != "cpu"


def _reports_to(*names: str) -> Need:
    def met(args: TrainingArguments) -> bool:
        return bool({*names} & {*(args.report_to or ())})

    return Need(met, f"report_to: {' or '.join(names)}")


_ACCELERATED = Need(_is_accelerated, "an accelerator, and this training runs on a CPU")
_CHECKPOINTING = Need(_checkpoints, "activation_checkpointing: true")
# What depends on the number of processes or nodes alone, or on a device's cache, is not among
# them: one recipe serves all machines, and such a setting changes no result.
NEEDS = {
    "fp16": _ACCELERATED,
    "tf32": _ACCELERATED,
    "save_steps": Need(_saves_by_steps, "save_strategy: steps"),
    "save_total_limit": Need(_saves, "save_strategy: steps or epoch"),
    "logging_steps": Need(_logs_by_steps, "logging_strategy: steps"),
    "dataloader_persistent_workers": Need(_has_workers, "dataloader_num_workers above 0"),
    "dataloader_prefetch_factor": Need(_has_workers, "dataloader_num_workers above 0"),
    "activation_checkpointing_kwargs": _CHECKPOINTING,
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
    "run_name": _reports_to("wandb", "trackio", "comet_ml", "mlflow", "dagshub", "swanlab"),
    "project": _reports_to("trackio"),
    "trackio_space_id": _reports_to("trackio"),
    "trackio_bucket_id": _reports_to("trackio"),
    "trackio_static_space_id": _reports_to("trackio"),
}
# What torch's `checkpoint` takes of a recipe -> the values; `context_fn` is a function.
RECOMPUTING: dict[str, tuple[Any, ...]] = {
    "use_reentrant": (False,),
    "preserve_rng_state": (True, False),
    "determinism_check": ("default", "none"),
    "debug": (True, False),
    "early_stop": (True, False),
    "respect_saved_tensors_hooks": (True, False),
}


def require_effects(
    args: TrainingArguments, settings: dict[str, Any], ours: dict[str, Any]
) -> None:
    """Raise RecipeError for one of the `settings` that does nothing among the others.

    What holds by default, transformers' or `ours`, or asks for nothing, may be written.
    """
    for key, need in NEEDS.items():  # in this order, so that all processes say the same
        if key not in settings:
            continue
        idle = (None, False, {}, default_of(key), ours.get(key))
        if settings[key] not in idle and not need.met(args):
            raise RecipeError(f"train: {key} does nothing without {need.words}; leave it out")


def require_recomputing(options: Any) -> None:
    """Raise RecipeError for what torch would not read of `activation_checkpointing_kwargs`."""
    name = "activation_checkpointing_kwargs"
    if not isinstance(options, dict):
        raise RecipeError(f"train: {name} must be a mapping, not {short(options)}")
    if options.get("use_reentrant", False) is not False:
        raise RecipeError(
            "train: use_reentrant must be false: the other way finds no gradients where a layer's "
            "inputs have none, as those of a frozen tower"
        )
    read = inspect.signature(checkpoint).parameters
    taken = [key for key in RECOMPUTING if key in read]  # a later torch reads more
    for key, value in options.items():
        if key not in taken:
            raise RecipeError(f"train: {name}: unknown key {key!r}; allowed: {', '.join(taken)}")
        if not any(
            value is one or value == one and isinstance(value, str) for one in RECOMPUTING[key]
        ):
            allowed = " or ".join(str(one).lower() for one in RECOMPUTING[key])
            raise RecipeError(f"train: {name}: {key} must be {allowed}, not {short(value)}")
