"""Llama stacks with random weights, batches for them, and masks over their linear layers.

make_stack(layers)               about 12.6 M parameters a layer and 6 M in embedding and head
make_batch(tokens, examples)     random tokens, all of them supervised
make_mask(model, kind, density)  entries to train: `uniform`, `clustered`, `few layers`, `top half`
"""

from typing import Any, TypedDict

import torch
from torch import Tensor, nn

VOCABULARY = 3072


class LlamaSizes(TypedDict):
    """A Llama's widths, under their names in its configuration."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int


SIZES: LlamaSizes = {
    "hidden_size": 1024,
    "intermediate_size": 2752,
    "num_attention_heads": 8,
}
QUICK: LlamaSizes = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 4,
}
LINEARS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)


def make_stack(layers: int, dtype: torch.dtype = torch.float32, quick: bool = False) -> Any:
    """Return a model in training mode, its weights drawn from seed 0."""
    from transformers import LlamaConfig

    torch.manual_seed(0)
    sizes = QUICK if quick else SIZES
    config = LlamaConfig(
        **sizes,
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
    )
    return _draw_llama(config).to(dtype).train()


def _draw_llama(config: Any) -> nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(config)


def make_batch(tokens: int, examples: int = 1) -> dict[str, Tensor]:
    """Return inputs and labels of some examples."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (examples, tokens), generator=random)
    return {"input_ids": ids, "labels": ids}


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the linear layers, without the head, under their names."""
    endings = tuple(f"{module}.weight" for module in LINEARS)
    found = {}
    for name, weight in model.named_parameters():
        if name.endswith(endings):
            found[name] = weight.detach()
    return found


def make_mask(model: nn.Module, kind: str, density: float, seed: int = 0) -> dict[str, Tensor]:
    """Return `density` of the entries of all linear layers, sorted flat indices per weight."""
    named = linear_weights(model)
    names = list(named)
    if kind == "few layers":
        # six weights in ten have no entries
        chosen = [name for number, name in enumerate(names) if number % 5 < 2]
    elif kind == "top half":
        chosen = names[len(names) // 2 :]
    else:
        chosen = names

    # as many entries in all, however many weights they lie in
    total = density * sum(weight.numel() for weight in named.values())
    available = sum(named[name].numel() for name in chosen)
    share = total / available

    random = torch.Generator().manual_seed(seed)
    sample_entries = _sample_clustered if kind == "clustered" else _sample_uniform
    return {name: sample_entries(named[name], share, random) for name in chosen}


def _sample_uniform(weight: Tensor, density: float, random: torch.Generator) -> Tensor:
    """Return flat indices of a uniform sample, sorted."""
    size = weight.numel()
    count = max(1, round(density * size))
    # a quarter more than needed, because some are drawn twice
    num_draws = count + count // 4 + 16
    sampled = torch.randint(size, (num_draws,), generator=random).unique()
    return _choose_entries(sampled, count, random)


def _sample_clustered(weight: Tensor, density: float, random: torch.Generator) -> Tensor:
    """Return flat indices within a tenth of the rows and a tenth of the columns, sorted."""
    lines = []
    for length in weight.shape:
        order = torch.randperm(length, generator=random)
        lines.append(order[: max(1, length // 10)])
    rows, columns = lines

    area = rows[:, None] * weight.shape[1] + columns[None]  # (rows, columns)
    wanted = max(1, round(density * weight.numel()))
    count = min(area.numel(), wanted)
    return _choose_entries(area.view(-1), count, random)


def _choose_entries(indices: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Return `count` of the indices, at random, sorted."""
    order = torch.randperm(len(indices), generator=random)
    chosen = indices[order[:count]]
    return chosen.sort().values
