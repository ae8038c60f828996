"""From rows of any known format to examples: chat messages and images.

A source is a JSON or JSONL file (LLaVA conversations, `messages`, or `{prompt, answer[,
image|pic_path]}`), or `scenes:NAME/SPLIT` for the embedded data; either may end in a slice such as
`[:100]`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from mm_piece import scenes
from mm_piece.errors import DataError

_MARK = "<image>"
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One row: its chat messages (typed content) and its images, as paths or as pictures."""

    row: int
    messages: list[Message]
    images: list[Path | Image.Image]
    source: str
    kind: str = ""
    accepted: list[str] = field(default_factory=list)  # all right answers, where a row has several

    @property
    def prompt(self) -> str:
        """The text of the last question."""
        return text_of(self.messages[-2])

    @property
    def answer(self) -> str:
        """The text of the last answer."""
        return text_of(self.messages[-1])

    def pictures(self) -> list[Image.Image]:
        """The images, opened, in RGB; DataError names row and path of one that cannot be read."""
        return [self._open(image) for image in self.images]

    def _open(self, image: Path | Image.Image) -> Image.Image:
        where = f"{self.source} row {self.row}: image {image}"
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        try:
            with Image.open(image) as opened:
                _require_8_bit(opened, where)
                return ImageOps.exif_transpose(opened).convert("RGB")
        except FileNotFoundError as error:
            raise DataError(f"{where} does not exist") from error
        except _UNREADABLE as error:
            raise DataError(f"{where} cannot be read") from error


def read(source: str, images: str | None = None) -> list[Example]:
    """All rows of a source; image paths are relative to `images`, or to the file's own folder.

    Raises DataError in one line for a missing or empty file, a row of no known format, a missing
    image, and images that do not match the `<image>` marks of the text.
    """
    path, start, stop = _sliced(source)
    rows = scenes_rows(path) if path.startswith("scenes:") else _file_rows(Path(path))
    if not rows[start:stop]:
        raise DataError(f"{source} has no rows")
    folder = Path(images) if images else Path(path).parent
    numbered = list(enumerate(rows))[start:stop]
    examples = [_example(row, number, path, folder) for number, row in numbered]
    _require_images(examples)
    return examples


def scenes_rows(source: str) -> list[dict[str, Any]]:
    """The rows of `scenes:NAME/SPLIT`."""
    name, separator, split = source.removeprefix("scenes:").partition("/")
    if not separator:
        raise DataError(f"{source!r} is not of the form scenes:NAME/SPLIT")
    return scenes.rows(name, split)


def _sliced(source: str) -> tuple[str, int | None, int | None]:
    match = re.fullmatch(r"(.+)\[(\d*):(\d*)\]", source)
    if not match:
        return source, None, None
    return match[1], int(match[2]) if match[2] else None, int(match[3]) if match[3] else None


def _file_rows(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    try:
        lines = [line for line in text.split("\n") if line.strip()]
        rows = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} must hold a list of rows")
    return rows


def text_of(message: Message) -> str:
    """The text of a message, without its images."""
    return "".join(part.get("text", "") for part in message["content"])


def _example(row: Any, number: int, source: str, folder: Path) -> Example:
    where = f"{source} row {number}"
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be an object")
    pictures = _pictures(row, folder, where)
    turns = _turns(row, where, bool(pictures))
    marks = sum(text.count(_MARK) for role, text in turns)
    if marks != len(pictures):
        raise DataError(
            f"{where}: {len(pictures)} image(s) but {marks} {_MARK} mark(s) in the text"
        )
    roles = [role for role, _ in turns if role != "system"]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise DataError(f"{where}: turns must alternate, question first, and end in an answer")
    if not roles or not turns[-1][1].strip():
        raise DataError(f"{where}: the conversation must end in an answer")
    messages = [{"role": role, "content": _content(text)} for role, text in turns]
    return Example(number, messages, pictures, source, str(row.get("kind", "")), _accepted(row))


def _pictures(row: dict[str, Any], folder: Path, where: str) -> list[Path | Image.Image]:
    given = row.get("image", row.get("pic_path", row.get("images", [])))
    listed = [image for image in (given if isinstance(given, list) else [given]) if image]
    if odd := [image for image in listed if not isinstance(image, str | Image.Image)]:
        raise DataError(f"{where}: an image must be a path, not {type(odd[0]).__name__}")
    return [folder / image if isinstance(image, str) else image for image in listed]


def _turns(row: dict[str, Any], where: str, has_image: bool) -> list[tuple[str, str]]:
    """Role and text of each turn, whatever the row's format; `<image>` marks stand in the text."""
    for key, role, text in (("conversations", "from", "value"), ("messages", "role", "content")):
        if isinstance(row.get(key), list):
            return [_turn(turn, role, text, where) for turn in row[key]]
    if row.get("prompt") is not None and row.get("answer") is not None:
        prompt = str(row["prompt"])
        mark = f"{_MARK}\n" if has_image and _MARK not in prompt else ""
        return [("user", mark + prompt), ("assistant", str(row["answer"]))]
    raise DataError(
        f"{where}: no known format; expected a list of conversations or messages, "
        "or prompt and answer"
    )


def _turn(turn: Any, role: str, text: str, where: str) -> tuple[str, str]:
    if not isinstance(turn, dict) or str(turn.get(role)) not in _ROLES:
        raise DataError(f"{where}: a turn needs {role!r}, one of {', '.join(_ROLES)}")
    content = turn.get(text)
    if isinstance(content, list):  # typed content
        content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise DataError(f"{where}: a turn needs a text {text!r}")
    return _ROLES[turn[role]], content


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "image"):
        raise DataError(f"{where}: content of type {kind!r}; allowed: text, image")
    return _MARK if kind == "image" else str(part.get("text", ""))


def _content(text: str) -> list[dict[str, str]]:
    """Typed content: an image entry for each mark, text between them."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(_MARK)):
        if number:
            parts.append({"type": "image"})
        if piece := piece.strip("\n"):
            parts.append({"type": "text", "text": piece})
    return parts


def _accepted(row: dict[str, Any]) -> list[str]:
    answers = row.get("answers", [])
    listed = answers if isinstance(answers, list) else [answers]
    return [str(a["answer"] if isinstance(a, dict) and "answer" in a else a) for a in listed]


def _require_image(path: Path, where: str) -> None:
    if not path.is_file():
        raise DataError(f"{where} does not exist")
    try:
        with Image.open(path) as opened:
            _require_8_bit(opened, where)
            opened.verify()
    except _UNREADABLE as error:
        raise DataError(f"{where} cannot be read") from error


def _require_8_bit(image: Image.Image, where: str) -> None:
    """Conversion would clip deeper pixels to white without a word."""
    if image.mode.startswith(("I", "F")):
        raise DataError(f"{where} has mode {image.mode}; convert it to 8 bits a channel")


def _require_images(examples: Sequence[Example]) -> None:
    for example in examples:
        for image in example.images:
            if isinstance(image, Path):
                _require_image(image, f"{example.source} row {example.row}: image {image}")
