"""The penalty on moving what is at stake: entries are pulled back to where a task found them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def register_penalty(
    optimizer: torch.optim.Optimizer, penalized: Mapping[Tensor, tuple[Tensor, Tensor]]
) -> None:
    """Add pull * (value - start) to each gradient before every step of an optimizer.

    `held` maps parameters as the optimizer steps them to `(start, pull)`, fp32, of their shape.
    With pull = penalty * stake it is the gradient of penalty / 2 * sum of stake * (value - start)
    ** 2, as elastic weight consolidation has it (arXiv 1612.00796, eq. 3). The gradients are those
    that the step takes: averaged over processes and batches, clipped, and unscaled, or still in
    the scale that a fused step divides by (`grad_scale`, set by torch's GradScaler).
    """

    @torch.no_grad()
    def add_penalty_gradients(stepped: torch.optim.Optimizer, *_: Any) -> None:
        scale = getattr(stepped, "grad_scale", None)
        for group in stepped.param_groups:
            for values in group["params"]:
                if values in penalized and values.grad is not None:
                    start, strength = penalized[values]
                    scaled_strength = strength if scale is None else strength * scale
                    values.grad.addcmul_(scaled_strength, values - start)

    optimizer.register_step_pre_hook(add_penalty_gradients)
