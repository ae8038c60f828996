"""The pages: a `Report` or a `Comparison` in an HTML template, with numbers for readers."""

from collections.abc import Iterable
from importlib.resources import files

from jinja2 import (
    Environment,
    FunctionLoader,
    StrictUndefined,
)
from markupsafe import Markup

from mm_piece.families import GROUPS
from mm_piece.plaintext import make_printable
from mm_piece.report.comparison import Comparison
from mm_piece.report.drawing import CurveFrame, LossFrame, ScatterPlane, join_dots
from mm_piece.report.examples import KINDS
from mm_piece.report.formats import TEMPLATE_FILTERS
from mm_piece.report.summary import Curve, Report

METRIC_TITLES = {
    "learned": "Learned accuracy (MFT)",
    "op": "Overall performance (OP)",
    "maa": "Mean average accuracy (MAA)",
    "bwt": "Backward transfer (BWT)",
    "forgetting": "Forgetting",
    "fwt": "Forward transfer (FWT)",
}
COLUMN_TITLES = {
    "learned": "learned",
    "op": "OP",
    "bwt": "BWT",
    "base_before": "base before",
    "base_retained": "base ability retained",
    "entries": "entries a task",
    "bytes": "size of a delta",
    "select": "seconds to select",
    "train": "seconds to train",
}


def render_report(report: Report) -> str:
    """Return the whole page as text; the same report gives the same bytes."""
    # one frame for all curves: they are read against each other
    curves = [*report.curves, *report.kinds, report.ability]
    frame = CurveFrame(len(report.positions), curves)
    return _render_template(
        "page.html",
        r=report,
        titles=METRIC_TITLES,
        frame=frame,
        loss_frame=LossFrame([task.losses for task in report.training]),
        kinds=KINDS,
        metric={metric.name: metric.value for metric in report.metrics},
    )


def render_comparison(comparison: Comparison) -> str:
    """Return the page about several stores as text; the same stores give the same bytes."""
    runs = comparison.runs
    frames = {
        "seen": _make_frame(run.seen for run in runs),
        "ability": _make_frame(run.ability for run in runs),
    }
    return _render_template(
        "comparison.html",
        c=comparison,
        titles=COLUMN_TITLES,
        frames=frames,
        plane=ScatterPlane(),
        groups=GROUPS,
    )


def _make_frame(curves: Iterable[Curve | None]) -> CurveFrame:
    """Build axes for curves that need not be equally long."""
    present = [curve for curve in curves if curve]
    lengths = [len(curve.values) for curve in present]
    return CurveFrame(max([1, *lengths]), present)


def _render_template(template: str, **content: object) -> str:
    """Fill a template of this package; an unknown name in it is an error, not a blank."""
    page = Environment(
        loader=FunctionLoader(_read_resource),
        autoescape=True,
        finalize=_finalize_value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= TEMPLATE_FILTERS
    page.globals["join_dots"] = join_dots

    css = Markup(_read_resource("page.css"))  # our own file: the only text that is not escaped
    text = page.get_template(template).render(css=css, **content)
    return text.lstrip()  # macros before the page leave blank lines


def _finalize_value(value: object) -> object:
    """Return a value as a template prints it: text without controls, marks of direction etc."""
    # Markup is escaped already, and is a str as well
    if isinstance(value, Markup) or not isinstance(value, str):
        return value

    return make_printable(value, lines=True)


def _read_resource(name: str) -> str:
    """Read a file of this package, also from a zipped installation."""
    resource = files("mm_piece.report").joinpath(name)
    return resource.read_text(encoding="utf-8")
