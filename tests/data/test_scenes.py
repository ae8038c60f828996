"""The embedded data: the same everywhere, disjoint between splits, balanced, never ambiguous."""

import hashlib
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont

from mm_piece import errors
from mm_piece.data import read, scenes
from mm_piece.data.scenes import base, canvas, wordings

NAMES = tuple(scenes.TASKS)
DOWNSTREAM = tuple(name for name in NAMES if name != "base")


@pytest.fixture(scope="module")
def data() -> dict:
    """Every split of every task, drawn once."""
    return {
        (name, split): scenes.make_rows(name, split)
        for name in NAMES
        for split in scenes.SPLIT_SIZES
    }


def prints(rows: list[dict]) -> list[str]:
    """Return a digest of each row's picture and prompt."""
    return [
        hashlib.sha256(row["image"].tobytes() + row["prompt"].encode()).hexdigest() for row in rows
    ]


def same(first: list[dict], second: list[dict]) -> bool:
    texts = [[(r["prompt"], r["answer"], r["kind"]) for r in rows] for rows in (first, second)]
    return texts[0] == texts[1] and prints(first) == prints(second)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_depend_on_the_order_of_calls(data, name):
    assert same(data[name, "test"], scenes.make_rows(name, "test"))


def test_the_questions_are_those_that_were_published(data):
    """Texts come from integer arithmetic alone, so they are the same wherever the tests run."""
    texts = [
        f"{r['prompt']}|{r['answer']}|{r['kind']}"
        for name in NAMES
        for split in scenes.SPLIT_SIZES
        for r in data[name, split]
    ]
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == "8638841fa33a5624"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", scenes.SPLIT_SIZES)
def test_each_row_is_a_small_picture_with_a_question_and_an_answer(data, name, split):
    rows = data[name, split]
    assert len(rows) == scenes.SPLIT_SIZES[split]
    for row in rows:
        assert list(row) == ["image", "prompt", "answer", "kind"]
        assert row["image"].size == (48, 48) and row["image"].mode == "RGB"
        assert all(row[key] and row[key] == row[key].strip() for key in ("prompt", "answer"))


@pytest.mark.parametrize("name", NAMES)
def test_no_question_about_a_picture_occurs_twice(data, name):
    seen = [digest for split in scenes.SPLIT_SIZES for digest in prints(data[name, split])]
    assert len(set(seen)) == len(seen)


def test_handwriting_of_one_split_is_in_no_other():
    ranges = [set(range(*bounds)) for bounds in scenes.downstream.SCAN_RANGES.values()]
    assert len(set().union(*ranges)) == sum(map(len, ranges)) == 1797


def test_handwriting_is_that_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = datasets.load_digits(return_X_y=True)
    scans, embedded, _ = scenes.downstream._load_scans()
    assert embedded == labels.tolist()
    assert np.array_equal(scans, (pixels.reshape(-1, 8, 8) * 15.9).astype(np.uint8))


@pytest.mark.parametrize("name", canvas.FONTS)
def test_fonts_draw_as_those_of_matplotlib(name):
    matplotlib = pytest.importorskip("matplotlib")
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    for size in (12, 17, 18, 24):
        embedded = canvas.load_font(name, size)
        whole = ImageFont.truetype(str(file), size * canvas.SCALE, layout_engine=0)
        for text in (*map(chr, range(32, 127)), "AVATAR", "Wolf To"):  # pairs that are kerned too
            mask, offset = embedded.getmask2(text)
            expected, expected_offset = whole.getmask2(text)
            assert (bytes(mask), offset) == (bytes(expected), expected_offset)


@pytest.mark.parametrize("name", DOWNSTREAM)
@pytest.mark.parametrize("split", scenes.SPLIT_SIZES)
def test_no_answer_of_a_later_task_is_frequent(data, name, split):
    counts = Counter(row["answer"] for row in data[name, split])
    assert counts.most_common(1)[0][1] <= 0.35 * scenes.SPLIT_SIZES[split]
    assert len(counts) >= 9


