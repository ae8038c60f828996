"""Bases whose parts do not fit each other are named in one line, before a store exists."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from newer_families import ALL, ALL_TEXT
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    LlavaForConditionalGeneration,
    PixtralProcessor,
)

import mm_piece
from mm_piece.data import Example, encode
from mm_piece.errors import DataError, ModelError, PieceError, format_error
from mm_piece.evaluation.answers import generate_batch
from mm_piece.models.base import load_base, load_processor
from mm_piece.recipe import Recipe, parse_recipe
from mm_piece.training.base_parts import BaseParts
from mm_piece.training.recipe_check import check

pytestmark = pytest.mark.slow


def recipe_on(base: Path, folder: Path, image: bool = True, **rows: list[dict]) -> Recipe:
    Image.linear_gradient("L").resize((40, 24)).convert("RGB").save(folder / "a.png")
    shown = {"image": "a.png"} if image else {}
    for part in ("train", "test"):
        content = rows.get(part) or [{"prompt": "Which?", "answer": "red", **shown}] * 2
        (folder / f"{part}.json").write_text(json.dumps(content))
    files = {part: str(folder / f"{part}.json") for part in ("train", "test")}
    content = {
        **{"base": str(base), "store": str(folder / "store")},
        "tasks": [{"name": "t", "max_new_tokens": 2, **files}],
        "select": {"method": "random", "density": 0.01},
        "train": {"max_steps": 1, "disable_tqdm": True},
    }
    return parse_recipe(json.dumps(content))


def matches(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None


def told(call: Callable[[], Any]) -> str:
    """What a call refuses with, or the errors that its result lists."""
    try:
        return " ".join(getattr(call(), "errors", ()))
    except PieceError as error:
        assert "\n" not in str(error)
        return str(error)


def edit(base: Path, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    path = base / f"{file}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def sized(content: dict[str, Any]) -> None:
    sizes = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    content["image_processor"] |= sizes


PROCESSOR, CONFIG = "processor_config", "config"
MISFITS = {
    "no patch_size": ("llava", PROCESSOR, lambda c: c.pop("patch_size"), "no patch_size"),
    "another patch_size": (
        *("llava", PROCESSOR, lambda c: c.update(patch_size=4)),
        "leaves 16 places .* makes 4 features",
    ),
    "another strategy": (
        *("llava", PROCESSOR, lambda c: c.update(vision_feature_select_strategy="full")),
        "leaves 5 places .* makes 4 features .* vision_feature_select_strategy",
    ),
    "another image size": ("llava", PROCESSOR, sized, r"vision tower cannot take .*24\*24"),
    "another image token": (
        *("llava", CONFIG, lambda c: c.update(image_token_id=5)),
        r"puts the token '<image>' \(3\) .* looks for 5 \(image_token_id",
    ),
    "an image token beyond the embedding": (
        *("llava", CONFIG, lambda c: c.update(image_token_id=9999)),
        "looks for 9999",
    ),
    "other pinpoints": (
        *("llava_next", CONFIG, lambda c: c.update(image_grid_pinpoints=[[16, 16]])),
        r"leaves \d+ places .* makes \d+ features",
    ),
    "no num_image_tokens": (
        *("llava_onevision", PROCESSOR, lambda c: c.pop("num_image_tokens")),
        "no num_image_tokens",
    ),
    "another merge_size": (
        *("qwen2_vl", PROCESSOR, lambda c: c["image_processor"].update(merge_size=1)),
        r"leaves \d+ places .* makes \d+ features",
    ),
    "another patch_size (Qwen)": (
        *("qwen3_vl", PROCESSOR, lambda c: c["image_processor"].update(patch_size=14)),
        "patches of 1176 values, the model takes 1536",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_check_names_a_misfit(misfit, family_base, tmp_path):
    family, file, change, said = MISFITS[misfit]
    base = shutil.copytree(family_base(family), tmp_path / "base")
    edit(base, file, change)
    assert matches(said, told(lambda: check(recipe_on(base, tmp_path))))
    texts = [{"prompt": "Which?", "answer": "red"}]  # rows without images have nothing to miss
    assert told(lambda: check(recipe_on(base, tmp_path, train=texts, test=texts))) == ""


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("misfit", ["no patch_size", "another image token"])
def test_train_names_it_before_there_is_a_store(misfit, part, family_base, tmp_path):
    family, file, change, said = MISFITS[misfit]
    base = shutil.copytree(family_base(family), tmp_path / "base")
    edit(base, file, change)
    other = "test" if part == "train" else "train"
    recipe = recipe_on(base, tmp_path, **{other: [{"prompt": "Which?", "answer": "red"}] * 2})
    assert matches(said, told(lambda: mm_piece.train(recipe)))
    assert not (tmp_path / "store").exists()


def with_tokens(base: Path, *tokens: str, **special: str) -> Path:
    """Tokens are added to the tokenizer, and the embedding stays as it is."""
    processor = load_processor(base)
    processor.tokenizer.add_tokens(list(tokens))
    processor.tokenizer.add_special_tokens(special)
    processor.save_pretrained(base)
    return base


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_token_without_a_row_is_named_by_check_and_train(part, family_base, tmp_path):
    base = with_tokens(shutil.copytree(family_base("llava"), tmp_path / "base"), "green")
    rows = [{"prompt": "Which?", "answer": "red"}, {"prompt": "Is it green?", "answer": "no"}]
    recipe = recipe_on(base, tmp_path, image=False, **{part: rows})
    said = rf"{part}\.json row 1: its token 'green' \(360\) has no row .* has 360"
    assert matches(said, told(lambda: check(recipe)))
    assert matches(said, told(lambda: mm_piece.train(recipe)))
    assert not (tmp_path / "store").exists()


def test_a_token_that_no_row_needs_is_no_fault(family_base, tmp_path):
    base = with_tokens(shutil.copytree(family_base("llava"), tmp_path / "base"), "green")
    answers = [{"prompt": "Which?", "answer": "green"}]  # of test rows, no model sees them
    recipe = recipe_on(base, tmp_path, image=False, test=answers)
    found = check(recipe)
    assert not found.errors
    assert "its tokenizer has 1 tokens more than its embedding has rows" in found.notes[0]
    assert len(mm_piece.train(recipe)) == 1


def test_a_padding_token_without_a_row_is_named(family_base, tmp_path):
    base = shutil.copytree(family_base("llava"), tmp_path / "base")
    with_tokens(base, pad_token="[PAD]")
    recipe = recipe_on(base, tmp_path, image=False)
    for call in (check, mm_piece.train):
        assert matches(
            r"padding token '\[PAD\]' \(360\) has no row", told(lambda c=call: c(recipe))
        )
    assert not (tmp_path / "store").exists()


def test_a_processor_that_writes_text_is_named(family_base, tmp_path):
    """Marks around an image are the processor's business, the text is not."""
    base = shutil.copytree(family_base("llava (Pixtral)"), tmp_path / "base")
    recipe = recipe_on(base, tmp_path)
    assert check(recipe).errors == []

    processor = load_processor(base)
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which one?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    example = Example(0, turns, [Image.new("RGB", (24, 24))], "made up")
    encode(example, processor)
    whole = PixtralProcessor.__call__

    def changing(self, images=None, text=None, **options):
        return whole(self, images, [text[0].replace("one", "1 of them")], **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PixtralProcessor, "__call__", changing)
        said = told(lambda: encode(example, processor))
    assert matches(r"made up row 0: the base's PixtralProcessor changed more than image", said)


