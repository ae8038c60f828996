"""Drawings of a page: where a score or a loss lies in an SVG, in its own units."""

from collections.abc import Sequence

from mm_piece.report.comparison import Configuration
from mm_piece.report.formats import format_percent
from mm_piece.report.summary import Curve
from mm_piece.report.training_record import LossCurve

Dots = list[tuple[float, float]]  # x, y

# The drawing of a curve: the page scales it.
WIDTH = 240
HEIGHT = 126

# Margins of that drawing: the left one has room for scores, the bottom one for positions.
LEFT = 30
RIGHT = 10
TOP = 10
BOTTOM = 22


class CurveFrame:
    """Axes that all curves of a page share."""

    def __init__(
        self,
        num_positions: int,
        curves: Sequence[Curve | None],
    ):
        scores = []
        for curve in curves:
            if curve:
                scores += curve.values

        self.top = max([1.0, *scores])  # a metric such as CIDEr may exceed 1
        last = max(num_positions - 1, 1)  # a single position is at the left
        self.xs = []
        for position in range(num_positions):
            x = _place_across(position / last)
            self.xs.append(x)

    def scale_y(self, score: float) -> float:
        """Return the vertical place of a score; SVG counts from the top."""
        return _place_up(score / self.top)

    def place_dots(self, curve: Curve) -> Dots:
        """Return one point per measured position."""
        dots = []
        # a curve may end before the last position
        for x, score in zip(self.xs, curve.values, strict=False):
            y = self.scale_y(score)
            dots.append((x, y))
        return dots


class LossFrame:
    """Axes of the training losses of all tasks; each has its own number of steps."""

    def __init__(self, curves: Sequence[LossCurve]):
        losses = []
        for curve in curves:
            for _, loss in curve:
                losses.append(loss)

        self.top = max([0.0, *losses]) or 1.0
        self.bottom = min([0.0, *losses])

    def scale_y(self, loss: float) -> float:
        """Return the vertical place of a loss; SVG counts from the top."""
        height = self.top - self.bottom
        part = (loss - self.bottom) / height
        return _place_up(part)

    def place_dots(self, curve: LossCurve) -> Dots:
        """Return one point per recorded loss, from the training's start to its last step."""
        last, _ = curve[-1]
        dots = []
        for step, loss in curve:
            part = step / max(last, 1)
            x = _place_across(part)
            y = self.scale_y(loss)
            dots.append((x, y))
        return dots


def _place_across(part: float) -> float:
    """Return the horizontal place of a part of the axis."""
    length = WIDTH - LEFT - RIGHT
    return round(LEFT + length * part, 1)


def _place_up(part: float) -> float:
    """Return the vertical place of a part of the axis; SVG counts from the top."""
    length = HEIGHT - TOP - BOTTOM
    foot = HEIGHT - BOTTOM
    return round(foot - length * part, 1)


def join_dots(dots: Dots) -> str:
    """Return a line through the points, as SVG path data."""
    points = []
    for x, y in dots:
        point = f"{x} {y}"
        points.append(point)
    return "M" + "L".join(points)


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
