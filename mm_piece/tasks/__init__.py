"""Data formats to chat messages to batches: what a task's rows become before a model sees them."""

from mm_piece.tasks.batching import WINDOW, Alike, batches, collate, digest_of, pictured
from mm_piece.tasks.encoded import Encoded
from mm_piece.tasks.encoding import IGNORED, encode, encode_prompt, token_ids
from mm_piece.tasks.examples import Example
from mm_piece.tasks.lengths import fitted
from mm_piece.tasks.reading import Rows, problems, read
from mm_piece.tasks.rendering import tokenizer_of

__all__ = [
    "IGNORED",
    "WINDOW",
    "Alike",
    "Encoded",
    "Example",
    "Rows",
    "batches",
    "collate",
    "digest_of",
    "encode",
    "encode_prompt",
    "fitted",
    "pictured",
    "problems",
    "read",
    "token_ids",
    "tokenizer_of",
]
