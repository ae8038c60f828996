"""From data formats to chat messages to batches: a task's rows, up to what a model takes.

sources            where rows lie: arrow (arrow_features), json_csv, image_folder, scenes/
row_formats        a row of any format as an example: fields, question_pairs, conversations
                   (turn_marks, thoughts), images
example            one row, the same for every format
dataset            `read`: the examples of a source; absent_columns, absent_images: what is wrong
                   with all of its rows
processor          what is asked of a base's processor and its tokenizer
chat_template      the base's template; prompts: the text before and after each answer
encoding           an example as tokens and labels; expansion, special_tokens, answers
truncation         examples of a maximum length
encoded_dataset    encoded examples on disk
collation          batches
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mm_piece.data.collation import (
        MAX_WINDOW_SIZE,
        EncodedExamples,
        EncodedList,
        ExamplesDigest,
        LengthGroupedBatches,
        collate,
        has_image,
        iter_batches,
    )
    from mm_piece.data.dataset import (
        ExampleDataset,
        find_absent_columns,
        iter_problems,
        open_examples,
        read,
        require_sound_rows,
    )
    from mm_piece.data.encoded_dataset import EncodedDataset
    from mm_piece.data.encoding import IGNORE_INDEX, encode, encode_prompt, token_ids_of
    from mm_piece.data.example import Example
    from mm_piece.data.processor import Processor, pad_token_of, tokenizer_of
    from mm_piece.data.truncation import encode_truncated

# Imported on first use, so that rows are read without torch.
_HOMES = {
    "EncodedDataset": "encoded_dataset",
    "EncodedExamples": "collation",
    "EncodedList": "collation",
    "Example": "example",
    "ExampleDataset": "dataset",
    "ExamplesDigest": "collation",
    "IGNORE_INDEX": "encoding",
    "LengthGroupedBatches": "collation",
    "MAX_WINDOW_SIZE": "collation",
    "Processor": "processor",
    "collate": "collation",
    "encode": "encoding",
    "encode_prompt": "encoding",
    "encode_truncated": "truncation",
    "has_image": "collation",
    "iter_batches": "collation",
    "find_absent_columns": "dataset",
    "iter_problems": "dataset",
    "open_examples": "dataset",
    "require_sound_rows": "dataset",
    "pad_token_of": "processor",
    "read": "dataset",
    "token_ids_of": "encoding",
    "tokenizer_of": "processor",
}

__all__ = [
    "IGNORE_INDEX",
    "MAX_WINDOW_SIZE",
    "LengthGroupedBatches",
    "EncodedDataset",
    "EncodedExamples",
    "EncodedList",
    "Example",
    "ExampleDataset",
    "ExamplesDigest",
    "Processor",
    "iter_batches",
    "collate",
    "encode",
    "encode_prompt",
    "encode_truncated",
    "has_image",
    "find_absent_columns",
    "iter_problems",
    "open_examples",
    "require_sound_rows",
    "pad_token_of",
    "read",
    "token_ids_of",
    "tokenizer_of",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"mm_piece.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mm_piece.data' has no attribute {name!r}")
