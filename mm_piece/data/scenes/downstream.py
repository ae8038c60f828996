"""The tasks to learn after the base: other pictures, other prompts, other answers.

Each generator takes the row's index within its split (for balance), the split, and a random source,
and returns (image, prompt, answer, kind).
"""

import functools
import math
import random

import numpy as np
from PIL import Image

from mm_piece.data.scenes import canvas
from mm_piece.data.scenes.canvas import COLOURS, SHAPES, SIZE
from mm_piece.data.scenes.lexicon import NUMBERS, READABLE, TEXTURES

SCAN_RANGES = {"train": (0, 1200), "validation": (1200, 1450), "test": (1450, 1797)}
BAR_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")


def make_digit(index: int, split: str, rng: random.Random):
    """A real handwritten digit (scikit-learn's 8×8 scans), enlarged; the answer is its name."""
    scans, labels, order = _load_scans()
    first, last = SCAN_RANGES[split]
    source = order[first + index % (last - first)]
    strength = Image.fromarray(scans[source]).resize((40, 40), Image.Resampling.BICUBIC)
    ink = canvas.sample_tint(rng, rng.choice(("black", "blue", "red")))
    ground = canvas.sample_paper(rng, 170, 235)
    image = Image.new("RGB", (SIZE, SIZE), ground)
    image.paste(ink, (rng.randint(0, 8), rng.randint(0, 8)), strength)
    prompt = rng.choice(("Spell out the handwritten digit.", "Which number was written by hand?"))
    return image, prompt, NUMBERS[labels[source]], "digit"


def make_word(index: int, split: str, rng: random.Random):
    """A short printed word to read."""
    word = READABLE[index % len(READABLE)]
    ground = rng.choice(list(COLOURS))
    ink = rng.choice([c for c in ("black", "white", "blue", "red") if c != ground])
    if abs(_luminance_of(ground) - _luminance_of(ink)) < 90:
        ink = "white" if _luminance_of(ground) < 110 else "black"
    drawing = canvas.DrawingCanvas(canvas.sample_tint(rng, ground))
    font = canvas.load_font(rng.choice(canvas.FONTS), rng.choice((17, 18)))
    x, y = 24 + rng.uniform(-1.5, 1.5), 24 + rng.uniform(-3, 3)
    drawing.draw_text(x, y, word, font, canvas.sample_tint(rng, ink))
    prompt = rng.choice(("What word is printed on the label?", "Text on the label:"))
    return drawing.render_image(), prompt, word, "word"


def make_chart(index: int, split: str, rng: random.Random):
    """A bar chart: which bar is tallest or shortest, how many bars, what is next to a bar."""
    count = 2 + index // 4 % 5
    colours = rng.sample(BAR_COLOURS, count)
    heights = rng.sample(range(3, 15), count)
    drawing = canvas.DrawingCanvas(canvas.sample_paper(rng, 215, 245))
    pitch = 42 / count
    for place, (colour, height) in enumerate(zip(colours, heights, strict=True)):
        left = 4 + pitch * place
        drawing.draw_box(
            left, 44 - 2.7 * height, left + 0.72 * pitch, 44, canvas.sample_tint(rng, colour)
        )
    drawing.draw_line([(3, 3), (3, 44), (46, 44)], 0.7, (40, 40, 40))
    kind = ("tallest", "shortest", "bars", "first")[index % 4]
    answer = {
        "tallest": colours[heights.index(max(heights))],
        "shortest": colours[heights.index(min(heights))],
        "bars": NUMBERS[count],
        "first": colours[-1],
    }[kind]
    return drawing.render_image(), CHART_PROMPTS[kind], answer, kind


def make_texture(index: int, split: str, rng: random.Random):
    """A cloth of two colours: the name of its pattern."""
    name = TEXTURES[index % len(TEXTURES)]
    light, dark = rng.sample(list(COLOURS), 2)
    strength = _make_pattern(name, rng)[..., None]
    dyes = np.array(
        [canvas.sample_tint(rng, light), canvas.sample_tint(rng, dark)], dtype=np.float64
    )
    mixed = dyes[0] * (1 - strength) + dyes[1] * strength
    noise = np.array([rng.gauss(0, 5) for _ in range(SIZE)])
    image = Image.fromarray(np.clip(mixed + noise[:, None, None], 0, 255).astype(np.uint8))
    prompt = rng.choice(("How would you describe this cloth?", "Pattern of the cloth?"))
    return image, prompt, name, "texture"


