"""The base ability: scenes of one to four shapes and ten kinds of question about them.

A scene is laid out on a loose 3×3 grid; beside its shapes it may hold one sign, a letter or a
digit. Every kind of question has several wordings; the last ones are never used in training.
"""

import random
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from PIL import Image

from mm_piece.data.scenes import canvas, lexicon
from mm_piece.data.scenes.canvas import COLOURS, SHAPES, SIZE
from mm_piece.data.scenes.wordings import NUM_HELD_OUT, WORDINGS

SIGNS = "ABCDEFHJKLMNPRTUVXYZ234679"
ALL_NAMES = (
    *(f"{colour} {name}" for colour in COLOURS for name in (*SHAPES, "thing")),
    *SHAPES,
)
SIZES = {"big": 7.0, "small": 4.0}  # radius in pixels
_CELL_NAMES = "top left,top,top right,left,middle,right,bottom left,bottom,bottom right"
CELL_NAMES = tuple(_CELL_NAMES.split(","))  # reading order
_PREPOSITIONS = {"left": "on the left", "right": "on the right", "middle": "in the middle"}
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
    """What a picture shows, in reading order, and the seed of how it is drawn."""

    objects: tuple[SceneObject, ...]
    sign: tuple[str, int] | None
    drawing_seed: int

    @cached_property
    def image(self) -> Image.Image:
        rng = random.Random(self.drawing_seed)
        drawing = canvas.DrawingCanvas(canvas.sample_paper(rng))
        for thing in self.objects:
            radius = SIZES[thing.size] + rng.uniform(-0.6, 0.6)
            x, y = _sample_cell_point(rng, thing.cell, 8.5 - radius)
            canvas.draw_shape(
                drawing, thing.shape, x, y, radius, canvas.sample_tint(rng, thing.colour)
            )
        if self.sign:
            letter, cell = self.sign
            x, y = _sample_cell_point(rng, cell, 1.5)
            ink = canvas.sample_tint(rng, rng.choice(("black", "white")))
            drawing.draw_text(x, y, letter, canvas.load_font(rng.choice(canvas.FONTS), 16), ink)
        return drawing.render_image()


def sample_scene(rng: random.Random) -> Scene:
    """Return a random scene; few colours or few shapes make counting worth while."""
    colours = rng.sample(list(COLOURS), rng.choice((2, 3, 8)))
    shapes = rng.sample(SHAPES, rng.choice((2, 3, 6)))
    count = rng.choice((1, 2, 2, 3, 3, 4, 4))
    cells = rng.sample(range(9), count + 1)
    things = (
        SceneObject(rng.choice(("big", "small")), rng.choice(colours), rng.choice(shapes), cell)
        for cell in sorted(cells[:count])
    )
    sign = (rng.choice(SIGNS), cells[-1]) if rng.random() < 0.4 else None
    return Scene(tuple(things), sign, rng.getrandbits(64))


def ask_question(kind: str, scene: Scene, rng: random.Random, new_wording: bool = False):
    """Return a (prompt, answer) of this kind, or None if the scene gives no clear question."""
    found = QUESTION_MAKERS[kind](scene, rng)
    if found is None:
        return None
    form, slots, answer = found
    wordings = WORDINGS[form]
    pool = wordings[-NUM_HELD_OUT:] if new_wording else wordings[:-NUM_HELD_OUT]
    return rng.choice(pool).format(**slots), answer


def make_question_row(kind: str, rng: random.Random, new_wording: bool) -> dict:
    """Return one row: scenes are drawn until one suits the kind of question."""
    while True:
        scene = sample_scene(rng)
        if found := ask_question(kind, scene, rng, new_wording):
            return {"image": scene.image, "prompt": found[0], "answer": found[1], "kind": kind}


def make_turns(scene: Scene, rng: random.Random, count: int) -> list[tuple[str, str, str]]:
    """Return up to `count` different (prompt, answer, kind) about one scene, in random order."""
    asked = {}
    for kind in rng.choices(QUESTION_KINDS, weights=list(PRETRAIN_WEIGHTS.values()), k=2 * count):
        if len(asked) < count and (found := ask_question(kind, scene, rng)):
            asked[_vary_style(found[0], rng)] = (found[1], kind)
    return [(prompt, answer, kind) for prompt, (answer, kind) in asked.items()]


def _vary_style(prompt: str, rng: random.Random) -> str:
    """Now and then write a prompt as people do: American spelling, lower case, no full stop."""
    if rng.random() < 0.15:
        prompt = prompt.replace("colour", "color")
    if rng.random() < 0.15 and ":" not in prompt and '"' not in prompt:
        prompt = prompt.lower().rstrip(".?")
    return prompt


def _sample_cell_point(rng: random.Random, cell: int, slack: float) -> tuple[float, float]:
    """Return a point near the middle of a cell, at most `slack` pixels away on each axis."""
    third = SIZE / 3
    row, column = divmod(cell, 3)
    x = third * (column + 0.5) + rng.uniform(-slack, slack)
    return x, third * (row + 0.5) + rng.uniform(-slack, slack)


def _names_of(thing: SceneObject) -> list[str]:
    return [f"{thing.colour} {thing.shape}", thing.shape, f"{thing.colour} thing"]


def _plural_of(name: str) -> str:
    return name + ("es" if name.endswith("cross") else "s")


