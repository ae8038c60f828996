"""DeepSpeed around a model: partitioned loading, passes outside of training, saved state.

Trainer builds the engine that trains. Two things need DeepSpeed beside it: loading under ZeRO-3,
where no process ever has all of the model, and the passes that score weights and generate answers.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mm_piece.distributed.deepspeed_config import read_deepspeed_config
from mm_piece.distributed.deepspeed_protocols import Engine
from mm_piece.distributed.shards import is_partitioned, slice_to_shard
from mm_piece.errors import RecipeError

# The keys of a recipe's `train:` that set how processes share the work, and change no result.
PROCESS_SETTINGS = ("deepspeed", "ddp_timeout")

# What `engine.destroy` leaves on the modules.
_STALE_ATTRIBUTES = (
    "pre_bwd_fn",
    "post_bwd_fn",
    "applied_pre_backward_ref_cnt",
    "ds_grads_remaining",
)
_COMPILER_LOG = "torch.utils.cpp_extension"
_TEMPORARY_KEY = "passing"  # of the optimizer's state, for the time of one call
_OPTIMIZER = "optimizer.safetensors"
_SCHEDULE = "schedule.json"


@dataclass(frozen=True)
class ZeroConfig:
    """How DeepSpeed partitions a model, by a recipe's configuration; `stage` 0: no DeepSpeed."""

    stage: int = 0
    section: Mapping[str, object] = field(default_factory=dict)  # `zero_optimization`
    dtype: str = "float32"

    def require_launcher(self) -> None:
        """Raise RecipeError if the recipe asks for DeepSpeed and no launcher started this."""
        if self.stage and "RANK" not in os.environ:
            raise RecipeError(
                "train: deepspeed needs a launcher that starts processes: torchrun "
                "--nproc-per-node N -m mm_piece train … (accelerate launch: with --multi_gpu)"
            )

    def loading_context(self) -> AbstractContextManager[object]:
        """Keep loaded weights partitioned, at stage 3, from the first one on.

        From here on DeepSpeed itself is patched, at every stage: a plan alone changes nothing.
        """
        if self.stage:
            _patch_deepspeed()
        if self.stage < 3:
            return nullcontext()

        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        # `from_pretrained` partitions as long as this object lives; the context keeps it alive.
        config = HfDeepSpeedConfig(self._make_inference_config())
        return nullcontext(config)

    @contextmanager
    def engine_context(self, model: nn.Module) -> Iterator[None]:
        """Keep the model callable, outside of training, while the block runs.

        At stage 3 an engine gathers the weights of each layer when the layer is called.
        """
        if self.stage < 3:
            yield
            return

        import deepspeed

        _patch_deepspeed()
        config = self._make_inference_config()
        engine, *_ = deepspeed.initialize(model=model, config=config)
        _engines[model] = engine
        try:
            yield
        finally:
            del _engines[model]
            destroy_engine(engine)

    def _make_inference_config(self) -> dict[str, object]:
        """Return a configuration without an optimizer.

        DeepSpeed's defaults take the place of "auto", which only Trainer could fill in.
        """
        section: dict[str, object] = {}
        for key, value in self.section.items():
            if value != "auto":
                section[key] = value
        return {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": section,
            "bf16": {"enabled": self.dtype == "bfloat16"},
            "fp16": {"enabled": self.dtype == "float16"},
        }


def zero_config(train: Mapping[str, object], dtype: str) -> ZeroConfig:
    """Return the partitioning that a recipe's `train:` asks for, for weights of a dtype.

    Raises RecipeError if DeepSpeed is not installed, and for a configuration that cannot be read or
    asks for what cannot be done.
    """
    if train.get("deepspeed") is None:
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            raise RecipeError("train: deepspeed must name the configuration that is launched")
        return ZeroConfig()

    _require_deepspeed()
    config = read_deepspeed_config(train)
    section = config["zero_optimization"]
    return ZeroConfig(section["stage"], section, dtype)


def has_engine(accelerator: Any) -> bool:
    """Return whether accelerate's `Accelerator` prepares training in a DeepSpeed engine."""
    from accelerate import DistributedType

    return accelerator.distributed_type == DistributedType.DEEPSPEED


