"""The pages: a `Report` or a `Comparison` in an HTML template, with numbers for readers."""

from collections.abc import Iterable, Sequence
from importlib.resources import files

from jinja2 import (
    Environment,
    FunctionLoader,
    StrictUndefined,
)
from markupsafe import Markup

from mm_piece.families import GROUPS
from mm_piece.metrics.intervals import format_interval
from mm_piece.plaintext import make_printable
from mm_piece.report.comparison import Comparison, Configuration
from mm_piece.report.summary import Curve, Report

# The drawing of a curve, in its own units: the page scales it.
WIDTH = 240
HEIGHT = 126

# Margins of that drawing: the left one has room for scores, the bottom one for positions.
LEFT = 30
RIGHT = 10
TOP = 10
BOTTOM = 22

METRIC_TITLES = {
    "learned": "Learned accuracy (MFT)",
    "op": "Overall performance (OP)",
    "maa": "Mean average accuracy (MAA)",
    "bwt": "Backward transfer (BWT)",
    "forgetting": "Forgetting",
    "fwt": "Forward transfer (FWT)",
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


def _make_frame(curves: Iterable[Curve | None]) -> "CurveFrame":
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

    css = Markup(_read_resource("page.css"))  # our own file: the only text that is not escaped
    text = page.get_template(template).render(css=css, **content)
    return text.lstrip()  # macros before the page leave blank lines


def _finalize_value(value: object) -> object:
    """Return a value as a template prints it: text without controls, marks of direction etc."""
    # Markup is escaped already, and is a str as well
    if isinstance(value, Markup) or not isinstance(value, str):
        return value

    return make_printable(value, lines=True)


class ScatterPlane:
    """A square on which each run is a dot: one score across, another one up, both 0 to 1."""

    side = 320  # the page scales it
    near_margin = 44  # left and below, with room for scores
    far_margin = 12

    def place_dots(
        self,
        configurations: Sequence[Configuration],
        across: str,
        up: str,
    ) -> list[tuple[int, str, float, float]]:
        """Return a dot for each run with both scores: configuration's number, name, x, y."""
        found = []
        for number, configuration in enumerate(configurations):
            for run in configuration.runs:
                x_value = run.values[across]
                y_value = run.values[up]
                if x_value is None or y_value is None:
                    continue

                name = f"{run.name}: {format_percent(x_value)}, {format_percent(y_value)}"
                x = self.scale_x(x_value)
                y = self.scale_y(y_value)
                found.append((number, name, x, y))
        return found

    def scale_x(self, score: float) -> float:
        """Return the horizontal place of a score."""
        length = self.side - self.near_margin - self.far_margin
        return round(self.near_margin + length * score, 1)

    def scale_y(self, score: float) -> float:
        """Return the vertical place of a score."""
        # SVG counts from the top; the square's margins mirror each other
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
    """Axes that all curves of a page share."""

    def __init__(self, num_positions: int, curves: Sequence[Curve | None]):
        scores = []
        for curve in curves:
            if curve:
                scores += curve.values

        self.top = max([1.0, *scores])  # a metric such as CIDEr may exceed 1
        self.xs = [self._scale_x(at, num_positions) for at in range(num_positions)]

    def _scale_x(self, at: int, num_positions: int) -> float:
        """Return the horizontal place of a position; a single one is at the left."""
        last = max(num_positions - 1, 1)
        return round(LEFT + (WIDTH - LEFT - RIGHT) * at / last, 1)

    def scale_y(self, score: float) -> float:
        """Return the vertical place of a score; SVG counts from the top."""
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * score / self.top, 1)

    def place_dots(self, curve: Curve) -> list[tuple[float, float]]:
        """Return one point per measured position."""
        dots = []
        # a curve may end before the last position
        for x, score in zip(self.xs, curve.values, strict=False):
            dots.append((x, self.scale_y(score)))
        return dots

    def join_dots(self, dots: Sequence[tuple[float, float]]) -> str:
        """Return a line through the points, as SVG path data."""
        return "M" + "L".join(f"{x} {y}" for x, y in dots)


def format_percent(fraction: float | None) -> str:
    """Format a score for a table whose unit is stated once: 0.725 → 72.5."""
    if fraction is None:
        return "–"
    return f"{100 * fraction:.1f}"


def format_points(difference: float | None) -> str:
    """Format a signed difference of scores, in percentage points."""
    if difference is None:
        return "–"

    # rounded first: a difference that is shown as 0.0 has a plus sign
    sign = "−" if round(difference, 3) < 0 else "+"
    return f"{sign}{abs(100 * difference):.1f}"


def format_share(fraction: float) -> str:
    """Format a fraction that may be tiny, to three digits: 0.00098 → 0.098 %."""
    if 0 < fraction < 1e-6:
        return "< 0.0001 %"

    # `.3g` alone would write an exponent from 1000 % on
    rounded = float(f"{100 * fraction:.3g}")
    return f"{rounded:g} %"


def format_permille(fraction: float) -> str:
    """Format a density in thousandths, short enough for a small cell."""
    value = 1000 * fraction
    # from 9.95 on, one digit after the point would round to 10.0
    if value >= 9.95:
        return f"{value:.0f}"
    return f"{value:.1f}"


def format_size(num_bytes: float) -> str:
    """Format bytes in decimal units: 45213 → 45.2 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        # from 999.5 on, three digits would round to 1e+03
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def format_count(number: int) -> str:
    """Format a whole number with its thousands apart."""
    return f"{number:,}"


def format_fact(value: object) -> str:
    """Format any value of a delta's `info` for one cell."""
    if isinstance(value, dict):
        return ", ".join(_format_item(key, item) for key, item in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return format_count(value)
    return str(value)


def _format_item(key: object, item: object) -> str:
    """Format one item of a mapping; a nested mapping is set in parentheses."""
    text = format_fact(item)
    if isinstance(item, dict):
        return f"{key} ({text})"
    return f"{key} {text}"


def format_spread(values: Sequence[float]) -> str:
    """Format the mean of fractions in percent, and half its interval where there are several."""
    if not values:
        return "–"
    return format_interval(values).replace("-", "−")


def _read_resource(name: str) -> str:
    """Read a file of this package, also from a zipped installation."""
    resource = files("mm_piece.report").joinpath(name)
    return resource.read_text(encoding="utf-8")


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
