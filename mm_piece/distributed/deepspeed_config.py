"""A DeepSpeed configuration: read it, and refuse what it asks for and cannot be done here.

DeepSpeed's own errors come late and in many lines. Some settings raise no error at all, but change
the frozen weights, or partition them where they cannot be found.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mm_piece.errors import RecipeError

_HALF_PRECISIONS = ("bf16", "fp16")
_SECTIONS = (*_HALF_PRECISIONS, "zero_optimization", "optimizer", "scheduler")
# Without them DeepSpeed would take defaults of its own in place of the recipe's.
_REQUIRED_KEYS = (
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
_SCHEDULE_KEYS = ("lr_scheduler_type", "lr_scheduler_kwargs")
_DDP_KEYS = (
    "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers",
)
_WEIGHT_CASTING_KEYS = (
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
)
_TWO_OPTIMIZERS = "optim and the configuration's optimizer exclude each other; leave one out"


def read_deepspeed_config(train: Mapping[str, object]) -> dict[str, Any]:
    """Read the configuration that a recipe's `train: {deepspeed: …}` names or contains.

    Raises RecipeError for one that cannot be read, or that asks for what cannot be done.
    """
    source = train["deepspeed"]
    config = source if isinstance(source, dict) else _read_json_object(source)

    for name in _SECTIONS:
        is_section = isinstance(config.get(name, {}), dict)
        _require_setting(is_section, f"{name} must be a section, {{…}}")
    _require_zero(config.get("zero_optimization", {}))
    _require_precision(train, config)

    for name in _REQUIRED_KEYS:
        _require_setting(
            name in config,
            f'{name} must be there ("auto" takes the recipe\'s)',
        )
    _require_optimizer(train, config)

    has_schedule = bool(config.get("scheduler"))
    for key in _SCHEDULE_KEYS:
        _require_setting(
            not (has_schedule and key in train),
            f"{key} and the configuration's scheduler exclude each other",
        )
    for key in _DDP_KEYS:
        _require_setting(
            train.get(key) is None,
            f"{key} is of DDP, which is not used beside it",
        )
    return config


def _read_json_object(source: Any) -> dict[str, Any]:
    """Read a JSON file with an object; RecipeError for any other."""
    try:
        text = Path(source).read_text(encoding="utf-8")
        config = json.loads(text)
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"train: deepspeed: cannot read {source}: {error}") from error

    if not isinstance(config, dict):
        raise RecipeError(f"train: deepspeed: {source} is no JSON object")
    return config


def _require_setting(condition: bool, message: str) -> None:
    """Raise RecipeError with the message unless the condition is met."""
    if not condition:
        raise RecipeError(f"train: deepspeed: {message}")


def _require_zero(section: Mapping[str, Any]) -> None:
    """Raise RecipeError unless DeepSpeed accepts a `zero_optimization`, and weights stay findable.

    Weights are read and written in each process's memory, at the precision that they have.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    stage = section.get("stage")
    is_valid_stage = type(stage) is int and stage in (1, 2, 3)  # True is an int, and equals 1
    _require_setting(is_valid_stage, "zero_optimization.stage must be 1, 2 or 3")

    # Trainer replaces "auto" before DeepSpeed sees it.
    settled = {key: value for key, value in section.items() if value != "auto"}
    try:
        DeepSpeedZeroConfig(**settled)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise RecipeError(f"train: deepspeed: {location}: {first['msg']}") from error

    for offload in ("offload_param", "offload_optimizer"):
        offload_section = section.get(offload) or {}
        is_in_memory = offload_section.get("device") != "nvme"
        _require_setting(is_in_memory, f"{offload}.device must be cpu or none, not nvme")

    for key in _WEIGHT_CASTING_KEYS:
        _require_setting(
            not section.get(key),
            f"{key} would change the frozen weights; remove it",
        )

    # hpZ keeps a second partition of each weight, which writes to the first one would miss.
    is_unsplit = section.get("zero_hpz_partition_size", 1) == 1
    _require_setting(is_unsplit, "zero_hpz_partition_size must be 1")


def _require_precision(train: Mapping[str, object], config: Mapping[str, Any]) -> None:
    """Raise RecipeError for mixed precision, in the recipe or in the configuration."""
    for half in _HALF_PRECISIONS:
        section = config.get(half, {})
        if train.get(half) or section.get("enabled") is True:
            raise RecipeError(
                f"train: {half} under DeepSpeed would cast every weight; "
                "leave it out and set model: {dtype: bfloat16} instead"
            )


def _require_optimizer(train: Mapping[str, object], config: Mapping[str, Any]) -> None:
    """Raise RecipeError for an optimizer or schedule that DeepSpeed does not have."""
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
    from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES

    optimizer = config.get("optimizer") or {}
    optimizer_type = str(optimizer.get("type", "adamw")).lower()
    has_two = bool(optimizer) and "optim" in train
    _require_setting(not has_two, _TWO_OPTIMIZERS)
    _require_setting(
        optimizer_type in DEEPSPEED_OPTIMIZERS,
        f"optimizer.type {optimizer_type!r} is none of {', '.join(DEEPSPEED_OPTIMIZERS)}",
    )

    schedule = config.get("scheduler") or {}
    schedule_type = schedule.get("type", "WarmupLR")
    _require_setting(
        schedule_type in VALID_LR_SCHEDULES,
        f"scheduler.type {schedule_type!r} is none of {', '.join(VALID_LR_SCHEDULES)}",
    )

    # DeepSpeed's own Adam is a C++ extension on a CPU, compiled at the first use.
    is_adam = bool(optimizer) and optimizer_type in ("adam", "adamw")
    if is_adam and not torch.accelerator.is_available():
        parameters = optimizer.get("params") or {}
        _require_setting(
            parameters.get("torch_adam") is True,
            "optimizer.params.torch_adam must be true on a CPU, or Adam is compiled",
        )
