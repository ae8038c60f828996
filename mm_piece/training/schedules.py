"""The schedule of the learning rate: what a recipe says of it acts, or is refused.

transformers itself is asked: a schedule is made with a setting and without it, and compared.
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

_GIVEN_BY_TRAINER = {
    "optimizer",
    "num_warmup_steps",
    "num_training_steps",
    "last_epoch",
}  # by Trainer
_MIN_STEPS = 1000  # at least, of the schedule that is looked at
_MAX_POINTS = 100_000  # points of it


def require_schedule(args: TrainingArguments) -> None:
    """Raise RecipeError for a schedule that cannot be made, or a setting that it ignores."""
    kind, options = SchedulerType(args.lr_scheduler_type), args.lr_scheduler_kwargs or {}
    name = kind.value
    if not isinstance(options, dict):
        raise RecipeError("train: lr_scheduler_kwargs must be a mapping")
    parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[kind]).parameters
    for key in options:
        if key not in parameters.keys() - _GIVEN_BY_TRAINER:
            allowed = (
                ", ".join(one for one in parameters if one not in _GIVEN_BY_TRAINER) or "nothing"
            )
            raise RecipeError(
                f"train: lr_scheduler_kwargs: {name} reads {allowed} there, not {key!r}"
            )

    steps = _MIN_STEPS + int(args.warmup_steps)
    steps += sum(value for value in options.values() if type(value) is int and value > 0)
    try:
        factors = _sample_factors(args, options, args.get_warmup_steps(steps), steps)
    except Exception as error:  # a schedule trips over values in ways of its own
        raise RecipeError(f"train: lr_scheduler_type {name}: {format_error(error)}") from error
    if args.warmup_steps and factors == _sample_factors_or_none(args, options, 0, steps):
        raise RecipeError(
            f"train: warmup_steps does nothing with lr_scheduler_type {name!r}; leave it out"
            + (", or take constant_with_warmup" if name == "constant" else "")
        )
    for key, value in options.items():
        others = {one: options[one] for one in options if one != key}
        without = _sample_factors_or_none(args, others, args.get_warmup_steps(steps), steps)
        if value != parameters[key].default and factors == without:
            raise RecipeError(
                f"train: lr_scheduler_kwargs: {key} does nothing with lr_scheduler_type {name!r} "
                "and the settings beside it; leave it out"
            )


def _sample_factors_or_none(args: TrainingArguments, *schedule: Any) -> list[float] | None:
    try:
        return _sample_factors(args, *schedule)
    except Exception:  # what cannot be left out acts
        return None


def _sample_factors(
    args: TrainingArguments, options: Mapping[str, Any], warmup: int, steps: int
) -> list[float]:
    """The rate's factor at the steps of a schedule, at so many of a long one."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    schedule: Any = get_scheduler(
        args.lr_scheduler_type, optimizer, warmup, steps, scheduler_specific_kwargs={**options}
    )
    (factor,) = schedule.lr_lambdas
    return [factor(step) for step in range(0, steps + 1, 1 + steps // _MAX_POINTS)]
