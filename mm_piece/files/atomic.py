"""Files and folders that are there whole or not at all, and errors that name them.

Until it is whole, each has a name that nobody can foresee, under which nothing lay before, not even
a link.
"""

import os
import secrets
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mm_piece.errors import StoreError


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, even after a power cut."""
    with writing_atomically(path) as file:
        file.write(data)


@contextmanager
def writing_atomically(path: Path, durable: bool = True) -> Generator[BinaryIO]:
    """Open a file that is there whole once the block ends, and not at all if it raises.

    A `durable` one survives a power cut.
    """
    # random, and "x" below: a link that someone planted under the name is not followed
    temporary = path.with_name(f".{path.name}.{secrets.randbelow(10**15)}.tmp")
    with naming_errors(path, temporary):
        file = temporary.open("xb")
        try:
            with file:
                yield file
                file.flush()
                # before the rename, which could otherwise reach the disk before the content
                if durable:
                    os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    if durable:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk: a rename alone does not survive a power cut."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def naming_errors(path: Path, *others: Path) -> Generator[None]:
    """Make OSErrors name `path` while the block runs, if they name no file or one of `others`.

    An OSError of a full disk names no file.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and error.filename not in map(str, others):
            raise
        raise _with_path(error, path) from error


def _with_path(error: OSError, path: Path) -> OSError:
    """Return an OSError of the same kind that names `path`."""
    message = error.strerror or str(error)
    return OSError(error.errno, message, str(path))


@contextmanager
def creating_folder(path: Path) -> Generator[Path]:
    """Create a folder that is there whole once the block ends, and not at all if it raises.

    An empty one may lie there. An OSError about what the block writes names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        folder = Path(temporary) / path.name
        folder.mkdir()
        try:
            yield folder
            folder.replace(path)
        except OSError as error:
            # a copy that fails names its source first, then what it writes
            named = [name for name in (error.filename, error.filename2) if name is not None]
            if not named or any(Path(name).is_relative_to(folder) for name in named):
                raise _with_path(error, path) from error
            raise


@contextmanager
def reporting_os_errors(path: Path) -> Generator[None]:
    """Turn OSErrors into a StoreError of one line while the block runs."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{error.filename or path}: {error.strerror or error}") from error
