"""A stack of layers in several processes, trained by one of the `tuners`, with one engine.

prepare_stack        a stack on disk, and entries to train beside it
load_stack           the stack as an engine wants it; stage 0 is DDP, 1 to 3 are ZeRO
ProcessTraining      one process's side of a training: `step()`
read_sent_bytes      bytes that this process has sent so far
"""

import json
import os
import socket
import stat
import struct
from pathlib import Path
from typing import Any

import torch

from eval.bench.harness.models import VOCABULARY, make_mask, make_stack
from eval.bench.harness.tuners import TUNERS
from mm_piece import distributed

DENSITY = 0.001
_BYTES_SENT = 200  # offset in tcp_info of linux/tcp.h, since Linux 4.19
_ALWAYS_GATHERED = {  # as in a model too large for one process: each layer is gathered when it runs
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def prepare_stack(
    folder: Path, layers: int, quick: bool, density: float = DENSITY
) -> dict[str, int]:
    """Write a stack and a uniform mask over its linear layers; return its size and the mask's."""
    from safetensors.torch import save_file

    model = make_stack(layers, quick=quick)
    chosen = make_mask(model, "uniform", density)
    model.save_pretrained(folder)
    save_file(chosen, folder / "mask")
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "k": sum(map(len, chosen.values())),
    }


def load_stack(stage: int, folder: Path) -> Any:
    """Return the stack, partitioned under ZeRO-3."""
    from transformers import LlamaForCausalLM

    settings = {"deepspeed": _read_config(stage)} if stage else {}
    zero = distributed.zero_config(settings, "float32")
    with zero.loading_context():
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train()

    # a mapped file becomes memory when it is written, and would count as the training's
    if stage < 3:
        for weight in model.parameters():
            weight.data = weight.data.clone()
    return model


def read_mask(folder: Path) -> dict[str, torch.Tensor]:
    """Read the entries to train."""
    from safetensors.torch import load_file

    return load_file(folder / "mask")


def make_rank_batch(tokens: int) -> dict[str, torch.Tensor]:
    """Return a batch that is this process's own."""
    random = torch.Generator().manual_seed(distributed.rank())
    ids = torch.randint(VOCABULARY, (1, tokens), generator=random)
    return {"input_ids": ids, "labels": ids}


def make_engine(stage: int, model: Any, parameters: list[torch.nn.Parameter]) -> Any:
    """Return DeepSpeed's engine around a model."""
    import deepspeed

    # DeepSpeed takes a list of parameters where its own annotation says a module
    arguments: dict[str, Any] = {
        "model": model,
        "model_parameters": parameters,
        "config": _read_config(stage),
    }
    engine, *_ = deepspeed.initialize(**arguments)
    return engine


class ProcessTraining:
    """One process's side of a training."""

    def __init__(self, stage: int, folder: Path, tuner_name: str, tokens: int) -> None:
        model = load_stack(stage, folder)
        self.batch = make_rank_batch(tokens)
        # before the tuner: from here on memory is that of training
        self.loaded = read_anonymous_bytes()
        self.tuner = TUNERS[tuner_name](model, read_mask(folder))
        self._step = self._with_deepspeed(stage) if stage else self._with_ddp()

    def step(self) -> None:
        """Run one training step, the optimizer's step included."""
        self._step()

    def count_training_bytes(self) -> int:
        """Return the bytes of training between steps, beside the weights."""
        return read_anonymous_bytes() - self.loaded

    def _with_ddp(self) -> Any:
        model = torch.nn.parallel.DistributedDataParallel(self.tuner.model)

        def step() -> None:
            model(**self.batch).loss.backward()
            self.tuner.optimizer.step()
            # zeroed, not freed: memory between steps includes gradients, as under DeepSpeed
            self.tuner.optimizer.zero_grad(set_to_none=False)

        return step

    def _with_deepspeed(self, stage: int) -> Any:
        engine = make_engine(stage, self.tuner.model, self.tuner.parameters)

        def step() -> None:
            engine.backward(engine(**self.batch).loss)
            engine.step()

        return step


def read_anonymous_bytes() -> int:
    """Return the bytes of this process's memory that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            _, kibibytes, *_ = line.split()
            return 1024 * int(kibibytes)
    raise RuntimeError("the kernel tells no RssAnon")


def read_sent_bytes() -> int:
    """Return the bytes that went into this process's TCP connections, as the kernel counts them."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        total += _read_socket_bytes(int(entry.name))
    return total


def _read_socket_bytes(number: int) -> int:
    """Return the bytes sent through a descriptor: 0 if it is no TCP connection, or closed."""
    try:
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            return 0
        # a duplicate, which the socket object may close
        with socket.socket(fileno=os.dup(number)) as connection:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except OSError:
        return 0
    (sent,) = struct.unpack_from("=Q", info, _BYTES_SENT)
    return sent


def _read_config(stage: int) -> dict[str, Any]:
    """Return the shipped configuration, with the values that Trainer would fill in."""
    folder = Path(__file__).parents[3] / "pipelines" / "deepspeed"
    file = folder / f"zero{stage}.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    section = {k: v for k, v in config["zero_optimization"].items() if v != "auto"}
    if stage == 3:
        section |= _ALWAYS_GATHERED
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": section,
    }
