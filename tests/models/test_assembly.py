"""LLaVAs of open_clip towers: checkpoints like any other, all parts as they were; or a refusal."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner
from extras import needs
from safetensors.torch import load_file, save_file
from sized_pictures import SIZES, picture
from tiny_llava import make_tokenizer
from tiny_towers import (
    ARCHITECTURES,
    LANGUAGES,
    TEXT,
    blind_tokenizer,
    make_language,
    refused,
    register,
    stirred,
)
from transformers import AutoTokenizer, LlavaProcessor

import mm_piece
from mm_piece.cli.assemble import assemble as command
from mm_piece.data import IGNORE_INDEX, Example, encode
from mm_piece.deltas.delta import compute_fingerprint
from mm_piece.errors import ModelError
from mm_piece.evaluation.answers import generate_batch
from mm_piece.models.assembly import assemble, building
from mm_piece.models.assembly.openclip import load_visual
from mm_piece.models.assembly.towers import convert_encoder
from mm_piece.models.base import load_base, tensors
from mm_piece.models.checkpoint import Checkpoint
from mm_piece.recipe import parse_recipe

pytestmark = [pytest.mark.slow, needs("open_clip")]

ASKED = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}
TURNS = [ASKED, {"role": "assistant", "content": [{"type": "text", "text": "noise"}]}]


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory):
    register(tmp_path_factory.mktemp("architectures"))


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    return make_language(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module", params=["tiny-ViT", "tiny-SigLIP"])
def assembled(request, language, tmp_path_factory):
    """A tower like CLIP's or SigLIP's with a tiny Llama."""
    to = tmp_path_factory.mktemp("assembled") / "base"
    assemble(request.param, language, to, "random", seed=3)
    return to


@torch.inference_mode()
def test_the_projector_reads_the_layer_of_the_tower(assembled, request):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    name = request.node.callspec.params["assembled"]
    model, processor = load_base(assembled)
    torch.default_generator.manual_seed(3)
    visual = load_visual(name, "random").eval()
    seen = []
    siglip = name == "tiny-SigLIP"
    layer = visual.trunk.blocks[2] if siglip else visual.transformer.resblocks[1]
    layer.register_forward_hook(lambda _, __, output: seen.append(output))
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(*args))
    transform = image_transform_v2(PreprocessCfg(**visual.preprocess_cfg), is_train=False)
    for size in SIZES:
        inputs = processor(images=picture(*size), text="<image>", return_tensors="pt")
        assert torch.equal(inputs["pixel_values"][0], transform(picture(*size)))
        model(**inputs)
        visual(inputs["pixel_values"])
        read_by_projector, of_open_clip = seen[-2:]
        of_open_clip = of_open_clip if siglip else of_open_clip[:, 1:]
        assert torch.allclose(read_by_projector, of_open_clip, rtol=0, atol=1e-5)
        assert read_by_projector.shape[1] == 16 == model.config.image_seq_length


def test_the_whole_path(assembled, tmp_path):
    model, processor = load_base(assembled)
    picture(50, 40).save(tmp_path / "image.png")
    example = Example(0, TURNS, [tmp_path / "image.png"], "test")
    encoded = encode(example, processor)
    labels = encoded["labels"][encoded["labels"] != IGNORE_INDEX]
    assert processor.tokenizer.decode(labels) == "noise<|end|>"
    model(**encoded).loss.backward()
    for name in ("vision_tower.embeddings.patch_embedding", "multi_modal_projector.linear_1"):
        assert model.model.get_submodule(name).weight.grad.abs().max() > 0
    assert isinstance(generate_batch(model, processor, [example], 3)[0], str)
    assert model.generation_config.eos_token_id == [2, 4]  # Llama's default, the tokenizer's


def test_a_projector_is_trained_first(assembled, tmp_path):
    text = f"""
