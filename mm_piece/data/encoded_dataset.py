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
from mm_piece.data.truncation import fitted
from mm_piece.files import atomic
from mm_piece.files.atomic import reported


class Encoded(Sequence[dict[str, Tensor]]):
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
        room: int = 20 * 2**30,
    ) -> None:
        """Nothing is encoded before it is asked for."""
        self.examples, self.processor, self.folder = examples, processor, folder
        self.max_length, self.room = max_length, room
        self._setting = f"{processor!r} {template_of(processor)} {max_length}"
        self._held = sum(map(_bytes_of, folder.glob("*"))) if room else 0

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.examples)

    def __getitem__(self, position: Any) -> Any:
        """One encoded example, or the part of the sequence that a slice names."""
        if isinstance(position, slice):
            return self.part(range(len(self))[position])
        return self.fitted(position)[0]

    def part(self, positions: Sequence[int]) -> "Encoded":
        """The examples at some positions, in that order."""
        return self.of([self.examples[position] for position in positions])

    def of(self, examples: Sequence[Example]) -> "Encoded":
        """Other examples, encoded and kept alike."""
        return Encoded(examples, self.processor, self.folder, self.max_length, self.room)

    def drawn(self, number: int, seed: int) -> "Encoded":
        """So many of the examples in random order; all of them if there are no more."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.part(order[:number].tolist())

    def fitted(self, position: int) -> tuple[dict[str, Tensor], bool]:
        """One encoded example, and whether it lost text to `max_length`."""
        example = self.examples[position]
        key = hashlib.sha256(f"{example.digest()} {self._setting}".encode()).hexdigest()
        file = self.folder / f"{key}.safetensors"
        if file.is_file():
            with safe_open(file, "pt") as opened:
                names = opened.keys()
                cut = opened.metadata()["truncated"] == "True"
                return {name: opened.get_tensor(name) for name in names}, cut
        made, cut = fitted(example, self.processor, self.max_length)
        if self._held < self.room:
            self._keep(file, made, cut)
        return made, cut

    def _keep(self, file: Path, made: dict[str, Tensor], cut: bool) -> None:
        content = {name: value.contiguous() for name, value in made.items()}
        data = save(content, {"truncated": str(cut)})
        with reported(file):
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic.writing(file, durable=False) as whole:  # loader processes may meet here
                whole.write(data)
        self._held += len(data)


def _bytes_of(file: Path) -> int:
    """The size of a file, nothing if another process has just renamed it."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0
