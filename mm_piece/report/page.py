"""The page: a `Report` poured into one HTML template, its numbers as a reader compares them."""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

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


def render(report: Report) -> str:
    """The whole page as text; the same report gives the same bytes."""
    page = Environment(
        loader=FunctionLoader(_text),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= FILTERS
    text = page.get_template("page.html").render(
        r=report,
        css=Markup(_text("page.css")),  # our own file: the only text that is not escaped
        titles=METRIC_TITLES,
        frame=Frame(len(report.positions), [*report.curves, *report.kinds, report.ability]),
        metric={metric.name: metric.value for metric in report.metrics},
    )
    return text.lstrip()  # the macros' blank lines


class Frame:
    """The axes that all curves of a page share."""

    def __init__(self, num_positions: int, curves: Sequence[Curve | None]):
        scores = [score for curve in curves if curve for score in curve.values]
        self.top = max([1.0, *scores])  # a metric such as CIDEr may exceed 1
        self.xs = [self._x(at, num_positions) for at in range(num_positions)]

    def _x(self, at: int, num_positions: int) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * at / max(num_positions - 1, 1), 1)

    def y(self, score: float) -> float:
        """Height of a score in the picture."""
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * score / self.top, 1)

    def dots(self, curve: Curve) -> list[tuple[float, float]]:
        """One point per measured position."""
        return [(x, self.y(score)) for x, score in zip(self.xs, curve.values, strict=False)]

    def path(self, dots: Sequence[tuple[float, float]]) -> str:
        """The points joined, as SVG path data."""
        return "M" + "L".join(f"{x} {y}" for x, y in dots)


def percent(fraction: float | None) -> str:
    """A score for a table whose unit is stated once: 0.725 → 72.5."""
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def points(difference: float | None) -> str:
    """A signed difference of scores, in percentage points."""
    if difference is None:
        return "–"
    sign = "−" if round(difference, 3) < 0 else "+"
    return f"{sign}{abs(100 * difference):.1f}"


def share(fraction: float) -> str:
    """A fraction that may be tiny, to three digits: 0.00098 → 0.098 %."""
    if 0 < fraction < 1e-6:
        return "< 0.0001 %"
    return f"{float(f'{100 * fraction:.3g}'):g} %"


def permille(fraction: float) -> str:
    """A density in thousandths, short enough for a small cell."""
    value = 1000 * fraction
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def size(num_bytes: float) -> str:
    """Bytes in decimal units: 45213 → 45.2 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def count(number: int) -> str:
    """A whole number with its thousands apart."""
    return f"{number:,}"


def fact(value: Any) -> str:
    """Whatever a delta says about how it was made, in one cell."""
    if isinstance(value, dict):
        return ", ".join(
            f"{key} ({fact(part)})" if isinstance(part, dict) else f"{key} {fact(part)}"
            for key, part in value.items()
        )
    if isinstance(value, float):
        return f"{value:.4g}"
    return count(value) if isinstance(value, int) else str(value)


def _text(name: str) -> str:
    return files("mm_piece.report").joinpath(name).read_text(encoding="utf-8")


FILTERS = {
    "percent": percent,
    "points": points,
    "share": share,
    "permille": permille,
    "size": size,
    "count": count,
    "fact": fact,
}
