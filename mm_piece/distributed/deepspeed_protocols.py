"""DeepSpeed's engine and its optimizer, as far as their states are read and written here."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class EngineOptimizer(Protocol):
    """The optimizer of a DeepSpeed engine, around one that steps flat partitions."""

    optimizer: torch.optim.Optimizer
    fp32_partitioned_groups_flat: Sequence[Tensor]  # at stage 3
    single_partition_of_fp32_groups: Sequence[Tensor]  # at stages 1 and 2
    _hp_optimizer_states_linked: bool

    def _lazy_init_hp_params_optimizer_state(self) -> None: ...


class Engine(Protocol):
    """The parts of a `DeepSpeedEngine`, which has no annotations, that are used here."""

    optimizer: EngineOptimizer
    device: torch.device

    def zero_optimization_stage(self) -> int:
        """Return the stage of ZeRO."""
        ...
