"""Checks of a base's loading options: known devices, weights on them, experts to configure."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mm_piece.errors import ModelError, format_error
from mm_piece.families import weights
from mm_piece.recipe.base_options import AUTOMATIC_MAPS


def require_devices(options: Mapping[str, Any]) -> None:
    """Raise ModelError for a device that torch does not know, or that is not there."""
    device_map = options.get("device_map")
    devices = device_map.values() if isinstance(device_map, dict) else [device_map]
    for device in devices:
        if device in AUTOMATIC_MAPS:
            continue

        try:
            torch.empty(0, device=device)
        except Exception as error:  # a device's library raises in ways of its own
            raise ModelError(f"device_map: {device!r}: {format_error(error)}") from error


def require_experts(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Raise ModelError for an `experts_implementation` of a model that has no experts."""
    if not options.get("experts_implementation"):
        return

    has_experts = any(".experts." in name for name, _ in model.named_parameters())
    if not has_experts:
        raise ModelError(
            "experts_implementation does nothing: the base has no experts; leave it out"
        )


def require_values(model: nn.Module) -> None:
    """Raise ModelError for weights that a device map offloads: to the disk, or until a call.

    Such weights are meta tensors in the model.
    """
    valueless = [name for name, weight in weights(model).items() if weight.is_meta]
    if valueless:
        raise ModelError(
            f"device_map leaves {len(valueless)} weights off the devices, {valueless[0]!r} "
            "first, and what is not there cannot be trained; "
            "give max_memory more room, or take more devices"
        )
