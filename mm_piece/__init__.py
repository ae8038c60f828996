"""Teach a vision-language model a sequence of tasks without forgetting: one delta per task."""

from importlib import import_module
from typing import TYPE_CHECKING

from mm_piece.threads import prefer_passive_waiting

if TYPE_CHECKING:
    from mm_piece.deltas.delta import Delta
    from mm_piece.errors import PieceError
    from mm_piece.evaluation.answers import evaluate
    from mm_piece.importance import estimate
    from mm_piece.selection import select
    from mm_piece.sparse.tuning import sparse_tuning
    from mm_piece.store.attachment import attach, checkout, position
    from mm_piece.store.delta_store import DeltaStore
    from mm_piece.store.deriving import extract
    from mm_piece.store.exporting import export
    from mm_piece.store.loading import load
    from mm_piece.store.sharing import pull, push
    from mm_piece.store.squashing import squash
    from mm_piece.training.loop import train

# Imported on first use, so that `import mm_piece` and `mm-piece --help` do not wait for torch.
_HOMES = {
    "Delta": "deltas.delta",
    "DeltaStore": "store.delta_store",
    "PieceError": "errors",
    "attach": "store.attachment",
    "checkout": "store.attachment",
    "estimate": "importance",
    "evaluate": "evaluation.answers",
    "export": "store.exporting",
    "extract": "store.deriving",
    "load": "store.loading",
    "position": "store.attachment",
    "pull": "store.sharing",
    "push": "store.sharing",
    "select": "selection",
    "sparse_tuning": "sparse.tuning",
    "squash": "store.squashing",
    "train": "training.loop",
}

__all__ = [
    "Delta",
    "DeltaStore",
    "PieceError",
    "attach",
    "checkout",
    "estimate",
    "evaluate",
    "export",
    "extract",
    "load",
    "position",
    "pull",
    "push",
    "select",
    "sparse_tuning",
    "squash",
    "train",
]


def __getattr__(name: str) -> object:
    if name == "train":
        prefer_passive_waiting()  # before torch is imported
    if name in _HOMES:
        return getattr(import_module(f"mm_piece.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mm_piece' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names too, of which none may have been imported yet."""
    return sorted({*globals(), *__all__})
