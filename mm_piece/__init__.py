"""Teach a vision-language model a sequence of tasks without forgetting: one delta per task."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm_piece.attachment import attach, checkout, position
    from mm_piece.delta import Delta
    from mm_piece.derive import extract, squash
    from mm_piece.errors import PieceError
    from mm_piece.evaluation import evaluate
    from mm_piece.exporting import export
    from mm_piece.importance import estimate
    from mm_piece.loading import load
    from mm_piece.mask import select
    from mm_piece.sharing import pull, push
    from mm_piece.sparse import sparse_tuning
    from mm_piece.store import DeltaStore
    from mm_piece.training import train

# Imported on first use, so that `import mm_piece` and `mm-piece --help` do not wait for torch.
_HOMES = {
    "Delta": "delta",
    "DeltaStore": "store",
    "PieceError": "errors",
    "attach": "attachment",
    "checkout": "attachment",
    "estimate": "importance",
    "evaluate": "evaluation",
    "export": "exporting",
    "extract": "derive",
    "load": "loading",
    "position": "attachment",
    "pull": "sharing",
    "push": "sharing",
    "select": "mask",
    "sparse_tuning": "sparse",
    "squash": "derive",
    "train": "training",
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


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"mm_piece.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mm_piece' has no attribute {name!r}")
