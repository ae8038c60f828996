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
from mm_piece.data.scenes.wordings import HELD_OUT, WORDINGS

SIGNS = "ABCDEFHJKLMNPRTUVXYZ234679"
ALL_NAMES = (
    *(f"{colour} {name}" for colour in COLOURS for name in (*SHAPES, "thing")),
    *SHAPES,
)
SIZES = {"big": 7.0, "small": 4.0}  # radius in pixels
_PLACES = "top left,top,top right,left,middle,right,bottom left,bottom,bottom right"
PLACES = tuple(_PLACES.split(","))  # reading order
_ON = {"left": "on the left", "right": "on the right", "middle": "in the middle"}
AT = tuple(_ON.get(place, f"at the {place}") for place in PLACES)


@dataclass(frozen=True)
class Thing:
    """One shape of a scene; `cell` counts the 3×3 grid in reading order."""

    size: str
    colour: str
    shape: str
    cell: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows, in reading order, and the seed of how it is drawn."""

    things: tuple[Thing, ...]
    sign: tuple[str, int] | None
    look: int

    @cached_property
    def image(self) -> Image.Image:
        rng = random.Random(self.look)
        page = canvas.Page(canvas.paper(rng))
        for thing in self.things:
            radius = SIZES[thing.size] + rng.uniform(-0.6, 0.6)
            x, y = _spot(rng, thing.cell, 8.5 - radius)
            canvas.shape(page, thing.shape, x, y, radius, canvas.tint(rng, thing.colour))
        if self.sign:
            letter, cell = self.sign
            x, y = _spot(rng, cell, 1.5)
            ink = canvas.tint(rng, rng.choice(("black", "white")))
            page.text(x, y, letter, canvas.font(rng.choice(canvas.FONTS), 16), ink)
        return page.finish()


def sample(rng: random.Random) -> Scene:
    """Return a random scene; few colours or few shapes make counting worth while."""
    colours = rng.sample(list(COLOURS), rng.choice((2, 3, 8)))
    shapes = rng.sample(SHAPES, rng.choice((2, 3, 6)))
    count = rng.choice((1, 2, 2, 3, 3, 4, 4))
    cells = rng.sample(range(9), count + 1)
    things = (
        Thing(rng.choice(("big", "small")), rng.choice(colours), rng.choice(shapes), cell)
        for cell in sorted(cells[:count])
    )
    sign = (rng.choice(SIGNS), cells[-1]) if rng.random() < 0.4 else None
    return Scene(tuple(things), sign, rng.getrandbits(64))


def ask(kind: str, scene: Scene, rng: random.Random, new_wording: bool = False):
    """Return a (prompt, answer) of this kind, or None if the scene gives no clear question."""
    found = QUESTIONS[kind](scene, rng)
    if found is None:
        return None
    form, slots, answer = found
    wordings = WORDINGS[form]
    pool = wordings[-HELD_OUT:] if new_wording else wordings[:-HELD_OUT]
    return rng.choice(pool).format(**slots), answer


def example(kind: str, rng: random.Random, new_wording: bool) -> dict:
    """Return one row: scenes are drawn until one suits the kind of question."""
    while True:
        scene = sample(rng)
        if found := ask(kind, scene, rng, new_wording):
            return {"image": scene.image, "prompt": found[0], "answer": found[1], "kind": kind}


def turns(scene: Scene, rng: random.Random, count: int) -> list[tuple[str, str, str]]:
    """Return up to `count` different (prompt, answer, kind) about one scene, in random order."""
    asked = {}
    for kind in rng.choices(KINDS, weights=list(PRETRAIN_WEIGHTS.values()), k=2 * count):
        if len(asked) < count and (found := ask(kind, scene, rng)):
            asked[_casual(found[0], rng)] = (found[1], kind)
    return [(prompt, answer, kind) for prompt, (answer, kind) in asked.items()]


def _casual(prompt: str, rng: random.Random) -> str:
    """Now and then write a prompt as people do: American spelling, lower case, no full stop."""
    if rng.random() < 0.15:
        prompt = prompt.replace("colour", "color")
    if rng.random() < 0.15 and ":" not in prompt and '"' not in prompt:
        prompt = prompt.lower().rstrip(".?")
    return prompt


def _spot(rng: random.Random, cell: int, slack: float) -> tuple[float, float]:
    """Return a point near the middle of a cell, at most `slack` pixels away on each axis."""
    third = SIZE / 3
    row, column = divmod(cell, 3)
    x = third * (column + 0.5) + rng.uniform(-slack, slack)
    return x, third * (row + 0.5) + rng.uniform(-slack, slack)


def _names(thing: Thing) -> list[str]:
    return [f"{thing.colour} {thing.shape}", thing.shape, f"{thing.colour} thing"]


def _plural(name: str) -> str:
    return name + ("es" if name.endswith("cross") else "s")


def _a(name: str) -> str:
    return f"an {name}" if name.startswith("orange") else f"a {name}"


def _tally(scene: Scene) -> Counter:
    return Counter(name for thing in scene.things for name in _names(thing))


def _pointed(scene: Scene, rng: random.Random, *forms: int) -> tuple[Thing, str] | None:
    """Choose a thing and a phrase that fits it alone; forms index `_names`, 3 is its place."""
    tally = _tally(scene)
    options = []
    for thing in scene.things:
        phrases = [*_names(thing), f"thing {AT[thing.cell]}"]
        fitting = [phrases[form] for form in forms if tally[phrases[form]] < 2]
        options += [(thing, phrase) for phrase in fitting]
    return rng.choice(options) if options else None


def _caption(scene, rng):
    if scene.sign is None and len(scene.things) < 3 and rng.random() < 0.7:
        parts = [f"a {t.size} {t.colour} {t.shape} {AT[t.cell]}" for t in scene.things]
        return "describe", {}, " and ".join(parts)
    return "list", {}, ", ".join(f"{t.colour} {t.shape}" for t in scene.things)


def _colour(scene, rng):
    found = _pointed(scene, rng, 1, 3)
    return found and ("colour", {"what": found[1]}, found[0].colour)


def _shape(scene, rng):
    found = _pointed(scene, rng, 2, 3)
    return found and ("shape", {"what": found[1]}, found[0].shape)


def _size(scene, rng):
    found = _pointed(scene, rng, 0, 1, 2, 3)
    return found and ("size", {"what": found[1]}, found[0].size)


def _where(scene, rng):
    if scene.sign and rng.random() < 0.3:
        return "where", {"what": "sign"}, PLACES[scene.sign[1]]
    found = _pointed(scene, rng, 0, 1, 2)
    return found and ("where", {"what": found[1]}, PLACES[found[0].cell])


def _count(scene, rng):
    """Ask for all shapes, or for a name whose count is drawn evenly among those that occur."""
    tally = _tally(scene)
    tally["shape"] = len(scene.things)
    tally[rng.choice([s for s in SHAPES if s not in tally] or ["shape"])] += 0
    wanted = rng.choice(sorted(set(tally.values())))
    name = rng.choice(sorted(name for name, count in tally.items() if count == wanted))
    return "count", {"what": _plural(name)}, lexicon.NUMBERS[wanted]


def _exists(scene, rng):
    """Ask for something present, or for something absent that often resembles what is there."""
    tally = _tally(scene)
    if rng.random() < 0.5:
        return "exists", {"what": _a(rng.choice(sorted(tally)))}, "yes"
    absent = [name for name in ALL_NAMES if name not in tally]
    seen = {word for t in scene.things for word in (t.colour, t.shape)}
    alike = [name for name in absent if not seen.isdisjoint(name.split())]
    name = rng.choice(alike if alike and rng.random() < 0.6 else absent)
    return "exists", {"what": _a(name)}, "no"


def _compare(scene, rng):
    names, noun = (list(COLOURS), "colour") if rng.random() < 0.5 else (SHAPES, "shape")
    counts = Counter({name: 0 for name in names})
    counts.update(t.colour if noun == "colour" else t.shape for t in scene.things)
    (top, most), (_, second) = counts.most_common(2)
    if most > second and most > 1 and rng.random() < 0.35:
        return "most", {"what": noun}, top
    first, other = rng.sample(sorted(names, key=lambda n: (-counts[n], n))[:3], 2)
    if counts[first] == counts[other]:
        return None
    named = [f"{n} things" if noun == "colour" else _plural(n) for n in (first, other)]
    more = counts[first] > counts[other]
    slots = dict(zip("ab", named, strict=True))
    if rng.random() < 0.5:
        return "more", slots, "yes" if more else "no"
    return "which", slots, named[0] if more else named[1]


def _glyph(scene, rng):
    return scene.sign and ("glyph", {}, scene.sign[0])


def _echo(scene, rng):
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
QUESTIONS = {
    "caption": _caption,
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "where": _where,
    "exists": _exists,
    "size": _size,
    "glyph": _glyph,
    "compare": _compare,
    "echo": _echo,
}
KINDS = tuple(QUESTIONS)