def test_the_base_asks_every_kind_equally_often_and_answers_evenly(data):
    rows = data["base", "train"]
    assert set(Counter(row["kind"] for row in rows).values()) == {100}
    for kind in ("exists", "size"):
        counts = Counter(row["answer"] for row in rows if row["kind"] == kind)
        assert len(counts) == 2 and min(counts.values()) >= 35
    places = Counter(row["answer"] for row in rows if row["kind"] == "where")
    assert len(places) == 9 and max(places.values()) <= 20


def test_some_wordings_are_kept_for_validation_and_test(data):
    kept = {
        text for texts in wordings.WORDINGS.values() for text in texts[-wordings.NUM_HELD_OUT :]
    }
    fixed = {text for text in kept if "{" not in text}
    prompts = {
        split: {row["prompt"] for row in data["base", split]} for split in scenes.SPLIT_SIZES
    }
    assert not fixed & prompts["train"]
    assert fixed & prompts["test"] and fixed & prompts["validation"]
    assert all(len(texts) - wordings.NUM_HELD_OUT >= 4 for texts in wordings.WORDINGS.values())


def test_a_question_points_at_one_thing_only():
    """Colour, shape, size and place are asked only where the picture gives one answer."""
    for scene, turns in islice(scenes.iter_scenes(seed=3), 300):
        for prompt, answer, kind in turns:
            assert facts_agree(scene, prompt.lower(), answer, kind), (prompt, answer, scene.objects)


def facts_agree(scene, prompt: str, answer: str, kind: str) -> bool:
    """Check an answer from the scene's facts, by another road than the one that wrote it."""
    fitting = {
        "colour": lambda: {t.colour for t in scene.objects if described(t, prompt)},
        "shape": lambda: {t.shape for t in scene.objects if described(t, prompt)},
        "size": lambda: {t.size for t in scene.objects if described(t, prompt)},
        "exists": lambda: {"yes" if any(described(t, prompt) for t in scene.objects) else "no"},
        "glyph": lambda: {scene.sign[0]},
    }
    return kind not in fitting or fitting[kind]() == {answer}


def described(thing, prompt: str) -> bool:
    """Whether every colour, shape and place that the prompt names is the thing's."""
    words = set(prompt.replace("?", " ").replace(".", " ").split())
    colours, shapes = words & set(base.COLOURS), words & set(base.SHAPES)
    placed = f"thing {base.CELL_PHRASES[thing.cell]}"
    elsewhere = (
        "thing at the" in prompt or "thing on the" in prompt or "thing in the middle" in prompt
    )
    here = placed in prompt and not prompt.split(placed)[1].startswith((" left", " right"))
    return colours <= {thing.colour} and shapes <= {thing.shape} and (here or not elsewhere)


def test_the_stream_repeats_by_its_seed_and_never_repeats_a_training_picture(data):
    first, again = (list(islice(scenes.iter_scenes(seed=5), 50)) for _ in range(2))
    assert first == again
    assert first != list(islice(scenes.iter_scenes(seed=6), 50))
    drawn = {scene.image.tobytes() for scene, _ in first}
    assert not drawn & {row["image"].tobytes() for row in data["base", "test"]}


@pytest.mark.parametrize(
    "name, split, allowed", [("digit", "train", "digits"), ("digits", "dev", "validation")]
)
def test_a_wrong_name_is_answered_with_the_allowed_ones(name, split, allowed):
    with pytest.raises(errors.DataError) as caught:
        scenes.make_rows(name, split)
    assert allowed in str(caught.value) and "\n" not in str(caught.value)


def test_a_misspelt_task_is_named():
    close = r"unknown task 'texture': did you mean 'textures'\? choose from base"
    with pytest.raises(errors.DataError, match=close):
        read("scenes:texture/test")
    with pytest.raises(errors.DataError, match="unknown task 'nothing alike': choose from base"):
        read("scenes:nothing alike/test")
