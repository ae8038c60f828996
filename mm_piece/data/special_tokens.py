"""The special tokens of a base: those that end an answer, those that stand for an image."""

from collections.abc import Iterable
from typing import Any

from mm_piece.data.chat_template import tokenizer_of
from mm_piece.data.example import Example, all_text_of
from mm_piece.errors import DataError

_VISUAL_ATTRIBUTES = ("image_token", "video_token", "vision_start_token", "vision_end_token")


def list_special_tokens(tokenizer: Any) -> list[str]:
    """The special tokens of a tokenizer, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    return sorted((token.content for token in added if token.special), key=len, reverse=True)


def remove_special_tokens(text: str, tokenizer: Any) -> str:
    """A text without the special tokens in it."""
    for token in list_special_tokens(tokenizer):
        text = text.replace(token, "")
    return text.strip()


def has_special_token(example: Example, processor: Any) -> bool:
    """Whether a text of an example holds what the tokenizer reads as a special token."""
    tokens = list_special_tokens(tokenizer_of(processor))
    texts = [all_text_of(message) for message in example.messages]
    return any(token in text for text in texts for token in tokens)


def require_no_visual_tokens(example: Example, processor: Any) -> None:
    """Raise DataError if a text holds a token that the base reads as an image."""
    for message in example.messages:
        if token := find_visual_token(all_text_of(message), processor):
            raise DataError(
                f"{example.source} row {example.row}: the text holds {token!r}, which the "
                "base reads as an image"
            )


def find_visual_token(text: str, processor: Any) -> str:
    """The first token in a text that the base reads as an image, or nothing."""
    return next((token for token in list_visual_tokens(processor) if token in text), "")


def list_end_tokens(processor: Any) -> list[str]:
    """The special tokens that may end an answer: no images, and none that only begins texts."""
    tokenizer = tokenizer_of(processor)
    begins = {tokenizer.bos_token} - {tokenizer.eos_token}
    return [
        t
        for t in list_special_tokens(tokenizer)
        if t not in begins and t not in list_visual_tokens(processor)
    ]


def list_visual_tokens(processor: Any) -> list[str]:
    """The tokens that stand for images and videos, or around them."""
    return [value for key, value in vars(processor).items() if key in _VISUAL_ATTRIBUTES and value]


def find_leading_token(text: str, tokens: Iterable[str]) -> str:
    """The special token that a text begins with, or nothing."""
    return next((token for token in tokens if text.startswith(token)), "")


def find_trailing_token(text: str, tokenizer: Any) -> str:
    """The special token that a text ends with, or nothing."""
    return next((token for token in list_special_tokens(tokenizer) if text.endswith(token)), "")
