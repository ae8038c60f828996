"""LLaVAs of parts as they come: transformers' encoders, GGUF files, pairs for a projector."""

import json

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from tiny_encoders import EDGE, PATCH, TOKENS, write_encoder
from tiny_gguf import dequantised, write_gguf
from tiny_towers import make_language
from transformers import AutoImageProcessor

import mm_piece
from mm_piece.cli.assemble import assemble as command
from mm_piece.errors import ModelError, PieceError
from mm_piece.models.assembly import assemble
from mm_piece.models.assembly.pretrained import load_pretrained_encoder
from mm_piece.models.base import load_base
from mm_piece.recipe import parse_recipe

pytestmark = pytest.mark.slow

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 30), "blue": (20, 30, 220)}


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    return make_language(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    made = {}

    def find(kind):
        if kind not in made:
            made[kind] = write_encoder(folder / kind, kind)
        return made[kind]

    return find


def colour_pairs(count):
    """Pictures of one colour each, not quite plain, and the colours' names."""
    pairs = []
    for number in range(count):
        name = list(COLOURS)[number % len(COLOURS)]
        image = Image.new("RGB", (EDGE, EDGE), COLOURS[name])
        image.putpixel((number % EDGE, number % 7), (255, 255, 255))
        pairs.append((image, name))
    return pairs


def keys_of(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@torch.inference_mode()
def states_of(folder, pixels):
    """The hidden states of the encoder alone."""
    model, _, _ = load_pretrained_encoder(str(folder), None)
    return model(pixels, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("kind", TOKENS)
def test_the_language_model_sees_what_the_tower_says(kind, encoders, language, tmp_path):
    base = assemble(str(encoders(kind)), language, tmp_path / "base", vision_layer=-2).folder
    model, processor = load_base(base)
    image = colour_pairs(1)[0][0].resize((60, 40))
    inputs = processor(images=image, text="<image>", return_tensors="pt")
    plain = AutoImageProcessor.from_pretrained(encoders(kind))(image, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], plain["pixel_values"])

    seen = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(*args))
    with torch.inference_mode():
        model(**inputs)
    expected = states_of(encoders(kind), inputs["pixel_values"])[-2]
    has_class_token = kind != "siglip"
    assert torch.equal(seen[0], expected[:, has_class_token:])
    assert seen[0].shape[1] == TOKENS[kind] == model.config.image_seq_length


@pytest.mark.parametrize("kind", TOKENS)
def test_weights_have_the_names_of_the_published_parts(kind, encoders, language, tmp_path):
    base = assemble(str(encoders(kind)), language, tmp_path / "base").folder
    own = {name.removeprefix("vision_tower.") for name in keys_of(base) if "vision_tower." in name}
    published = {name.removeprefix("vit.") for name in keys_of(encoders(kind))}
    if kind in ("clip", "siglip"):
        published = {name for name in published if name.startswith("vision_model.")}
    for part in ("head.", "vision_model.head.", "classifier."):  # that pool or name
        published = {name for name in published if not name.startswith(part)}
    if kind == "vit":
        published |= {"pooler.dense.weight", "pooler.dense.bias"}
    assert own == published


@pytest.mark.parametrize("kind", TOKENS)
def test_the_whole_path(kind, encoders, language, tmp_path):
    base = assemble(str(encoders(kind)), language, tmp_path / "base").folder
    text = f"""
base: {base}
store: {tmp_path / "store"}
tasks:
  - {{name: one, train: "scenes:digits/train[:8]", test: "scenes:digits/test[:2]"}}
  - {{name: two, train: "scenes:textures/train[:8]", test: "scenes:textures/test[:2]"}}
select: {{density: {{vision: 0.02, projector: 0.02, language: 0.02}}, samples: 4}}
train: {{max_steps: 2, learning_rate: 1e-2, disable_tqdm: true}}
"""
    store = mm_piece.train(parse_recipe(text))
    assert any(name.startswith("vision_tower.") for name in store.delta(2).indices)
    assert {name for t in (1, 2) for name in store.delta(t).indices} <= keys_of(base)

    model, _ = mm_piece.load(base, store, at=1)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    mm_piece.checkout(model, at=2)
    mm_piece.checkout(model, at=1)
    exported, _ = load_base(mm_piece.export(store, at=1, to=tmp_path / "merged"))
    for name, weight in exported.named_parameters():
        assert torch.equal(weight, before[name])
        assert torch.equal(model.get_parameter(name), before[name])
    layers = {mm_piece.families.parameter_location(name)[1] for name in keys_of(base)}
    assert layers == {None, 0, 1, 2}


@pytest.mark.parametrize("kind", TOKENS)
def test_images_of_another_size(kind, encoders, language, tmp_path):
    made = assemble(str(encoders(kind)), language, tmp_path / "base", image_size=48)
    model, processor = load_base(made.folder)
    inputs = processor(images=Image.new("RGB", (70, 50)), text="<image>", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 48, 48)
    with torch.inference_mode():
        model(**inputs)
    assert model.config.image_seq_length == TOKENS[kind] - 16 + (48 // PATCH) ** 2
    assert "for images of 48 pixels" in made.notes[0]


def test_positions_for_another_size_are_those_of_transformers(encoders, language, tmp_path):
    base = assemble(str(encoders("clip")), language, tmp_path / "base", image_size=48).folder
    model, processor = load_base(base)
    pixels = processor(images=colour_pairs(1)[0][0], text="<image>", return_tensors="pt")
    tower, _, _ = load_pretrained_encoder(str(encoders("clip")), None)
    with torch.inference_mode():
        ours = model.model.vision_tower(pixels["pixel_values"]).last_hidden_state
        theirs = tower(pixels["pixel_values"], interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(ours, theirs)


def test_several_layers_side_by_side(encoders, language, tmp_path):
    base = tmp_path / "base"
    arguments = [str(encoders("dinov2")), str(language), str(base), "--vision-layer", "-3,1,-1"]
    assert CliRunner().invoke(command, arguments, catch_exceptions=False).exit_code == 0
    model, _ = load_base(base)
    assert model.config.vision_feature_layer == [-3, 1, -1]
    assert model.model.multi_modal_projector.linear_1.in_features == 3 * 24


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("siglip2", "a Siglip2VisionModel cannot be LLaVA's tower"),
        ("convnext", "a ConvNextModel cannot be LLaVA's tower: its hidden states are not the same"),
        ("swin", "a SwinModel cannot be LLaVA's tower"),
        ("mae", "a ViTMAEModel has no token for each patch"),
        ("pixtral", "PixtralVisionModel"),
    ],
)
def test_towers_that_llava_cannot_have(kind, message, encoders, language, tmp_path):
    with pytest.raises(ModelError, match=message) as caught:
        assemble(str(encoders(kind)), language, tmp_path / "base")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "base").exists()


