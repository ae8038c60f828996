"""A delta store as one self-contained HTML page: no script, no request, the same bytes every time.

`summarise` reads and counts (`summary`, `weights`); `render` fills `page.html` (`page`). Several
stores: `compare` (`comparing`) and `render_comparison`, which fills `comparison.html`.
"""

from collections.abc import Sequence
from pathlib import Path

from mm_piece.data import read
from mm_piece.errors import DataError, StoreError
from mm_piece.files.atomic import write_atomically
from mm_piece.recipe import parse_recipe
from mm_piece.report.comparison import Comparison, compare_stores
from mm_piece.report.page import render_comparison, render_report
from mm_piece.report.summary import ExampleImages, Report, summarise_store
from mm_piece.store.delta_store import DeltaStore

__all__ = [
    "Comparison",
    "ExampleImages",
    "Report",
    "compare_stores",
    "render_report",
    "render_comparison",
    "report_comparison",
    "report_store",
    "summarise_store",
    "write_report",
]

_IMAGES_PER_TASK = 3  # test rows of each task that the page shows with their images


def report_store(path: str | Path, to: str | Path | None = None) -> Path:
    """Write the report of the store at `path` (default: `report.html` inside it); its path.

    Images come from the recipe's data; a task whose data is not at hand is shown as text.
    """
    store = DeltaStore.open(path)
    return write_report(store, Path(to) if to else store.path / "report.html", _load_images(store))


def report_comparison(paths: Sequence[str | Path], to: str | Path | None = None) -> Path:
    """Write a page about several stores (default: `comparison.html` in this folder); its path.

    Raises StoreError for a store that is named twice, and if the page cannot be written.
    """
    resolved = [Path(path).resolve() for path in paths]
    if duplicates := [path for path in resolved if resolved.count(path) > 1]:
        raise StoreError(f"store {duplicates[0]} is named twice")
    comparison = compare_stores([DeltaStore.open(path) for path in paths])
    return _write_page(Path(to or "comparison.html"), render_comparison(comparison))


def write_report(store: DeltaStore, to: Path, examples: ExampleImages | None = None) -> Path:
    """Write the report of a delta store to one HTML file and return its path.

    `examples` chooses the test rows to show and brings their images: `{task: [(row, image), …]}`.
    Without it the first rows of each task are shown as text. Raises StoreError if the page cannot
    be written.
    """
    return _write_page(to, render_report(summarise_store(store, examples)))


def _write_page(to: Path, page: str) -> Path:
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(to, page.encode())
    except OSError as error:
        raise StoreError(f"cannot write {to}: {error.strerror}") from error
    return to


def _load_images(store: DeltaStore) -> ExampleImages:
    recipe = parse_recipe(store.recipe, f"{store.path}/recipe.yaml")
    shown: ExampleImages = {}
    for task in (*recipe.tasks, *recipe.general):
        try:
            examples = read(task.test, task.images)[:_IMAGES_PER_TASK]
            shown[task.name] = [(e.row, e.open_images()[0]) for e in examples if e.images]
        except DataError:  # the store travels without its data
            continue
    return shown
