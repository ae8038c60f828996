"""A delta store as one self-contained HTML page: no script, no request, the same bytes every time.

summary          `summarise_store` reads and counts the content of a page
examples         test questions that tell what was learned, retained and forgotten
training_record  times and losses
weight_maps      places and overlaps of changed entries
comparison       `compare_stores`: the same for several stores
page             `render_report` and `render_comparison` fill the HTML templates
formats          numbers and texts for readers
drawing          places in a drawing
"""

from collections.abc import Sequence
from pathlib import Path

from mm_piece.data import read
from mm_piece.errors import DataError, StoreError
from mm_piece.files.atomic import write_atomically
from mm_piece.report.comparison import Comparison, compare_stores
from mm_piece.report.examples import ImageLoader, Images
from mm_piece.report.page import render_comparison, render_report
from mm_piece.report.summary import Report, summarise_store
from mm_piece.store.delta_store import DeltaStore

__all__ = [
    "Comparison",
    "ImageLoader",
    "Report",
    "compare_stores",
    "render_report",
    "render_comparison",
    "report_comparison",
    "report_store",
    "summarise_store",
    "write_report",
]


def report_store(path: str | Path, to: str | Path | None = None) -> Path:
    """Write the report of the store at `path` (default: `report.html` inside it); return its path.

    Images come from the recipe's data. The page shows a task without data as text.
    """
    store = DeltaStore.open(path)
    target = Path(to) if to else store.path / "report.html"
    return write_report(store, target, _make_image_loader(store))


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
    load_images: ImageLoader | None = None,
) -> Path:
    """Write the report of a delta store to one HTML file and return its path.

    `load_images` returns images of a task's test questions by their rows; without it the page shows
    them as text. Raises StoreError if the page cannot be written.
    """
    report = summarise_store(store, load_images)
    return _write_page(to, render_report(report))


def _write_page(to: Path, page: str) -> Path:
    """Write a page and return its path; StoreError if it cannot be written."""
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(to, page.encode())  # an older page stays until the new one is complete
    except OSError as error:
        raise StoreError(f"cannot write {to}: {error.strerror}") from error
    return to


def _make_image_loader(store: DeltaStore) -> ImageLoader:
    """Make a function that loads the first image of test rows; none where data is missing."""
    recipe = store.load_recipe()
    tasks = {task.name: task for task in (*recipe.tasks, *recipe.general)}

    def load_images(name: str, rows: Sequence[int]) -> Images:
        if name not in tasks:
            return {}

        task = tasks[name]
        images = {}
        try:
            dataset = read(task.test, task.images, task.columns, task.prompt)
            for row in rows:
                if row not in dataset.row_numbers:
                    continue
                example = dataset[dataset.row_numbers.index(row)]
                if example.images:
                    images[row] = example.open_images()[0]
        except DataError:  # a store travels without its data
            return {}
        return images

    return load_images
