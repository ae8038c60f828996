"""The page: a `Report` poured into one HTML template, its numbers as a reader compares them."""

from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from mm_piece.families import GROUPS
from mm_piece.metrics.intervals import format_interval
from mm_piece.plaintext import make_printable
from mm_piece.report.comparison import Comparison, Configuration
from mm_piece.report.summary import Curve, Report

# A curve's picture, in its own units: the page scales it.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 240, 126, 30, 10, 10, 22

METRIC_TITLES = {
    "learned": "Learned accuracy (MFT)",
    "op": "Overall performance (OP)",
    "maa": "Mean average accuracy (MAA)",
    "bwt": "Backward transfer (BWT)",
    "forgetting": "Forgetting",
    "fwt": "Forward transfer (FWT)",
}


def render_report(report: Report) -> str:
    """The whole page as text; the same report gives the same bytes."""
    return _render_template(
        "page.html",
        r=report,
        titles=METRIC_TITLES,
        frame=CurveFrame(len(report.positions), [*report.curves, *report.kinds, report.ability]),
        metric={metric.name: metric.value for metric in report.metrics},
    )


def render_comparison(comparison: Comparison) -> str:
    """The page about several stores as text; the same stores give the same bytes."""
    runs = comparison.runs
    return _render_template(
        "comparison.html",
        c=comparison,
        titles=COLUMN_TITLES,
        frames={
            "seen": _make_frame(run.seen for run in runs),
            "ability": _make_frame(run.ability for run in runs),
        },
        plane=ScatterPlane(),
        groups=GROUPS,
    )


def _make_frame(curves: Iterable[Curve | None]) -> "CurveFrame":
    """Axes for curves that need not be equally long."""
    present = [curve for curve in curves if curve]
    return CurveFrame(max([1, *(len(curve.values) for curve in present)]), present)


def _render_template(template: str, **content: Any) -> str:
    page = Environment(
        loader=FunctionLoader(_read_resource),
        autoescape=True,
        finalize=_finalize_value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= TEMPLATE_FILTERS
    css = Markup(_read_resource("page.css"))  # our own file: the only text that is not escaped
    return page.get_template(template).render(css=css, **content).lstrip()  # macros' blank lines


def _finalize_value(value: Any) -> Any:
    """What a template prints: text of others without controls, marks of direction and the like."""
    is_plain = isinstance(value, str) and not isinstance(value, Markup)
    return make_printable(value, lines=True) if is_plain else value


class ScatterPlane:
    """A square on which each run is a dot: one score across, another one up, both 0 to 1."""

    side, near_margin, far_margin = 320, 44, 12  # the page scales it

    def place_dots(
        self, configurations: Sequence[Configuration], across: str, up: str
    ) -> list[tuple[int, str, float, float]]:
        """Of each run that has both scores: number of its way, a name, place."""
        found = []
        for number, configuration in enumerate(configurations):
            for run in configuration.runs:
                x_value, y_value = run.values[across], run.values[up]
                if x_value is not None and y_value is not None:
                    name = f"{run.name}: {format_percent(x_value)}, {format_percent(y_value)}"
                    found.append((number, name, self.scale_x(x_value), self.scale_y(y_value)))
        return found

    def scale_x(self, score: float) -> float:
        """Where a score lies across."""
        return round(self.near_margin + (self.side - self.near_margin - self.far_margin) * score, 1)

    def scale_y(self, score: float) -> float:
        """Where a score lies up; the page counts from its top."""
        return round(self.side - self.scale_x(score), 1)


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


class CurveFrame:
    """The axes that all curves of a page share."""

    def __init__(self, num_positions: int, curves: Sequence[Curve | None]):
        scores = [score for curve in curves if curve for score in curve.values]
        self.top = max([1.0, *scores])  # a metric such as CIDEr may exceed 1
        self.xs = [self._scale_x(at, num_positions) for at in range(num_positions)]

    def _scale_x(self, at: int, num_positions: int) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * at / max(num_positions - 1, 1), 1)

    def scale_y(self, score: float) -> float:
        """Height of a score in the picture."""
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * score / self.top, 1)

    def place_dots(self, curve: Curve) -> list[tuple[float, float]]:
        """One point per measured position."""
        return [(x, self.scale_y(score)) for x, score in zip(self.xs, curve.values, strict=False)]

    def join_dots(self, dots: Sequence[tuple[float, float]]) -> str:
        """The points joined, as SVG path data."""
        return "M" + "L".join(f"{x} {y}" for x, y in dots)


def format_percent(fraction: float | None) -> str:
    """A score for a table whose unit is stated once: 0.725 → 72.5."""
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def format_points(difference: float | None) -> str:
    """A signed difference of scores, in percentage points."""
    if difference is None:
        return "–"
    sign = "−" if round(difference, 3) < 0 else "+"
    return f"{sign}{abs(100 * difference):.1f}"


def format_share(fraction: float) -> str:
    """A fraction that may be tiny, to three digits: 0.00098 → 0.098 %."""
    if 0 < fraction < 1e-6:
        return "< 0.0001 %"
    return f"{float(f'{100 * fraction:.3g}'):g} %"


def format_permille(fraction: float) -> str:
    """A density in thousandths, short enough for a small cell."""
    value = 1000 * fraction
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def format_size(num_bytes: float) -> str:
    """Bytes in decimal units: 45213 → 45.2 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def format_count(number: int) -> str:
    """A whole number with its thousands apart."""
    return f"{number:,}"


def format_fact(value: Any) -> str:
    """Whatever a delta says about how it was made, in one cell."""
    if isinstance(value, dict):
        return ", ".join(
            f"{key} ({format_fact(item)})"
            if isinstance(item, dict)
            else f"{key} {format_fact(item)}"
            for key, item in value.items()
        )
    if isinstance(value, float):
        return f"{value:.4g}"
    return format_count(value) if isinstance(value, int) else str(value)


def format_spread(values: Sequence[float]) -> str:
    """The mean of fractions in percent, and half its interval where there are several."""
    return format_interval(values).replace("-", "−") if values else "–"


def _read_resource(name: str) -> str:
    return files("mm_piece.report").joinpath(name).read_text(encoding="utf-8")


TEMPLATE_FILTERS = {
    "percent": format_percent,
    "points": format_points,
    "share": format_share,
    "permille": format_permille,
    "size": format_size,
    "count": format_count,
    "fact": format_fact,
    "spread": format_spread,
}
