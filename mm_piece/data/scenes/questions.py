"""What is asked of a scene: ten kinds of question, each in several wordings.

The last wordings of each kind are never used in training.
"""

from collections import Counter
from random import Random

from mm_piece.data.scenes import lexicon
from mm_piece.data.scenes.base import (
    CELL_NAMES,
    CELL_PHRASES,
    SIGNS,
    Scene,
    SceneObject,
    sample_scene,
)
from mm_piece.data.scenes.canvas import COLOURS, SHAPES
from mm_piece.data.scenes.wordings import NUM_HELD_OUT, WORDINGS

Turn = tuple[str, str, str]  # prompt, answer, kind

_NOUNS = (*SHAPES, "thing")
ALL_NAMES = (
    *(f"{colour} {noun}" for colour in COLOURS for noun in _NOUNS),
    *SHAPES,
)


def ask_question(
    kind: str,
    scene: Scene,
    rng: Random,
    new_wording: bool = False,
):
    """Return a (prompt, answer) of this kind, or None if the scene gives no clear question."""
    found = QUESTION_MAKERS[kind](scene, rng)
    if found is None:
        return None
    form, slots, answer = found

    wordings = WORDINGS[form]
    trained = wordings[:-NUM_HELD_OUT]
    held_out = wordings[-NUM_HELD_OUT:]
    wording = rng.choice(held_out if new_wording else trained)
    prompt = wording.format(**slots)
    return prompt, answer


def make_question_row(
    kind: str,
    rng: Random,
    new_wording: bool,
) -> dict:
    """Return one row; draw scenes until one suits the kind of question."""
    while True:
        scene = sample_scene(rng)
        found = ask_question(kind, scene, rng, new_wording)
        if found:
            prompt, answer = found
            return {
                "image": scene.image,
                "prompt": prompt,
                "answer": answer,
                "kind": kind,
            }


def make_turns(
    scene: Scene,
    rng: Random,
    count: int,
) -> list[Turn]:
    """Return up to `count` different (prompt, answer, kind) about one scene, in random order."""
    weights = list(PRETRAIN_WEIGHTS.values())
    # twice as many as needed, because a scene does not suit every kind
    kinds = rng.choices(QUESTION_KINDS, weights=weights, k=2 * count)
    asked = {}
    for kind in kinds:
        if len(asked) == count:
            break
        found = ask_question(kind, scene, rng)
        if found:
            prompt, answer = found
            asked[_vary_style(prompt, rng)] = (answer, kind)
    return [(prompt, *rest) for prompt, rest in asked.items()]


def _vary_style(prompt: str, rng: Random) -> str:
    """Return the prompt, now and then in American spelling or in lower case without a full stop."""
    if rng.random() < 0.15:
        prompt = prompt.replace("colour", "color")
    # a prompt with a colon or quotation marks has text to echo, whose case matters
    if rng.random() < 0.15 and ":" not in prompt and '"' not in prompt:
        prompt = prompt.lower().rstrip(".?")
    return prompt


def _names_of(thing: SceneObject) -> list[str]:
    return [
        f"{thing.colour} {thing.shape}",
        thing.shape,
        f"{thing.colour} thing",
    ]


def _plural_of(name: str) -> str:
    ending = "es" if name.endswith("cross") else "s"
    return name + ending


def _with_article(name: str) -> str:
    article = "an" if name.startswith("orange") else "a"
    return f"{article} {name}"


def _count_names(scene: Scene) -> Counter:
    counts = Counter()
    for thing in scene.objects:
        counts.update(_names_of(thing))
    return counts


def _choose_referent(
    scene: Scene,
    rng: Random,
    *forms: int,
) -> tuple[SceneObject, str] | None:
    """Choose a thing and a phrase that fits it alone; forms index `_names_of`, 3 is its place."""
    tally = _count_names(scene)
    options = []
    for thing in scene.objects:
        place = f"thing {CELL_PHRASES[thing.cell]}"
        phrases = [*_names_of(thing), place]
        for form in forms:
            phrase = phrases[form]
            # a place is not among the counted names: cells are distinct
            if tally[phrase] < 2:
                options.append((thing, phrase))
    if not options:
        return None
    return rng.choice(options)


def _ask_caption(scene, rng):
    # the order of the conditions matters: a number is drawn only if the first two hold
    is_simple = scene.sign is None and len(scene.objects) < 3
    if is_simple and rng.random() < 0.7:
        parts = []
        for thing in scene.objects:
            place = CELL_PHRASES[thing.cell]
            parts.append(f"a {thing.size} {thing.colour} {thing.shape} {place}")
        return "describe", {}, " and ".join(parts)
    names = [f"{thing.colour} {thing.shape}" for thing in scene.objects]
    return "list", {}, ", ".join(names)


