"""Cloths of two colours, in nine patterns: one of the tasks to learn after the base."""

import math
from random import Random

import numpy as np
from PIL import Image

from mm_piece.data.scenes.canvas import COLOURS, SIZE, sample_tint
from mm_piece.data.scenes.lexicon import TEXTURES

Field = np.ndarray  # (48, 48), one number for each pixel

TEXTURE_PROMPTS = (
    "How would you describe this cloth?",
    "Pattern of the cloth?",
)


def make_texture(
    index: int,
    split: str,
    rng: Random,
) -> tuple[Image.Image, str, str, str]:
    """Draw a cloth of two colours; the answer is the name of its pattern."""
    name = TEXTURES[index % len(TEXTURES)]
    colours = list(COLOURS)
    first, second = rng.sample(colours, 2)
    pattern = _make_pattern(name, rng)
    second_share = pattern[..., None]  # (48, 48, 1)
    first_share = 1 - second_share
    first_tint = sample_tint(rng, first)
    second_tint = sample_tint(rng, second)
    first_dye = first_share * np.array(first_tint)  # (48, 48, 3)
    second_dye = second_share * np.array(second_tint)

    # one shift of brightness for each line of pixels
    shifts = [rng.gauss(0, 5) for _ in range(SIZE)]
    noise = np.array(shifts)
    noisy = first_dye + second_dye + noise[:, None, None]
    clipped = np.clip(noisy, 0, 255)
    pixels = clipped.astype(np.uint8)
    image = Image.fromarray(pixels)
    prompt = rng.choice(TEXTURE_PROMPTS)
    return image, prompt, name, "texture"


def _make_pattern(name: str, rng: Random) -> Field:
    """Return the pattern as a 48×48 array of weights between 0 and 1."""
    wavelength = rng.uniform(8, 13)  # pixels
    step = 2 * math.pi / wavelength
    grid = np.mgrid[0:SIZE, 0:SIZE]
    rows, columns = grid * step
    u = columns + rng.uniform(0, 6)
    v = rows + rng.uniform(0, 6)
    if rng.random() < 0.5:
        u, v = v, u

    make_field = PATTERNS[name]
    field = make_field(u, v, rng)
    # steep, so that most pixels have one of the two colours
    weights = 0.5 + 2.5 * field
    return np.clip(weights, 0, 1)


def _make_stripes(
    u: Field,
    v: Field,
    rng: Random,
) -> Field:
    slope = rng.choice((0, 0, 1))
    phases = u + slope * v
    return np.sin(phases)


def _make_waves(
    u: Field,
    v: Field,
    rng: Random,
) -> Field:
    slow_phases = 0.7 * v
    bend = 1.6 * np.sin(slow_phases)
    return np.sin(u + bend)


def _make_rings(
    u: Field,
    v: Field,
    rng: Random,
) -> Field:
    middle_u = rng.uniform(0.35, 0.65) * u.max()
    middle_v = rng.uniform(0.35, 0.65) * v.max()
    distance = np.hypot(u - middle_u, v - middle_v)
    return np.sin(1.2 * distance)


def _make_weave(
    u: Field,
    v: Field,
    rng: Random,
) -> Field:
    # which of the two threads lies on top
    checks = np.sin(u / 2) * np.sin(v / 2)
    is_across = checks > 0
    across = np.sin(2 * u)
    along = np.sin(2 * v)
    return np.where(is_across, across, along)


def _make_speckles(
    u: Field,
    v: Field,
    rng: Random,
) -> Field:
    seed = rng.getrandbits(32)
    generator = np.random.default_rng(seed)
    coarse = generator.random((24, 24))
    block = np.ones((2, 2))
    fine = np.kron(coarse, block)  # (48, 48)
    return fine - 0.75


def _make_gradient(
    u: Field,
    v: Field,
    rng: Random,
) -> Field:
    centred_u = u - u.mean()
    centred_v = v - v.mean()
    across = centred_u / np.ptp(u) * 0.4
    along = 0.1 * centred_v / np.ptp(v)
    return across + along


def _make_dots(
    u: Field,
    v: Field,
    rng: Random,
) -> Field:
    return np.cos(u) + np.cos(v) - 1.0


def _make_checks(
    u: Field,
    v: Field,
    rng: Random,
) -> Field:
    across = np.sign(np.sin(u))
    along = np.sign(np.sin(v))
    return across * along


def _make_crosses(
    u: Field,
    v: Field,
    rng: Random,
) -> Field:
    across = np.cos(u)
    along = np.cos(v)
    return np.maximum(across, along) - 0.85


# fields over the phases u and v: positive where the second colour prevails
PATTERNS = {
    "striped": _make_stripes,
    "dotted": _make_dots,
    "checked": _make_checks,
    "wavy": _make_waves,
    "ringed": _make_rings,
    "woven": _make_weave,
    "speckled": _make_speckles,
    "crossed": _make_crosses,
    "faded": _make_gradient,
}
