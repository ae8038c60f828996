"""Retention importance: what a model stands to lose when it learns a task.

It needs no old data. The model answers general prompts about the new task's images (self-generated
rehearsal), and the margin sensitivity of these answers shows which weights its abilities depend on.
That of each earlier task was estimated when the task ended. Both are kept in factored form.
"""

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm_piece import distributed, importance
from mm_piece.data import EncodedDataset, Example, LengthGroupedBatches
from mm_piece.distributed import shape_of
from mm_piece.distributed.progress import progress_bar
from mm_piece.evaluation.answers import relabel_examples
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
_RETENTION_ANSWERS = 96  # self-generated ones that retention importance is estimated from
_HEADER_KIND = "stakes"  # in the header of a file of this kind; another file is made again
_MAX_NEW_TOKENS = 32  # of a self-generated answer


def generate_rehearsal(
    model: nn.Module,
    encoded: EncodedDataset,
    select: SelectionSettings,
    seed: int,
    num_answers: int,
) -> EncodedDataset:
    """Generate rehearsal examples: the model's answers to general prompts about a task's images.

    Up to `num_answers` images are drawn by `seed`, and the prompts take turns. Without images each
    prompt stands alone, once. Answers that cannot be trained are left out.
    """
    prompts = select.prompts or PROMPTS
    images = _draw_images(encoded.examples, seed, num_answers)
    if not images:  # a task of texts alone
        images = [[] for _ in prompts]

    questions = []
    for row, shown in enumerate(images):
        prompt = prompts[row % len(prompts)]
        questions.append(_make_question(row, prompt, shown))

    answered = relabel_examples(
        model,
        encoded.processor,
        questions,
        max_new_tokens=_MAX_NEW_TOKENS,
        title="what the model answers now",
    )
    return encoded.with_examples(answered)


def _draw_images(
    examples: Sequence[Example],
    seed: int,
    limit: int,
) -> list[list[Any]]:
    """Draw the first images of up to `limit` examples, a list of one for each."""
    with_images = [example for example in examples if example.images]

    # a generator of its own leaves the random state of the run as it is
    random = torch.Generator()
    random.manual_seed(seed)
    permutation = torch.randperm(len(with_images), generator=random)
    drawn = permutation.tolist()[:limit]
    return [with_images[number].images[:1] for number in drawn]


def _make_question(row: int, prompt: str, images: list[Any]) -> Example:
    content: list[dict[str, str]] = [{"type": "image"} for _ in images]
    content.append({"type": "text", "text": prompt})
    turns = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": []},
    ]
    return Example(row, turns, images, "rehearsal")


def make_retention_importance(
    model: nn.Module,
    encoded: EncodedDataset,
    select: SelectionSettings,
    seed: int,
    earlier: Sequence[FactoredImportance | None],
) -> RetentionImportance:
    """Build a model's retention importance before a task, from rehearsal and earlier tasks.

    An earlier task may lack its margin sensitivity (None), and then does not count.
    """
    rehearsal = generate_rehearsal(model, encoded, select, seed, _RETENTION_ANSWERS)

    sensitivities = []
    if len(rehearsal):
        # without usable answers, earlier tasks alone count
        sensitivities.append(estimate_sensitivity(model, rehearsal, select))
    sensitivities += [found for found in earlier if found is not None]
    return RetentionImportance(sensitivities)


def estimate_sensitivity(
    model: nn.Module,
    encoded: EncodedDataset,
    select: SelectionSettings,
) -> FactoredImportance:
    """Estimate the margin sensitivity of the weights that a task may change, in factored form."""
    batches = LengthGroupedBatches(encoded, select.batch_size)
    names = importance.find_scorable_names(model, batches, "piece-f", select.exclude)

    named = weights(model)
    shapes = {name: tuple(shape_of(named[name])) for name in names}
    # processes divide each weight in whole output rows: `factor_scores` sums over them
    entry_ranges = {}
    for name, shape in shapes.items():
        num_entries = prod(shape)
        entry_ranges[name] = distributed.assign_entry_range(num_entries, width_of(shape))

    pieces = importance.stream_scores(
        model,
        batches,
        names=entry_ranges,
        memory=parse_bytes(select.memory),
        host=select.accumulators == "host",
        objective=importance.margin_sensitivity,
        progress=lambda items, title: progress_bar(items, f"{title}, to keep", "batch"),
    )
    return factor_scores(pieces, shapes)


def write_sensitivity(file: Path, sensitivity: FactoredImportance, delta: str) -> None:
    """Write a margin sensitivity beside the delta that it was estimated after.

    `delta` is the delta's SHA-256, by which `read_sensitivity` knows whether the two still match.
    """
    file.parent.mkdir(exist_ok=True)
    tensors = dict(_flatten_tensors(sensitivity))
    header = {"of": _HEADER_KIND, "delta": delta}
    sealed.write_checksummed(file, tensors, header)


def read_sensitivity(file: Path, delta: str) -> FactoredImportance | None:
    """Read the margin sensitivity beside a delta; return None if it is absent or damaged."""
    stored = sealed.read_checksummed(file)
    if stored is None:
        return None

    # a file of another kind or delta is as good as none: it is made again
    tensors, header = stored
    if header != {"of": _HEADER_KIND, "delta": delta}:
        return None

    parts: dict[str, dict[str, Tensor]] = {"rows": {}, "columns": {}}
    for key, values in tensors.items():
        kind, _, name = key.partition(".")
        parts[kind][name] = values
    return FactoredImportance(**parts)


def _flatten_tensors(sensitivity: FactoredImportance) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor with its key in a file: `rows.NAME` or `columns.NAME`."""
    for name, values in sensitivity.rows.items():
        yield f"rows.{name}", values
    for name, values in sensitivity.columns.items():
        yield f"columns.{name}", values
