"""The quadratic penalty of elastic weight consolidation (EWC), on the entries of a mask.

It pulls every entry back to the value that it had before the task, the more strongly, the higher
the entry's parameter importance K is.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def register_penalty(
    optimizer: torch.optim.Optimizer, penalized: Mapping[Tensor, tuple[Tensor, Tensor]]
) -> None:
    """Add strength * (value - start) to each gradient before every step of an optimizer.

    `penalized` maps parameters as the optimizer steps them to `(start, strength)`, fp32, of their
    shape. With strength = penalty * K, this is the gradient of penalty / 2 * sum of
    K * (value - start) ** 2 (Kirkpatrick et al., arXiv 1612.00796, eq. 3).

    The step takes these gradients as they are then: averaged over processes and batches, clipped,
    and unscaled, or still in the scale that a fused step divides by (`grad_scale`, which torch's
    GradScaler sets).
    """

    @torch.no_grad()
    def add_penalty_gradients(stepped: torch.optim.Optimizer, *_: Any) -> None:
        # only a fused optimizer gets a scale: others have unscaled gradients here
        scale = getattr(stepped, "grad_scale", None)

        for group in stepped.param_groups:
            for values in group["params"]:
                # a parameter without a gradient is not stepped, and so not moved
                if values not in penalized or values.grad is None:
                    continue

                start, strength = penalized[values]
                scaled_strength = strength
                if scale is not None:
                    scaled_strength = strength * scale
                values.grad.addcmul_(scaled_strength, values - start)

    optimizer.register_step_pre_hook(add_penalty_gradients)
