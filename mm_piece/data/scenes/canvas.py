"""Drawing on a 48×48 page: a supersampled canvas, eight colours, six shapes, the DejaVu fonts."""

import functools
import math
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]  # red, green, blue
Point = tuple[float, float]

ASSETS = Path(__file__).parent / "assets"

SIZE = 48
SCALE = 3  # drawn at 144×144, averaged down: smooth edges

COLOURS = {
    "red": (215, 35, 35),
    "green": (35, 155, 55),
    "blue": (40, 75, 215),
    "yellow": (240, 220, 40),
    "purple": (145, 50, 175),
    "orange": (240, 130, 25),
    "black": (18, 18, 18),
    "white": (242, 242, 242),
}
SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "cross",
    "ring",
)
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
)


class DrawingCanvas:
    """One image in the making; lengths are in final pixels, the origin is the top left corner."""

    def __init__(self, background: Colour):
        drawn_size = SIZE * SCALE
        self.image = Image.new("RGB", (drawn_size, drawn_size), background)
        self.pen = ImageDraw.Draw(self.image)

    def draw_polygon(self, points, fill) -> None:
        scaled = [_scale_point(x, y) for x, y in points]
        self.pen.polygon(scaled, fill=fill)

    def draw_box(self, left, top, right, bottom, fill) -> None:
        box = _scale_box(left, top, right, bottom)
        self.pen.rectangle(box, fill=fill)

    def draw_disc(self, x, y, radius, fill) -> None:
        box = _bounding_box_of(x, y, radius)
        self.pen.ellipse(box, fill=fill)

    def draw_ring(self, x, y, radius, width, fill) -> None:
        box = _bounding_box_of(x, y, radius)
        pen_width = round(width * SCALE)
        self.pen.ellipse(box, outline=fill, width=pen_width)

    def draw_line(self, points, width, fill) -> None:
        scaled = [_scale_point(x, y) for x, y in points]
        pen_width = round(width * SCALE)
        self.pen.line(
            scaled,
            fill=fill,
            width=pen_width,
            joint="curve",
        )

    def draw_text(self, x, y, text, font, fill) -> None:
        """Write the text with its middle at (x, y)."""
        middle = _scale_point(x, y)
        # anchor "mm": the middle of the text in both directions
        self.pen.text(
            middle,
            text,
            font=font,
            fill=fill,
            anchor="mm",
        )

    def render_image(self) -> Image.Image:
        """Return the image in its final size, each pixel the mean of SCALE × SCALE drawn ones."""
        return self.image.reduce(SCALE)


def draw_shape(
    page: DrawingCanvas,
    name: str,
    x: float,
    y: float,
    radius: float,
    fill,
) -> None:
    """Draw one of the six shapes around (x, y)."""
    # the factors give the shapes about the same visible size
    if name == "circle":
        page.draw_disc(x, y, radius, fill)
    elif name == "square":
        half = 0.86 * radius
        _draw_centred_box(page, x, y, half, half, fill)
    elif name == "ring":
        page.draw_ring(x, y, radius, 0.36 * radius, fill)
    elif name == "cross":
        arm = 0.3 * radius
        _draw_centred_box(page, x, y, radius, arm, fill)
        _draw_centred_box(page, x, y, arm, radius, fill)
    else:
        corners = _corners_of(name, x, y, radius)
        page.draw_polygon(corners, fill)


def sample_tint(rng: Random, colour: str, spread: int = 14) -> Colour:
    """Return a shade of a named colour."""
    return jitter_colour(rng, COLOURS[colour], spread)


def sample_paper(rng: Random, low: int = 100, high: int = 200) -> Colour:
    """Return a background between dark and light grey, slightly coloured."""
    grey = rng.randint(low, high)
    return jitter_colour(rng, (grey, grey, grey), 12)


def jitter_colour(rng: Random, rgb, spread: int) -> Colour:
    """Return the colour with each channel moved by at most `spread`, clipped to 0 to 255."""
    channels = []
    for value in rgb:
        moved = value + rng.randint(-spread, spread)
        channels.append(min(255, max(0, moved)))
    red, green, blue = channels
    return red, green, blue


@functools.cache
def load_font(name: str, size: float) -> ImageFont.FreeTypeFont:
    """Return one of the embedded DejaVu fonts, `size` final pixels high; it has ASCII alone."""
    # basic layout: the other engine, Raqm, is not in every build of Pillow
    return ImageFont.truetype(
        str(ASSETS / f"{name}.ttf"),
        round(size * SCALE),
        layout_engine=ImageFont.Layout.BASIC,
    )


def _draw_centred_box(page, x, y, half_width, half_height, fill):
    left = x - half_width
    right = x + half_width
    top = y - half_height
    bottom = y + half_height
    page.draw_box(left, top, right, bottom, fill)


def _scale_point(x, y):
    return x * SCALE, y * SCALE


def _scale_box(left, top, right, bottom):
    return [
        left * SCALE,
        top * SCALE,
        right * SCALE,
        bottom * SCALE,
    ]


def _bounding_box_of(x, y, radius):
    left = x - radius
    right = x + radius
    top = y - radius
    bottom = y + radius
    return _scale_box(left, top, right, bottom)


def _corners_of(
    name: str,
    x: float,
    y: float,
    radius: float,
) -> list[Point]:
    """Return the corners of a triangle or a five-pointed star, the first one on top."""
    is_triangle = name == "triangle"
    count = 3 if is_triangle else 10
    # a triangle's corners lie around its centroid, which is below the middle of its height
    middle = y + (0.2 * radius if is_triangle else 0.0)

    corners = []
    for index in range(count):
        angle = 2 * math.pi * index / count - math.pi / 2
        # a star's tips and notches take turns
        factor = 1.12 if is_triangle else (1.1, 0.45)[index % 2]
        length = radius * factor
        corner_x = x + length * math.cos(angle)
        corner_y = middle + length * math.sin(angle)
        corners.append((corner_x, corner_y))
    return corners