def make_relation(index: int, split: str, rng: random.Random):
    """Three shapes apart from each other: what lies beside, above or below what."""
    names = rng.sample(SHAPES, 3)
    spots = _sample_points(rng, 3)
    drawing = canvas.DrawingCanvas(canvas.sample_paper(rng))
    for name, (x, y) in zip(names, spots, strict=True):
        canvas.draw_shape(
            drawing,
            name,
            x,
            y,
            rng.uniform(5, 6.5),
            canvas.sample_tint(rng, rng.choice(INK_COLOURS)),
        )
    kind = ("side", "fact", "extreme")[index % 3]
    prompt, answer = _ask_relation(kind, names, spots, index // 3, rng)
    return drawing.render_image(), prompt, answer, kind


def make_clock(index: int, split: str, rng: random.Random):
    """A clock with one hand on a full hour."""
    hour = 1 + index % 12
    drawing = canvas.DrawingCanvas(canvas.sample_paper(rng, 90, 220))
    x, y, radius = rng.uniform(21, 27), rng.uniform(21, 27), rng.uniform(17, 20)
    drawing.draw_disc(x, y, radius, canvas.sample_tint(rng, "white"))
    drawing.draw_ring(x, y, radius, 1.2, canvas.sample_tint(rng, "black"))
    for mark in range(1, 13):
        inner_share = 0.72 if mark == 12 else 0.84
        drawing.draw_line(
            [
                _point_on_clock(x, y, mark, inner_share * radius),
                _point_on_clock(x, y, mark, radius),
            ],
            0.9,
            (30, 30, 30),
        )
    ink = canvas.sample_tint(rng, rng.choice(("black", "red", "blue")))
    tip = _point_on_clock(x, y, hour + rng.uniform(-0.1, 0.1), rng.uniform(0.6, 0.8) * radius)
    drawing.draw_line([(x, y), tip], rng.uniform(1.6, 2.4), ink)
    prompt = rng.choice(("What time is it?", "Time on the clock:"))
    return drawing.render_image(), prompt, f"{NUMBERS[hour]} o'clock", "clock"


@functools.cache
def _load_scans():
    """Return the scans as 8-bit images, their labels, and one fixed shuffling of them."""
    from sklearn.datasets import load_digits

    scans, labels = (np.asarray(scan_array) for scan_array in load_digits(return_X_y=True))
    order = list(range(len(labels)))
    random.Random(8).shuffle(order)
    return (scans.reshape(-1, 8, 8) * 15.9).astype(np.uint8), labels.tolist(), order


def _luminance_of(colour: str) -> float:
    red, green, blue = COLOURS[colour]
    return 0.3 * red + 0.59 * green + 0.11 * blue


def _make_pattern(name: str, rng: random.Random) -> np.ndarray:
    """Return the pattern as a 48×48 array of weights between 0 and 1."""
    v, u = np.mgrid[0:SIZE, 0:SIZE] * (2 * math.pi / rng.uniform(8, 13))
    u, v = u + rng.uniform(0, 6), v + rng.uniform(0, 6)
    if rng.random() < 0.5:
        u, v = v, u
    field = PATTERNS[name](u, v, rng)
    return np.clip(0.5 + 2.5 * field, 0, 1)


def _make_stripes(u, v, rng):
    return np.sin(u + rng.choice((0, 0, 1)) * v)


def _make_waves(u, v, rng):
    return np.sin(u + 1.6 * np.sin(0.7 * v))


def _make_rings(u, v, rng):
    middle = rng.uniform(0.35, 0.65) * u.max(), rng.uniform(0.35, 0.65) * v.max()
    return np.sin(1.2 * np.hypot(u - middle[0], v - middle[1]))


def _make_speckles(u, v, rng):
    coarse = np.random.default_rng(rng.getrandbits(32)).random((24, 24))
    return np.kron(coarse, np.ones((2, 2))) - 0.75


def _make_gradient(u, v, rng):
    return (u - u.mean()) / np.ptp(u) * 0.4 + 0.1 * (v - v.mean()) / np.ptp(v)


def _sample_points(rng: random.Random, count: int) -> list[tuple[float, float]]:
    """Return points whose x and whose y all differ clearly."""
    lanes = [9, 24, 39]
    xs, ys = rng.sample(lanes, count), rng.sample(lanes, count)
    return [(x + rng.uniform(-2, 2), y + rng.uniform(-2, 2)) for x, y in zip(xs, ys, strict=True)]


def _ask_relation(kind: str, names, spots, turn: int, rng: random.Random) -> tuple[str, str]:
    """Return a prompt and its answer about shapes at these spots."""
    (x0, y0), (x1, y1) = spots[:2]
    across, down = ("left" if x0 < x1 else "right"), ("above" if y0 < y1 else "below")
    if kind == "side" and rng.random() < 0.5:
        return f"The {names[0]} is on which side of the {names[1]}: left or right?", across
    if kind == "side":
        return f"Is the {names[0]} above or below the {names[1]}?", down
    if kind == "fact":
        claimed_side = down if turn % 2 else {"above": "below", "below": "above"}[down]
        return f"True or false: the {names[0]} is {claimed_side} the {names[1]}.", str(
            claimed_side == down
        ).lower()
    axis, sign, word = rng.choice(
        ((0, 1, "farthest left"), (0, -1, "farthest right"), (1, 1, "highest"), (1, -1, "lowest"))
    )
    best = min(range(len(names)), key=lambda i: sign * spots[i][axis])
    return f"Which of the shapes is {word}?", names[best]


def _point_on_clock(x: float, y: float, hour: float, length: float) -> tuple[float, float]:
    angle = math.pi * hour / 6
    return x + length * math.sin(angle), y - length * math.cos(angle)


INK_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
CHART_PROMPTS = {
    "tallest": "Chart: which bar has the largest value?",
    "shortest": "Chart: which bar has the smallest value?",
    "bars": "Chart: number of bars?",
    "first": "Chart: colour of the last bar?",
}
PATTERNS = {
    "striped": _make_stripes,
    "dotted": lambda u, v, rng: np.cos(u) + np.cos(v) - 1.0,
    "checked": lambda u, v, rng: np.sign(np.sin(u)) * np.sign(np.sin(v)),
    "wavy": _make_waves,
    "ringed": _make_rings,
    "woven": lambda u, v, rng: np.where(
        np.sin(u / 2) * np.sin(v / 2) > 0, np.sin(2 * u), np.sin(2 * v)
    ),
    "speckled": _make_speckles,
    "crossed": lambda u, v, rng: np.maximum(np.cos(u), np.cos(v)) - 0.85,
    "faded": _make_gradient,
}
