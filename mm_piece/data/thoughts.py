"""Thoughts before an answer: in a field of their own, or between tags at the start of its text."""

import re
from typing import Any

from mm_piece.data.example import Message, text_of

THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")  # what rows and templates call them
OPEN, CLOSE = "<think>", "</think>"
# The opening tag may be missing: some templates write it into the prompt.
_TAGGED = re.compile(rf"(\s*(?:{OPEN})?\s*)(.*?)(\s*{CLOSE}\s*)(.*)", re.DOTALL)
_ASKED = re.compile(rf"{OPEN}\s*({CLOSE}\s*)?$")


def thoughts_of(message: Message) -> tuple[str, str]:
    """The thoughts of an answer, and what it says after them."""
    text = text_of(message)
    for name in THOUGHT_FIELDS:
        if message.get(name):
            return message[name], text
    tagged = _TAGGED.fullmatch(text)
    return (tagged[2], tagged[4]) if tagged else ("", text)


def is_tagged(message: Message) -> bool:
    """Whether an answer's own text holds thoughts, if empty ones."""
    return not any(message.get(name) for name in THOUGHT_FIELDS) and bool(
        _TAGGED.fullmatch(text_of(message))
    )


def with_thoughts_apart(message: Message) -> Message:
    """The answer with its thoughts in the field that templates read, not in its text."""
    thoughts, said = thoughts_of(message)
    return {**message, THOUGHT_FIELDS[0]: thoughts, "content": [{"type": "text", "text": said}]}


def thought_asked(prompt: str) -> str:
    """The tags of thoughts that a prompt ends with: none, an open one, or an empty pair."""
    tags = _ASKED.search(prompt)
    return tags[0] if tags else ""


def shortened(message: Message, most: int) -> Message:
    """The answer with at most `most` characters of its thoughts and of what it says, their first.

    Neither loses all: an answer without any character would teach to say nothing.
    """
    fields: dict[str, Any] = {n: _first(message[n], most) for n in THOUGHT_FIELDS if message.get(n)}
    tagged = _TAGGED.fullmatch(text_of(message)) if not fields else None
    before, said = "", text_of(message)
    if tagged:
        before, said = tagged[1] + _first(tagged[2], most) + tagged[3], tagged[4]
    text = before + _first(said, most)
    return {**message, **fields, "content": [{"type": "text", "text": text}]}


def _first(text: str, most: int) -> str:
    """At most so many characters of a text, and at least one that is no blank."""
    return text[: max(most, len(text) - len(text.lstrip()) + 1)]


def squeezed(text: str) -> str:
    """A text without its blanks, of which templates add and strip some."""
    return "".join(text.split())
