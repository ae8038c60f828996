"""Reasoning that rows give with their answers and a base's chat template leaves out."""

from dataclasses import replace
from typing import Any

from mm_piece.tasks.examples import Example
from mm_piece.tasks.templates import conversation, prompt
from mm_piece.tasks.turns import REASONING


def left_out(example: Example, processor: Any, generation: bool = False) -> set[str]:
    """The fields of turns with reasoning that change nothing in the text that the base sees.

    For generation the last answer does not count.
    """
    whole = _text(example, processor, generation)
    turns = example.messages[:-1] if generation else example.messages
    found: set[str] = set()
    for position, message in enumerate(turns):
        for name in REASONING:
            if name in message:
                without = _without(example, position, name)
                found |= {name} if _text(without, processor, generation) == whole else set()
    return found


def _text(example: Example, processor: Any, generation: bool) -> str:
    return prompt(example, processor) if generation else conversation(example, processor)[0]


def _without(example: Example, position: int, name: str) -> Example:
    messages = list(example.messages)
    messages[position] = {key: value for key, value in messages[position].items() if key != name}
    return replace(example, messages=messages)
