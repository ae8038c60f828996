"""Which turns of a conversation are to be learned, by the marks that formats put on them.

`loss`, `loss_scale` (ms-swift, XTuner), `weight` (OpenAI, Mistral, axolotl), `train`, `training`
(axolotl), `train_on_turn`, `trainable` and `loss_mask` are 1 or true for a turn that is learned,
`masked` (torchtune) is for one that is not.
"""

from typing import Any

from mm_piece.data.fields import TrackedFields
from mm_piece.errors import DataError, format_value

_TRAINED_MARKS = (
    *("loss", "loss_scale", "loss_weight", "loss_mask"),
    *("weight", "train", "training", "train_on_turn", "trainable"),
)
_UNTRAINED_MARKS = ("masked",)
_TURN_MARKS = frozenset((*_TRAINED_MARKS, *_UNTRAINED_MARKS))
_UNCLEAR_MARKS = {
    "mask": "formats disagree on what it means; say `loss`",
    **dict.fromkeys(("train_detail", "training_detail"), "a turn is learned as a whole or not"),
}


def is_trained_turn(turn: TrackedFields, role: str, location: str) -> bool:
    """Whether an answer is to be learned; a question never is, and a mark that asks is not read.

    Raises DataError for a weight between 0 and 1, marks that disagree and marks of no clear sense.
    """
    marks = [name for name in turn.raw_values if name in _TURN_MARKS and turn.has_value(name)]
    if role != "assistant":
        for name in marks:
            if _parse_mark(name, turn.raw_values[name], turn.path, location) is False:
                turn.read_value(name)
        return False

    for name, why in _UNCLEAR_MARKS.items():
        if turn.has_value(name):
            raise DataError(f"{location}: '{turn.path}{name}' is not supported: {why}")

    verdicts = {
        name: _parse_mark(name, turn.read_value(name), turn.path, location) for name in marks
    }
    if len(set(verdicts.values())) > 1:
        raise DataError(f"{location}: {' and '.join(map(repr, verdicts))} of a turn disagree")
    return False not in verdicts.values()


def _parse_mark(name: str, value: Any, path: str, location: str) -> bool:
    """Whether a mark says that its turn is to be learned."""
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise DataError(
            f"{location}: '{path}{name}' is {format_value(value)}: a turn is learned (1, true) "
            "or not "
            "(0, false); weights in between are not supported"
        )
    return bool(value) is not (name in _UNTRAINED_MARKS)
