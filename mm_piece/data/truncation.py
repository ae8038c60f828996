"""Model inputs of a maximum length: examples that are too long lose text, never image tokens."""

import sys
from dataclasses import replace

from torch import Tensor

from mm_piece.data.encoding import encode, encode_prompt, token_ids_of
from mm_piece.data.example import Example, Message, text_of
from mm_piece.data.processor import Processor
from mm_piece.data.thoughts import split_thoughts, truncate_answer
from mm_piece.errors import DataError


def encode_truncated(
    example: Example,
    processor: Processor,
    max_length: int | None,
    generation: bool = False,
) -> tuple[dict[str, Tensor], bool]:
    """Return model inputs of at most `max_length` tokens, and whether they lost text to it.

    Images count with all of their tokens.
    All texts are truncated to one number of characters: questions in their middle, since
    instructions stand at both ends, answers and their thoughts at their end. For generation the
    last answer does not count. Raises DataError if the images alone are too long.
    """
    build = encode_prompt if generation else encode
    inputs = build(example, processor)
    length = inputs["input_ids"].shape[1]
    excess = length - (max_length or sys.maxsize)
    if excess <= 0:
        return inputs, False

    # images keep their tokens: the text has to lose the whole excess
    num_tokens = len(token_ids_of(example, processor, generation))
    max_chars = _find_max_chars(example, processor, generation, num_tokens - excess)
    if max_chars < 0:
        raise DataError(
            f"{example.source} row {example.row}: max_length {max_length} leaves no room for text"
        )
    truncated = _truncate_example(example, max_chars)
    return build(truncated, processor), True


def _find_max_chars(
    example: Example,
    processor: Processor,
    generation: bool,
    max_tokens: int,
) -> int:
    """Return the most characters a text with which an example has at most `max_tokens` tokens.

    An image counts as one token. Returns -1 if no number of characters fits.
    """
    # bisection: more characters never make fewer tokens, up to a token at the edge
    low = -1
    high = max(map(_count_longest_text, example.messages))
    while low < high:
        middle = (low + high + 1) // 2
        truncated = _truncate_example(example, middle)
        num_tokens = len(token_ids_of(truncated, processor, generation))
        if num_tokens <= max_tokens:
            low = middle
        else:
            high = middle - 1
    return low


def _truncate_example(example: Example, max_chars: int) -> Example:
    """Return the example with at most `max_chars` characters in each text, images untouched."""
    messages = []
    for message in example.messages:
        truncated = _truncate_message(message, max_chars)
        messages.append(truncated)
    return replace(example, messages=messages)


def _count_longest_text(message: Message) -> int:
    """Return the characters of a message's longest text; an answer may have thoughts beside it."""
    texts = [*split_thoughts(message), text_of(message)]
    return max(map(len, texts))


def _truncate_message(message: Message, max_chars: int) -> Message:
    if message["role"] == "assistant":
        return truncate_answer(message, max_chars)

    length = len(text_of(message))
    num_kept = min(max(max_chars, 0), length)
    num_removed = length - num_kept
    start = (num_kept + 1) // 2  # the beginning gets the odd character
    removed = range(start, start + num_removed)
    content = _remove_characters(message, removed)
    return {**message, "content": content}


def _remove_characters(message: Message, removed: range) -> list[dict[str, str]]:
    """Return typed content without a range of the characters of its texts.

    The characters are numbered through all texts of the message.
    """
    parts = []
    start = 0  # number of this text's first character
    for content_part in message["content"]:
        text = content_part.get("text")
        if text is None:
            parts.append(content_part)
            continue

        # the range may begin or end in other texts: slices end with this one by themselves
        low = max(removed.start - start, 0)
        high = max(removed.stop - start, 0)
        remaining = text[:low] + text[high:]
        parts.append({**content_part, "text": remaining})
        start += len(text)
    return parts