def _with_article(name: str) -> str:
    return f"an {name}" if name.startswith("orange") else f"a {name}"


def _count_names(scene: Scene) -> Counter:
    return Counter(name for thing in scene.objects for name in _names_of(thing))


def _choose_referent(
    scene: Scene, rng: random.Random, *forms: int
) -> tuple[SceneObject, str] | None:
    """Choose a thing and a phrase that fits it alone; forms index `_names`, 3 is its place."""
    tally = _count_names(scene)
    options = []
    for thing in scene.objects:
        phrases = [*_names_of(thing), f"thing {CELL_PHRASES[thing.cell]}"]
        fitting = [phrases[form] for form in forms if tally[phrases[form]] < 2]
        options += [(thing, phrase) for phrase in fitting]
    return rng.choice(options) if options else None


def _ask_caption(scene, rng):
    if scene.sign is None and len(scene.objects) < 3 and rng.random() < 0.7:
        parts = [f"a {t.size} {t.colour} {t.shape} {CELL_PHRASES[t.cell]}" for t in scene.objects]
        return "describe", {}, " and ".join(parts)
    return "list", {}, ", ".join(f"{t.colour} {t.shape}" for t in scene.objects)


def _ask_colour(scene, rng):
    found = _choose_referent(scene, rng, 1, 3)
    return found and ("colour", {"what": found[1]}, found[0].colour)


def _ask_shape(scene, rng):
    found = _choose_referent(scene, rng, 2, 3)
    return found and ("shape", {"what": found[1]}, found[0].shape)


def _ask_size(scene, rng):
    found = _choose_referent(scene, rng, 0, 1, 2, 3)
    return found and ("size", {"what": found[1]}, found[0].size)


def _ask_place(scene, rng):
    if scene.sign and rng.random() < 0.3:
        return "where", {"what": "sign"}, CELL_NAMES[scene.sign[1]]
    found = _choose_referent(scene, rng, 0, 1, 2)
    return found and ("where", {"what": found[1]}, CELL_NAMES[found[0].cell])


def _ask_count(scene, rng):
    """Ask for all shapes, or for a name whose count is drawn evenly among those that occur."""
    tally = _count_names(scene)
    tally["shape"] = len(scene.objects)
    tally[rng.choice([s for s in SHAPES if s not in tally] or ["shape"])] += 0
    wanted = rng.choice(sorted(set(tally.values())))
    name = rng.choice(sorted(name for name, count in tally.items() if count == wanted))
    return "count", {"what": _plural_of(name)}, lexicon.NUMBERS[wanted]


def _ask_existence(scene, rng):
    """Ask for something present, or for something absent that often resembles what is there."""
    tally = _count_names(scene)
    if rng.random() < 0.5:
        return "exists", {"what": _with_article(rng.choice(sorted(tally)))}, "yes"
    absent = [name for name in ALL_NAMES if name not in tally]
    seen = {word for t in scene.objects for word in (t.colour, t.shape)}
    similar_names = [name for name in absent if not seen.isdisjoint(name.split())]
    name = rng.choice(similar_names if similar_names and rng.random() < 0.6 else absent)
    return "exists", {"what": _with_article(name)}, "no"


def _ask_comparison(scene, rng):
    names, noun = (list(COLOURS), "colour") if rng.random() < 0.5 else (SHAPES, "shape")
    counts = Counter({name: 0 for name in names})
    counts.update(t.colour if noun == "colour" else t.shape for t in scene.objects)
    (top, most), (_, second) = counts.most_common(2)
    if most > second and most > 1 and rng.random() < 0.35:
        return "most", {"what": noun}, top
    first, other = rng.sample(sorted(names, key=lambda n: (-counts[n], n))[:3], 2)
    if counts[first] == counts[other]:
        return None
    named = [f"{n} things" if noun == "colour" else _plural_of(n) for n in (first, other)]
    more = counts[first] > counts[other]
    slots = dict(zip("ab", named, strict=True))
    if rng.random() < 0.5:
        return "more", slots, "yes" if more else "no"
    return "which", slots, named[0] if more else named[1]


def _ask_glyph(scene, rng):
    return scene.sign and ("glyph", {}, scene.sign[0])


def _ask_echo(scene, rng):
    if rng.random() < 0.6:
        text = " ".join(rng.choices(lexicon.EVERYTHING, k=rng.choice((1, 1, 2, 3))))
    else:
        letters = rng.choice(("abcdefghijklmnopqrstuvwxyz",) * 2 + (SIGNS, "0123456789"))
        text = "".join(rng.choices(letters, k=rng.randint(1, 6)))
    return "echo", {"text": text}, text


PRETRAIN_WEIGHTS = {
    "caption": 1.0,
    "colour": 1.0,
    "shape": 1.0,
    "count": 1.3,
    "where": 1.0,
    "exists": 1.3,
    "size": 0.8,
    "glyph": 1.5,
    "compare": 1.6,
    "echo": 1.0,
}
QUESTION_MAKERS = {
    "caption": _ask_caption,
    "colour": _ask_colour,
    "shape": _ask_shape,
    "count": _ask_count,
    "where": _ask_place,
    "exists": _ask_existence,
    "size": _ask_size,
    "glyph": _ask_glyph,
    "compare": _ask_comparison,
    "echo": _ask_echo,
}
QUESTION_KINDS = tuple(QUESTION_MAKERS)
