"""Data formats to chat messages to batches: what a task's rows become before a model sees them.

A source is a JSON or JSONL file (LLaVA conversations, `messages`, or `{prompt, answer[,
image|pic_path]}`), or `scenes:NAME/SPLIT` for the embedded data; either may end in a slice such as
`[:100]`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mm_piece import scenes
from mm_piece.errors import DataError, ModelError

IGNORED = -100  # the label of a token that is not supervised
_MARK = "<image>"
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
        return _text(self.messages[-2])

    @property
    def answer(self) -> str:
        """The text of the last answer."""
        return _text(self.messages[-1])

    def pictures(self) -> list[Image.Image]:
        """The images, opened, in RGB; DataError names row and path of one that cannot be read."""
        return [self._open(image) for image in self.images]

    def _open(self, image: Path | Image.Image) -> Image.Image:
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        try:
            with Image.open(image) as opened:
                return opened.convert("RGB")
        except FileNotFoundError as error:
            raise DataError(
                f"{self.source} row {self.row}: image {image} does not exist"
            ) from error
        except (OSError, UnidentifiedImageError, ValueError) as error:
            raise DataError(
                f"{self.source} row {self.row}: image {image} cannot be read"
            ) from error


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


def encode(example: Example, processor: Any) -> dict[str, Tensor]:
    """Model inputs of one example, batch dimension 1, with labels on the answers' tokens alone.

    Image tokens are expanded by the processor. Raises DataError where text and images disagree,
    ModelError where the chat template breaks the law that a prompt's tokens begin the tokens of
    prompt and answer.
    """
    inputs = _process(processor, _render(processor, example.messages), example)
    inputs["labels"] = _labels(example, processor, inputs["input_ids"])
    return inputs


def encode_prompt(example: Example, processor: Any) -> dict[str, Tensor]:
    """Model inputs of an example's last question, ready for generation."""
    return _process(processor, _render(processor, example.messages[:-1], prompt=True), example)


def collate(batch: Sequence[dict[str, Tensor]], pad: int, left: bool = False) -> dict[str, Tensor]:
    """One batch of encoded examples: token rows padded (left for generation), the rest stacked."""
    fill = {"input_ids": pad, "labels": IGNORED}
    length = max(example["input_ids"].shape[1] for example in batch)
    joined: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for example in batch for key in example):
        parts = [example[key] for example in batch if key in example]
        if parts[0].shape[:2] == batch[0]["input_ids"].shape[:2] or key in (
            "attention_mask",
            *fill,
        ):
            parts = [_pad(part, length, fill.get(key, 0), left) for part in parts]
        joined[key] = torch.cat(parts)
    return joined


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor; a text model's processor is its tokenizer."""
    return getattr(processor, "tokenizer", processor)


def _pad(part: Tensor, length: int, fill: int, left: bool) -> Tensor:
    missing = length - part.shape[1]
    return torch.nn.functional.pad(part, (missing, 0) if left else (0, missing), value=fill)


def _labels(example: Example, processor: Any, expanded: Tensor) -> Tensor:
    """Labels for the expanded ids; expansion adds image tokens only, so spans count the others."""
    plain, spans = _answer_spans(example, processor)
    image = _image_token(processor)
    others = (expanded[0] != image).nonzero().view(-1)
    kept = [token for token in plain if token != image]
    if expanded[0][others].tolist() != kept:
        raise ModelError(
            f"{example.source} row {example.row}: the processor changed more than image tokens"
        )
    labels = torch.full_like(expanded, IGNORED)
    for start, stop in spans:
        low, high = (sum(token != image for token in plain[:edge]) for edge in (start, stop))
        labels[0, others[low:high]] = expanded[0, others[low:high]]
    return labels


