"""`Example`: one row as chat messages and images, whatever format it came in."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from mm_piece.data import images as pictures
from mm_piece.data.images import ImageSource
from mm_piece.errors import format_value

Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One row: its chat messages (typed content) and its images, in the order of their marks."""

    row: int
    messages: list[Message]
    images: list[ImageSource]
    source: str
    kind: str = ""
    accepted: list[str] = field(default_factory=list)  # all right answers, where a row has several
    untrained_turns: tuple[int, ...] = ()  # positions of the answers that are not to be learned

    @property
    def prompt(self) -> str:
        """The text of the last question."""
        return text_of(self.messages[-2])

    @property
    def answer(self) -> str:
        """The text of the last answer."""
        return text_of(self.messages[-1])

    def with_answer(self, text: str) -> "Example":
        """The same question with another last answer, which is the only one that is accepted."""
        # Without its thoughts, which belong to the answer that the row had.
        turn = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        messages = [*self.messages[:-1], turn]
        last = len(messages) - 1
        untrained_turns = tuple(number for number in self.untrained_turns if number != last)
        return replace(self, messages=messages, accepted=[], untrained_turns=untrained_turns)

    def open_images(self) -> list[Image.Image]:
        """The images, opened, in RGB; DataError names row and path of one that cannot be read."""
        return [
            pictures.open_image(image, self._image_label(n)) for n, image in enumerate(self.images)
        ]

    def require_images(self) -> None:
        """Raise DataError for an image that is not there, or that its header shows to be unfit."""
        for number, image in enumerate(self.images):
            pictures.require_image(image, self._image_label(number))

    def compute_digest(self) -> str:
        """SHA-256 of the messages and of the images' content, wherever it lies."""
        sha = hashlib.sha256(json.dumps(self.messages, sort_keys=True).encode())
        if self.untrained_turns:
            sha.update(json.dumps(self.untrained_turns).encode())
        for number, image in enumerate(self.images):
            sha.update(
                hashlib.sha256(pictures.read_image_bytes(image, self._image_label(number))).digest()
            )
        return sha.hexdigest()

    def _image_label(self, number: int) -> str:
        image = self.images[number]
        name = str(image) if isinstance(image, Path) else f"{number + 1}"
        shown = name if len(name) < 300 and name.isprintable() else format_value(name, 300)
        return f"{self.source} row {self.row}: image {shown}"


def text_of(message: Message) -> str:
    """The text of a message, without its images."""
    return "".join(content_part.get("text", "") for content_part in message["content"])


def all_text_of(message: Message) -> str:
    """The text of a message and of its reasoning, all of which a chat template may render."""
    others = [value for key, value in message.items() if key not in ("role", "content")]
    return "\n".join([text_of(message), *others])
