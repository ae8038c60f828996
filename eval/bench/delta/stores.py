"""Made-up models, masks and deltas that look like those of a 7B model, at any size.

layer_shapes                     a layer's shapes
sample_indices, sample_values    uniform masks, values as training leaves them
make_random_delta                a delta on tensors, without a store
make_base, make_store            a Llama checkpoint with random weights, a store of deltas on it
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.bench.harness.models import LlamaSizes
from mm_piece.deltas.delta import Delta, compute_fingerprint
from mm_piece.entries import read_entries
from mm_piece.models.base import tensors
from mm_piece.store.base_location import locate_base
from mm_piece.store.delta_store import DeltaStore

LARGE: LlamaSizes = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
}
SMALL: LlamaSizes = {
    "hidden_size": 1024,
    "intermediate_size": 2752,
    "num_attention_heads": 8,
}
TINY: LlamaSizes = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
}
DENSITY = 0.001
SCALE = 0.02  # standard deviation of a trained layer's weights


def layer_shapes(sizes: LlamaSizes, number: int = 0) -> dict[str, tuple[int, ...]]:
    """Return name and shape of one layer's matrices."""
    narrow = sizes["hidden_size"]
    wide = sizes["intermediate_size"]
    shapes = {
        "self_attn.q_proj": (narrow, narrow),
        "self_attn.k_proj": (narrow, narrow),
        "self_attn.v_proj": (narrow, narrow),
        "self_attn.o_proj": (narrow, narrow),
        "mlp.gate_proj": (wide, narrow),
        "mlp.up_proj": (wide, narrow),
        "mlp.down_proj": (narrow, wide),
    }
    return {f"model.layers.{number}.{name}.weight": shape for name, shape in shapes.items()}


def sample_indices(size: int, count: int, random: torch.Generator) -> Tensor:
    """Return `count` of `size` flat indices, sorted, uniformly chosen; at most a tenth."""
    # an eighth more than needed, because some are drawn twice
    num_draws = count + count // 8 + 16
    sampled = torch.randint(size, (num_draws,), generator=random).unique()
    order = torch.randperm(len(sampled), generator=random)
    chosen = sampled[order[:count]]
    return chosen.sort().values.to(torch.int32)


def sample_values(count: int, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Return values as trained weights have them: normal, rounded to their dtype."""
    values = torch.randn(count, generator=random) * SCALE
    return values.to(dtype)


def make_delta(indices: Mapping[str, Tensor], shapes: Any, dtype: torch.dtype, seed: int) -> Delta:
    """Return a delta with random values at given indices, for no base in particular."""
    random = torch.Generator().manual_seed(seed)
    values = {}
    for name, index in indices.items():
        values[name] = sample_values(len(index), dtype, random)

    no_digest = "0" * 64
    return Delta(
        indices=dict(indices),
        values=values,
        shapes={name: tuple(shapes[name]) for name in indices},
        before=dict.fromkeys(indices, no_digest),
        task="made-up",
        base=no_digest,
        parent="",
        info={},
    )


def make_random_delta(
    live: Mapping[str, Tensor], seed: int, parent: str = "", base: str = ""
) -> Delta:
    """Return a delta that changes a thousandth of each tensor, from its current values."""
    random = torch.Generator().manual_seed(seed)
    indices = {}
    for name, row in live.items():
        size = row.numel()
        indices[name] = sample_indices(size, int(DENSITY * size), random)

    # all indices are drawn before the first value
    before = {}
    after = {}
    for name, index in indices.items():
        row = live[name]
        before[name] = read_entries(row, index)
        after[name] = sample_values(len(index), row.dtype, random)
    return Delta.from_change(
        indices,
        before=before,
        after=after,
        shapes={name: row.shape for name, row in live.items()},
        task=f"task-{seed}",
        base=base,
        parent=parent,
        info={"seed": seed},
    )


def bytes_in_memory(deltas: Sequence[Delta]) -> int:
    """Return the bytes of the deltas' indices and values in memory."""
    total = 0
    for delta in deltas:
        for row in (*delta.indices.values(), *delta.values.values()):
            total += row.numel() * row.itemsize
    return total


def layer_matrices(live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the matrices of the layers."""
    return {name: row for name, row in live.items() if row.ndim == 2 and ".layers." in name}


def make_model(sizes: LlamaSizes, layers: int, seed: int) -> Any:
    """Return a Llama in bfloat16 with random weights and a short vocabulary."""
    model = empty_model(sizes, layers)
    model = model.to_empty(device="cpu")
    random = torch.Generator().manual_seed(seed)
    for weight in tensors(model).values():
        weight.normal_(0, SCALE, generator=random)
    return model.eval()


def empty_model(sizes: LlamaSizes, layers: int) -> Any:
    """Return that Llama without memory for its weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    num_tokens = len(make_tokenizer())
    config = LlamaConfig(
        **sizes,
        num_hidden_layers=layers,
        vocab_size=math.ceil(num_tokens / 64) * 64,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def make_tokenizer() -> Any:
    """Return a tokenizer of single bytes."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"<{number}>": number for number in range(256)}
    model = models.WordLevel(words, "<0>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))


def make_base(folder: Path, model: Any, shard_size: int) -> Path:
    """Write a sharded checkpoint."""
    model.save_pretrained(folder, max_shard_size=shard_size)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_store(folder: Path, model: Any, base: Path, positions: int) -> DeltaStore:
    """Write a store of deltas on that base; the model ends at its last position."""
    live = tensors(model)
    identity = compute_fingerprint(live)
    facts = {
        **locate_base(base, None, folder),
        "dtype": "bfloat16",
        "fingerprint": identity,
    }
    store = DeltaStore.create(folder, facts, recipe="")

    parent = ""
    matrices = layer_matrices(live)
    for position in range(1, positions + 1):
        delta = make_random_delta(matrices, position, parent, identity)
        parent = store.append(delta).sha256
        delta.apply(live)
    return store
