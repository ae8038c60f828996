"""A delta store as one self-contained HTML page: no script, no request, the same bytes every time.

summary        `summarise_store` reads and counts the content of a page
weight_maps    places and overlaps of changed entries
comparison     `compare_stores`: the same for several stores
page           `render_report` and `render_comparison` fill the HTML templates
"""

from collections.abc import Sequence
from pathlib import Path

from mm_piece.data import read
from mm_piece.errors import DataError, StoreError
from mm_piece.files.atomic import write_atomically
from mm_piece.report.comparison import Comparison, compare_stores
from mm_piece.report.page import render_comparison, render_report
from mm_piece.report.summary import (
    ExampleImages,
    Report,
    summarise_store,
)
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

_IMAGES_PER_TASK = 3  # test examples of each task that the page shows with their images


def report_store(path: str | Path, to: str | Path | None = None) -> Path:
    """Write the report of the store at `path` (default: `report.html` inside it); return its path.

    Images come from the recipe's data. The page shows a task without data as text.
    """
    store = DeltaStore.open(path)
    target = Path(to) if to else store.path / "report.html"
    return write_report(store, target, _load_images(store))


def report_comparison(
    paths: Sequence[str | Path],
    to: str | Path | None = None,
) -> Path:
    """Write a page about several stores (default: `comparison.html` here); return its path.

    Raises StoreError for a store that is named twice, and if the page cannot be written.
    """
    # resolved: one store may be named by two paths
    resolved = [Path(path).resolve() for path in paths]
    duplicates = [path for path in resolved if resolved.count(path) > 1]
    if duplicates:
        raise StoreError(f"store {duplicates[0]} is named twice")

    comparison = compare_stores([DeltaStore.open(path) for path in paths])
    return _write_page(Path(to or "comparison.html"), render_comparison(comparison))


def write_report(
    store: DeltaStore,
    to: Path,
    examples: ExampleImages | None = None,
) -> Path:
    """Write the report of a delta store to one HTML file and return its path.

    `examples` chooses the test examples to show, with their images: `{task: [(row, image), …]}`.
    Without it the page shows the first ones of each task as text. Raises StoreError if the page
    cannot be written.
    """
    report = summarise_store(store, examples)
    return _write_page(to, render_report(report))


def _write_page(to: Path, page: str) -> Path:
    """Write a page and return its path; StoreError if it cannot be written."""
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(to, page.encode())  # an older page stays until the new one is complete
    except OSError as error:
        raise StoreError(f"cannot write {to}: {error.strerror}") from error
    return to


def _load_images(store: DeltaStore) -> ExampleImages:
    """Load the first image of the first test examples of each task whose data is there."""
    recipe = store.load_recipe()
    shown: ExampleImages = {}
    for task in (*recipe.tasks, *recipe.general):
        try:
            examples = read(task.test, task.images)[:_IMAGES_PER_TASK]
            shown[task.name] = [
                (example.row, example.open_images()[0]) for example in examples if example.images
            ]
        except DataError:  # a store travels without its data
            continue
    return shown
