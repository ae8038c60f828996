"""DeepSpeed around a model: partitioned loading, passes outside of training, saved state.

Trainer builds the engine that trains. What needs one beside it is loading under ZeRO-3, where no
process ever holds the whole model, and the passes that score weights and answer questions.
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
from mm_piece.distributed.shards import is_partitioned, slice_to_shard
from mm_piece.errors import RecipeError

_STALE_ATTRIBUTES = (
    "pre_bwd_fn",
    "post_bwd_fn",
    "applied_pre_backward_ref_cnt",
    "ds_grads_remaining",
)
_TEMPORARY_KEY = "passing"  # a key of the optimizer's state that is there for a moment
_OPTIMIZER, _SCHEDULE = "optimizer.safetensors", "schedule.json"


@dataclass(frozen=True)
class ZeroConfig:
    """How a recipe's DeepSpeed configuration divides a model: `stage` 0 is without DeepSpeed."""

    stage: int = 0
    section: Mapping[str, Any] = field(default_factory=dict)  # `zero_optimization`
    dtype: str = "float32"

    def require_launcher(self) -> None:
        """Raise RecipeError if DeepSpeed is asked for and no launcher came with it."""
        if self.stage and "RANK" not in os.environ:
            raise RecipeError(
                "train: deepspeed needs a launcher that starts processes: torchrun "
                "--nproc-per-node N -m mm_piece train … (accelerate launch: with --multi_gpu)"
            )

    def loading_context(self) -> AbstractContextManager[Any]:
        """Context in which a base loads: at stage 3 each process keeps its part of every weight."""
        if self.stage < 3:
            return nullcontext()
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        # What from_pretrained looks for, as long as it lives.
        return nullcontext(HfDeepSpeedConfig(self._make_inference_config()))

    @contextmanager
    def engine_context(self, model: nn.Module) -> Iterator[None]:
        """Context in which the model can be called, outside of training: layers are gathered."""
        if self.stage < 3:
            yield
            return
        import deepspeed

        engine, *_ = deepspeed.initialize(model=model, config=self._make_inference_config())
        _engines[model] = engine
        try:
            yield
        finally:
            del _engines[model]
            destroy_engine(engine)

    def _make_inference_config(self) -> dict[str, Any]:
        """A configuration for no optimizer: what Trainer would fill in has DeepSpeed's defaults."""
        section = {key: value for key, value in self.section.items() if value != "auto"}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": section,
            "bf16": {"enabled": self.dtype == "bfloat16"},
            "fp16": {"enabled": self.dtype == "float16"},
        }


def zero_config(train: Mapping[str, Any], dtype: str) -> ZeroConfig:
    """The division that a recipe's `train:` asks for, for weights of a dtype.

    Raises RecipeError for a configuration that cannot be read or asks for what cannot be done.
    """
    if train.get("deepspeed") is None:
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            raise RecipeError("train: deepspeed must name the configuration that is launched")
        return ZeroConfig()
    _patch_deepspeed()
    section = read_deepspeed_config(train)["zero_optimization"]
    return ZeroConfig(section["stage"], section, dtype)


# The keys of a recipe's `train:` that say how processes share the work, and change no result.
PROCESS_SETTINGS = ("deepspeed", "ddp_timeout")


def has_engine(accelerator: Any) -> bool:
    """Whether the training that accelerate's `Accelerator` prepares runs in a DeepSpeed engine."""
    from accelerate import DistributedType

    return accelerator.distributed_type == DistributedType.DEEPSPEED


def divide_decay(optimizer: Any, named: Mapping[str, nn.Parameter], decaying: Set[str]) -> None:
    """Have an optimizer of DeepSpeed's own let the same parameters decay as torch's would.

    Trainer hands it all of them in one group; `decaying` are the names of those that decay.
    """
    from accelerate.utils import DummyOptim

    if not isinstance(optimizer, DummyOptim):
        return
    groups = [
        {"params": [one for name, one in named.items() if name in decaying]},
        {
            "params": [one for name, one in named.items() if name not in decaying],
            "weight_decay": 0.0,
        },
    ]
    optimizer.params = [group for group in groups if group["params"]]


