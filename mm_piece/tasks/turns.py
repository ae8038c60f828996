"""The turns of a conversation, whatever its style, as texts and images in order.

A turn is `{from, value}` (LLaVA, ShareGPT) or `{role, content}` (OpenAI, Hugging Face); its content
is a text with `<image>` marks, or a list of parts of type text, image or image_url.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_piece.errors import DataError, short
from mm_piece.tasks.inline import image_of, names_image
from mm_piece.tasks.pictures import Picture

MARK = "<image>"
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bard", "bing"), "assistant"),
    "system": "system",
}
_TOOLS = ("tool", "tool_call", "tool_response", "function", "function_call", "observation")
_OTHER_MARKS = {"<video>": "videos are", "<audio>": "audio is"}
_OTHER_PARTS = {
    **dict.fromkeys(("video", "video_url", "input_video"), "videos are"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio is"),
}
Piece = str | Picture | None  # a text, an image of the turn's own, or the row's next image
Turn = tuple[str, list[Piece]]  # role and content


def turns_of(given: Any, folder: Path, where: str) -> list[Turn]:
    """The turns of a list of them; image paths in them are relative to `folder`.

    Raises DataError, which begins with `where`, for an unknown role or kind of content.
    """
    if isinstance(given, Mapping):  # lists side by side, as Arrow may keep a list of objects
        columns = given.values()
        given = [dict(zip(given, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(given, list):
        raise DataError(f"{where}: a conversation must be a list of turns, not {short(given)}")
    return [_turn(turn, folder, where) for turn in given]


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


def _turn(turn: Any, folder: Path, where: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where}: a turn must be an object, not {short(turn)}")
    key, text = ("from", "value") if turn.get("from") is not None else ("role", "content")
    role = str(turn.get(key)).lower()
    if role in _TOOLS or turn.get("tool_calls"):
        seen = "it has 'tool_calls'" if turn.get("tool_calls") else f"{key!r} is {role}"
        raise refusal("tool turns are", seen, where)
    if role not in _ROLES:
        allowed = ", ".join(_ROLES)
        raise DataError(
            f"{where}: a turn needs {key!r}, one of {allowed}; not {short(turn.get(key))}"
        )
    given = turn.get(text)
    if isinstance(given, list):  # typed content
        return _ROLES[role], [piece for part in given for piece in _part(part, folder, where)]
    if not isinstance(given, str):
        raise DataError(f"{where}: a turn needs a text {text!r}, not {short(given)}")
    return _ROLES[role], pieces(given, where)


def _part(part: Any, folder: Path, where: str) -> list[Piece]:
    """The pieces of one part of typed content."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _OTHER_PARTS:
        raise refusal(_OTHER_PARTS[kind], f"content of type {kind!r}", where)
    if kind in ("image", "image_url"):
        return [image_of(part, folder, where) if names_image(part) else None]
    if kind != "text" or not isinstance(part.get("text"), str):
        raise DataError(
            f"{where}: content {short(part)} is no part of type text (with a 'text'), image or "
            "image_url"
        )
    return pieces(part["text"], where)
