"""A delta store as one self-contained HTML page: no script, no request, the same bytes every time.

`summarise` reads and counts (`summary`, `weights`); `render` fills `page.html` (`page`).
"""

from pathlib import Path
from typing import TYPE_CHECKING

from mm_piece.report.page import render
from mm_piece.report.summary import Examples, Report, summarise

if TYPE_CHECKING:
    from mm_piece.store import DeltaStore

__all__ = ["Examples", "Report", "render", "summarise", "write_report"]


def write_report(store: "DeltaStore", to: Path, examples: Examples | None = None) -> Path:
    """Write the report of a delta store to one HTML file and return its path.

    `examples` chooses the test rows to show and brings their images: `{task: [(row, image), …]}`.
    Without it the first rows of each task are shown as text.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(render(summarise(store, examples)), encoding="utf-8")
    return to
