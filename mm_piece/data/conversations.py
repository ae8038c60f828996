"""The turns of a conversation, whatever its style, as texts and images in order.

A turn is `{from, value}` (LLaVA, ShareGPT) or `{role, content}` (OpenAI, Hugging Face); its content
is a text with `<image>` marks, or a list of parts of type text, image or image_url. An answer may
say that it is not to be learned (`marks`), and have a text of reasoning.
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
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bard", "bing"), "assistant"),
    "system": "system",
}
_TOOL_ROLES = ("tool", "tool_call", "tool_response", "function", "function_call", "observation")
_TOOL_CALL_FIELDS = ("tool_calls", "function_call")
_UNSUPPORTED_MARKS = {"<video>": "videos are", "<audio>": "audio is"}
_UNSUPPORTED_TYPES = {
    **dict.fromkeys(("video", "video_url", "input_video"), "videos are"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio is"),
}
ContentItem = (
    str | ImageSource | None
)  # a text, an image of the turn's own, or the row's next image


class Turn(NamedTuple):
    """One turn: its role, its content, whether it is learned if it is an answer, its reasoning."""

    role: str
    content: list[ContentItem]
    is_trained: bool = True
    reasoning: Mapping[str, str] = {}


def parse_turns(
    given: Any, folder: Path, location: str, row: TrackedFields, name: str
) -> list[Turn]:
    """The turns of a list of them in a row's field; image paths are relative to `folder`.

    Raises DataError, which begins with `where`, for an unknown role or kind of content.
    """
    listed = to_object_list(given)
    if not isinstance(listed, list):
        raise DataError(
            f"{location}: a conversation must be a list of turns, not {format_value(given)}"
        )
    return [_parse_turn(turn, folder, location, row, name) for turn in listed]


def split_at_marks(text: str, location: str) -> list[ContentItem]:
    """A text cut at its marks, each of which stands for the row's next image."""
    for mark, what in _UNSUPPORTED_MARKS.items():
        if mark in text:
            raise make_unsupported_error(what, f"the text holds {mark}", location)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{location}: the text holds half a character (a lone surrogate)"
        ) from error
    first, *others = text.split(IMAGE_MARK)
    return [first, *(piece for other in others for piece in (None, other))]


def make_unsupported_error(what: str, seen: str, location: str) -> DataError:
    """The error for what no row may have."""
    return DataError(f"{location}: {what} not supported: {seen}; allowed: text and images")


def _parse_turn(given: Any, folder: Path, location: str, row: TrackedFields, name: str) -> Turn:
    if not isinstance(given, Mapping):
        raise DataError(f"{location}: a turn must be an object, not {format_value(given)}")
    turn = row.add_nested_fields(given, f"{name}[]")
    role = _parse_role(turn, location)
    text = turn.choose_field("value", "content") or (
        "value" if "from" in turn.raw_values else "content"
    )
    return Turn(
        role,
        _parse_content(turn, text, folder, location),
        is_trained_turn(turn, role, location),
        _parse_reasoning(turn, location) if role == "assistant" else {},
    )


def _parse_role(turn: TrackedFields, location: str) -> str:
    key = turn.choose_field("from", "role") or "role"
    role = str(turn.raw_values.get(key)).lower()
    call = next((name for name in _TOOL_CALL_FIELDS if turn.has_value(name)), None)
    if role in _TOOL_ROLES or call:
        raise make_unsupported_error(
            "tool turns are", f"it has {call!r}" if call else f"{key!r} is {role}", location
        )
    if role not in _ROLES:
        allowed, found = ", ".join(_ROLES), format_value(turn.raw_values.get(key))
        raise DataError(f"{location}: a turn needs {key!r}, one of {allowed}; not {found}")
    return _ROLES[role]


def _parse_content(
    turn: TrackedFields, name: str, folder: Path, location: str
) -> list[ContentItem]:
    given = to_object_list(turn.raw_values.get(name))
    if isinstance(given, list):  # typed content
        parts = (
            _parse_content_part(content_part, folder, location, turn, name)
            for content_part in given
        )
        return [piece for content_part in parts for piece in content_part]
    if not isinstance(given, str):
        raise DataError(f"{location}: a turn needs a text {name!r}, not {format_value(given)}")
    return split_at_marks(given, location)


def _parse_content_part(
    given: Any, folder: Path, location: str, turn: TrackedFields, name: str
) -> list[ContentItem]:
    """The pieces of one part of typed content."""
    part_fields = turn.add_nested_fields(given if isinstance(given, Mapping) else {}, f"{name}[]")
    kind = part_fields.read_value("type")
    if kind in _UNSUPPORTED_TYPES:
        raise make_unsupported_error(
            _UNSUPPORTED_TYPES[kind], f"content of type {kind!r}", location
        )
    if kind in ("image", "image_url"):
        return [
            parse_image_object(part_fields, folder, location)
            if part_fields.has_value(*IMAGE_KEYS)
            else None
        ]
    text = part_fields.read_value("text")
    if kind != "text" or not isinstance(text, str):
        raise DataError(
            f"{location}: content {format_value(given)} is no part of type text (with a "
            "'text'), image or "
            "image_url"
        )
    return split_at_marks(text, location)


def _parse_reasoning(turn: TrackedFields, location: str) -> dict[str, str]:
    """What an answer says that it was thought out by, for the base's chat template to read."""
    found = {name: turn.read_value(name) for name in THOUGHT_FIELDS if turn.has_value(name)}
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
