"""The lock of a store: one writer at a time, among all processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mm_piece.errors import LockedError
from mm_piece.files.atomic import reporting_os_errors
from mm_piece.store.folder import LOCK
from mm_piece.store.manifest import require_inside

if TYPE_CHECKING:  # commands that only read take no lock, and filelock imports asyncio
    from filelock import FileLock


class StoreLock:
    """The lock of the store in a folder; its owner may take it again."""

    def __init__(self, store: Path) -> None:
        self._store = store

    @contextmanager
    def acquiring(self) -> Iterator[None]:
        """Keep the lock while the block runs; LockedError if another process has it."""
        from filelock import Timeout

        with reporting_os_errors(self._store):
            # a link would let a store lock a file elsewhere
            require_inside(self._store, self._store / LOCK)
            try:
                self._file.acquire()
            except Timeout as error:
                raise LockedError(f"{self._store}: another writer holds this store") from error

        try:
            yield
        finally:
            self._file.release()  # counted: only the outermost block gives it back

    @cached_property
    def _file(self) -> "FileLock":
        from filelock import FileLock

        # no waiting: a second writer gets LockedError at once
        return FileLock(self._store / LOCK, timeout=0)
