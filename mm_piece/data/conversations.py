"""The turns of a conversation, whatever its style, as texts and images in order.

A turn is `{from, value}` (LLaVA, ShareGPT) or `{role, content}` (OpenAI, Hugging Face); its content
is a text with `<image>` marks, or a list of parts of type text, image or image_url. An answer may
say that it is not to be learned (`marks`), and have a text of reasoning.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mm_piece.data.fields import Fields, list_objects
from mm_piece.data.images import KEYS, Picture, image_in
from mm_piece.data.thoughts import THOUGHT_FIELDS
from mm_piece.data.turn_marks import is_learned
from mm_piece.errors import DataError, short

MARK = "<image>"
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bard", "bing"), "assistant"),
    "system": "system",
}
_TOOLS = ("tool", "tool_call", "tool_response", "function", "function_call", "observation")
_CALLS = ("tool_calls", "function_call")
_OTHER_MARKS = {"<video>": "videos are", "<audio>": "audio is"}
_OTHER_PARTS = {
    **dict.fromkeys(("video", "video_url", "input_video"), "videos are"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio is"),
}
Piece = str | Picture | None  # a text, an image of the turn's own, or the row's next image


class Turn(NamedTuple):
    """One turn: its role, its content, whether it is learned if it is an answer, its reasoning."""

    role: str
    content: list[Piece]
    learned: bool = True
    reasoning: Mapping[str, str] = {}


def turns_of(given: Any, folder: Path, where: str, row: Fields, name: str) -> list[Turn]:
    """The turns of a list of them in a row's field; image paths are relative to `folder`.

    Raises DataError, which begins with `where`, for an unknown role or kind of content.
    """
    listed = list_objects(given)
    if not isinstance(listed, list):
        raise DataError(f"{where}: a conversation must be a list of turns, not {short(given)}")
    return [_turn(turn, folder, where, row, name) for turn in listed]


def pieces(text: str, where: str) -> list[Piece]:
    """A text cut at its marks, each of which stands for the row's next image."""
    for mark, what in _OTHER_MARKS.items():
        if mark in text:
            raise refusal(what, f"the text holds {mark}", where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the text holds half a character (a lone surrogate)") from error
    first, *others = text.split(MARK)
    return [first, *(piece for other in others for piece in (None, other))]


def refusal(what: str, seen: str, where: str) -> DataError:
    """The error for what no row may have."""
    return DataError(f"{where}: {what} not supported: {seen}; allowed: text and images")


def _turn(given: Any, folder: Path, where: str, row: Fields, name: str) -> Turn:
    if not isinstance(given, Mapping):
        raise DataError(f"{where}: a turn must be an object, not {short(given)}")
    turn = row.inside(given, f"{name}[]")
    role = _role(turn, where)
    text = turn.choose("value", "content") or ("value" if "from" in turn.given else "content")
    return Turn(
        role,
        _content(turn, text, folder, where),
        is_learned(turn, role, where),
        _reasoning(turn, where) if role == "assistant" else {},
    )


def _role(turn: Fields, where: str) -> str:
    key = turn.choose("from", "role") or "role"
    role = str(turn.given.get(key)).lower()
    call = next((name for name in _CALLS if turn.holds(name)), None)
    if role in _TOOLS or call:
        raise refusal("tool turns are", f"it has {call!r}" if call else f"{key!r} is {role}", where)
    if role not in _ROLES:
        allowed, found = ", ".join(_ROLES), short(turn.given.get(key))
        raise DataError(f"{where}: a turn needs {key!r}, one of {allowed}; not {found}")
    return _ROLES[role]


def _content(turn: Fields, name: str, folder: Path, where: str) -> list[Piece]:
    given = list_objects(turn.given.get(name))
    if isinstance(given, list):  # typed content
        parts = (_part(part, folder, where, turn, name) for part in given)
        return [piece for part in parts for piece in part]
    if not isinstance(given, str):
        raise DataError(f"{where}: a turn needs a text {name!r}, not {short(given)}")
    return pieces(given, where)


def _part(given: Any, folder: Path, where: str, turn: Fields, name: str) -> list[Piece]:
    """The pieces of one part of typed content."""
    part = turn.inside(given if isinstance(given, Mapping) else {}, f"{name}[]")
    kind = part.take("type")
    if kind in _OTHER_PARTS:
        raise refusal(_OTHER_PARTS[kind], f"content of type {kind!r}", where)
    if kind in ("image", "image_url"):
        return [image_in(part, folder, where) if part.holds(*KEYS) else None]
    text = part.take("text")
    if kind != "text" or not isinstance(text, str):
        raise DataError(
            f"{where}: content {short(given)} is no part of type text (with a 'text'), image or "
            "image_url"
        )
    return pieces(text, where)


def _reasoning(turn: Fields, where: str) -> dict[str, str]:
    """What an answer says that it was thought out by, for the base's chat template to read."""
    found = {name: turn.take(name) for name in THOUGHT_FIELDS if turn.holds(name)}
    for name, text in found.items():
        if not isinstance(text, str):
            raise DataError(f"{where}: '{turn.path}{name}' must be a text, not {short(text)}")
        if len(pieces(text, where)) > 1:
            raise DataError(
                f"{where}: '{turn.path}{name}' holds {MARK}; images belong to questions"
            )
    return found
