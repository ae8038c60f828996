"""The tasks to learn after the base: other images, other prompts, other answers.

Each generator takes the row's index within its split (for balance), the split, and a random source.
It returns (image, prompt, answer, kind). The order of the random draws is part of the data.
"""

import functools
import math
from random import Random

import numpy as np
from PIL import Image

from mm_piece.data.scenes.canvas import (
    ASSETS,
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
from mm_piece.data.scenes.lexicon import NUMBERS, READABLE

SCAN_RANGES = {
    "train": (0, 1200),
    "validation": (1200, 1450),
    "test": (1450, 1797),
}
BAR_COLOURS = (
    "red",
    "green",
    "blue",
    "yellow",
    "purple",
    "orange",
)
INK_COLOURS = BAR_COLOURS
DIGIT_INKS = (
    "black",
    "blue",
    "red",
)
DIGIT_PROMPTS = (
    "Spell out the handwritten digit.",
    "Which number was written by hand?",
)
WORD_PROMPTS = (
    "What word is printed on the label?",
    "Text on the label:",
)
CHART_PROMPTS = {
    "tallest": "Chart: which bar has the largest value?",
    "shortest": "Chart: which bar has the smallest value?",
    "bars": "Chart: number of bars?",
    "first": "Chart: colour of the last bar?",
}
CHART_KINDS = tuple(CHART_PROMPTS)
RELATION_KINDS = (
    "side",
    "fact",
    "extreme",
)
EXTREMES = (  # axis, sign, word
    (0, 1, "farthest left"),
    (0, -1, "farthest right"),
    (1, 1, "highest"),
    (1, -1, "lowest"),
)
HAND_COLOURS = (
    "black",
    "red",
    "blue",
)
CLOCK_PROMPTS = (
    "What time is it?",
    "Time on the clock:",
)


def make_digit(index: int, split: str, rng: Random):
    """Draw a real handwritten digit, one of 1797 8×8 scans; the answer is its name."""
    scans, labels, order = _load_scans()
    first, last = SCAN_RANGES[split]
    source = order[first + index % (last - first)]

    scan = Image.fromarray(scans[source])
    strength = scan.resize((40, 40), Image.Resampling.BICUBIC)
    ink_name = rng.choice(DIGIT_INKS)
    ink = sample_tint(rng, ink_name)
    ground = sample_paper(rng, 170, 235)
    image = Image.new("RGB", (SIZE, SIZE), ground)
    # 40 of 48 pixels leave 8 on each axis to shift the digit by
    left = rng.randint(0, 8)
    top = rng.randint(0, 8)
    image.paste(ink, (left, top), strength)

    prompt = rng.choice(DIGIT_PROMPTS)
    label = labels[source]
    return image, prompt, NUMBERS[label], "digit"


def make_word(index: int, split: str, rng: Random):
    """Draw a short printed word to read."""
    word = READABLE[index % len(READABLE)]
    ground = rng.choice(list(COLOURS))
    inks = [
        "black",
        "white",
        "blue",
        "red",
    ]
    if ground in inks:
        inks.remove(ground)
    ink = rng.choice(inks)

    # too little contrast to read: black or white instead, whichever contrasts more
    brightness = _luminance_of(ground)
    contrast = abs(brightness - _luminance_of(ink))
    if contrast < 90:
        ink = "white" if brightness < 110 else "black"

    tint = sample_tint(rng, ground)
    drawing = DrawingCanvas(tint)
    font_name = rng.choice(FONTS)
    font_size = rng.choice((17, 18))
    font = load_font(font_name, font_size)
    x = 24 + rng.uniform(-1.5, 1.5)
    y = 24 + rng.uniform(-3, 3)
    ink_tint = sample_tint(rng, ink)
    drawing.draw_text(x, y, word, font, ink_tint)
    prompt = rng.choice(WORD_PROMPTS)
    return drawing.render_image(), prompt, word, "word"


def make_chart(index: int, split: str, rng: Random):
    """Draw a bar chart: which bar is tallest or shortest, how many bars, the last one's colour."""
    # each kind of question gets two to six bars in turn
    kind = CHART_KINDS[index % 4]
    count = 2 + index // 4 % 5
    colours = rng.sample(BAR_COLOURS, count)
    # all heights differ, so that one bar is tallest and one is shortest
    heights = rng.sample(range(3, 15), count)

    paper = sample_paper(rng, 215, 245)
    drawing = DrawingCanvas(paper)
    pitch = 42 / count
    for place, colour in enumerate(colours):
        left = 4 + pitch * place
        right = left + 0.72 * pitch
        top = 44 - 2.7 * heights[place]
        tint = sample_tint(rng, colour)
        drawing.draw_box(left, top, right, 44, tint)
    axes = [
        (3, 3),
        (3, 44),
        (46, 44),
    ]
    drawing.draw_line(axes, 0.7, (40, 40, 40))

    tallest = heights.index(max(heights))
    shortest = heights.index(min(heights))
    answers = {
        "tallest": colours[tallest],
        "shortest": colours[shortest],
        "bars": NUMBERS[count],
        "first": colours[-1],
    }
    return drawing.render_image(), CHART_PROMPTS[kind], answers[kind], kind


def make_relation(index: int, split: str, rng: Random):
    """Draw three shapes apart from each other: what lies beside, above or below what."""
    names = rng.sample(SHAPES, 3)
    spots = _sample_points(rng, 3)
    paper = sample_paper(rng)
    drawing = DrawingCanvas(paper)
    for name, spot in zip(names, spots, strict=True):
        x, y = spot
        radius = rng.uniform(5, 6.5)
        colour = rng.choice(INK_COLOURS)
        tint = sample_tint(rng, colour)
        draw_shape(drawing, name, x, y, radius, tint)

    turn, remainder = divmod(index, 3)
    kind = RELATION_KINDS[remainder]
    prompt, answer = _ask_relation(kind, names, spots, turn, rng)
    image = drawing.render_image()
    return image, prompt, answer, kind


def make_clock(index: int, split: str, rng: Random):
    """Draw a clock with one hand on a full hour."""
    hour = 1 + index % 12
    paper = sample_paper(rng, 90, 220)
    drawing = DrawingCanvas(paper)
    x = rng.uniform(21, 27)
    y = rng.uniform(21, 27)
    radius = rng.uniform(17, 20)
    face = sample_tint(rng, "white")
    drawing.draw_disc(x, y, radius, face)
    rim = sample_tint(rng, "black")
    drawing.draw_ring(x, y, radius, 1.2, rim)

    for mark in range(1, 13):
        # a longer mark shows where the top is
        inner_share = 0.72 if mark == 12 else 0.84
        inner = _point_on_clock(x, y, mark, inner_share * radius)
        outer = _point_on_clock(x, y, mark, radius)
        drawing.draw_line([inner, outer], 0.9, (30, 30, 30))

    colour = rng.choice(HAND_COLOURS)
    ink = sample_tint(rng, colour)
    shown_hour = hour + rng.uniform(-0.1, 0.1)
    length = rng.uniform(0.6, 0.8) * radius
    tip = _point_on_clock(x, y, shown_hour, length)
    width = rng.uniform(1.6, 2.4)
    drawing.draw_line([(x, y), tip], width, ink)

    prompt = rng.choice(CLOCK_PROMPTS)
    answer = f"{NUMBERS[hour]} o'clock"
    image = drawing.render_image()
    return image, prompt, answer, "clock"


@functools.cache
def _load_scans():
    """Return the scans as 8-bit images, their labels, and one fixed shuffling of them."""
    with np.load(ASSETS / "digits.npz") as stored:
        grey_values = stored["scans"].astype(np.float64)  # (scans, 8, 8), of 0 to 16
        labels = stored["labels"]
    scans = grey_values * 15.9

    # one order for all splits, which take disjoint ranges of it
    order = list(range(len(labels)))
    Random(8).shuffle(order)
    return scans.astype(np.uint8), labels.tolist(), order


def _luminance_of(colour: str) -> float:
    # the weights of ITU-R BT.601, rounded
    red, green, blue = COLOURS[colour]
    return 0.3 * red + 0.59 * green + 0.11 * blue


def _sample_points(rng: Random, count: int) -> list[Point]:
    """Return points whose x and whose y all differ clearly."""
    lanes = [9, 24, 39]
    xs = rng.sample(lanes, count)
    ys = rng.sample(lanes, count)
    points = []
    for lane_x, lane_y in zip(xs, ys, strict=True):
        x = lane_x + rng.uniform(-2, 2)
        y = lane_y + rng.uniform(-2, 2)
        points.append((x, y))
    return points


def _ask_relation(
    kind: str,
    names,
    spots,
    turn: int,
    rng: Random,
) -> tuple[str, str]:
    """Return a prompt and its answer about shapes at these spots."""
    first, second, _ = names
    (x0, y0), (x1, y1), _ = spots
    across = "left" if x0 < x1 else "right"
    down = "above" if y0 < y1 else "below"  # y grows downwards

    if kind == "side":
        if rng.random() < 0.5:
            return f"The {first} is on which side of the {second}: left or right?", across
        return f"Is the {first} above or below the {second}?", down

    if kind == "fact":
        # true and false claims take turns
        is_true = bool(turn % 2)
        opposite = "below" if down == "above" else "above"
        claimed = down if is_true else opposite
        prompt = f"True or false: the {first} is {claimed} the {second}."
        return prompt, str(is_true).lower()

    axis, sign, word = rng.choice(EXTREMES)
    distances = [sign * spot[axis] for spot in spots]
    best = distances.index(min(distances))
    return f"Which of the shapes is {word}?", names[best]


def _point_on_clock(
    x: float,
    y: float,
    hour: float,
    length: float,
) -> Point:
    """Return the point `length` away from the middle in the direction of an hour."""
    angle = math.pi * hour / 6  # clockwise from the top
    right = length * math.sin(angle)
    up = length * math.cos(angle)
    return x + right, y - up
