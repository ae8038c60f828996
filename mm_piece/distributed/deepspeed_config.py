"""A DeepSpeed configuration: read, and refused where it asks for what cannot be done here.

What DeepSpeed itself would say comes late and in many lines; what would change weights behind our
back, or hide them from us, it would not say at all.
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
_WEIGHT_CASTING_KEYS = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")


def read_deepspeed_config(train: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that a recipe's `train: {deepspeed: …}` names or holds.

    Raises RecipeError for one that cannot be read, or that asks for what cannot be done.
    """
    source = train["deepspeed"]
    config = source if isinstance(source, dict) else _read_json_object(source)
    for name in _SECTIONS:
        _require_setting(isinstance(config.get(name, {}), dict), f"{name} must be a section, {{…}}")
    _require_zero(config.get("zero_optimization", {}))
    _require_precision(train, config)
    for name in _REQUIRED_KEYS:
        _require_setting(name in config, f'{name} must be there ("auto" takes the recipe\'s)')
    _require_optimizer(train, config)
    for key in ("lr_scheduler_type", "lr_scheduler_kwargs"):
        both = bool(config.get("scheduler")) and key in train
        _require_setting(not both, f"{key} and the configuration's scheduler exclude each other")
    for key in ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"):
        _require_setting(train.get(key) is None, f"{key} is of DDP, which is not used beside it")
    return config


def _read_json_object(source: Any) -> dict[str, Any]:
    try:
        config = json.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"train: deepspeed: cannot read {source}: {error}") from error
    if not isinstance(config, dict):
        raise RecipeError(f"train: deepspeed: {source} is no JSON object")
    return config


def _require_setting(condition: bool, message: str) -> None:
    if not condition:
        raise RecipeError(f"train: deepspeed: {message}")


def _require_zero(section: Mapping[str, Any]) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    stage = section.get("stage")
    is_valid_stage = type(stage) is int and stage in (1, 2, 3)
    _require_setting(is_valid_stage, "zero_optimization.stage must be 1, 2 or 3")
    try:
        DeepSpeedZeroConfig(**{key: value for key, value in section.items() if value != "auto"})
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise RecipeError(f"train: deepspeed: {location}: {first['msg']}") from error
    for offload in ("offload_param", "offload_optimizer"):
        device = (section.get(offload) or {}).get("device")
        _require_setting(device != "nvme", f"{offload}.device must be cpu or none, not nvme")
    for key in _WEIGHT_CASTING_KEYS:
        _require_setting(not section.get(key), f"{key} would change the frozen weights; remove it")
    is_unsplit = section.get("zero_hpz_partition_size", 1) == 1
    _require_setting(is_unsplit, "zero_hpz_partition_size must be 1")


def _require_precision(train: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    for half in _HALF_PRECISIONS:
        if train.get(half) or config.get(half, {}).get("enabled") is True:
            raise RecipeError(
                f"train: {half} under DeepSpeed would cast every weight; "
                "leave it out and set model: {dtype: bfloat16} instead"
            )


def _require_optimizer(train: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
    from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES

    optimizer, schedule = (config.get(name) or {} for name in ("optimizer", "scheduler"))
    given = str(optimizer.get("type", "adamw")).lower()
    _require_setting(not (optimizer and "optim" in train), _TWO_OPTIMIZERS)
    known = ", ".join(DEEPSPEED_OPTIMIZERS)
    _require_setting(given in DEEPSPEED_OPTIMIZERS, f"optimizer.type {given!r} is none of {known}")
    kind, known = schedule.get("type", "WarmupLR"), ", ".join(VALID_LR_SCHEDULES)
    _require_setting(kind in VALID_LR_SCHEDULES, f"scheduler.type {kind!r} is none of {known}")
    adam = bool(optimizer) and given in ("adam", "adamw")
    if adam and not torch.accelerator.is_available():
        ready = (optimizer.get("params") or {}).get("torch_adam") is True
        _require_setting(
            ready, "optimizer.params.torch_adam must be true on a CPU, or Adam is compiled"
        )


_TWO_OPTIMIZERS = "optim and the configuration's optimizer exclude each other; leave one out"
