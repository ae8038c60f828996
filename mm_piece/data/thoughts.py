"""Thoughts before an answer: in a field of their own, or between tags at the start of its text."""

import re
from typing import Any

from mm_piece.data.example import Message, text_of

THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")  # what rows and templates call them
OPEN_TAG, CLOSE_TAG = "<think>", "</think>"
# The opening tag may be missing: some templates write it into the prompt.
_TAGGED_TEXT = re.compile(rf"(\s*(?:{OPEN_TAG})?\s*)(.*?)(\s*{CLOSE_TAG}\s*)(.*)", re.DOTALL)
_TRAILING_TAGS = re.compile(rf"{OPEN_TAG}\s*({CLOSE_TAG}\s*)?$")


def split_thoughts(message: Message) -> tuple[str, str]:
    """The thoughts of an answer, and what it says after them."""
    text = text_of(message)
    for name in THOUGHT_FIELDS:
        if message.get(name):
            return message[name], text
    tagged = _TAGGED_TEXT.fullmatch(text)
    return (tagged[2], tagged[4]) if tagged else ("", text)


def has_tagged_thoughts(message: Message) -> bool:
    """Whether an answer's own text holds thoughts, if empty ones."""
    return not any(message.get(name) for name in THOUGHT_FIELDS) and bool(
        _TAGGED_TEXT.fullmatch(text_of(message))
    )


def move_thoughts_to_field(message: Message) -> Message:
    """The answer with its thoughts in the field that templates read, not in its text."""
    thoughts, answer_text = split_thoughts(message)
    return {
        **message,
        THOUGHT_FIELDS[0]: thoughts,
        "content": [{"type": "text", "text": answer_text}],
    }


def find_trailing_tags(prompt: str) -> str:
    """The tags of thoughts that a prompt ends with: none, an open one, or an empty pair."""
    tags = _TRAILING_TAGS.search(prompt)
    return tags[0] if tags else ""


def truncate_answer(message: Message, max_chars: int) -> Message:
    """The answer with at most `most` characters of its thoughts and of what it says, their first.

    Neither loses all: an answer without any character would teach to say nothing.
    """
    fields: dict[str, Any] = {
        n: _truncate_text(message[n], max_chars) for n in THOUGHT_FIELDS if message.get(n)
    }
    tagged = _TAGGED_TEXT.fullmatch(text_of(message)) if not fields else None
    before, answer_text = "", text_of(message)
    if tagged:
        before, answer_text = (
            tagged[1] + _truncate_text(tagged[2], max_chars) + tagged[3],
            tagged[4],
        )
    text = before + _truncate_text(answer_text, max_chars)
    return {**message, **fields, "content": [{"type": "text", "text": text}]}


def _truncate_text(text: str, max_chars: int) -> str:
    """At most so many characters of a text, and at least one that is no blank."""
    return text[: max(max_chars, len(text) - len(text.lstrip()) + 1)]


def remove_whitespace(text: str) -> str:
    """A text without its blanks, of which templates add and strip some."""
    return "".join(text.split())
