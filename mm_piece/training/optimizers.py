"""The optimizers that a recipe may choose, and the settings that each of them reads.

A test for each shows that a stopped training goes on bit for bit. Optimizers with smaller states,
such as those of 8 bits, gain nothing here: only the selected entries have a state.
"""

from collections.abc import Mapping
from itertools import pairwise
from math import isfinite
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from mm_piece.errors import RecipeError, format_error, format_value

# Name -> the keys of `optim_args` that it reads.
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adamw_torch": (),
    "adamw_torch_fused": (),
    "adafactor": (),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
    "sgd": ("momentum", "dampening", "nesterov"),
}
_FLAGS = ("centered", "nesterov")
_ADAM_DEFAULTS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}


def format_optim_args(options: Mapping[str, Any]) -> str:
    """Return `optim_args` in the form that transformers reads: `key=value,key=value`.

    Raises RecipeError for a value that is no plain one.
    """
    pairs = []
    for key, value in options.items():
        if not isinstance(value, bool | int | float | str):
            raise RecipeError(
                f"train: optim_args: {key} must be a number or true or false, not "
                f"{format_value(value)}"
            )
        pairs.append(f"{key}={value}")

    return ",".join(pairs)


def require_optimizer(args: TrainingArguments) -> None:
    """Raise RecipeError for an optimizer that is not known here, or a setting that it ignores.

    The optimizer's own checks of its values come last.
    """
    name = OptimizerNames(args.optim).value
    if name not in OPTIMIZERS:
        raise RecipeError(
            f"train: optim {name!r} is not known to go on bit for bit after a stop; "
            f"allowed: {', '.join(OPTIMIZERS)}"
        )

    options = _parse_optim_args(args.optim_args)
    for key, value in options.items():
        if key not in OPTIMIZERS[name]:
            allowed = ", ".join(OPTIMIZERS[name]) or "nothing"
            raise RecipeError(f"train: optim_args: {name} reads {allowed} there, not {key!r}")
        _require_option_value(key, value)

    dampening = float(options.get("dampening", 0))
    momentum = float(options.get("momentum", 0))
    if dampening and not momentum:
        raise RecipeError(
            "train: optim_args: dampening does nothing without momentum; leave it out"
        )

    # TrainingArguments always has these fields: only another value than the default was asked for
    for key, default in _ADAM_DEFAULTS.items():
        if not name.startswith("adam") and vars(args)[key] != default:
            raise RecipeError(f"train: {key} does nothing with optim {name!r}; leave it out")

    _require_constructible(name, args)


def _require_constructible(name: str, args: TrainingArguments) -> None:
    """Raise RecipeError for settings of which no optimizer can be made."""
    # any parameter will do: the checks do not depend on it
    parameter = nn.Parameter(torch.zeros(1))
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        kind([parameter], **options)
    except Exception as error:  # an optimizer refuses values in ways of its own
        raise RecipeError(f"train: optim {name}: {format_error(error)}") from error


def _parse_optim_args(written: str | None) -> dict[str, str]:
    """Return the pairs of `key=value,key=value`.

    Raises RecipeError for a part that is no pair, and for a key that stands twice.
    """
    # transformers strips spaces the same way
    text = (written or "").replace(" ", "")
    pairs = [part.partition("=") for part in text.split(",") if part]

    for key, equals, value in pairs:
        if not equals or not value:
            raise RecipeError(f"train: optim_args: {key!r} must be key=value, separated by ,")

    keys = sorted(key for key, _, _ in pairs)
    for key, following in pairwise(keys):
        if key == following:
            raise RecipeError(f"train: optim_args: {key!r} stands twice")

    return {key: value for key, _, value in pairs}


def _require_option_value(key: str, value: str) -> None:
    """Raise RecipeError for a value of `optim_args` that transformers would read as another."""
    if key in _FLAGS:
        if value.lower() not in ("true", "false"):
            raise RecipeError(f"train: optim_args: {key} must be true or false, not {value!r}")
        return

    try:
        finite = isfinite(float(value))
    except ValueError:
        finite = False

    if not finite:
        raise RecipeError(f"train: optim_args: {key} must be a number, not {value!r}")
