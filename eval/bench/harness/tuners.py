"""Ways to train a stack: what each makes trainable, and what it does after a backward pass.

    TUNERS[name](model, mask)    a `Tuner`: its parameters, and what to do before an optimizer step

`full`, PEFT's LoRA and SHiRA, gradient masking as published (dense gradients times dense masks),
the floor (every weight frozen, gradients of the inputs alone), and ours.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from eval.bench.harness.models import LINEARS, linear_weights
from eval.bench.harness.shira import add_shira_adapter as with_shira
from mm_piece.sparse.tuning import sparse_tuning

Mask = Mapping[str, Tensor]
RANK = 8  # of LoRA


def do_nothing() -> None:
    """What most do before an optimizer's step."""


@dataclass
class Tuner:
    """A model made ready for training in one way."""

    model: Any
    parameters: list[nn.Parameter]
    mask_gradients: Callable[[], None] = do_nothing  # between backward pass and optimizer
    exit_tuning: Callable[[], None] = do_nothing
    optimizer: Any = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5) if self.parameters else None

    def backward(self, batch: Mapping[str, Tensor]) -> None:
        """Forward and backward pass; gradients are dropped."""
        self.model(**batch).loss.backward()
        self.mask_gradients()
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, batch: Mapping[str, Tensor]) -> None:
        """A whole training step."""
        self.model(**batch).loss.backward()
        self.mask_gradients()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()


def make_floor_tuner(model: Any, mask: Mask) -> Tuner:
    """No weight trains; gradients flow to the embeddings' output, past every layer."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda *given: given[2].requires_grad_())
    return Tuner(model, [])


def make_full_tuner(model: Any, mask: Mask) -> Tuner:
    """Every weight trains."""
    return Tuner(model, list(model.parameters()))


def make_masking_tuner(model: Any, mask: Mask) -> Tuner:
    """Every weight gets a gradient, which is multiplied by a dense mask."""
    dense = {}
    for name, weight in linear_weights(model).items():
        dense[name] = torch.zeros_like(weight)
        if name in mask:
            dense[name].view(-1)[mask[name]] = 1
    named = dict(model.named_parameters())
    for name, weight in named.items():
        weight.requires_grad_(name in dense)

    def mask_gradients() -> None:
        for name, ones in dense.items():
            named[name].grad.mul_(ones)

    return Tuner(model, [named[name] for name in dense], mask_gradients)


def make_lora_tuner(model: Any, mask: Mask, same_dtype: bool = False) -> Tuner:
    """PEFT's LoRA on every linear layer; its values in fp32, or in the model's dtype."""
    import peft

    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")
    config = peft.LoraConfig(r=RANK, target_modules=list(LINEARS))
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=not same_dtype)
    return Tuner(wrapped, [p for p in wrapped.parameters() if p.requires_grad])


def make_shira_tuner(model: Any, mask: Mask) -> Tuner:
    """PEFT's SHiRA on every linear layer, about as many entries as a density of 0.1 to 0.4 %."""
    wrapped = with_shira(model, LINEARS)
    return Tuner(wrapped, [p for p in wrapped.parameters() if p.requires_grad])


def make_sparse_tuner(model: Any, mask: Mask) -> Tuner:
    """Sparse tuning."""
    tuning = sparse_tuning(model, mask)
    tuning.__enter__()
    return Tuner(
        model,
        tuning.parameters(),
        exit_tuning=lambda: tuning.__exit__(None, None, None),
    )


TUNERS: dict[str, Callable[[Any, Mask], Tuner]] = {
    "full": make_full_tuner,
    "floor": make_floor_tuner,
    "LoRA r=8": make_lora_tuner,
    "LoRA r=8, its dtype": lambda model, mask: make_lora_tuner(model, mask, same_dtype=True),
    "SHiRA": make_shira_tuner,
    "gradient mask": make_masking_tuner,
    "ours": make_sparse_tuner,
}
