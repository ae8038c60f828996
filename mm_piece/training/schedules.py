"""The schedule of the learning rate: a recipe's settings of it act, or are refused.

transformers itself decides that: a schedule is made with a setting and without it, and the factors
by which the two multiply the learning rate are compared.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from mm_piece.errors import RecipeError, format_error

# Parameters of a schedule that Trainer gives itself.
_GIVEN_BY_TRAINER = {
    "optimizer",
    "num_warmup_steps",
    "num_training_steps",
    "last_epoch",
}
_MIN_STEPS = 1000  # length of the schedule that is sampled, at least
_MAX_POINTS = 100_000  # of a longer one, so many steps are sampled


def require_schedule(args: TrainingArguments) -> None:
    """Raise RecipeError for a schedule that cannot be made, or a setting that it ignores."""
    name = SchedulerType(args.lr_scheduler_type).value
    options = args.lr_scheduler_kwargs or {}
    if not isinstance(options, dict):
        raise RecipeError("train: lr_scheduler_kwargs must be a mapping")
    _require_known_options(name, options)

    # options may be numbers of steps themselves: the schedule must be longer than they reach
    counts = [value for value in options.values() if type(value) is int and value > 0]
    steps = _MIN_STEPS + int(args.warmup_steps) + sum(counts)
    try:
        factors = _sample_factors(args, options, args.get_warmup_steps(steps), steps)
    except Exception as error:  # a schedule trips over values in ways of its own
        raise RecipeError(f"train: lr_scheduler_type {name}: {format_error(error)}") from error

    _require_warmup_acts(args, options, factors, steps)
    _require_options_act(args, options, factors, steps)


def _require_known_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise RecipeError for an option that a schedule's function does not have."""
    parameters = _parameters_of(name)
    known = [key for key in parameters if key not in _GIVEN_BY_TRAINER]

    for key in options:
        if key not in known:
            allowed = ", ".join(known) or "nothing"
            raise RecipeError(
                f"train: lr_scheduler_kwargs: {name} reads {allowed} there, not {key!r}"
            )


def _require_warmup_acts(
    args: TrainingArguments,
    options: Mapping[str, Any],
    factors: list[float],
    steps: int,
) -> None:
    """Raise RecipeError for a warm-up that leaves the learning rate as it is."""
    if not args.warmup_steps:
        return
    if factors != _sample_factors_or_none(args, options, 0, steps):
        return

    name = SchedulerType(args.lr_scheduler_type).value
    alternative = ", or take constant_with_warmup" if name == "constant" else ""
    raise RecipeError(
        f"train: warmup_steps does nothing with lr_scheduler_type {name!r}; leave it out"
        f"{alternative}"
    )


def _require_options_act(
    args: TrainingArguments,
    options: Mapping[str, Any],
    factors: list[float],
    steps: int,
) -> None:
    """Raise RecipeError for an option that leaves the learning rate as it is."""
    name = SchedulerType(args.lr_scheduler_type).value
    parameters = _parameters_of(name)
    warmup = args.get_warmup_steps(steps)

    for key, value in options.items():
        others = {other: options[other] for other in options if other != key}
        without = _sample_factors_or_none(args, others, warmup, steps)

        # a default may be written, though it changes nothing
        if value != parameters[key].default and factors == without:
            raise RecipeError(
                f"train: lr_scheduler_kwargs: {key} does nothing with lr_scheduler_type {name!r} "
                "and the settings beside it; leave it out"
            )


def _parameters_of(name: str) -> Mapping[str, inspect.Parameter]:
    function = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    return inspect.signature(function).parameters


def _sample_factors_or_none(
    args: TrainingArguments,
    options: Mapping[str, Any],
    warmup: int,
    steps: int,
) -> list[float] | None:
    try:
        return _sample_factors(args, options, warmup, steps)
    except Exception:  # a setting without which no schedule can be made acts
        return None


def _sample_factors(
    args: TrainingArguments,
    options: Mapping[str, Any],
    warmup: int,
    steps: int,
) -> list[float]:
    """Return the learning rate's factor at each step, or at `_MAX_POINTS` of a longer schedule."""
    # a schedule only needs the learning rate of some optimizer
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    schedule: Any = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        warmup,
        steps,
        scheduler_specific_kwargs={**options},
    )
    # one group of parameters, so one factor
    (factor,) = schedule.lr_lambdas

    stride = 1 + steps // _MAX_POINTS
    return [factor(step) for step in range(0, steps + 1, stride)]
