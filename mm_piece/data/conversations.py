"""The turns of a conversation, whatever its style, as texts and images in order.

A turn is `{from, value}` (LLaVA, ShareGPT) or `{role, content}` (OpenAI, Hugging Face); its content
is a text with `<image>` marks, or a list of parts of type text, image or image_url. An answer may
have a mark that it is not to be learned (`turn_marks`), and a text of reasoning.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mm_piece.data.fields import TrackedFields, to_object_list
from mm_piece.data.images import IMAGE_KEYS, ImageSource, parse_image_object
from mm_piece.data.thoughts import THOUGHT_FIELDS
from mm_piece.data.turn_marks import is_trained_turn
from mm_piece.errors import DataError, format_value

IMAGE_MARK = "<image>"
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "system": "system",
}
_TOOL_ROLES = ("tool", "tool_call", "tool_response", "function", "function_call", "observation")
_TOOL_CALL_FIELDS = ("tool_calls", "function_call")
_UNSUPPORTED_MARKS = {"<video>": "videos are", "<audio>": "audio is"}
_UNSUPPORTED_TYPES = {
    "video": "videos are",
    "video_url": "videos are",
    "input_video": "videos are",
    "audio": "audio is",
    "audio_url": "audio is",
    "input_audio": "audio is",
}
# A text, an image of the turn's own, or None for the row's next image.
ContentItem = str | ImageSource | None


class Turn(NamedTuple):
    """One turn of a conversation."""

    role: str  # user, assistant or system
    content: list[ContentItem]
    is_trained: bool = True  # whether it is to be learned, if it is an answer
    reasoning: Mapping[str, str] = {}  # thoughts of an answer, by the field that has them


def parse_turns(
    given: Any,
    folder: Path,
    location: str,
    row: TrackedFields,
    name: str,
) -> list[Turn]:
    """Return the turns in the field `name` of a row; image paths are relative to `folder`.

    Raises DataError, which begins with `location`, for an unknown role or kind of content.
    """
    listed = to_object_list(given)
    if not isinstance(listed, list):
        raise DataError(
            f"{location}: a conversation must be a list of turns, not {format_value(given)}"
        )
    return [_parse_turn(turn, folder, location, row, name) for turn in listed]


def split_at_marks(text: str, location: str) -> list[ContentItem]:
    """Return a text split at its `<image>` marks: None for each, as it is the row's next image.

    Raises DataError for marks of video and audio, and for a text that is no valid Unicode.
    """
    for mark, what in _UNSUPPORTED_MARKS.items():
        if mark in text:
            raise make_unsupported_error(what, f"the text holds {mark}", location)

    # JSON may write one half of a surrogate pair, which no tokenizer takes
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{location}: the text holds half a character (a lone surrogate)"
        ) from error

    first, *others = text.split(IMAGE_MARK)
    content: list[ContentItem] = [first]
    for other in others:
        content.append(None)
        content.append(other)
    return content


def make_unsupported_error(what: str, seen: str, location: str) -> DataError:
    """Return the error for what no row may have."""
    return DataError(f"{location}: {what} not supported: {seen}; allowed: text and images")


def _parse_turn(
    given: Any,
    folder: Path,
    location: str,
    row: TrackedFields,
    name: str,
) -> Turn:
    if not isinstance(given, Mapping):
        raise DataError(f"{location}: a turn must be an object, not {format_value(given)}")

    turn = row.add_nested_fields(given, f"{name}[]")
    role = _parse_role(turn, location)
    content_field = turn.choose_field("value", "content")
    if content_field is None:  # for the message: the one that belongs to the turn's style
        content_field = "value" if "from" in turn.raw_values else "content"

    content = _parse_content(turn, content_field, folder, location)
    is_trained = is_trained_turn(turn, role, location)
    reasoning = {}
    if role == "assistant":
        reasoning = _parse_reasoning(turn, location)
    return Turn(role, content, is_trained, reasoning)


def _parse_role(turn: TrackedFields, location: str) -> str:
    key = turn.choose_field("from", "role") or "role"
    given = turn.raw_values.get(key)
    role = str(given).lower()

    for field in _TOOL_CALL_FIELDS:
        if turn.has_value(field):
            raise make_unsupported_error("tool turns are", f"it has {field!r}", location)
    if role in _TOOL_ROLES:
        raise make_unsupported_error("tool turns are", f"{key!r} is {role}", location)

    if role not in _ROLES:
        allowed = ", ".join(_ROLES)
        found = format_value(given)
        raise DataError(f"{location}: a turn needs {key!r}, one of {allowed}; not {found}")
    return _ROLES[role]


def _parse_content(
    turn: TrackedFields,
    name: str,
    folder: Path,
    location: str,
) -> list[ContentItem]:
    given = to_object_list(turn.raw_values.get(name))
    if isinstance(given, list):  # typed content
        content: list[ContentItem] = []
        for content_part in given:
            content += _parse_content_part(content_part, folder, location, turn, name)
        return content

    if not isinstance(given, str):
        raise DataError(f"{location}: a turn needs a text {name!r}, not {format_value(given)}")
    return split_at_marks(given, location)


def _parse_content_part(
    given: Any,
    folder: Path,
    location: str,
    turn: TrackedFields,
    name: str,
) -> list[ContentItem]:
    """Return the items of one part of typed content."""
    values = given if isinstance(given, Mapping) else {}
    fields = turn.add_nested_fields(values, f"{name}[]")
    kind = fields.read_value("type")
    if isinstance(kind, str) and kind in _UNSUPPORTED_TYPES:
        what = _UNSUPPORTED_TYPES[kind]
        raise make_unsupported_error(what, f"content of type {kind!r}", location)

    if kind in ("image", "image_url"):
        if not fields.has_value(*IMAGE_KEYS):
            return [None]
        image = parse_image_object(fields, folder, location)
        return [image]

    text = fields.read_value("text")
    if kind != "text" or not isinstance(text, str):
        raise DataError(
            f"{location}: content {format_value(given)} is no part of type text (with a 'text'), "
            "image or image_url"
        )
    return split_at_marks(text, location)


def _parse_reasoning(turn: TrackedFields, location: str) -> dict[str, str]:
    """Return the thoughts of an answer by the field that has them, for the base's chat template."""
    found = {}
    for name in THOUGHT_FIELDS:
        if turn.has_value(name):
            found[name] = turn.read_value(name)

    for name, text in found.items():
        if not isinstance(text, str):
            raise DataError(
                f"{location}: '{turn.path}{name}' must be a text, not {format_value(text)}"
            )
        if len(split_at_marks(text, location)) > 1:
            raise DataError(
                f"{location}: '{turn.path}{name}' holds {IMAGE_MARK}; images belong to questions"
            )
    return found