def _answer_spans(example: Example, processor: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of the whole conversation before image expansion, and the token span of each answer."""
    whole = _ids(processor, _render(processor, example.messages))
    spans = []
    for turn, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        before = _ids(processor, _render(processor, example.messages[:turn], prompt=True))
        after = _ids(processor, _render(processor, example.messages[: turn + 1]))
        if whole[: len(after)] != after or after[: len(before)] != before:
            raise ModelError(
                f"{example.source} row {example.row}: "
                "the chat template's prompt is not a prefix of prompt + answer"
            )
        spans.append((len(before), len(after)))
    return whole, spans


def _render(processor: Any, messages: list[Message], prompt: bool = False) -> str:
    if processor is tokenizer_of(processor):  # templates of text models take plain strings
        messages = [{**message, "content": _text(message)} for message in messages]
    try:
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except (ValueError, AttributeError) as error:
        raise ModelError(f"the base has no usable chat template: {error}") from error


def _ids(processor: Any, text: str) -> list[int]:
    return tokenizer_of(processor)(text, add_special_tokens=False)["input_ids"]


def _process(processor: Any, text: str, example: Example) -> dict[str, Tensor]:
    options: dict[str, Any] = {"return_tensors": "pt", "add_special_tokens": False}
    try:
        if processor is tokenizer_of(processor):
            return dict(processor(text, **options))
        return dict(processor(text=[text], images=example.pictures() or None, **options))
    except (ValueError, IndexError) as error:
        raise DataError(
            f"{example.source} row {example.row}: {' '.join(str(error).split())}"
        ) from error


def _image_token(processor: Any) -> int | None:
    return None if processor is tokenizer_of(processor) else processor.image_token_id


def _sliced(source: str) -> tuple[str, int | None, int | None]:
    match = re.fullmatch(r"(.+)\[(\d*):(\d*)\]", source)
    if not match:
        return source, None, None
    return match[1], int(match[2]) if match[2] else None, int(match[3]) if match[3] else None


def _file_rows(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    try:
        lines = [line for line in text.splitlines() if line.strip()]
        rows = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} must hold a list of rows")
    return rows


def _example(row: Any, number: int, source: str, folder: Path) -> Example:
    where = f"{source} row {number}"
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be an object")
    pictures = _pictures(row, folder)
    turns = _turns(row, where, bool(pictures))
    marks = sum(text.count(_MARK) for role, text in turns)
    if marks != len(pictures):
        raise DataError(
            f"{where}: {len(pictures)} image(s) but {marks} {_MARK} mark(s) in the text"
        )
    if len(turns) < 2 or turns[-1][0] != "assistant" or not turns[-1][1].strip():
        raise DataError(f"{where}: the conversation must end in an answer")
    messages = [{"role": role, "content": _content(text)} for role, text in turns]
    return Example(number, messages, pictures, source, str(row.get("kind", "")), _accepted(row))


def _pictures(row: dict[str, Any], folder: Path) -> list[Path | Image.Image]:
    given = row.get("image", row.get("pic_path", row.get("images", [])))
    listed = given if isinstance(given, list) else [given]
    return [folder / image if isinstance(image, str) else image for image in listed if image]


def _turns(row: dict[str, Any], where: str, has_image: bool) -> list[tuple[str, str]]:
    """Role and text of each turn, whatever the row's format; `<image>` marks stand in the text."""
    if "conversations" in row:
        return [_turn(turn, "from", "value", where) for turn in row["conversations"]]
    if "messages" in row:
        return [_turn(turn, "role", "content", where) for turn in row["messages"]]
    if "prompt" in row and "answer" in row:
        prompt = str(row["prompt"])
        mark = f"{_MARK}\n" if has_image and _MARK not in prompt else ""
        return [("user", mark + prompt), ("assistant", str(row["answer"]))]
    raise DataError(
        f"{where}: no known format; expected conversations, messages, or prompt and answer"
    )


def _turn(turn: Any, role: str, text: str, where: str) -> tuple[str, str]:
    if (
        not isinstance(turn, dict)
        or turn.get(role) not in _ROLES
        or not isinstance(turn.get(text), str)
    ):
        raise DataError(
            f"{where}: a turn needs {role!r} (one of {', '.join(_ROLES)}) and a text {text!r}"
        )
    return _ROLES[turn[role]], turn[text]


def _content(text: str) -> list[dict[str, str]]:
    """Typed content: an image entry for each mark, text between them."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(_MARK)):
        if number:
            parts.append({"type": "image"})
        if piece := piece.strip("\n"):
            parts.append({"type": "text", "text": piece})
    return parts


def _text(message: Message) -> str:
    return "".join(part.get("text", "") for part in message["content"])


def _accepted(row: dict[str, Any]) -> list[str]:
    answers = row.get("answers", [])
    return [str(a["answer"] if isinstance(a, dict) else a) for a in answers]


def _require_images(examples: Sequence[Example]) -> None:
    for example in examples:
        for image in example.images:
            if isinstance(image, Path) and not image.is_file():
                raise DataError(f"{example.source} row {example.row}: image {image} does not exist")


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Runs of at most `size` items, in order."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