@pytest.mark.parametrize("family", sorted({*ALL} - {*ALL_TEXT}))
def test_parts_that_fit_pass(family, family_base):
    base = family_base(family)
    parts = BaseParts(str(base), None, load_processor(base))
    for sizes in ([(24, 24)], [(90, 20), (16, 50)], []):
        images = [Image.new("RGB", size) for size in sizes]
        marks = [{"type": "image"} for _ in images]
        turns = [
            {"role": "user", "content": [*marks, {"type": "text", "text": "Which?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        ]
        example = Example(0, turns, images, "made up")
        parts.require_fit(example, encode(example, parts.processor))

    # these towers look at values, which the model without values does not have
    reads_values = family in ("idefics3", "smolvlm", "mistral3", "llava (Pixtral)")
    notes = [note for note in parts.notes if "its vision tower does not run without" not in note]
    assert notes == []
    assert len(parts.notes) == reads_values


@pytest.mark.parametrize("part", ["check", "train"])
def test_a_tower_that_cannot_be_asked_without_its_values_is_named(
    part, base, tmp_path, monkeypatch, capsys
):
    tower = "transformers.LlavaForConditionalGeneration.get_image_features"
    found = LlavaForConditionalGeneration.get_image_features

    def read(model, *given, **named):
        features = found(model, *given, **named)
        features.pooler_output[0].sum().item()
        return features

    monkeypatch.setattr(tower, read)
    recipe = recipe_on(base, tmp_path)
    if part == "check":
        lines = check(recipe).notes
    else:
        mm_piece.train(recipe)
        lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if "its vision tower does not run without its values" in line]
    assert len(told) == 1


class Odd(Exception):
    """An error of no kind that one would list."""


@pytest.mark.parametrize(
    "error", [Odd("oh\nno"), KeyError("x"), AssertionError(), ZeroDivisionError()]
)
def test_whatever_a_library_raises_becomes_one_line(error, base, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise error

    model, processor = load_base(base)
    question = [{"role": "user", "content": [{"type": "text", "text": "Which?"}]}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    example = Example(7, [*question, answer], [], "rows.json")
    line = format_error(error)
    monkeypatch.setattr(type(model), "generate", fail)
    with pytest.raises(ModelError, match="the base cannot answer rows.json row 7: ") as caught:
        generate_batch(model, processor, [example], 2)
    assert str(caught.value).endswith(line) and caught.value.__cause__ is error
    monkeypatch.setattr(type(processor), "__call__", fail)
    with pytest.raises(DataError, match="rows.json row 7: the base's processor cannot") as caught:
        encode(example, processor)
    assert line in str(caught.value) and caught.value.__cause__ is error
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", fail)
    for load in (load_base, load_processor):
        with pytest.raises(ModelError, match="cannot load base") as caught:
            load(base)
        assert str(caught.value).endswith(line) and caught.value.__cause__ is error


def spoiled(base: Path, to: Path, name: str, value: float) -> Path:
    """A copy of a base with another value as the last entry of a weight."""
    shutil.copytree(base, to)
    tensors = load_file(to / "model.safetensors")
    (key,) = (key for key in tensors if name in key)
    tensors[key].view(-1)[-1] = value
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize("family", ["qwen2", "llava"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(family_base, tmp_path, family, value):
    name = "layers.1.self_attn.v_proj.weight"
    broken = spoiled(family_base(family), tmp_path / "base", f"model.{name}", value)
    recipe = recipe_on(broken, tmp_path, image=family == "llava")
    for call in (check, mm_piece.train):
        error = told(lambda call=call: call(recipe))
        assert f"{name} holds {value} in float32" in error and str(broken) in error
    assert not (tmp_path / "store").exists()


def test_a_dtype_that_cannot_hold_a_weight_is_named(family_base, tmp_path):
    broken = spoiled(family_base("qwen2"), tmp_path / "base", "model.norm.weight", 1e5)
    recipe = recipe_on(broken, tmp_path, image=False)
    half = recipe.model_copy(update={"model": {"dtype": "float16"}})
    for call in (check, mm_piece.train):
        assert "model.norm.weight holds inf in float16" in told(lambda call=call: call(half))
    assert told(lambda: check(recipe)) == ""
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("method", ["random", "magnitude", "piece-f"])
def test_a_loss_that_is_no_number_is_named(family_base, tmp_path, method):
    """Of a base whose weights and inputs are all finite."""
    name = "layers.1.input_layernorm.weight"
    broken = spoiled(family_base("qwen2"), tmp_path / "base", name, 3e38)
    select = {"method": method}
    recipe = recipe_on(broken, tmp_path, image=False)
    recipe = recipe.model_copy(update={"select": recipe.select.model_copy(update=select)})
    error = told(lambda: mm_piece.train(recipe))
    assert matches(r"base: its loss on .*train.json row \d is (nan|inf)", error), error
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("setting", [{"image_std": [0, 0, 0]}, {"image_mean": [float("nan")] * 3}])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_processor_that_makes_no_numbers_is_named(family_base, tmp_path, family, setting):
    shutil.copytree(family_base(family), tmp_path / "base")
    found = False
    for file in (tmp_path / "base").glob("*processor_config.json"):
        content = json.loads(file.read_text())
        part = content.get("image_processor", content)
        found = found or "image_std" in part
        part |= setting
        file.write_text(json.dumps(content))
    assert found
    recipe = recipe_on(tmp_path / "base", tmp_path)
    for call in (check, mm_piece.train):
        error = told(lambda call=call: call(recipe))
        assert matches(r"t\w+\.json row \d: the base's \w+ makes pixel_values that", error), error
    assert not (tmp_path / "store").exists()


def test_the_rehearsed_step_fails_in_one_line(base, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise Odd("deep inside")

    recipe = recipe_on(base, tmp_path)
    monkeypatch.setattr("transformers.LlavaForConditionalGeneration.forward", fail)
    assert told(lambda: mm_piece.train(recipe)) == "train: deep inside"
    assert not (tmp_path / "store").exists()
