"""Which turns of a conversation are to be learned, by the marks that formats put on them.

`loss`, `loss_scale` (ms-swift, XTuner), `weight` (OpenAI, Mistral, axolotl), `train`, `training`
(axolotl), `train_on_turn`, `trainable` and `loss_mask` are 1 or true for a turn that is learned,
`masked` (torchtune) is for one that is not.
"""

from typing import Any

from mm_piece.data.fields import Fields
from mm_piece.errors import DataError, short

_LEARNED = (
    *("loss", "loss_scale", "loss_weight", "loss_mask"),
    *("weight", "train", "training", "train_on_turn", "trainable"),
)
_NOT_LEARNED = ("masked",)
_MARKS = frozenset((*_LEARNED, *_NOT_LEARNED))
_UNCLEAR = {
    "mask": "formats disagree on what it means; say `loss`",
    **dict.fromkeys(("train_detail", "training_detail"), "a turn is learned as a whole or not"),
}


def is_learned(turn: Fields, role: str, where: str) -> bool:
    """Whether an answer is to be learned; a question never is, and a mark that asks is not read.

    Raises DataError for a weight between 0 and 1, marks that disagree and marks of no clear sense.
    """
    marks = [name for name in turn.given if name in _MARKS and turn.holds(name)]
    if role != "assistant":
        for name in marks:
            if _says(name, turn.given[name], turn.path, where) is False:
                turn.take(name)
        return False

    for name, why in _UNCLEAR.items():
        if turn.holds(name):
            raise DataError(f"{where}: '{turn.path}{name}' is not supported: {why}")

    said = {name: _says(name, turn.take(name), turn.path, where) for name in marks}
    if len(set(said.values())) > 1:
        raise DataError(f"{where}: {' and '.join(map(repr, said))} of a turn disagree")
    return False not in said.values()


def _says(name: str, value: Any, path: str, where: str) -> bool:
    """Whether a mark says that its turn is to be learned."""
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise DataError(
            f"{where}: '{path}{name}' is {short(value)}: a turn is learned (1, true) or not "
            "(0, false); weights in between are not supported"
        )
    return bool(value) is not (name in _NOT_LEARNED)
