"""Settings that act only beside another one, and what each of them needs.

A recipe in which such a setting would do nothing is refused, with the reason.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments

from mm_piece.errors import RecipeError, format_value
from mm_piece.training.known_arguments import default_of


class Requirement(NamedTuple):
    """Condition under which a setting acts, and its description in a message."""

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
    """Build the requirement that one of some reporters is used."""

    def is_reporting(args: TrainingArguments) -> bool:
        used = args.report_to or ()
        return any(name in used for name in names)

    allowed = " or ".join(names)
    return Requirement(is_reporting, f"report_to: {allowed}")


_ACCELERATED = Requirement(_is_accelerated, "an accelerator, and this training runs on a CPU")
_CHECKPOINTING = Requirement(_is_recomputing, "activation_checkpointing: true")
# Setting -> what it needs. Settings that depend on the number of processes or nodes alone, or on a
# device's cache, are not among them: they change no result, and one recipe serves all machines.
REQUIREMENTS = {
    # precision that only accelerators have
    "fp16": _ACCELERATED,
    "tf32": _ACCELERATED,
    # when checkpoints and logs are written
    "save_steps": Requirement(_is_saving_by_steps, "save_strategy: steps"),
    "save_total_limit": Requirement(_is_saving, "save_strategy: steps or epoch"),
    "logging_steps": Requirement(_is_logging_by_steps, "logging_strategy: steps"),
    # without workers, the training process loads examples itself
    "dataloader_persistent_workers": Requirement(_has_workers, "dataloader_num_workers above 0"),
    "dataloader_prefetch_factor": Requirement(_has_workers, "dataloader_num_workers above 0"),
    "activation_checkpointing_kwargs": _CHECKPOINTING,
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
    # each reporter reads settings of its own
    "run_name": _reporter_requirement(
        "wandb", "trackio", "comet_ml", "mlflow", "dagshub", "swanlab"
    ),
    "project": _reporter_requirement("trackio"),
    "trackio_space_id": _reporter_requirement("trackio"),
    "trackio_bucket_id": _reporter_requirement("trackio"),
    "trackio_static_space_id": _reporter_requirement("trackio"),
}
# Keyword of torch's `checkpoint` -> its allowed values. A recipe cannot hold `context_fn`, which
# must be a function.
RECOMPUTE_OPTIONS: dict[str, tuple[Any, ...]] = {
    "use_reentrant": (False,),
    "preserve_rng_state": (True, False),
    "determinism_check": ("default", "none"),
    "debug": (True, False),
    "early_stop": (True, False),
    "respect_saved_tensors_hooks": (True, False),
}


def require_effects(
    args: TrainingArguments,
    settings: dict[str, Any],
    our_defaults: dict[str, Any],
) -> None:
    """Raise RecipeError for one of the `settings` that does nothing among the others.

    A recipe may still write a value that asks for nothing, or a default: transformers' own or one
    of `our_defaults`.
    """
    # in the table's order, so that all processes raise the same error
    for key, requirement in REQUIREMENTS.items():
        if key not in settings:
            continue

        neutral_values = (None, False, {}, default_of(key), our_defaults.get(key))
        if settings[key] in neutral_values:
            continue

        if not requirement.is_met(args):
            raise RecipeError(
                f"train: {key} does nothing without {requirement.description}; leave it out"
            )


def require_recomputing(options: Any) -> None:
    """Raise RecipeError unless torch reads all of `activation_checkpointing_kwargs`."""
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

        choices = RECOMPUTE_OPTIONS[key]
        # 1 == True: flags are compared by identity, texts by value
        is_flag = any(value is choice for choice in choices)
        is_text = isinstance(value, str) and value in choices
        if not is_flag and not is_text:
            allowed = " or ".join(str(choice).lower() for choice in choices)
            raise RecipeError(f"train: {name}: {key} must be {allowed}, not {format_value(value)}")
