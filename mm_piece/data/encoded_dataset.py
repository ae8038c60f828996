"""A task's examples as model inputs: encoded on access, cached on disk by their content."""

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
from mm_piece.data.processor import Processor, pad_token_of, tokenizer_of
from mm_piece.data.truncation import encode_truncated
from mm_piece.files import atomic
from mm_piece.files.atomic import reporting_os_errors


class EncodedDataset(Sequence[dict[str, Tensor]]):
    """Encoded examples that take no memory: `folder` caches each of them once it is encoded.

    The name of a file is the SHA-256 of all that went into it (texts, image bytes, processor,
    maximum length), so changed data are encoded anew. Once the folder holds `max_bytes`, further
    examples are encoded at every access.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        processor: Processor,
        folder: Path,
        max_length: int | None = None,
        max_bytes: int = 20 * 2**30,
    ) -> None:
        """Take the examples, without encoding any."""
        self.examples = examples
        self.processor = processor
        self.folder = folder
        self.max_length = max_length
        self.max_bytes = max_bytes
        # the repr of a tokenizer leaves its chat template out
        self._settings_key = f"{processor!r} {template_of(processor)} {max_length}"
        self._cached_bytes = 0
        if max_bytes:
            files = folder.glob("*")
            self._cached_bytes = sum(map(_file_size_of, files))

    @property
    def pad_token_id(self) -> int:
        """The token that fills up the shorter rows of a batch."""
        return pad_token_of(tokenizer_of(self.processor))

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.examples)

    def __getitem__(self, position: Any) -> Any:
        """Return one encoded example, or the subsequence that a slice names."""
        if isinstance(position, slice):
            positions = range(len(self))[position]
            return self.select_positions(positions)
        encoded, _ = self.encode_truncated(position)
        return encoded

    def select_positions(self, positions: Sequence[int]) -> "EncodedDataset":
        """Return the examples at some positions, in that order."""
        examples = [self.examples[position] for position in positions]
        return self.with_examples(examples)

    def with_examples(self, examples: Sequence[Example]) -> "EncodedDataset":
        """Return other examples, encoded and cached with the same settings."""
        return EncodedDataset(
            examples,
            self.processor,
            self.folder,
            self.max_length,
            self.max_bytes,
        )

    def sample(self, number: int, seed: int) -> "EncodedDataset":
        """Return `number` of the examples in random order; all of them if there are no more."""
        generator = torch.Generator().manual_seed(seed)
        # the order depends on the seed alone, not on the state of the global generator
        order = torch.randperm(len(self), generator=generator)
        positions = order[:number].tolist()
        return self.select_positions(positions)

    def encode_truncated(self, position: int) -> tuple[dict[str, Tensor], bool]:
        """Return one encoded example, and whether it lost text to `max_length`."""
        example = self.examples[position]
        file = self._locate_file(example)
        if file.is_file():
            return _read_encoded(file)

        encoded, is_truncated = encode_truncated(example, self.processor, self.max_length)
        if self._cached_bytes < self.max_bytes:
            self._write_encoded(file, encoded, is_truncated)
        return encoded, is_truncated

    def _locate_file(self, example: Example) -> Path:
        content = f"{example.compute_digest()} {self._settings_key}"
        cache_key = hashlib.sha256(content.encode()).hexdigest()
        return self.folder / f"{cache_key}.safetensors"

    def _write_encoded(
        self,
        file: Path,
        encoded: dict[str, Tensor],
        is_truncated: bool,
    ) -> None:
        tensors = {}
        for name, value in encoded.items():
            tensors[name] = value.contiguous()  # safetensors refuses others
        metadata = {"truncated": str(is_truncated)}
        data = save(tensors, metadata)

        with reporting_os_errors(file):
            self.folder.mkdir(parents=True, exist_ok=True)
            # data loader processes may write the same file at once
            with atomic.writing_atomically(file, durable=False) as stream:
                stream.write(data)
        self._cached_bytes += len(data)


def _read_encoded(file: Path) -> tuple[dict[str, Tensor], bool]:
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        names = opened.keys()  # the handle is no mapping: it cannot be iterated itself
        encoded = {}
        for name in names:
            encoded[name] = opened.get_tensor(name)
    return encoded, metadata["truncated"] == "True"


def _file_size_of(file: Path) -> int:
    """Return the size of a file; 0 if another process has just renamed it."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0
