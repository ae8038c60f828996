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

_HALVES = ("bf16", "fp16")
_SECTIONS = (*_HALVES, "zero_optimization", "optimizer", "scheduler")
# Without them DeepSpeed would take defaults of its own in place of the recipe's.
_FILLED = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
_CASTING = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")


def configuration_of(train: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that a recipe's `train: {deepspeed: …}` names or holds.

    Raises RecipeError for one that cannot be read, or that asks for what cannot be done.
    """
    source = train["deepspeed"]
    config = source if isinstance(source, dict) else _read(source)
    for name in _SECTIONS:
        _require(isinstance(config.get(name, {}), dict), f"{name} must be a section, {{…}}")
    _require_zero(config.get("zero_optimization", {}))
    _require_precision(train, config)
    for name in _FILLED:
        _require(name in config, f'{name} must be there ("auto" takes the recipe\'s)')
    _require_optimizer(train, config)
    for key in ("lr_scheduler_type", "lr_scheduler_kwargs"):
        both = bool(config.get("scheduler")) and key in train
        _require(not both, f"{key} and the configuration's scheduler exclude each other")
    for key in ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"):
        _require(train.get(key) is None, f"{key} is of DDP, which is not used beside it")
    return config


def _read(source: Any) -> dict[str, Any]:
    try:
        config = json.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"train: deepspeed: cannot read {source}: {error}") from error
    if not isinstance(config, dict):
        raise RecipeError(f"train: deepspeed: {source} is no JSON object")
    return config


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise RecipeError(f"train: deepspeed: {what}")


def _require_zero(section: Mapping[str, Any]) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    stage = section.get("stage")
    plain = type(stage) is int and stage in (1, 2, 3)
    _require(plain, "zero_optimization.stage must be 1, 2 or 3")
    try:
        DeepSpeedZeroConfig(**{key: value for key, value in section.items() if value != "auto"})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise RecipeError(f"train: deepspeed: {place}: {first['msg']}") from error
    for offload in ("offload_param", "offload_optimizer"):
        device = (section.get(offload) or {}).get("device")
        _require(device != "nvme", f"{offload}.device must be cpu or none, not nvme")
    for key in _CASTING:
        _require(not section.get(key), f"{key} would change the frozen weights; remove it")
    whole = section.get("zero_hpz_partition_size", 1) == 1
    _require(whole, "zero_hpz_partition_size must be 1")


def _require_precision(train: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    for half in _HALVES:
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
    _require(not (optimizer and "optim" in train), _TWO)
    known = ", ".join(DEEPSPEED_OPTIMIZERS)
    _require(given in DEEPSPEED_OPTIMIZERS, f"optimizer.type {given!r} is none of {known}")
    kind, known = schedule.get("type", "WarmupLR"), ", ".join(VALID_LR_SCHEDULES)
    _require(kind in VALID_LR_SCHEDULES, f"scheduler.type {kind!r} is none of {known}")
    adam = bool(optimizer) and given in ("adam", "adamw")
    if adam and not torch.accelerator.is_available():
        ready = (optimizer.get("params") or {}).get("torch_adam") is True
        _require(ready, "optimizer.params.torch_adam must be true on a CPU, or Adam is compiled")


_TWO = "optim and the configuration's optimizer exclude each other; leave one out"