def _ask_attribute(name, *forms):
    """Return the question for an attribute of a thing that one of some forms of its name tells."""

    def ask(scene, rng):
        found = _choose_referent(scene, rng, *forms)
        if not found:
            return None
        thing, phrase = found
        return name, {"what": phrase}, getattr(thing, name)

    return ask


def _ask_place(scene, rng):
    if scene.sign and rng.random() < 0.3:
        _, cell = scene.sign
        return "where", {"what": "sign"}, CELL_NAMES[cell]
    found = _choose_referent(scene, rng, 0, 1, 2)
    if not found:
        return None
    thing, phrase = found
    return "where", {"what": phrase}, CELL_NAMES[thing.cell]


def _ask_count(scene, rng):
    """Ask for all shapes, or for a name whose count is drawn evenly among those that occur."""
    tally = _count_names(scene)
    tally["shape"] = len(scene.objects)

    # one absent shape joins the tally, so that zero may be the answer
    absent = [shape for shape in SHAPES if shape not in tally]
    tally[rng.choice(absent or ["shape"])] += 0

    wanted = rng.choice(sorted(set(tally.values())))
    names = sorted(name for name, count in tally.items() if count == wanted)
    name = rng.choice(names)
    return "count", {"what": _plural_of(name)}, lexicon.NUMBERS[wanted]


def _ask_existence(scene, rng):
    """Ask for something present, or for something absent that often resembles what is there."""
    tally = _count_names(scene)
    if rng.random() < 0.5:
        name = rng.choice(sorted(tally))
        return "exists", {"what": _with_article(name)}, "yes"

    absent = [name for name in ALL_NAMES if name not in tally]
    seen = set()
    for thing in scene.objects:
        seen |= {thing.colour, thing.shape}
    similar = [name for name in absent if seen & set(name.split())]
    # a number is drawn only if there is a choice
    prefers_similar = similar and rng.random() < 0.6
    name = rng.choice(similar if prefers_similar else absent)
    return "exists", {"what": _with_article(name)}, "no"


def _ask_comparison(scene, rng):
    if rng.random() < 0.5:
        noun = "colour"
        names = list(COLOURS)
    else:
        noun = "shape"
        names = list(SHAPES)
    counts = Counter({name: 0 for name in names})
    counts.update(getattr(thing, noun) for thing in scene.objects)

    (top, most), (_, runner_up) = counts.most_common(2)
    if most > runner_up and most > 1 and rng.random() < 0.35:
        return "most", {"what": noun}, top

    # only the three most frequent, so that two absent ones are seldom compared
    by_count = sorted(names, key=lambda name: (-counts[name], name))
    first, other = rng.sample(by_count[:3], 2)
    if counts[first] == counts[other]:
        return None

    def name_group(name: str) -> str:
        return f"{name} things" if noun == "colour" else _plural_of(name)

    first_group = name_group(first)
    other_group = name_group(other)
    slots = {"a": first_group, "b": other_group}
    more = counts[first] > counts[other]
    if rng.random() < 0.5:
        return "more", slots, "yes" if more else "no"
    return "which", slots, first_group if more else other_group


def _ask_glyph(scene, rng):
    if scene.sign is None:
        return None
    letter, _ = scene.sign
    return "glyph", {}, letter


def _ask_echo(scene, rng):
    if rng.random() < 0.6:
        count = rng.choice((1, 1, 2, 3))
        words = rng.choices(lexicon.EVERYTHING, k=count)
        text = " ".join(words)
    else:
        lower_case = "abcdefghijklmnopqrstuvwxyz"
        # lower case is listed twice, to be drawn twice as often
        letters = rng.choice((lower_case, lower_case, SIGNS, "0123456789"))
        length = rng.randint(1, 6)
        text = "".join(rng.choices(letters, k=length))
    return "echo", {"text": text}, text


# weights of the kinds in pretraining; a split of rows has equally many of each
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
# each returns a key of WORDINGS, what fills its blanks, and the answer; or None
QUESTION_MAKERS = {
    "caption": _ask_caption,
    "colour": _ask_attribute("colour", 1, 3),
    "shape": _ask_attribute("shape", 2, 3),
    "count": _ask_count,
    "where": _ask_place,
    "exists": _ask_existence,
    "size": _ask_attribute("size", 0, 1, 2, 3),
    "glyph": _ask_glyph,
    "compare": _ask_comparison,
    "echo": _ask_echo,
}
QUESTION_KINDS = tuple(QUESTION_MAKERS)
