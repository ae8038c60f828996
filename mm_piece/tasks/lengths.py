"""Examples that are too long lose text, never image tokens."""

import sys
from dataclasses import replace
from typing import Any

from torch import Tensor

from mm_piece.errors import DataError
from mm_piece.tasks.encoding import count_tokens, encode, encode_prompt
from mm_piece.tasks.examples import Example, Message, text_of
from mm_piece.tasks.templates import conversation, prompt


def fitted(
    example: Example, processor: Any, max_length: int | None, generation: bool = False
) -> tuple[dict[str, Tensor], bool]:
    """Model inputs of at most `max_length` tokens, images included, and whether text was cut.

    The longest question loses its middle, since instructions stand at both ends; then the next one;
    answers lose their end last. For generation the last answer does not count. Raises DataError if
    the images alone are too long.
    """
    build = encode_prompt if generation else encode
    inputs = build(example, processor)
    excess = inputs["input_ids"].shape[1] - (max_length or sys.maxsize)
    if excess <= 0:
        return inputs, False
    room = _length(example, processor, generation) - excess
    for position in _order(example, generation):
        kept = _most_that_fits(example, processor, position, room, generation)
        example = _cut(example, position, max(kept, _least(example, position)))
        if kept >= _least(example, position):
            return build(example, processor), True
    raise DataError(
        f"{example.source} row {example.row}: max_length {max_length} leaves no room for its text"
    )


def _most_that_fits(
    example: Example, processor: Any, position: int, room: int, generation: bool
) -> int:
    """The most characters of a message's text with which the example fits; -1 if none do."""
    low, high = -1, len(text_of(example.messages[position]))
    while low < high:
        middle = (low + high + 1) // 2
        fits = _length(_cut(example, position, middle), processor, generation) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _length(example: Example, processor: Any, generation: bool) -> int:
    """Tokens of the example, an image counted as one."""
    text = prompt(example, processor) if generation else conversation(example, processor)[0]
    return count_tokens(text, processor)


def _order(example: Example, generation: bool) -> list[int]:
    """The messages that may lose text: questions before answers, the longest first."""
    found = range(len(example.messages) - generation)
    messages = example.messages
    return sorted(found, key=lambda n: (_is_answer(messages[n]), -len(text_of(messages[n]))))


def _cut(example: Example, position: int, keep: int) -> Example:
    """The example with `keep` characters of one message's text, images untouched."""
    message = example.messages[position]
    text = text_of(message)
    head = keep if _is_answer(message) else (keep + 1) // 2
    gone = range(head, head + len(text) - keep)
    messages = list(example.messages)
    messages[position] = {**message, "content": _without(message, gone)}
    return replace(example, messages=messages)


def _without(message: Message, gone: range) -> list[dict[str, str]]:
    """Typed content less the characters `gone` of all its text, counted through."""
    parts, start = [], 0
    for part in message["content"]:
        text = part.get("text")
        if text is None:
            parts.append(part)
            continue
        low, high = (min(max(edge - start, 0), len(text)) for edge in (gone.start, gone.stop))
        parts.append({**part, "text": text[:low] + text[high:]})
        start += len(text)
    return parts


def _least(example: Example, position: int) -> int:
    """The characters that must stay: an answer without any would teach to say nothing."""
    text = text_of(example.messages[position])
    return len(text) - len(text.lstrip()) + 1 if _is_answer(example.messages[position]) else 0


def _is_answer(message: Message) -> bool:
    return message["role"] == "assistant"
