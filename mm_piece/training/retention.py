"""What a model is to keep while it learns: the stakes of its own answers and of earlier tasks.

No old data are needed. The model answers general prompts about the new task's images, and what
these answers stand on are the weights that hold what it can do; what each earlier task stands on
was estimated when it ended. Both are kept compact.
"""

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm_piece import distributed, importance
from mm_piece.data import Alike, Encoded, Example, tokenizer_of
from mm_piece.distributed import shape_of
from mm_piece.distributed.progress import bar
from mm_piece.evaluation.answers import pad_of, with_own_answers
from mm_piece.families import weights
from mm_piece.files import sealed
from mm_piece.importance import Compact, compact
from mm_piece.importance.factored import Kept
from mm_piece.importance.rows import width_of
from mm_piece.recipe import Select, parse_bytes

PROMPTS = (
    "Describe the image.",
    "What is in the image?",
    "What colours are in the image?",
    "How many things are in the image?",
    "What text is in the image?",
    "Where is the largest thing in the image?",
)
_ANSWERS = 96  # of its own that tell what a model stands on
_OF = "stakes"  # what a kept file holds: another kind is made again
_TOKENS = 32  # of an answer, at most


def own_answers(
    model: nn.Module, encoded: Encoded, select: Select, seed: int, number: int
) -> Encoded:
    """What the model says to general prompts about a task's images, as further examples.

    Each of at most `number` images, drawn by `seed`, is asked about by the next prompt in turn.
    Where there are no images, the prompts stand alone, each once. Answers that cannot be trained
    are left out.
    """
    prompts, examples = select.prompts or PROMPTS, encoded.examples
    pictured = [example for example in examples if example.images]
    order = torch.randperm(len(pictured), generator=torch.Generator().manual_seed(seed)).tolist()
    images = [pictured[place].images[:1] for place in order[:number]] or [[] for _ in prompts]
    asked = [_turns(row, prompts[row % len(prompts)], images[row]) for row in range(len(images))]
    options = {"max_new_tokens": _TOKENS, "title": "own answers"}
    return encoded.of(with_own_answers(model, encoded.processor, asked, **options))


def _turns(row: int, prompt: str, images: list[Any]) -> Example:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": []}]
    return Example(row, turns, images, "own answers")


def kept_by(
    model: nn.Module,
    encoded: Encoded,
    select: Select,
    seed: int,
    earlier: Sequence[Compact | None],
) -> Kept:
    """What a model is to keep before it learns a task: its own answers, and earlier tasks."""
    own = own_answers(model, encoded, select, seed, _ANSWERS)
    parts = [importance_of(model, own, select)] if len(own) else []
    return Kept([*parts, *(found for found in earlier if found is not None)])


def importance_of(model: nn.Module, encoded: Encoded, select: Select) -> Compact:
    """The compact stakes of some examples, over the weights that a task may change."""
    batches = Alike(encoded, select.batch_size, pad_of(tokenizer_of(encoded.processor)))
    names = importance.scorable(model, batches, "piece-f", select.exclude)
    named = weights(model)
    shapes = {name: tuple(shape_of(named[name])) for name in names}
    shares = {n: distributed.share(prod(shape), width_of(shape)) for n, shape in shapes.items()}
    pieces = importance.stream(
        model,
        batches,
        names=shares,
        memory=parse_bytes(select.memory),
        host=select.accumulators == "host",
        objective=importance.stakes,
        progress=lambda items, title: bar(items, f"{title}, to keep", "batch"),
    )
    return compact(pieces, shapes)


def write(file: Path, found: Compact, delta: str) -> None:
    """Keep an importance beside the delta (its SHA-256) that it was estimated after."""
    file.parent.mkdir(exist_ok=True)
    sealed.write(file, dict(_flat(found)), {"of": _OF, "delta": delta})


def read(file: Path, delta: str) -> Compact | None:
    """The importance that stands beside a delta; None if there is none, or not whole."""
    kept = sealed.read(file)
    if kept is None or kept[1] != {"of": _OF, "delta": delta}:
        return None
    parts = {"rows": {}, "columns": {}}
    for key, values in kept[0].items():
        kind, _, name = key.partition(".")
        parts[kind][name] = values
    return Compact(**parts)


def _flat(found: Compact) -> Iterator[tuple[str, Tensor]]:
    for kind, parts in (("rows", found.rows), ("columns", found.columns)):
        for name, values in parts.items():
            yield f"{kind}.{name}", values