def divide_decay(
    optimizer: object,
    named: Mapping[str, nn.Parameter],
    decaying: Set[str],
) -> None:
    """Apply weight decay to `decaying` alone in an optimizer of DeepSpeed's own, as in torch's.

    Trainer gives such an optimizer all parameters in one group. `decaying` are the names of the
    parameters that decay.
    """
    from accelerate.utils import DummyOptim

    if not isinstance(optimizer, DummyOptim):
        return

    with_decay = [parameter for name, parameter in named.items() if name in decaying]
    without_decay = [parameter for name, parameter in named.items() if name not in decaying]
    groups = [
        {"params": with_decay},
        {"params": without_decay, "weight_decay": 0.0},
    ]
    optimizer.params = [group for group in groups if group["params"]]


def without_deepspeed(train: Mapping[str, object]) -> dict[str, object]:
    """Return a recipe's `train:` for one process without a launcher."""
    return {key: value for key, value in train.items() if key != "deepspeed"}


def _require_deepspeed() -> None:
    """Raise RecipeError if DeepSpeed is not installed."""
    compiler_log = logging.getLogger(_COMPILER_LOG)
    level = compiler_log.level
    compiler_log.setLevel(logging.ERROR)  # its import warns of a compiler that nothing here needs
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        message = "train: deepspeed is not installed: pip install 'mm-piece[deepspeed]'"
        raise RecipeError(message) from error
    finally:
        compiler_log.setLevel(level)


def _patch_deepspeed() -> None:
    """Make DeepSpeed compute as torch does, and need no compiler where there is no accelerator."""
    from deepspeed.ops import __compatible_ops__
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    # DeepSpeed adds the bias to a product that is rounded already. In 16 bits the difference from
    # torch's fused product shows in masks.
    LinearFunctionForZeroStage3.forward = staticmethod(_compute_linear)
    logging.getLogger(_COMPILER_LOG).setLevel(logging.ERROR)

    if torch.accelerator.is_available():
        return
    __compatible_ops__["deepspeed_shm_comm"] = False
    torch._dynamo.config.disable = True  # type: ignore[attr-defined] - it would call a C++ compiler


def _compute_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    """Return torch's own product; DeepSpeed replaces the function of that name in torch."""
    return torch.ops.aten.linear(input, weight, bias)


def repartition(model: nn.Module) -> None:
    """Free the weights that a backward pass has left gathered."""
    if model in _engines:
        _engines[model].optimizer.partition_all_parameters()


def destroy_engine(engine: Any) -> None:
    """End an engine: partition its weights again and remove its hooks."""
    engine.empty_partition_cache()
    engine.destroy()

    # Without this the model's next engine would run its backward pass in this one.
    for module in engine.module.modules():
        for name in _STALE_ATTRIBUTES:
            vars(module).pop(name, None)


_engines: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # of `engine_context`


def save_state(
    engine: Any,
    named: Mapping[str, nn.Parameter],
    schedule: Any,
    folder: Path,
    is_writer: bool,
) -> None:
    """Write the state of an engine's optimizer and schedule, for any number of processes.

    All processes call it, and the one with `is_writer` writes. `schedule` is Trainer's, for where
    DeepSpeed has none of its own.
    """
    state = _gather_optimizer_state(engine, named)
    if not is_writer:
        return

    save_file(state, folder / _OPTIMIZER)
    schedule = engine.lr_scheduler or schedule
    schedule_state = json.dumps(schedule.state_dict())
    (folder / _SCHEDULE).write_text(schedule_state, encoding="utf-8")


def load_state(
    engine: Any,
    named: Mapping[str, nn.Parameter],
    schedule: Any,
    folder: Path,
) -> None:
    """Restore the state that `save_state` wrote, on however many processes."""
    optimizer_state = load_file(folder / _OPTIMIZER)
    _load_optimizer(engine, named, optimizer_state)

    schedule = engine.lr_scheduler or schedule
    schedule_state = (folder / _SCHEDULE).read_text(encoding="utf-8")
    schedule.load_state_dict(json.loads(schedule_state))

    # A schedule sets learning rates at its next step only.
    learning_rates = schedule.get_last_lr()
    for group, learning_rate in zip(engine.optimizer.param_groups, learning_rates, strict=True):
        group["lr"] = learning_rate


