"""Data formats to chat messages to batches: what a task's rows become before a model sees them.

sources            where rows lie: arrow (arrow_features), json_csv, image_folder, scenes/
row_formats        a row of any format as an example: fields, question_pairs, conversations
                   (turn_marks, thoughts), images
example            one row as every format gives it
dataset            `read`: the examples of a source
chat_template      the base's template; prompts: what it writes before and behind each answer
encoding           an example as tokens and labels; special_tokens, answers
truncation         what is too long, cut to its maximum
encoded_dataset    encoded examples on disk
collation          batches
"""

from mm_piece.data.chat_template import tokenizer_of
from mm_piece.data.collation import WINDOW, Alike, batches, collate, digest_of, pictured
from mm_piece.data.dataset import Rows, problems, read
from mm_piece.data.encoded_dataset import Encoded
from mm_piece.data.encoding import IGNORED, encode, encode_prompt, token_ids
from mm_piece.data.example import Example
from mm_piece.data.truncation import fitted

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
