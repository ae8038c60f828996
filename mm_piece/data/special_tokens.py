"""The special tokens of a base: those that end an answer, those that stand for an image."""

from collections.abc import Iterable

from mm_piece.data.example import Example, all_text_of
from mm_piece.data.processor import Processor, Tokenizer, tokenizer_of
from mm_piece.errors import DataError

# Attributes of a processor, and names of special tokens of its tokenizer; none has all.
_VISUAL_ATTRIBUTES = (
    "image_token",
    "video_token",
    "vision_start_token",
    "vision_end_token",
    "start_image_token",
    "end_image_token",
    "context_image_token",
    "boi_token",
    "eoi_token",
    "image_break_token",
    "image_end_token",
    "fake_image_token",
    "global_image_tag",
    "global_image_token",
)


def list_special_tokens(tokenizer: Tokenizer) -> list[str]:
    """Return the special tokens of a tokenizer, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    contents = [token.content for token in added if token.special]
    # one may begin another: a search must meet the longer one first
    return sorted(contents, key=len, reverse=True)


def remove_special_tokens(text: str, tokenizer: Tokenizer) -> str:
    """Return a text without the special tokens in it, and without outer whitespace."""
    for token in list_special_tokens(tokenizer):
        text = text.replace(token, "")
    return text.strip()


def has_special_token(example: Example, processor: Processor) -> bool:
    """Return whether the tokenizer would read a special token in a text of an example."""
    tokens = list_special_tokens(tokenizer_of(processor))
    for message in example.messages:
        text = all_text_of(message)
        if any(token in text for token in tokens):
            return True
    return False


def require_no_visual_tokens(example: Example, processor: Processor) -> None:
    """Raise DataError if a text holds a token that the base reads as an image."""
    for message in example.messages:
        text = all_text_of(message)
        token = find_visual_token(text, processor)
        if token:
            raise DataError(
                f"{example.source} row {example.row}: the text holds {token!r}, which the "
                "base reads as an image"
            )


def find_visual_token(text: str, processor: Processor) -> str:
    """Return the first token that a text holds and the base reads as an image; "" if none."""
    for token in list_visual_tokens(processor):
        if token in text:
            return token
    return ""


def list_end_tokens(processor: Processor) -> list[str]:
    """Return the special tokens that may end an answer, the longest first.

    Tokens of images end none, nor does one that only begins texts.
    """
    tokenizer = tokenizer_of(processor)
    excluded: list[str | None] = [*list_visual_tokens(processor)]
    # some bases begin and end a text with the same token
    if tokenizer.bos_token != tokenizer.eos_token:
        excluded.append(tokenizer.bos_token)
    return [token for token in list_special_tokens(tokenizer) if token not in excluded]


def list_visual_tokens(processor: Processor) -> list[str]:
    """Return the tokens that stand for images and videos, or around them."""
    named = [*vars(processor).items()]
    named += tokenizer_of(processor).special_tokens_map.items()

    tokens = []
    for name, value in named:
        if name in _VISUAL_ATTRIBUTES and value:
            tokens.append(value)
    # a token may have several names
    return list(dict.fromkeys(tokens))


def find_leading_token(text: str, tokens: Iterable[str]) -> str:
    """Return the first of some tokens that a text begins with; "" if none."""
    for token in tokens:
        if text.startswith(token):
            return token
    return ""


def find_trailing_token(text: str, tokenizer: Tokenizer) -> str:
    """Return the special token that a text ends with; "" if none."""
    for token in list_special_tokens(tokenizer):
        if text.endswith(token):
            return token
    return ""
