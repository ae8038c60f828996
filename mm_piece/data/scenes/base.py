"""The images of the base ability: scenes of one to four shapes, see `questions` for what is asked.

A scene is laid out on a loose 3×3 grid. Beside its shapes it may show one sign, a letter or a
digit.
"""

from dataclasses import dataclass
from functools import cached_property
from random import Random

from PIL import Image

from mm_piece.data.scenes.canvas import (
    COLOURS,
    FONTS,
    SHAPES,
    SIZE,
    DrawingCanvas,
    Point,
    draw_shape,
    load_font,
    sample_paper,
    sample_tint,
)

SIGNS = "ABCDEFHJKLMNPRTUVXYZ234679"
SIZES = {"big": 7.0, "small": 4.0}  # radius in pixels
CELL_NAMES = (  # reading order
    "top left",
    "top",
    "top right",
    "left",
    "middle",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
_PREPOSITIONS = {
    "left": "on the left",
    "right": "on the right",
    "middle": "in the middle",
}
CELL_PHRASES = tuple(_PREPOSITIONS.get(place, f"at the {place}") for place in CELL_NAMES)


@dataclass(frozen=True)
class SceneObject:
    """One shape of a scene; `cell` counts the 3×3 grid in reading order."""

    size: str
    colour: str
    shape: str
    cell: int


@dataclass(frozen=True)
class Scene:
    """Content of an image, in reading order, and the seed of its drawing."""

    objects: tuple[SceneObject, ...]
    sign: tuple[str, int] | None
    drawing_seed: int

    @cached_property
    def image(self) -> Image.Image:
        rng = Random(self.drawing_seed)
        paper = sample_paper(rng)
        drawing = DrawingCanvas(paper)

        for thing in self.objects:
            variation = rng.uniform(-0.6, 0.6)
            radius = SIZES[thing.size] + variation
            x, y = _sample_cell_point(rng, thing.cell, 8.5 - radius)
            tint = sample_tint(rng, thing.colour)
            draw_shape(drawing, thing.shape, x, y, radius, tint)

        if self.sign:
            letter, cell = self.sign
            x, y = _sample_cell_point(rng, cell, 1.5)
            colour = rng.choice(("black", "white"))
            ink = sample_tint(rng, colour)
            font_name = rng.choice(FONTS)
            font = load_font(font_name, 16)
            drawing.draw_text(x, y, letter, font, ink)
        return drawing.render_image()


def sample_scene(rng: Random) -> Scene:
    """Return a random scene; few colours or few shapes make counting worth while."""
    num_colours = rng.choice((2, 3, 8))
    colours = rng.sample(list(COLOURS), num_colours)
    num_shapes = rng.choice((2, 3, 6))
    shapes = rng.sample(SHAPES, num_shapes)
    count = rng.choice((1, 2, 2, 3, 3, 4, 4))
    cells = rng.sample(range(9), count + 1)

    # the sign is drawn before the shapes: published rows depend on this order
    sign = None
    if rng.random() < 0.4:
        sign = (rng.choice(SIGNS), cells[-1])

    things = []
    for cell in sorted(cells[:count]):
        size = rng.choice(("big", "small"))
        colour = rng.choice(colours)
        shape = rng.choice(shapes)
        things.append(SceneObject(size, colour, shape, cell))
    return Scene(tuple(things), sign, rng.getrandbits(64))


def _sample_cell_point(rng: Random, cell: int, slack: float) -> Point:
    """Return a point near the middle of a cell, at most `slack` pixels away on each axis."""
    third = SIZE / 3
    row, column = divmod(cell, 3)
    x = third * (column + 0.5) + rng.uniform(-slack, slack)
    y = third * (row + 0.5) + rng.uniform(-slack, slack)
    return x, y
