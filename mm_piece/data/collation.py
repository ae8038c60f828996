"""From encoded examples to batches: token rows padded, images side by side."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as padded

from mm_piece.data.encoding import IGNORE_INDEX
from mm_piece.errors import DataError, format_value

# Inputs with one entry per token, and what stands in the padding (None: the padding token).
_TOKEN_INPUT_FILLS: dict[str, int | None] = {
    "input_ids": None,
    "attention_mask": 0,
    "labels": IGNORE_INDEX,
    "mm_token_type_ids": 0,
    "token_type_ids": 0,
}


def collate(batch: Sequence[dict[str, Tensor]], pad: int, left: bool = False) -> dict[str, Tensor]:
    """One batch of encoded examples: token rows padded (left for generation), the rest stacked.

    `pad` is the padding token. Rows with and without images may stand in one batch; images cut into
    unequal numbers of tiles (LLaVA-NeXT) get empty ones, which the model leaves out. Raises
    DataError for what is no example.
    """
    if not isinstance(batch, Sequence) or not batch:
        raise DataError(f"a batch must be a list of encoded examples, not {format_value(batch)}")
    for example in batch:
        if not isinstance(example, Mapping) or "input_ids" not in example:
            raise DataError(
                f"an encoded example maps names to tensors, not {format_value(example)}"
            )
    length = max(example["input_ids"].shape[1] for example in batch)
    batch_inputs: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for example in batch for key in example):
        if key not in _TOKEN_INPUT_FILLS:
            batch_inputs[key] = _concatenate_images(
                [example[key] for example in batch if key in example]
            )
            continue
        fill = _TOKEN_INPUT_FILLS[key]
        rows = [_token_row_of(example, key) for example in batch]
        batch_inputs[key] = torch.cat(
            [_pad_token_row(r, length, pad if fill is None else fill, left) for r in rows]
        )
    return batch_inputs


def has_image(example: dict[str, Tensor]) -> bool:
    """Whether an encoded example has an image."""
    return any(key not in _TOKEN_INPUT_FILLS for key in example)


def digest_of(encoded: Iterable[dict[str, Tensor]]) -> str:
    """SHA-256 of everything that the task's training examples feed to the model."""
    sha = hashlib.sha256()
    for example in encoded:
        for key in sorted(example):
            sha.update(example[key].numpy().tobytes())
    return sha.hexdigest()


def iter_batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Runs of at most `size` items, in order."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


MAX_WINDOW_SIZE = 32  # examples in a window at most: the most that a batch can have
_MIN_WINDOW_SIZE = 8  # examples in a window, if there are more
_WINDOW_MULTIPLE = 16  # the windows come in multiples of this, so that this many parts are equal


class LengthGroupedBatches(Sequence[dict[str, Tensor]]):
    """Batches of encoded examples that differ in their texts alone, made when asked for.

    Examples of one batch have the same inputs, images of one shape and about equally many tokens,
    so that a pass over a batch is a pass over each of them. Images that a processor packs into rows
    of patches (Qwen-VL) stand alone. Like is looked for within windows of neighbours: of examples
    in random order, every window is then a random part, and parts can be compared.
    """

    def __init__(
        self, examples: Sequence[dict[str, Tensor]], size: int, pad: int, windowed: bool = True
    ) -> None:
        """At most `size` examples a batch; `pad` is the padding token.

        Not `apart`, all examples are one window, and every batch is a part: what is to be summed
        over batches wants whole ones.
        """
        self.examples, self.pad = examples, pad
        window = _assign_windows(len(examples)) if windowed else [0] * len(examples)
        keys = [(window[n], *_grouping_key_of(example)) for n, example in enumerate(examples)]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        groups = [[*group] for _, group in groupby(order, key=lambda n: keys[n][:2])]
        self.batch_positions = [
            batch
            for group in groups
            for batch in iter_batches(group, size if _is_stackable(examples[group[0]]) else 1)
        ]
        self.windows = [
            window[batch[0]] if windowed else number
            for number, batch in enumerate(self.batch_positions)
        ]

    def __len__(self) -> int:
        """The number of batches."""
        return len(self.batch_positions)

    def __getitem__(self, number: Any) -> Any:
        """One batch."""
        return collate(
            [self.examples[position] for position in self.batch_positions[number]], self.pad
        )


def _assign_windows(examples: int) -> list[int]:
    """The window of each example; they differ by one example at most."""
    few = -(-examples // _MIN_WINDOW_SIZE)
    number = (
        few
        if few < _WINDOW_MULTIPLE
        else _WINDOW_MULTIPLE * -(-examples // (_WINDOW_MULTIPLE * MAX_WINDOW_SIZE))
    )
    return [position * number // examples for position in range(examples)]


def _is_stackable(example: dict[str, Tensor]) -> bool:
    return all(len(value) == 1 for value in example.values())


def _grouping_key_of(example: dict[str, Tensor]) -> tuple[str, int]:
    """What examples of one batch share, and their length."""
    shared = [
        (key, list(value.shape), [] if value.is_floating_point() else value.tolist())
        for key, value in sorted(example.items())
        if key not in _TOKEN_INPUT_FILLS
    ]
    return f"{sorted(example)} {shared}", example["input_ids"].shape[1]


def _token_row_of(example: dict[str, Tensor], key: str) -> Tensor:
    """One row of a per-token input; a row without an image has no token types, which means 0."""
    return example[key] if key in example else torch.zeros_like(example["input_ids"])


def _pad_token_row(row: Tensor, length: int, fill: int, left: bool) -> Tensor:
    missing = length - row.shape[1]
    return padded(row, (missing, 0) if left else (0, missing), value=fill)


def _concatenate_images(image_inputs: Sequence[Tensor]) -> Tensor:
    """Parts joined along the first dimension; images in tiles (5 dimensions) get equally many."""
    if image_inputs[0].dim() == 5:
        most = max(image_input.shape[1] for image_input in image_inputs)
        image_inputs = [
            padded(image_input, (0, 0) * 3 + (0, most - image_input.shape[1]))
            for image_input in image_inputs
        ]
    return torch.cat(list(image_inputs))
