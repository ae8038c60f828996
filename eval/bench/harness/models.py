"""Llama stacks with random weights, batches for them, and masks over their linear layers.

stack(layers)               about 12.6 M parameters a layer and 6 M in embedding and head
batch(tokens, examples)     random tokens, all of them supervised
mask(model, kind, density)  entries to train: `uniform`, `clustered`, `few layers`, `top half`
"""

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 3072
SIZES = {"hidden_size": 1024, "intermediate_size": 2752, "num_attention_heads": 8}
QUICK = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_stack(layers: int, dtype: torch.dtype = torch.float32, quick: bool = False) -> Any:
    """Return a model in training mode, its weights drawn from seed 0."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **(QUICK if quick else SIZES), vocab_size=VOCABULARY, num_hidden_layers=layers
    )
    return LlamaForCausalLM(config).to(dtype).train()


def make_batch(tokens: int, examples: int = 1) -> dict[str, Tensor]:
    """Return inputs and labels of some examples."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (examples, tokens), generator=random)
    return {"input_ids": ids, "labels": ids}


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the linear layers, without the head, under their names."""
    return {
        name: weight.detach()
        for name, weight in model.named_parameters()
        if name.endswith(tuple(f"{part}.weight" for part in LINEARS))
    }


def make_mask(model: nn.Module, kind: str, density: float, seed: int = 0) -> dict[str, Tensor]:
    """Return `density` of the entries of all linear layers, sorted flat indices per weight."""
    named = linear_weights(model)
    if kind == "few layers":  # six in ten have no entries
        chosen = [name for number, name in enumerate(named) if number % 5 < 2]
    elif kind == "top half":
        chosen = list(named)[len(named) // 2 :]
    else:
        chosen = list(named)
    total = density * sum(weight.numel() for weight in named.values())
    available = sum(named[name].numel() for name in chosen)
    random = torch.Generator().manual_seed(seed)
    sample_entries = _sample_clustered if kind == "clustered" else _sample_uniform
    return {name: sample_entries(named[name], total / available, random) for name in chosen}


def _sample_uniform(weight: Tensor, density: float, random: torch.Generator) -> Tensor:
    count = max(1, round(density * weight.numel()))
    sampled = torch.randint(weight.numel(), (count + count // 4 + 16,), generator=random).unique()
    return sampled[torch.randperm(len(sampled), generator=random)[:count]].sort().values


def _sample_clustered(weight: Tensor, density: float, random: torch.Generator) -> Tensor:
    """Entries of a tenth of the rows and a tenth of the columns."""
    rows, columns = (torch.randperm(n, generator=random)[: max(1, n // 10)] for n in weight.shape)
    area = (rows[:, None] * weight.shape[1] + columns[None]).view(-1)
    count = min(len(area), max(1, round(density * weight.numel())))
    return area[torch.randperm(len(area), generator=random)[:count]].sort().values