base: {assembled}
store: {tmp_path / "store"}
tasks: [{{name: first, train: "scenes:digits/train[:8]", test: "scenes:digits/test[:2]"}}]
select: {{density: {{projector: 1.0}}, samples: 2}}
train: {{max_steps: 2, learning_rate: 1e-2, disable_tqdm: true}}
"""
    store = mm_piece.train(parse_recipe(text))
    assert {name.split(".")[0] for name in store.delta(1).indices} == {"multi_modal_projector"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", LANGUAGES)
def test_the_language_model_says_what_it_said(tmp_path, family, dtype):
    source = make_language(tmp_path / "llm", family)
    made = assemble("tiny-ViT", source, tmp_path / "base", "random", dtype=dtype)
    assert any("no longer capped at 0.1" in note for note in made.notes) == (family == "gemma2")
    model, _ = load_base(made.folder, dtype=dtype)
    assert Checkpoint(made.folder, dtype).compute_fingerprint() == compute_fingerprint(
        tensors(model)
    )
    assert set(load_file(made.folder / "model.safetensors")) == set(tensors(model))
    alone, _ = load_base(source, dtype=dtype)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        states = (alone.model(ids)[0], model.model(ids)[0])
        assert torch.equal(*states)
        assert torch.equal(alone.lm_head(states[0]), model(ids).logits)


@pytest.fixture(scope="module")
def tower_file(tmp_path_factory):
    """Weights of an open_clip model as a checkpoint file."""
    import open_clip

    file = tmp_path_factory.mktemp("tower") / "weights.safetensors"
    save_file(open_clip.create_model("tiny-ViT").state_dict(), file)
    return file


def test_equal_seeds_write_equal_files(language, tower_file, tmp_path):
    folders = [tmp_path / str(number) for number in range(3)]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        torch.rand(3)
        state = torch.get_rng_state()
        assemble("tiny-ViT", language, folder, str(tower_file), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
    first, again, other = ({p.name: p.read_bytes() for p in f.iterdir()} for f in folders)
    assert first == again
    assert [name for name in first if first[name] != other[name]] == ["model.safetensors"]
    assert str(tmp_path.parent).encode() not in b"".join(first.values())
    left, right = (load_file(folders[i] / "model.safetensors") for i in (0, 2))
    changed = [name for name in left if not torch.equal(left[name], right[name])]
    assert sorted(changed) == [
        f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("bias", "weight")
    ]


def test_a_folder_of_open_clip_brings_weights_and_transform(language, tmp_path):
    import open_clip

    source = tmp_path / "open_clip"
    source.mkdir()
    visual = stirred("tiny-SigLIP")
    config = {"model_cfg": {"embed_dim": 32, "text_cfg": TEXT, **ARCHITECTURES["tiny-SigLIP"]}}
    config["preprocess_cfg"] = {"resize_mode": "squash", "mean": [0.5] * 3, "std": [0.5] * 3}
    (source / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    whole = open_clip.create_model("tiny-SigLIP")
    whole.visual.load_state_dict(visual.state_dict())
    save_file(whole.state_dict(), source / "open_clip_model.safetensors")
    made = assemble(f"local-dir:{source}", language, tmp_path / "base", vision_layer=1)
    assert "SiglipVisionModel for images of 32 pixels; its hidden states 1 make 16" in made.notes[0]
    model, processor = load_base(made.folder)
    found = tensors(model)
    for name, weight in convert_encoder(visual, "tiny-SigLIP")[1].items():
        assert torch.equal(found[f"vision_tower.vision_model.{name}"], weight)
    assert processor.image_processor.image_mean == (0.5, 0.5, 0.5)
    assert not processor.image_processor.do_center_crop


def test_a_blind_language_model_learns_the_image_token(tmp_path):
    source = make_language(tmp_path / "llm", tokenizer=blind_tokenizer(), rows=261)
    made = assemble("tiny-ViT", source, tmp_path / "base", "random")
    assert len(made.notes) == 5
    text = " ".join(made.notes)
    assert "<image> was added to the tokenizer as 261; the vocabulary grew from 261 to 262" in text
    assert "no padding token; <|end|> is used" in text
    assert "no chat template" in text
    assert "the projector is untrained (seed 0)" in text
    model, processor = load_base(made.folder)
    alone, _ = load_base(source)
    assert processor.tokenizer.pad_token == "<|end|>"
    assert processor.image_token_id == model.config.image_token_id == 261
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        new, old = tensors(model)[f"language_model.{name}"], tensors(alone)[name]
        assert torch.equal(new[:261], old)
        assert torch.allclose(new[261], old.mean(0), atol=1e-7)
    found = processor(images=picture(9, 9), text="a<image>b", return_tensors="pt")["input_ids"][0]
    assert found.tolist().count(261) == 16 and len(found) == 18
    rendered = processor.apply_chat_template(TURNS * 2, tokenize=False)
    once = "USER: <image>what is it?\nASSISTANT: noise<|end|>"
    assert rendered == once * 2
    prompt = processor.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "USER: <image>what is it?\nASSISTANT:"


def test_spare_rows_of_the_embedding_are_used(tmp_path):
    source = make_language(tmp_path / "llm", tokenizer=blind_tokenizer(), rows=300)
    made = assemble("tiny-ViT", source, tmp_path / "base", "random")
    assert "<image> was added to the tokenizer as 261" in made.notes
    assert load_base(made.folder)[0].lm_head.weight.shape[0] == 300


@pytest.mark.parametrize("rows", [261, 300])
def test_a_tied_head_stays_tied(tmp_path, rows):
    source = make_language(tmp_path / "llm", "qwen2", tokenizer=blind_tokenizer(), rows=rows)
    made = assemble("tiny-ViT", source, tmp_path / "base", "random")
    assert not [n for n in load_file(made.folder / "model.safetensors") if "lm_head" in n]
    model, _ = load_base(made.folder)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


TEMPLATE = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}<<{{ messages[0].content }}>>"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] | trim }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_the_own_chat_template_takes_typed_content(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    source = make_language(tmp_path / "llm", tokenizer=tokenizer)
    folder = assemble("tiny-ViT", source, tmp_path / "base", "random").folder
    system = [{"role": "system", "content": [{"type": "text", "text": "be brief"}]}]
    expected = "<<be brief>>[user] <image>what is it?<|end|>[assistant] noise<|end|>"
    plain = [{"role": "user", "content": "<image>what is it?"}, TURNS[1]]
    for renders in (load_base(folder)[1], AutoTokenizer.from_pretrained(folder)):
        for turns in (TURNS, plain):
            assert renders.apply_chat_template(system + turns, tokenize=False) == expected


def test_nothing_is_left_behind_when_writing_fails(language, tmp_path, monkeypatch):
    def fail(self, folder):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(ModelError, match="the disk is full"):
        patch.setattr(LlavaProcessor, "save_pretrained", fail)
        assemble("tiny-ViT", language, tmp_path / "base", "random")
    monkeypatch.setattr(building, "compute_fingerprint", lambda _: "of something else")
    refused("wrote other weights", "tiny-ViT", language, tmp_path / "base", "random")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {"n_embd": 24, "n_head": 2, "n_layer": 1}, "cannot hold gpt2 models"),
        ("phi", {}, "cannot hold phi models"),
        ("granite", {"logits_scaling": 3.0}, "no place for what they do to their logits"),
    ],
)
def test_language_models_that_are_refused(tmp_path, family, changes, message):
    source = make_language(tmp_path / "llm", family, **changes)
    refused(message, "tiny-ViT", source, tmp_path / "base", "random")
    assert [path.name for path in tmp_path.iterdir()] == ["llm"]


def test_other_mistakes(language, base, tower_file, tmp_path, monkeypatch):
    to = tmp_path / "base"
    absent = tmp_path / "absent"
    refused(f"cannot load language model {absent}", "tiny-ViT", absent, to, "random")
    refused("is a llava model and sees already", "tiny-ViT", base, to, "random")
    refused("unknown dtype 'int8'; allowed", "tiny-ViT", language, to, "random", dtype="int8")
    refused("layer 4 is out of -4…3", "tiny-ViT", language, to, "random", vision_layer=4)
    refused("cannot load tiny-SigLIP .*key", "tiny-SigLIP", language, to, str(tower_file))
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    refused("cannot load tiny-ViT", "tiny-ViT", language, to, str(tmp_path / "broken.pt"))
    refused("exists and is not empty", "tiny-ViT", language, tmp_path, "random")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    refused(r"pip install 'mm-piece\[open_clip\]'", "tiny-ViT", language, to, "random")
    assert not to.exists()


def test_the_command(language, tmp_path):
    to = tmp_path / "base"
    options = ["--pretrained", "random", "--vision-layer", "-1", "--dtype", "bfloat16"]
    result = CliRunner().invoke(command, ["tiny-ViT", str(language), str(to), *options])
    assert result.exit_code == 0, result.output
    assert "hidden states -1 make 16 tokens an image" in result.stdout
    assert "the projector is untrained (seed 0): train it first" in result.stdout
    assert load_base(to, dtype="bfloat16")[0].config.vision_feature_layer == -1
