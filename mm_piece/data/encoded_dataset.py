"""A task's examples as model inputs: encoded when asked for, kept on disk by their content."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from mm_piece.data.chat_template import template_of
from mm_piece.data.example import Example
from mm_piece.data.truncation import encode_truncated
from mm_piece.files import atomic
from mm_piece.files.atomic import reporting_os_errors


class EncodedDataset(Sequence[dict[str, Tensor]]):
    """Encoded examples that take no memory: each is made once and read from `folder` after that.

    A file is named by the SHA-256 of what it was made of (texts, image bytes, processor, length),
    so changed data are encoded anew. Once the folder holds `room` bytes, further examples are made
    whenever they are asked for.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        processor: Any,
        folder: Path,
        max_length: int | None = None,
        max_bytes: int = 20 * 2**30,
    ) -> None:
        """Nothing is encoded before it is asked for."""
        self.examples, self.processor, self.folder = examples, processor, folder
        self.max_length, self.max_bytes = max_length, max_bytes
        self._settings_key = f"{processor!r} {template_of(processor)} {max_length}"
        self._cached_bytes = sum(map(_file_size_of, folder.glob("*"))) if max_bytes else 0

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.examples)

    def __getitem__(self, position: Any) -> Any:
        """One encoded example, or the part of the sequence that a slice names."""
        if isinstance(position, slice):
            return self.select_positions(range(len(self))[position])
        return self.encode_truncated(position)[0]

    def select_positions(self, positions: Sequence[int]) -> "EncodedDataset":
        """The examples at some positions, in that order."""
        return self.with_examples([self.examples[position] for position in positions])

    def with_examples(self, examples: Sequence[Example]) -> "EncodedDataset":
        """Other examples, encoded and kept alike."""
        return EncodedDataset(
            examples, self.processor, self.folder, self.max_length, self.max_bytes
        )

    def sample(self, number: int, seed: int) -> "EncodedDataset":
        """So many of the examples in random order; all of them if there are no more."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.select_positions(order[:number].tolist())

    def encode_truncated(self, position: int) -> tuple[dict[str, Tensor], bool]:
        """One encoded example, and whether it lost text to `max_length`."""
        example = self.examples[position]
        cache_key = hashlib.sha256(
            f"{example.compute_digest()} {self._settings_key}".encode()
        ).hexdigest()
        file = self.folder / f"{cache_key}.safetensors"
        if file.is_file():
            with safe_open(file, "pt") as opened:
                names = opened.keys()
                is_truncated = opened.metadata()["truncated"] == "True"
                return {name: opened.get_tensor(name) for name in names}, is_truncated
        made, is_truncated = encode_truncated(example, self.processor, self.max_length)
        if self._cached_bytes < self.max_bytes:
            self._write_encoded(file, made, is_truncated)
        return made, is_truncated

    def _write_encoded(self, file: Path, made: dict[str, Tensor], is_truncated: bool) -> None:
        content = {name: value.contiguous() for name, value in made.items()}
        data = save(content, {"truncated": str(is_truncated)})
        with reporting_os_errors(file):
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic.writing_atomically(
                file, durable=False
            ) as file_stream:  # loader processes may meet here
                file_stream.write(data)
        self._cached_bytes += len(data)


def _file_size_of(file: Path) -> int:
    """The size of a file, nothing if another process has just renamed it."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0
