"""From encoded examples to batches: rows of tokens padded, images side by side."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad as padded

from mm_piece.data.encoding import IGNORE_INDEX
from mm_piece.errors import DataError, format_value

# Inputs with one entry per token, and the value of their padding (None: the padding token).
_TOKEN_INPUT_FILLS: dict[str, int | None] = {
    "input_ids": None,
    "attention_mask": 0,
    "labels": IGNORE_INDEX,
    "mm_token_type_ids": 0,
    "token_type_ids": 0,
}
_TILED_DIM = 5  # (images, tiles, channels, height, width), or (rows, images, …)
_IMAGE_DIM = 4  # (images, channels, height, width)


class EncodedExamples(Protocol):
    """Encoded examples, batch dimension 1 each, and the token that pads them in a batch."""

    @property
    def pad_token_id(self) -> int:
        """The token that fills up the shorter rows of a batch."""
        ...

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def __getitem__(self, position: int, /) -> dict[str, Tensor]:
        """Return one encoded example; IndexError past the last."""
        ...


@dataclass(frozen=True)
class EncodedList(Sequence[dict[str, Tensor]]):
    """Encoded examples in memory."""

    examples: Sequence[dict[str, Tensor]]
    pad_token_id: int

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.examples)

    def __getitem__(self, position: Any) -> Any:
        """Return one encoded example, or those that a slice names."""
        return self.examples[position]


def collate(
    batch: Sequence[dict[str, Tensor]],
    pad: int,
    left: bool = False,
) -> dict[str, Tensor]:
    """Return one batch of encoded examples.

    Rows of tokens are padded with the token `pad`, on the left for generation; images are joined.
    A batch may mix rows with and without images. Images in unequal numbers of tiles (LLaVA-NeXT)
    get empty ones, which the model leaves out. Raises DataError for a batch of anything else.
    """
    _require_encoded(batch)
    lengths = [example["input_ids"].shape[1] for example in batch]
    max_length = max(lengths)

    # a row without an image lacks keys that others have: in the order of first appearance
    keys: dict[str, None] = {}
    for example in batch:
        keys.update(dict.fromkeys(example))

    batch_inputs: dict[str, Tensor] = {}
    for key in keys:
        if key not in _TOKEN_INPUT_FILLS:
            image_inputs = [example[key] for example in batch if key in example]
            batch_inputs[key] = _concatenate_images(key, image_inputs, "image_sizes" in keys)
            continue

        fill = _TOKEN_INPUT_FILLS[key]
        if fill is None:
            fill = pad
        rows = []
        for example in batch:
            row = _token_row_of(example, key)
            padded_row = _pad_token_row(row, max_length, fill, left)
            rows.append(padded_row)
        batch_inputs[key] = torch.cat(rows)  # (batch, max_length)
    return batch_inputs


def has_image(example: dict[str, Tensor]) -> bool:
    """Return whether an encoded example has an image."""
    return any(key not in _TOKEN_INPUT_FILLS for key in example)


class ExamplesDigest:
    """The SHA-256 of everything that a task's training examples feed to the model."""

    def __init__(self) -> None:
        """Begin without examples."""
        self._sha = hashlib.sha256()

    def add_example(self, example: dict[str, Tensor]) -> None:
        """Add the next encoded example."""
        for key in sorted(example):
            values = example[key].numpy()
            self._sha.update(values.tobytes())

    def hexdigest(self) -> str:
        """Return the digest of the examples so far, in hex."""
        return self._sha.hexdigest()


def iter_batches(
    items: Sequence[Any],
    size: int,
) -> Iterator[Sequence[Any]]:
    """Yield runs of at most `size` items, in order."""
    for start in range(0, len(items), size):
        stop = start + size
        yield items[start:stop]


MAX_WINDOW_SIZE = 32  # examples in a window at most: the most that a batch can have
_MIN_WINDOW_SIZE = 8  # examples in a window, if there are more
_WINDOW_MULTIPLE = 16  # from this many windows on, they divide into 16 equal folds