def _gather_optimizer_state(
    engine: Engine,
    named: Mapping[str, nn.Parameter],
) -> dict[str, Tensor]:
    """Return the gathered optimizer state of each trained parameter: `name/key`, on the CPU.

    A key with one number for all parameters (the step) has no name before it.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    # DeepSpeed links the states after the first step of its first group, when the other groups
    # have no state yet.
    _relink_states(engine)

    flat = _flat_partitions_of(engine)[0]
    state = engine.optimizer.optimizer.state[flat]
    per_entry_keys = [key for key, value in state.items() if _is_per_entry(value, flat)]

    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key not in per_entry_keys:
            found[key] = torch.as_tensor(value).cpu()
    for name, parameter in named.items():
        for key in per_entry_keys:
            full_state = safe_get_full_optimizer_state(parameter, key)
            assert full_state is not None
            found[f"{name}/{key}"] = full_state.cpu()
    return found


def _load_optimizer(
    engine: Engine,
    named: Mapping[str, nn.Parameter],
    saved: Mapping[str, Tensor],
) -> None:
    """Write the state that `_gather_optimizer_state` returned into an engine's optimizer."""
    shared = {key: value for key, value in saved.items() if "/" not in key}
    # Sorted: all processes write the keys in one order, and later gather them in it.
    last_parts = {key.rpartition("/")[2] for key in saved if "/" in key}
    per_entry_keys = sorted(last_parts)

    for flat in _flat_partitions_of(engine):
        state: dict[str, Tensor] = {}
        for key, value in shared.items():
            state[key] = value.clone()
        for key in per_entry_keys:
            state[key] = torch.zeros_like(flat, requires_grad=False)
        engine.optimizer.optimizer.state[flat] = state
    _relink_states(engine)

    for name, parameter in named.items():
        for key in per_entry_keys:
            _write_state(engine, parameter, key, saved[f"{name}/{key}"])


def to_optimizer_layout(
    engine: Any,
    named: Mapping[str, nn.Parameter],
    values_by_name: Mapping[str, Tensor],
) -> dict[Tensor, Tensor]:
    """Return one number for each trained entry, laid out as an engine's optimizer has the entries.

    The keys are this process's flat partitions, as the optimizer steps them. Padding gets zeros.
    """
    # DeepSpeed lays out only what it writes to the optimizer's state: the numbers pass through the
    # state, under a key of their own.
    state = engine.optimizer.optimizer.state
    for flat in _flat_partitions_of(engine):
        zeros = torch.zeros_like(flat, requires_grad=False)
        state[flat][_TEMPORARY_KEY] = zeros
    _relink_states(engine)

    for name, parameter in named.items():
        _write_state(engine, parameter, _TEMPORARY_KEY, values_by_name[name])

    found: dict[Tensor, Tensor] = {}
    for flat in _flat_partitions_of(engine):
        found[flat] = state[flat].pop(_TEMPORARY_KEY)
    _relink_states(engine)
    return found


def _relink_states(engine: Engine) -> None:
    """Make an engine read the keys that its optimizer's state has now."""
    if engine.zero_optimization_stage() == 3:
        return

    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()
    engine.optimizer._hp_optimizer_states_linked = False  # the first step may add keys


def _write_state(
    engine: Engine,
    parameter: nn.Parameter,
    key: str,
    value: Tensor,
) -> None:
    """Write one key of the optimizer's state of a trained parameter, from a gathered value."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    value = value.to(engine.device)
    if not is_partitioned(parameter):
        safe_set_full_optimizer_state(parameter, value, key)
        return

    # DeepSpeed's own way from a gathered value to a shard leaves out the padding.
    shard = slice_to_shard(parameter, value)
    safe_set_local_optimizer_state(parameter, shard, key)


def _flat_partitions_of(engine: Engine) -> Sequence[Tensor]:
    """Return this process's partitions of the trained parameters, as its optimizer steps them."""
    if engine.zero_optimization_stage() == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return engine.optimizer.single_partition_of_fp32_groups


def _is_per_entry(value: object, flat: Tensor) -> bool:
    """Return whether a value has one number for each entry of a flat partition."""
    return isinstance(value, Tensor) and value.shape == flat.shape
