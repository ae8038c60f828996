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
from mm_piece.data import EncodedDataset, Example, LengthGroupedBatches, tokenizer_of
from mm_piece.distributed import shape_of
from mm_piece.distributed.progress import progress_bar
from mm_piece.evaluation.answers import pad_token_of, relabel_examples
from mm_piece.families import weights
from mm_piece.files import sealed
from mm_piece.importance import FactoredImportance, factor_scores
from mm_piece.importance.factored import RetentionImportance
from mm_piece.importance.rows import width_of
from mm_piece.recipe import SelectionSettings, parse_bytes

PROMPTS = (
    "Describe the image.",
    "What is in the image?",
    "What colours are in the image?",
    "How many things are in the image?",
    "What text is in the image?",
    "Where is the largest thing in the image?",
)
_RETENTION_ANSWERS = 96  # of its own that tell what a model stands on
_HEADER_KIND = "stakes"  # what a kept file holds: another kind is made again
_MAX_NEW_TOKENS = 32  # of an answer, at most


def generate_rehearsal(
    model: nn.Module,
    encoded: EncodedDataset,
    select: SelectionSettings,
    seed: int,
    num_answers: int,
) -> EncodedDataset:
    """What the model says to general prompts about a task's images, as further examples.

    Each of at most `number` images, drawn by `seed`, is asked about by the next prompt in turn.
    Where there are no images, the prompts stand alone, each once. Answers that cannot be trained
    are left out.
    """
    prompts, examples = select.prompts or PROMPTS, encoded.examples
    with_images = [example for example in examples if example.images]
    order = torch.randperm(len(with_images), generator=torch.Generator().manual_seed(seed)).tolist()
    images = [with_images[place].images[:1] for place in order[:num_answers]] or [
        [] for _ in prompts
    ]
    questions = [
        _make_question(row, prompts[row % len(prompts)], images[row]) for row in range(len(images))
    ]
    options = {"max_new_tokens": _MAX_NEW_TOKENS, "title": "own answers"}
    return encoded.with_examples(relabel_examples(model, encoded.processor, questions, **options))


def _make_question(row: int, prompt: str, images: list[Any]) -> Example:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": []}]
    return Example(row, turns, images, "own answers")


def make_retention_importance(
    model: nn.Module,
    encoded: EncodedDataset,
    select: SelectionSettings,
    seed: int,
    earlier: Sequence[FactoredImportance | None],
) -> RetentionImportance:
    """What a model is to keep before it learns a task: its own answers, and earlier tasks."""
    rehearsal = generate_rehearsal(model, encoded, select, seed, _RETENTION_ANSWERS)
    sensitivities = [estimate_sensitivity(model, rehearsal, select)] if len(rehearsal) else []
    return RetentionImportance([*sensitivities, *(found for found in earlier if found is not None)])


def estimate_sensitivity(
    model: nn.Module, encoded: EncodedDataset, select: SelectionSettings
) -> FactoredImportance:
    """The compact stakes of some examples, over the weights that a task may change."""
    batches = LengthGroupedBatches(
        encoded, select.batch_size, pad_token_of(tokenizer_of(encoded.processor))
    )
    names = importance.find_scorable_names(model, batches, "piece-f", select.exclude)
    named = weights(model)
    shapes = {name: tuple(shape_of(named[name])) for name in names}
    shares = {
        n: distributed.assign_entry_range(prod(shape), width_of(shape))
        for n, shape in shapes.items()
    }
    pieces = importance.stream_scores(
        model,
        batches,
        names=shares,
        memory=parse_bytes(select.memory),
        host=select.accumulators == "host",
        objective=importance.margin_sensitivity,
        progress=lambda items, title: progress_bar(items, f"{title}, to keep", "batch"),
    )
    return factor_scores(pieces, shapes)


def write_sensitivity(file: Path, sensitivity: FactoredImportance, delta: str) -> None:
    """Keep an importance beside the delta (its SHA-256) that it was estimated after."""
    file.parent.mkdir(exist_ok=True)
    sealed.write_checksummed(
        file, dict(_flatten_tensors(sensitivity)), {"of": _HEADER_KIND, "delta": delta}
    )


def read_sensitivity(file: Path, delta: str) -> FactoredImportance | None:
    """The importance that stands beside a delta; None if there is none, or not whole."""
    stored = sealed.read_checksummed(file)
    if stored is None or stored[1] != {"of": _HEADER_KIND, "delta": delta}:
        return None
    parts = {"rows": {}, "columns": {}}
    for key, values in stored[0].items():
        kind, _, name = key.partition(".")
        parts[kind][name] = values
    return FactoredImportance(**parts)


def _flatten_tensors(sensitivity: FactoredImportance) -> Iterator[tuple[str, Tensor]]:
    for kind, parts in (("rows", sensitivity.rows), ("columns", sensitivity.columns)):
        for name, values in parts.items():
            yield f"{kind}.{name}", values