def test_bad_parts(encoders, language, tmp_path):
    clip, to = str(encoders("clip")), tmp_path / "base"
    cases = [
        (dict(vision=clip, image_size=30), "not whole patches of 8; take 24 or 32"),
        (dict(vision=clip, pretrained="openai"), "brings its own weights; leave out 'openai'"),
        (dict(vision=clip, vision_layer=[-1, 9]), "vision layer 9 is out of -4…3"),
        (dict(vision=str(language)), "is a llama model, which is no vision tower"),
        (dict(vision=str(tmp_path / "none")), "none"),
        (dict(vision=clip, pairs=colour_pairs(4)), "solved from 4 pairs with 3 texts"),
        (dict(vision=clip, pairs=colour_pairs(60)[::3]), "more than one text"),
        (dict(vision=clip, chat_template=" \n"), "the chat template is empty"),
    ]
    for options, message in cases:
        with pytest.raises(PieceError, match=message) as caught:
            assemble(language=language, to=to, **options)
        assert "\n" not in str(caught.value)
        assert not to.exists()

    broken = tmp_path / "broken"
    write_encoder(broken, "dinov2")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ModelError, match="lacks 18 weights"):
        assemble(str(broken), language, to)


def test_a_projector_solved_from_pairs_says_the_texts(encoders, language, tmp_path):
    made = assemble(str(encoders("dinov2")), language, tmp_path / "base", pairs=colour_pairs(48))
    assert made.notes[-1].endswith("is the nearest of 3 for 100%")
    again = assemble(str(encoders("dinov2")), language, tmp_path / "twin", pairs=colour_pairs(48))
    model, processor = load_base(made.folder)
    twin, _ = load_base(again.folder)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)

    embedding = model.get_input_embeddings().weight
    ids = [processor.tokenizer(f" {name}").input_ids for name in COLOURS]
    texts = torch.stack([embedding[torch.tensor(row)].mean(0) for row in ids])
    center = texts.mean(0)
    for image, name in colour_pairs(3):
        pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        tokens = torch.cat(list(model.model.get_image_features(pixels).pooler_output))
        angles = torch.nn.functional.cosine_similarity(tokens.mean(0) - center, texts - center)
        assert int(angles.argmax()) == list(COLOURS).index(name)


def test_pairs_from_the_command_line(encoders, language, tmp_path):
    for number, (image, name) in enumerate(colour_pairs(30)):
        (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "train" / name / f"{number}.png")
    vision = str(encoders("dinov2"))
    options = ["--pairs", str(tmp_path / "train")]
    run = CliRunner().invoke(command, [vision, str(language), str(tmp_path / "base"), *options])
    assert run.exit_code == 0, run.output
    assert "solved from 30 pairs" in run.output

    lonely = CliRunner().invoke(command, [vision, str(language), "x", "--images", "y"])
    assert lonely.exit_code == 2


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    pytest.importorskip("gguf")
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_gguf_file_brings_weights_and_tokens(file, encoders, tmp_path):
    made = assemble(str(encoders("dinov2")), file, tmp_path / "base")
    text = " ".join(made.notes)
    assert "the weights of tiny.gguf were dequantised to float32" in text
    assert "numbers are split into digits" in text
    model, processor = load_base(made.folder)
    expected = torch.tensor(dequantised("blk.1.ffn_down.weight"))
    assert torch.equal(model.model.language_model.layers[1].mlp.down_proj.weight, expected)
    ids = processor.tokenizer("123").input_ids
    assert processor.tokenizer.convert_ids_to_tokens(ids) == ["1", "2", "3"]
    assert processor.tokenizer.decode(ids) == "123"
    assert "quantization_config" not in (made.folder / "config.json").read_text()


def test_a_folder_of_one_gguf_file(file, encoders, tmp_path):
    made = assemble(str(encoders("dinov2")), file.parent, tmp_path / "base")
    assert any("tiny.gguf" in note for note in made.notes)


def test_bad_gguf_files(file, encoders, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(file.read_bytes())
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:3000])
    other = write_gguf(tmp_path / "other.gguf", architecture="unheard")
    for source, message in (
        (folder, "holds a.gguf, b.gguf; name one of them"),
        (cut, "cannot load language model"),
        (other, "unheard"),
        (tmp_path / "none.gguf", "none.gguf"),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            assemble(str(encoders("dinov2")), source, tmp_path / "base")
        assert "\n" not in str(caught.value)