class LengthGroupedBatches(Sequence[dict[str, Tensor]]):
    """Batches of encoded examples that differ in their texts alone, made when they are read.

    Examples of one batch have the same inputs, images of one shape and about equally many tokens,
    so that a pass over a batch is a pass over each of them. Images that a processor packs into rows
    of patches (Qwen-VL) form a batch each. Grouping stays within windows of neighbours: of examples
    in random order, every window is a random sample, and windows can be compared.
    """

    def __init__(
        self,
        examples: EncodedExamples,
        size: int,
        *,
        windowed: bool = True,
    ) -> None:
        """Group examples into batches of at most `size`.

        Unless `windowed`, all examples are one window, so that batches are as full as can be, and
        each batch counts as a window of its own: this suits sums over batches.
        """
        self.examples = examples
        window_of = [0] * len(examples)
        if windowed:
            window_of = _assign_windows(len(examples))

        keys = []
        for position, window in enumerate(window_of):
            shared, length = _grouping_key_of(examples[position])
            key = (window, shared, length)
            keys.append(key)
        positions = range(len(keys))
        order = sorted(positions, key=keys.__getitem__)

        def group_of(position: int) -> tuple[int, str]:
            window, shared, _ = keys[position]
            return window, shared

        self.batch_positions: list[Sequence[int]] = []
        for _, group in groupby(order, key=group_of):
            positions = list(group)
            first_example = examples[positions[0]]
            batch_size = size if _is_stackable(first_example) else 1
            batches = iter_batches(positions, batch_size)
            self.batch_positions.extend(batches)

        self.windows: list[int] = []
        for number, positions in enumerate(self.batch_positions):
            window = window_of[positions[0]] if windowed else number
            self.windows.append(window)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.batch_positions)

    def __getitem__(self, number: Any) -> Any:
        """Return one batch."""
        positions = self.batch_positions[number]
        examples = [self.examples[position] for position in positions]
        return collate(examples, self.examples.pad_token_id)


def _require_encoded(batch: Any) -> None:
    if not isinstance(batch, Sequence) or not batch:
        raise DataError(f"a batch must be a list of encoded examples, not {format_value(batch)}")

    for example in batch:
        if not isinstance(example, Mapping) or "input_ids" not in example:
            raise DataError(
                f"an encoded example maps names to tensors, not {format_value(example)}"
            )


def _assign_windows(num_examples: int) -> list[int]:
    """Return the window of each example; their sizes differ by one example at most."""
    # -(-a // b) rounds up
    num_windows = -(-num_examples // _MIN_WINDOW_SIZE)
    if num_windows >= _WINDOW_MULTIPLE:
        max_examples = _WINDOW_MULTIPLE * MAX_WINDOW_SIZE  # in as many windows
        num_multiples = -(-num_examples // max_examples)
        num_windows = _WINDOW_MULTIPLE * num_multiples

    windows = []
    for position in range(num_examples):
        window = position * num_windows // num_examples
        windows.append(window)
    return windows


def _is_stackable(example: dict[str, Tensor]) -> bool:
    # several rows of one example (patches, images) could not be told from those of the next
    return all(len(value) == 1 for value in example.values())


def _grouping_key_of(example: dict[str, Tensor]) -> tuple[str, int]:
    """Return what examples of one batch share, and the length of this one."""
    shared = []
    for key in sorted(example):
        if key in _TOKEN_INPUT_FILLS:
            continue
        value = example[key]
        shape = list(value.shape)
        numbers = []
        # integers are sizes and grids of the images, which must agree; floats are pixels
        if not value.is_floating_point():
            numbers = value.tolist()
        shared.append((key, shape, numbers))

    text = f"{sorted(example)} {shared}"
    length = example["input_ids"].shape[1]
    return text, length


def _token_row_of(
    example: dict[str, Tensor],
    key: str,
) -> Tensor:
    """Return one input with an entry per token, (1, tokens).

    A row without an image has no token types: all of its tokens are of type 0, text.
    """
    if key in example:
        return example[key]
    return torch.zeros_like(example["input_ids"])


def _pad_token_row(
    row: Tensor,
    length: int,
    fill: int,
    left: bool,
) -> Tensor:
    missing = length - row.shape[1]
    sides = (0, missing)
    if left:
        sides = (missing, 0)
    return padded(row, sides, value=fill)


def _concatenate_images(
    key: str,
    image_inputs: Sequence[Tensor],
    has_sizes: bool,
) -> Tensor:
    """Join image inputs along their first dimension.

    Rows of tiles or of several images get equally many of them. Images of unequal sizes are filled
    up at the right and the bottom where `has_sizes`: then the model leaves the filling out.
    """
    dim = image_inputs[0].dim()
    filled_dims = set()
    if key == "pixel_attention_mask" or dim == _TILED_DIM:
        filled_dims = {1}
    elif key == "pixel_values" and dim == _IMAGE_DIM and has_sizes:
        filled_dims = {2, 3}

    filled = []
    for image_input in image_inputs:
        sides: list[int] = []
        # pairs from the last dimension on
        for axis in reversed(range(dim)):
            longest = max(other.shape[axis] for other in image_inputs)
            missing = longest - image_input.shape[axis] if axis in filled_dims else 0
            sides += [0, missing]
        filled.append(padded(image_input, sides))
    return torch.cat(filled)
