"""Methods of training a stack: their trainable parameters, and their work after a backward pass.

    TUNERS[name](model, mask)    a `Tuner`: its parameters, and its work before an optimizer step

They are full fine-tuning, PEFT's LoRA and SHiRA, gradient masking as published (dense gradients
times dense masks), the floor (every weight frozen, gradients of the inputs alone), and ours.
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
    """Leave the gradients as they are: the default of a tuner."""


@dataclass
class Tuner:
    """A model made ready for training by one method."""

    model: Any
    parameters: list[nn.Parameter]
    mask_gradients: Callable[[], None] = do_nothing  # between backward pass and optimizer
    exit_tuning: Callable[[], None] = do_nothing
    optimizer: Any = field(init=False)

    def __post_init__(self) -> None:
        # AdamW takes no empty list: the floor trains nothing
        self.optimizer = None
        if self.parameters:
            self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)

    def backward(self, batch: Mapping[str, Tensor]) -> None:
        """Run a forward and a backward pass, and drop the gradients."""
        self.model(**batch).loss.backward()
        self.mask_gradients()
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, batch: Mapping[str, Tensor]) -> None:
        """Run one training step, the optimizer's step included."""
        self.model(**batch).loss.backward()
        self.mask_gradients()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()


def make_floor_tuner(model: Any, mask: Mask) -> Tuner:
    """Return a tuner that trains nothing: gradients flow back to the embeddings' output."""
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings()
    # a hook's third argument is the module's output
    embeddings.register_forward_hook(lambda *given: given[2].requires_grad_())
    return Tuner(model, [])


def make_full_tuner(model: Any, mask: Mask) -> Tuner:
    """Return a tuner of every weight."""
    parameters = list(model.parameters())
    return Tuner(model, parameters)


def make_masking_tuner(model: Any, mask: Mask) -> Tuner:
    """Return a tuner whose gradients of all linear weights are multiplied by dense masks."""
    dense = {}
    for name, weight in linear_weights(model).items():
        ones = torch.zeros_like(weight)
        if name in mask:
            ones.view(-1)[mask[name]] = 1
        dense[name] = ones

    named = dict(model.named_parameters())
    for name, weight in named.items():
        weight.requires_grad_(name in dense)

    def mask_gradients() -> None:
        for name, ones in dense.items():
            named[name].grad.mul_(ones)

    parameters = [named[name] for name in dense]
    return Tuner(model, parameters, mask_gradients)


def make_lora_tuner(model: Any, mask: Mask, same_dtype: bool = False) -> Tuner:
    """Return PEFT's LoRA on every linear layer; its values in fp32, or in the model's dtype."""
    import peft

    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")
    config = peft.LoraConfig(r=RANK, target_modules=list(LINEARS))
    wrapped = peft.get_peft_model(
        model,
        config,
        autocast_adapter_dtype=not same_dtype,
    )
    return Tuner(wrapped, _trainable_parameters(wrapped))


def make_shira_tuner(model: Any, mask: Mask) -> Tuner:
    """Return PEFT's SHiRA on every linear layer, at a density of about 0.1 to 0.4 %."""
    wrapped = with_shira(model, LINEARS)
    return Tuner(wrapped, _trainable_parameters(wrapped))


def _trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def make_sparse_tuner(model: Any, mask: Mask) -> Tuner:
    """Return a tuner of the mask's entries, by `sparse_tuning`."""
    # entered by hand: the tuner outlives this function
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
