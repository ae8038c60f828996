"""What must be true of a mutated delta or store; anything else is a `Finding`.

judge_delta    refused with one line, or sound, applied exactly, and written again
judge_store    the same for a store; reading it leaves it as it is and stays inside
"""

import dataclasses
import hashlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_files import noise

from mm_piece import PieceError
from mm_piece.deltas.delta import Delta
from mm_piece.entries import read_entries
from mm_piece.store.delta_store import DeltaStore

MARGIN, CANARY = 64, 0xA5
LONGEST_MESSAGE = 600
LARGEST_MODEL = 2**20  # entries; a delta of a larger one is read, not applied


class Finding(Exception):
    """Something that must not happen: what kind of thing, and the details."""

    def __init__(self, what: str, detail: object = "") -> None:
        super().__init__(what, ascii(str(detail)[:300]))


def attempt(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a call gives, or the error that a user may see."""
    try:
        return call(*arguments)
    except PieceError as error:
        message = str(error)
        if not message.isprintable():  # line breaks, terminal escapes, what no terminal can encode
            raise Finding("a message that is not one printable line", message) from error
        if len(message) > LONGEST_MESSAGE:
            raise Finding("an overlong message", f"{len(message)}: {message}") from error
        return error
    except Exception as error:
        raise Finding(f"{type(error).__name__} escapes", error) from error


# --- deltas ---------------------------------------------------------------------------------------


class Guarded:
    """Tensors that lie in the middle of longer buffers, so that every stray write shows."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.buffers = {name: self._framed(tensor) for name, tensor in tensors.items()}
        self.tensors = {
            name: torch.from_numpy(self.buffers[name][MARGIN:-MARGIN])
            .view(tensor.dtype)
            .view(tensor.shape)
            for name, tensor in tensors.items()
        }

    def _framed(self, tensor: torch.Tensor) -> np.ndarray:
        raw = tensor.view(-1).view(torch.uint8).numpy()
        return np.pad(raw, MARGIN, constant_values=CANARY)

    def apply(self, delta: Delta) -> PieceError | None:
        """Apply a delta: every byte of every buffer is as it must be, whatever comes of it."""
        expected = {name: buffer.copy() for name, buffer in self.buffers.items()}
        answer = attempt(delta.apply, self.tensors)
        error = answer if isinstance(answer, PieceError) else None
        if error is None:
            for name, index in delta.indices.items():
                patterns = _patterns(delta.values[name])
                inside = expected[name][MARGIN:-MARGIN].view(patterns.dtype)
                inside[index.numpy()] = patterns
        astray = [name for name in expected if (expected[name] != self.buffers[name]).any()]
        if astray:
            raise Finding("entries other than those named changed", f"{astray} after {error!r}")
        return error


def judge_delta(data: bytes, model: Mapping[str, torch.Tensor]) -> str:
    """Return the class of the error that a file ends with, or how far it got."""
    delta = attempt(Delta.from_bytes, data)
    if isinstance(delta, PieceError):
        return type(delta).__name__
    _require_sound(delta)
    _require_rewritable(delta)
    error = Guarded(model).apply(delta)
    return _apply_where_it_fits(delta) if error else "applied"


def _require_sound(delta: Delta) -> None:
    for name, shape in delta.shapes.items():
        index, values = delta.indices[name].numpy().astype(np.int64), delta.values[name]
        inside = not len(index) or (index[0] >= 0 and index[-1] < math.prod(shape))
        if not inside or values.shape != index.shape or (np.diff(index) <= 0).any():
            raise Finding("an unsound delta is let through", f"{name}: {shape}: {index[:9]}")


def _require_rewritable(delta: Delta) -> None:
    """Raise unless what could be read can be written, and reads as the same again."""
    for codec in ("gap", "raw"):
        data = attempt(delta.to_bytes, codec)
        if not isinstance(data, PieceError):
            again = attempt(Delta.from_bytes, data)
            if isinstance(again, PieceError) or again.to_bytes(codec) != data:
                raise Finding("what was written does not read as the same", repr(again))


def _apply_where_it_fits(delta: Delta) -> str:
    """Apply a delta to a model that is made for it, where its own would have to be trusted."""
    if max((math.prod(max(n, 1) for n in shape) for shape in delta.shapes.values()), default=0) > (
        LARGEST_MODEL
    ):
        return "read"
    shapes = delta.shapes.items()
    guarded = Guarded({name: noise(shape, delta.values[name].dtype, 7) for name, shape in shapes})
    before = {
        name: read_entries(guarded.tensors[name], index) for name, index in delta.indices.items()
    }
    digests = {name: hashlib.sha256(_patterns(row)).hexdigest() for name, row in before.items()}
    error = guarded.apply(dataclasses.replace(delta, before=digests))
    if error:
        raise Finding("a delta that fits does not apply", repr(error))
    return "applied where it fits"


def _patterns(values: torch.Tensor) -> np.ndarray:
    """Return values as unsigned integers of their size."""
    return values.contiguous().view(torch.uint8).numpy().view(f"<u{values.itemsize}")


# --- stores ---------------------------------------------------------------------------------------

READS: tuple[Callable[[DeltaStore], Any], ...] = (
    DeltaStore.verify,
    DeltaStore.deltas,
    DeltaStore.results,
    DeltaStore.log,
    lambda store: store.answers(1),
    lambda store: store.recipe,
)


def judge_store(path: Path, listing: Callable[[], Any]) -> str:
    """Return the class of the first error that a store ends with, or "sound"."""
    before = listing()
    with Watched(path) as watched:
        store = attempt(DeltaStore.open, path)
        found = [store] if isinstance(store, PieceError) else [attempt(r, store) for r in READS]
    if watched.astray():
        raise Finding("a file outside of the store is opened", watched.astray())
    if listing() != before:
        raise Finding("reading changed the store")
    return next((type(one).__name__ for one in found if isinstance(one, PieceError)), "sound")


class Watched:
    """Sees which files are opened below the folder that a store lies in."""

    current: "Watched | None" = None

    def __init__(self, store: Path) -> None:
        self.store, self.opened = store, set()

    def __enter__(self) -> "Watched":
        Watched.current = self
        return self

    def __exit__(self, *_: object) -> None:
        Watched.current = None

    def astray(self) -> list[str]:
        """Return what was opened and lies elsewhere, be it through a link."""
        here = [path for path in self.opened if path.startswith(str(self.store.parent))]
        real = os.path.realpath(self.store)
        return sorted(p for p in here if not os.path.realpath(p).startswith(real))


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if Watched.current and event == "open" and isinstance(arguments[0], str | os.PathLike):
        Watched.current.opened.add(os.fspath(arguments[0]))


sys.addaudithook(_note)
