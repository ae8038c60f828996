"""The values of a recipe's `train:`: each of its field's type, and in its range."""

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
    """Which numbers a setting takes, and how a message says so."""

    description: str
    contains: Callable[[float], bool]


_FROM_0 = NumberRange("of at least 0", lambda value: 0 <= value < inf)
_FROM_1 = NumberRange("of at least 1", lambda value: 1 <= value < inf)
_ABOVE_0 = NumberRange("above 0", lambda value: 0 < value < inf)
_BELOW_1 = NumberRange("of at least 0 and below 1", lambda value: 0 <= value < 1)
# Of every setting that is a number.
RANGES = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _FROM_1),
    **dict.fromkeys(("gradient_accumulation_steps", "dataloader_prefetch_factor"), _FROM_1),
    **dict.fromkeys(("torch_empty_cache_steps", "save_total_limit", "ddp_bucket_cap_mb"), _FROM_1),
    **dict.fromkeys(("num_train_epochs", "learning_rate", "weight_decay"), _FROM_0),
    **dict.fromkeys(("adam_epsilon", "neftune_noise_alpha", "dataloader_num_workers"), _FROM_0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), _BELOW_1),
    **dict.fromkeys(("save_steps", "logging_steps"), _ABOVE_0),
    "ddp_timeout": NumberRange("above 0 and at most 10**9", lambda value: 0 < value <= 10**9),
    "data_seed": NumberRange("of at least 0 and below 2**63", lambda value: 0 <= value < 2**63),
    "max_grad_norm": NumberRange("of at least 0 (no clipping)", lambda value: value >= 0),
    "max_steps": NumberRange(
        "of at least 1 (or -1: num_train_epochs says it)", lambda value: value >= 1 or value == -1
    ),
    "warmup_steps": NumberRange(
        "of at least 0, whole or below 1 (a share of all steps)",
        lambda value: 0 <= value < inf and (value < 1 or value == int(value)),
    ),
}
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
    """The settings as transformers takes them today.

    Raises RecipeError for two names of one setting that disagree.
    """
    # YAML reads a bare `no` as false.
    found = {k: "no" if v is False and k.endswith("_strategy") else v for k, v in settings.items()}
    for old, new in ALIASES.items():
        if old in found and new in FIELDS:
            value = found.pop(old)
            if found.setdefault(new, value) != value:
                raise RecipeError(f"train: {old} and {new} are one setting, and disagree")
    if isinstance(options := found.get("optim_args"), dict):
        found["optim_args"] = format_optim_args(options)
    return found


def require_values(settings: dict[str, Any]) -> None:
    """Raise RecipeError for a value that is not of its setting's type, or is out of range."""
    for key, value in with_current_names(settings).items():
        if key not in FIELDS or key not in HONOURED | HARMLESS:
            continue
        if not _is_of_type(key, value) or not _is_in_range(key, value):
            raise RecipeError(
                f"train: {key} must be {_describe_type(key)}, not {format_value(value)}"
            )
        _require_choice(key, value)


def _is_of_type(key: str, value: Any) -> bool:
    try:
        _type_adapter_of(key).validate_python(value)
    except ValidationError:
        return False
    return True


@cache
def _type_adapter_of(key: str) -> TypeAdapter:
    return TypeAdapter(_load_type_hints()[key], config=ConfigDict(strict=True))


@cache
def _load_type_hints() -> dict[str, Any]:
    return get_type_hints(TrainingArguments)


def _is_in_range(key: str, value: Any) -> bool:
    return key not in RANGES or value is None or RANGES[key].contains(value)


def _describe_type(key: str) -> str:
    """What a setting must be."""
    hint = _load_type_hints()[key]
    members = {get_origin(member) or member for member in (get_args(hint) or (hint,))}
    description = " or ".join(
        description for kind, description in _TYPE_NAMES.items() if kind in members
    )
    if key in RANGES:
        description += f" {RANGES[key].description}"
    return f"{description} (or null)" if NoneType in members else description


def _require_choice(key: str, value: Any) -> None:
    choices = tuple(FIELDS[key].metadata.get("choices", _CHOICES.get(key, ())))
    if not choices or value in choices:
        return
    close = get_close_matches(str(value), map(str, choices), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    allowed = ", ".join(str(c).lower() for c in choices)
    raise RecipeError(f"train: {key}: unknown {format_value(value)}{hint} (allowed: {allowed})")
