"""The values of a recipe's `train:`: of the right type, in range, and under current names.

Types come from the annotations of transformers' TrainingArguments, ranges from a table here.
"""

from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from math import inf
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments

from mm_piece.errors import RecipeError, format_value
from mm_piece.training.known_arguments import ALIASES, FIELDS, HARMLESS, HONOURED
from mm_piece.training.optimizers import format_optim_args


class NumberRange(NamedTuple):
    """Description of the numbers that a setting takes, and a test for them."""

    description: str
    contains: Callable[[float], bool]


_FROM_0 = NumberRange("of at least 0", lambda value: 0 <= value < inf)
_FROM_1 = NumberRange("of at least 1", lambda value: 1 <= value < inf)
_ABOVE_0 = NumberRange("above 0", lambda value: 0 < value < inf)
_BELOW_1 = NumberRange("of at least 0 and below 1", lambda value: 0 <= value < 1)
# The range of every setting that is a number.
RANGES = {
    # counts that cannot be zero
    "per_device_train_batch_size": _FROM_1,
    "per_device_eval_batch_size": _FROM_1,
    "gradient_accumulation_steps": _FROM_1,
    "dataloader_prefetch_factor": _FROM_1,
    "torch_empty_cache_steps": _FROM_1,
    "save_total_limit": _FROM_1,
    "ddp_bucket_cap_mb": _FROM_1,
    # amounts, where zero means none
    "num_train_epochs": _FROM_0,
    "learning_rate": _FROM_0,
    "weight_decay": _FROM_0,
    "adam_epsilon": _FROM_0,
    "neftune_noise_alpha": _FROM_0,
    "dataloader_num_workers": _FROM_0,
    # factors of a decay, and shares
    "adam_beta1": _BELOW_1,
    "adam_beta2": _BELOW_1,
    "label_smoothing_factor": _BELOW_1,
    # below 1: a share of all steps
    "save_steps": _ABOVE_0,
    "logging_steps": _ABOVE_0,
    "ddp_timeout": NumberRange("above 0 and at most 10**9", lambda value: 0 < value <= 10**9),
    "data_seed": NumberRange("of at least 0 and below 2**63", lambda value: 0 <= value < 2**63),
    "max_grad_norm": NumberRange("of at least 0 (no clipping)", lambda value: value >= 0),
    "max_steps": NumberRange(
        "of at least 1 (or -1: num_train_epochs says it)",
        lambda value: value >= 1 or value == -1,
    ),
    "warmup_steps": NumberRange(
        "of at least 0, whole or below 1 (a share of all steps)",
        lambda value: 0 <= value < inf and (value < 1 or value == int(value)),
    ),
}
# Choices that a field's metadata do not list.
_CHOICES = {"include_num_input_tokens_seen": (True, False, "all", "non_padding", "no")}
_TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
}


def with_current_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings as current transformers takes them.

    Raises RecipeError for two names of one setting that disagree.
    """
    found = dict(settings)
    for key, value in settings.items():
        if value is False and key.endswith("_strategy"):
            found[key] = "no"  # YAML reads a bare `no` as false

    for old, new in ALIASES.items():
        if old not in found or new not in FIELDS:
            continue
        value = found.pop(old)
        if found.setdefault(new, value) != value:
            raise RecipeError(f"train: {old} and {new} are one setting, and disagree")

    options = found.get("optim_args")
    if isinstance(options, dict):
        found["optim_args"] = format_optim_args(options)
    return found


def require_values(settings: dict[str, Any]) -> None:
    """Raise RecipeError for a value that is not of its setting's type, or is out of range."""
    taken = FIELDS.keys() & (HONOURED | HARMLESS)
    for key, value in with_current_names(settings).items():
        if key not in taken:
            continue

        if not _is_of_type(key, value) or not _is_in_range(key, value):
            expected = _describe_type(key)
            given = format_value(value)
            raise RecipeError(f"train: {key} must be {expected}, not {given}")

        _require_choice(key, value)


def _is_of_type(key: str, value: Any) -> bool:
    try:
        _type_adapter_of(key).validate_python(value)
    except ValidationError:
        return False
    return True


@cache
def _type_adapter_of(key: str) -> TypeAdapter:
    hints = _load_type_hints()
    # strict: pydantic would otherwise take "1" for a number and 1 for true
    return TypeAdapter(hints[key], config=ConfigDict(strict=True))


@cache
def _load_type_hints() -> dict[str, Any]:
    # resolves what are texts in the class's source; slow enough to be cached
    return get_type_hints(TrainingArguments)


def _is_in_range(key: str, value: Any) -> bool:
    if key not in RANGES or value is None:
        return True
    return RANGES[key].contains(value)


def _describe_type(key: str) -> str:
    """Return what a setting must be, in words."""
    hint = _load_type_hints()[key]
    members = get_args(hint) or (hint,)  # of a union
    # `dict[str, Any]` counts as dict
    kinds = {get_origin(member) or member for member in members}

    names = [name for kind, name in _TYPE_NAMES.items() if kind in kinds]
    description = " or ".join(names)
    if key in RANGES:
        description += f" {RANGES[key].description}"
    if NoneType in kinds:
        description += " (or null)"
    return description


def _require_choice(key: str, value: Any) -> None:
    """Raise RecipeError for a value that is none of a setting's choices, with the nearest."""
    own_choices = _CHOICES.get(key, ())
    metadata = FIELDS[key].metadata
    choices = tuple(metadata.get("choices", own_choices))
    if not choices or value in choices:
        return

    names = [str(choice) for choice in choices]
    hint = ""
    if close := get_close_matches(str(value), names, n=1):
        hint = f"; did you mean {close[0]!r}?"
    allowed = ", ".join(str(choice).lower() for choice in choices)
    raise RecipeError(f"train: {key}: unknown {format_value(value)}{hint} (allowed: {allowed})")