def without_deepspeed(train: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's `train:` as one process without a launcher may look at it."""
    return {key: value for key, value in train.items() if key != "deepspeed"}


def _patch_deepspeed() -> None:
    """Have DeepSpeed compute as torch does, and need no compiler where there is no accelerator."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        from deepspeed.ops import __compatible_ops__
        from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3
    except ImportError as error:
        message = "train: deepspeed is not installed: pip install 'mm-piece[deepspeed]'"
        raise RecipeError(message) from error
    # Its own adds the bias to a product that is rounded already, which in 16 bits shows in masks.
    LinearFunctionForZeroStage3.forward = staticmethod(_compute_linear)
    if torch.accelerator.is_available():
        return
    __compatible_ops__["deepspeed_shm_comm"] = False
    torch._dynamo.config.disable = True  # type: ignore[attr-defined] - it would call a C++ compiler


def _compute_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    """torch's own product, which DeepSpeed hides under its name."""
    return torch.ops.aten.linear(input, weight, bias)


def repartition(model: nn.Module) -> None:
    """Let go of the weights that a backward pass has left gathered."""
    if model in _engines:
        _engines[model].optimizer.partition_all_parameters()


def destroy_engine(engine: Any) -> None:
    """End an engine: its weights in parts again, its hooks gone."""
    engine.empty_partition_cache()
    engine.destroy()
    for module in engine.module.modules():  # or the next engine would run backward in this one
        for name in _STALE_ATTRIBUTES:
            vars(module).pop(name, None)


_engines: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # of `Zero.running`


def save_state(
    engine: Any, named: Mapping[str, nn.Parameter], schedule: Any, folder: Path, is_writer: bool
) -> None:
    """Write the state of an engine's optimizer and schedule, for any number of processes.

    All processes call it, one of them `writes`; `schedule` is Trainer's, for where DeepSpeed has
    none of its own.
    """
    state = _gather_optimizer_state(engine, named)
    if is_writer:
        save_file(state, folder / _OPTIMIZER)
        steps = json.dumps((engine.lr_scheduler or schedule).state_dict())
        (folder / _SCHEDULE).write_text(steps, encoding="utf-8")


def load_state(engine: Any, named: Mapping[str, nn.Parameter], schedule: Any, folder: Path) -> None:
    """Take up what `save_state` wrote, on however many processes."""
    _load_optimizer(engine, named, load_file(folder / _OPTIMIZER))
    schedule = engine.lr_scheduler or schedule
    schedule.load_state_dict(json.loads((folder / _SCHEDULE).read_text(encoding="utf-8")))
    learning_rates = schedule.get_last_lr()
    for group, learning_rate in zip(engine.optimizer.param_groups, learning_rates, strict=True):
        group["lr"] = learning_rate


def _gather_optimizer_state(engine: Any, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state, whole, for each of the trained parameters: `name/key`, on the CPU.

    What is one number for all parameters (the step) stands under its key alone.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    _relink_states(
        engine
    )  # DeepSpeed does after its first group's first step, when others have no state
    flat = _flat_partitions_of(engine)[0]
    state = engine.optimizer.optimizer.state[flat]
    keys = [key for key, value in state.items() if _is_per_entry(value, flat)]
    found = {key: torch.as_tensor(state[key]).cpu() for key in state if key not in keys}
    for name, parameter in named.items():
        for key in keys:
            full_value = safe_get_full_optimizer_state(parameter, key)
            assert full_value is not None
            found[f"{name}/{key}"] = full_value.cpu()
    return found


def _load_optimizer(
    engine: Any, named: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]
) -> None:
    shared = {key: value for key, value in saved.items() if "/" not in key}
    # In one order on all processes, which gather these later on.
    keys = sorted({key.rpartition("/")[2] for key in saved if "/" in key})
    for flat in _flat_partitions_of(engine):
        engine.optimizer.optimizer.state[flat] = {
            **{key: value.clone() for key, value in shared.items()},
            **{key: torch.zeros_like(flat, requires_grad=False) for key in keys},
        }
    _relink_states(engine)
    for name, parameter in named.items():
        for key in keys:
            _write_state(engine, parameter, key, saved[f"{name}/{key}"])


def to_optimizer_layout(
    engine: Any, named: Mapping[str, nn.Parameter], values_by_name: Mapping[str, Tensor]
) -> dict[Tensor, Tensor]:
    """Numbers of the trained parameters' entries as an engine's optimizer has the entries.

    Returns this process's parts of the parameters, as the optimizer steps them, each with its
    numbers; zeros stand for padding.
    """
    state = engine.optimizer.optimizer.state
    for flat in _flat_partitions_of(engine):
        state[flat][_TEMPORARY_KEY] = torch.zeros_like(flat, requires_grad=False)
    _relink_states(engine)
    for name, parameter in named.items():
        _write_state(engine, parameter, _TEMPORARY_KEY, values_by_name[name])
    found = {flat: state[flat].pop(_TEMPORARY_KEY) for flat in _flat_partitions_of(engine)}
    _relink_states(engine)
    return found


def _relink_states(engine: Any) -> None:
    """Have an engine look at what the state of its optimizer holds now."""
    if engine.zero_optimization_stage() < 3:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
        engine.optimizer._hp_optimizer_states_linked = False  # the first step may add to it


def _write_state(engine: Any, parameter: nn.Parameter, key: str, value: Tensor) -> None:
    """Write one piece of the optimizer's state of a trained parameter, which comes whole."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    value = value.to(engine.device)
    if is_partitioned(parameter):  # DeepSpeed's own cut would miss the padding
        safe_set_local_optimizer_state(parameter, slice_to_shard(parameter, value), key)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def _flat_partitions_of(engine: Any) -> Sequence[Tensor]:
    """This process's parts of the trained parameters, as its optimizer steps them."""
    if engine.zero_optimization_stage() == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return engine.optimizer.single_partition_of_fp32_groups


def _is_per_entry(value: Any, flat: Tensor) -> bool:
    """Whether a piece of an optimizer's state has one number for each of a part's entries."""
    return isinstance(value, Tensor) and value.shape == flat.shape
