"""Errors of writing a checkpoint or a log, as a StoreError of one line that names the place."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mm_piece.errors import StoreError, format_value

# What torch says when it cannot write a file; the system's own reason is lost on the way.
_TORCH_WRITERS = ("PytorchStreamWriter", "inline_container")


@contextmanager
def translate_write_errors(folder: Path) -> Iterator[None]:
    """Translate what writers of checkpoints and logs raise while the block runs.

    It becomes a StoreError that names the file, or `folder` where the writer does not say it.
    """
    try:
        with _quiet_threads():
            yield
    except OSError as error:
        raise StoreError(f"{error.filename or folder}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise StoreError(f"{folder}: {format_value(error, 200)}") from error
    except RuntimeError as error:
        message = str(error)
        if not any(word in message for word in _TORCH_WRITERS):
            raise
        raise StoreError(f"{folder}: cannot be written, the disk may be full") from error


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """Keep TensorBoard's writing thread from printing tracebacks while the block runs.

    Its next call on this thread raises the same error.
    """
    before = threading.excepthook

    def handle_thread_error(failure: Any) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            before(failure)

    # one hook for all threads of the process
    threading.excepthook = handle_thread_error
    try:
        yield
    finally:
        threading.excepthook = before
