"""Drawing on a 48×48 page: a supersampled canvas, eight colours, six shapes, the DejaVu fonts."""

import functools
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

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
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
)


class DrawingCanvas:
    """One picture in the making; lengths are in final pixels, the origin is the top left corner."""

    def __init__(self, background: tuple[int, int, int]):
        self.image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), background)
        self.pen = ImageDraw.Draw(self.image)

    def draw_polygon(self, points, fill) -> None:
        self.pen.polygon([(x * SCALE, y * SCALE) for x, y in points], fill=fill)

    def draw_box(self, left, top, right, bottom, fill) -> None:
        self.pen.rectangle([left * SCALE, top * SCALE, right * SCALE, bottom * SCALE], fill=fill)

    def draw_disc(self, x, y, radius, fill) -> None:
        self.pen.ellipse(_bounding_box_of(x, y, radius), fill=fill)

    def draw_ring(self, x, y, radius, width, fill) -> None:
        self.pen.ellipse(_bounding_box_of(x, y, radius), outline=fill, width=round(width * SCALE))

    def draw_line(self, points, width, fill) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self.pen.line(scaled, fill=fill, width=round(width * SCALE), joint="curve")

    def draw_text(self, x, y, text, font, fill) -> None:
        """Write the text with its middle at (x, y)."""
        self.pen.text((x * SCALE, y * SCALE), text, font=font, fill=fill, anchor="mm")

    def render_image(self) -> Image.Image:
        return self.image.reduce(SCALE)


def draw_shape(page: DrawingCanvas, name: str, x: float, y: float, radius: float, fill) -> None:
    """Draw one of the six shapes around (x, y)."""
    if name == "circle":
        page.draw_disc(x, y, radius, fill)
    elif name == "square":
        half = 0.86 * radius
        page.draw_box(x - half, y - half, x + half, y + half, fill)
    elif name == "ring":
        page.draw_ring(x, y, radius, 0.36 * radius, fill)
    elif name == "cross":
        arm = 0.3 * radius
        page.draw_box(x - radius, y - arm, x + radius, y + arm, fill)
        page.draw_box(x - arm, y - radius, x + arm, y + radius, fill)
    else:
        page.draw_polygon(_corners_of(name, x, y, radius), fill)


def sample_tint(rng: random.Random, colour: str, spread: int = 14) -> tuple[int, int, int]:
    """Return a shade of a named colour."""
    return jitter_colour(rng, COLOURS[colour], spread)


def sample_paper(rng: random.Random, low: int = 100, high: int = 200) -> tuple[int, int, int]:
    """Return a background between dark and light grey, slightly coloured."""
    grey = rng.randint(low, high)
    return jitter_colour(rng, (grey, grey, grey), 12)


def jitter_colour(rng: random.Random, rgb, spread: int) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, v + rng.randint(-spread, spread))) for v in rgb)
    return red, green, blue


@functools.cache
def load_font(name: str, size: float) -> ImageFont.FreeTypeFont:
    """Return one of the DejaVu fonts that come with matplotlib, `size` final pixels high."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), round(size * SCALE), layout_engine=ImageFont.Layout.BASIC)


def _bounding_box_of(x, y, radius):
    left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
    return [left * SCALE, top * SCALE, right * SCALE, bottom * SCALE]


def _corners_of(name: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Return the corners of a triangle or a five-pointed star, the first one on top."""
    count = 3 if name == "triangle" else 10
    middle = y + (0.2 * radius if name == "triangle" else 0.0)
    corners = []
    for index in range(count):
        angle = 2 * math.pi * index / count - math.pi / 2
        corner_radius = radius * (1.12 if name == "triangle" else (1.1, 0.45)[index % 2])
        corners.append(
            (x + corner_radius * math.cos(angle), middle + corner_radius * math.sin(angle))
        )
    return corners
