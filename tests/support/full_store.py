"""A store with everything that travels, and what it holds."""

from pathlib import Path

from made_store import make

from mm_piece.store.delta_store import DeltaStore

TASKS = ["Task 1!", "Task 2!", "Task 3!"]
RESULTS = {
    "tasks": TASKS,
    "general": ["base"],
    "matrix": [[0, 0, 0], [1, 0, 0], [0.5, 1, 0], [0.25, 0.5, 1]],
    "base_ability": [1, 0.75, 0.5, 0.25],
    "base_ability_name": "base",
    "base_kinds": {"colour": [1, 1, 0.5, 0.5]},
    "seconds": {task: {"train": 1.5} for task in TASKS},
}


def answers(position: int) -> dict:
    row = {"row": 0, "prompt": "?", "answer": "a", "prediction": str(position), "score": 0}
    return {"Task 1!": [row]}


def full(path: Path) -> DeltaStore:
    """A store of three measured deltas, with everything that may lie in one."""
    store = make(path, deltas=3)
    store.write_results(RESULTS)
    for position in range(4):
        store.write_answers(position, answers(position))
    for name in ("logs/0001/events", "work/0004/mask.safetensors", "base/model.safetensors"):
        (path / name).parent.mkdir(parents=True)
        (path / name).write_text(name)
    return store


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
