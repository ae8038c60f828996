"""`Example`: one row as chat messages and images, whatever format it came in."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from mm_piece.data.images import ImageSource, open_image, read_image_bytes, require_image
from mm_piece.errors import format_value

Message = dict[str, Any]
_MAX_NAME_LENGTH = 300  # of an image's path in a message


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
        """Text of the last question."""
        question = self.messages[-2]
        return text_of(question)

    @property
    def answer(self) -> str:
        """Text of the last answer."""
        answer = self.messages[-1]
        return text_of(answer)

    def with_answer(self, text: str) -> "Example":
        """Return the same question with another last answer, the only one that is accepted."""
        # without thoughts: they belong to the answer that the row had
        turn: Message = {
            "role": "assistant",
            "content": [{"type": "text", "text": text}],
        }
        earlier = self.messages[:-1]
        last = len(earlier)  # position of the new answer, which is to be learned
        untrained = [position for position in self.untrained_turns if position != last]
        return replace(
            self,
            messages=[*earlier, turn],
            accepted=[],
            untrained_turns=tuple(untrained),
        )

    def open_images(self) -> list[Image.Image]:
        """Return the images, decoded, in RGB.

        Raises DataError that names the row and the path of an image that cannot be read.
        """
        opened = []
        for number, image in enumerate(self.images):
            location = self._image_label(number)
            opened.append(open_image(image, location))
        return opened

    def require_images(self) -> None:
        """Raise DataError for an image that is missing, or that its header shows to be unfit."""
        for number, image in enumerate(self.images):
            location = self._image_label(number)
            require_image(image, location)

    def compute_digest(self) -> str:
        """Return the SHA-256 of the messages and of the images' content, wherever it lies."""
        messages = json.dumps(self.messages, sort_keys=True)
        sha = hashlib.sha256(messages.encode())
        # an example without any has the digest of its messages and images alone
        if self.untrained_turns:
            untrained = json.dumps(self.untrained_turns)
            sha.update(untrained.encode())

        for number, image in enumerate(self.images):
            location = self._image_label(number)
            content = read_image_bytes(image, location)
            # digests have one length: no two lists of images run together to the same bytes
            image_sha = hashlib.sha256(content)
            sha.update(image_sha.digest())
        return sha.hexdigest()

    def _image_label(self, number: int) -> str:
        image = self.images[number]
        name = str(number + 1)
        if isinstance(image, Path):
            name = str(image)

        # a path comes from the row: it may be of any length, and hold control characters
        if len(name) >= _MAX_NAME_LENGTH or not name.isprintable():
            name = format_value(name, _MAX_NAME_LENGTH)
        return f"{self.source} row {self.row}: image {name}"


def text_of(message: Message) -> str:
    """Return the text of a message, without its images."""
    texts = []
    for content_part in message["content"]:
        texts.append(content_part.get("text", ""))
    return "".join(texts)


def all_text_of(message: Message) -> str:
    """Return the text of a message and of its thoughts: all that a chat template may write."""
    texts = [text_of(message)]
    for key, value in message.items():
        if key not in ("role", "content"):
            texts.append(value)
    return "\n".join(texts)
