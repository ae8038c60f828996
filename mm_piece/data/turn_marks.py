"""Which turns of a conversation are to be learned, by the marks that formats put on them.

A mark is a field of a turn. `loss`, `loss_scale` (ms-swift, XTuner), `weight` (OpenAI, Mistral,
axolotl), `train`, `training` (axolotl), `train_on_turn`, `trainable` and `loss_mask` are 1 or true
for a turn that is learned; `masked` (torchtune) is so for one that is not.
"""

from typing import Any

from mm_piece.data.fields import TrackedFields
from mm_piece.errors import DataError, format_value

_TRAINED_MARKS = (
    "loss",
    "loss_scale",
    "loss_weight",
    "loss_mask",
    "weight",
    "train",
    "training",
    "train_on_turn",
    "trainable",
)
_UNTRAINED_MARKS = ("masked",)
_TURN_MARKS = frozenset((*_TRAINED_MARKS, *_UNTRAINED_MARKS))
_UNCLEAR_MARKS = {
    "mask": "formats disagree on what it means; say `loss`",
    "train_detail": "a turn is learned as a whole or not",
    "training_detail": "a turn is learned as a whole or not",
}


def is_trained_turn(turn: TrackedFields, role: str, location: str) -> bool:
    """Return whether an answer is to be learned; a question never is.

    Raises DataError for a weight between 0 and 1, marks that disagree and marks of no clear sense.
    """
    marks = [name for name in turn.raw_values if name in _TURN_MARKS and turn.has_value(name)]
    if role != "assistant":
        for name in marks:
            value = turn.raw_values[name]
            # a mark to learn a question stays unread: the user is to hear that nothing reads it
            if not _parse_mark(name, value, turn.path, location):
                turn.read_value(name)
        return False

    # before the others: no verdict is safe beside such a mark
    for name, why in _UNCLEAR_MARKS.items():
        if turn.has_value(name):
            raise DataError(f"{location}: '{turn.path}{name}' is not supported: {why}")

    verdicts = set()
    for name in marks:
        value = turn.read_value(name)
        verdict = _parse_mark(name, value, turn.path, location)
        verdicts.add(verdict)
    if len(verdicts) > 1:
        shown = " and ".join(map(repr, marks))
        raise DataError(f"{location}: {shown} of a turn disagree")
    return False not in verdicts  # without marks, an answer is learned


def _parse_mark(
    name: str,
    value: Any,
    path: str,
    location: str,
) -> bool:
    """Return whether a mark says that its turn is to be learned."""
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise DataError(
            f"{location}: '{path}{name}' is {format_value(value)}: a turn is learned (1, true) "
            "or not (0, false); weights in between are not supported"
        )

    is_set = bool(value)
    if name in _UNTRAINED_MARKS:
        return not is_set
    return is_set
