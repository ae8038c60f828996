"""Thoughts before an answer: in a field of their own, or between tags at the start of its text."""

import re
from typing import Any

from mm_piece.data.example import Message, text_of

# The names that rows and templates give the field; the first is the one that templates read.
THOUGHT_FIELDS = (
    "reasoning_content",
    "reasoning",
    "thinking",
)
OPEN_TAG = "<think>"
CLOSE_TAG = "</think>"
# Groups: opening, thoughts, closing, answer. The opening tag may be missing: some templates write
# it into the prompt.
_TAGGED_TEXT = re.compile(rf"(\s*(?:{OPEN_TAG})?\s*)(.*?)(\s*{CLOSE_TAG}\s*)(.*)", re.DOTALL)
# At the end of a prompt; an empty pair asks for an answer without thoughts.
_TRAILING_TAGS = re.compile(rf"{OPEN_TAG}\s*({CLOSE_TAG}\s*)?$")


def split_thoughts(message: Message) -> tuple[str, str]:
    """Return the thoughts of an answer, and the text after them."""
    text = text_of(message)
    for name in THOUGHT_FIELDS:
        if message.get(name):
            return message[name], text

    tagged = _TAGGED_TEXT.fullmatch(text)
    if not tagged:
        return "", text
    thoughts = tagged[2]
    answer_text = tagged[4]
    return thoughts, answer_text


def has_tagged_thoughts(message: Message) -> bool:
    """Return whether an answer's own text holds thoughts, even empty ones."""
    for name in THOUGHT_FIELDS:
        if message.get(name):
            return False

    text = text_of(message)
    return _TAGGED_TEXT.fullmatch(text) is not None


def move_thoughts_to_field(message: Message) -> Message:
    """Return the answer with its thoughts in the field that templates read, not in its text."""
    thoughts, answer_text = split_thoughts(message)
    return {
        **message,
        THOUGHT_FIELDS[0]: thoughts,
        "content": [{"type": "text", "text": answer_text}],
    }


def find_trailing_tags(prompt: str) -> str:
    """Return the tags of thoughts that a prompt ends with: none, an open one, or an empty pair."""
    tags = _TRAILING_TAGS.search(prompt)
    if not tags:
        return ""
    return tags[0]


def truncate_answer(message: Message, max_chars: int) -> Message:
    """Return the answer with at most `max_chars` characters of its thoughts and of its text.

    Both keep their beginnings. Neither loses everything: an empty answer would train the model to
    say nothing.
    """
    fields: dict[str, Any] = {}
    for name in THOUGHT_FIELDS:
        if message.get(name):
            fields[name] = _truncate_text(message[name], max_chars)

    before = ""
    answer_text = text_of(message)
    tagged = _TAGGED_TEXT.fullmatch(answer_text)
    if tagged and not fields:  # with thoughts in a field, tags are mere text
        opening, thoughts, closing, answer_text = tagged.groups()
        before = opening + _truncate_text(thoughts, max_chars) + closing

    text = before + _truncate_text(answer_text, max_chars)
    content = [{"type": "text", "text": text}]
    return {**message, **fields, "content": content}


def remove_whitespace(text: str) -> str:
    """Return a text without its whitespace, of which templates add and strip some."""
    return "".join(text.split())


def _truncate_text(text: str, max_chars: int) -> str:
    """Return at most `max_chars` characters of a text, and at least one that is no whitespace."""
    # one character more than the leading whitespace
    num_leading = len(text) - len(text.lstrip())
    return text[: max(max_chars, num_leading + 1)]
