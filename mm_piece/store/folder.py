"""What lies in a store's folder, by name: no other wing knows these names.

store.json              the manifest: base, and each delta's file, SHA-256 and parent
recipe.yaml             the run that made it
0001-name.safetensors   one delta per position, only ever added
results.json            the accuracy matrix
answers/0001.json       answers given at that position
kept/0001.safetensors   the retention importance of a learned task, for methods that need it
logs/                   TensorBoard's files
work/0002/              scratch of a training in progress
"""

from pathlib import Path
from shutil import rmtree

from mm_piece.errors import StoreError

MANIFEST = "store.json"
RECIPE = "recipe.yaml"
RESULTS = "results.json"
LOCK = ".lock"
ANSWERS = "answers"
RETENTION = "kept"
WORK = "work"
LOGS = "logs"

# What may lie in the folder before there is a manifest: a start that crashed left it.
_START_LEFTOVERS = (
    LOCK,
    RECIPE,
    ANSWERS,
    WORK,
    LOGS,
)


def answers_file(position: int) -> str:
    """Return the name of the file with the answers given at a position."""
    return f"{ANSWERS}/{position:04d}.json"


def retention_file(position: int) -> str:
    """Return the name of the file with the retention importance of the task at a position."""
    return f"{RETENTION}/{position:04d}.safetensors"


def is_store(path: Path) -> bool:
    """Return whether a folder is a store."""
    return (path / MANIFEST).exists()


def require_unused(path: Path) -> None:
    """Raise StoreError for a folder that holds something else than what a crashed start left."""
    if path.exists() and not path.is_dir():
        raise StoreError(f"store {path} is a file; name a folder")

    if not path.is_dir():
        return

    names = sorted(child.name for child in path.iterdir())
    for name in names:
        if not _is_leftover(name):
            raise StoreError(f"store {path} holds {name!r} and is no store; name another")


def _is_leftover(name: str) -> bool:
    is_temporary = name.startswith(".") and name.endswith(".tmp")
    return is_temporary or name in _START_LEFTOVERS


def remove_empty_store(path: Path) -> None:
    """Remove the manifest, results and scratch of a store without deltas."""
    # a crash after the manifest is gone leaves no store at all
    for name in (RESULTS, MANIFEST):
        (path / name).unlink(missing_ok=True)
    for name in (ANSWERS, LOGS, RETENTION, WORK):
        rmtree(path / name, ignore_errors=True)
