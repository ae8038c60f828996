"""Data formats to chat messages to batches: what a task's rows become before a model sees them."""

from mm_piece.tasks.encoding import (
    IGNORED,
    batches,
    collate,
    digest_of,
    encode,
    encode_prompt,
    tokenizer_of,
)
from mm_piece.tasks.formats import Example, read

__all__ = [
    "IGNORED",
    "Example",
    "batches",
    "collate",
    "digest_of",
    "encode",
    "encode_prompt",
    "read",
    "tokenizer_of",
]
