"""The library sees in a folder what `from_pretrained` sees, or says in a line what is wrong.

Right values come from the loaded model: its weights, and its logits after what was derived.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mm_piece
from mm_piece.deltas.delta import compute_fingerprint, compute_full_digest
from mm_piece.errors import ModelError, StoreError
from mm_piece.models.base import load_base, tensors
from mm_piece.models.checkpoint import Checkpoint
from mm_piece.recipe import parse_recipe
from mm_piece.store import deriving, exporting
from mm_piece.store.base_reading import reading_of
from mm_piece.store.records import BaseRecord
from mm_piece.training.recipe_check import check

SAFE, BIN = "model.safetensors", "pytorch_model.bin"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.0.mlp.up_proj.weight"
Weights = dict[str, torch.Tensor]


def write_safe(folder: Path, weights: Weights, name: str = SAFE) -> None:
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, folder / name, PT)


PT = {"format": "pt"}
IDS = torch.arange(12)[None]


def write_shards(folder: Path, weights: Weights, suffix: str = "safetensors") -> None:
    """Two shards and their index."""
    stem, names = "model" if suffix == "safetensors" else "pytorch_model", sorted(weights)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{number:05d}-of-00002.{suffix}"
        content = {name: weights[name] for name in part}
        if suffix == "safetensors":
            write_safe(folder, content, file)
        else:
            torch.save(content, folder / file)
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / f"{stem}.{suffix}.index.json").write_text(text)


def configure(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def old(weights: Weights) -> Weights:
    return {name: tensor + 1 for name, tensor in weights.items()}


def untied(weights: Weights) -> Weights:
    return {**weights, HEAD: weights[EMBEDDING] + 0.1}


def rows_of_transformers_4(weights: Weights) -> Weights:
    """The body alone, as a model without a head is saved."""
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def stale_index(folder: Path, weights: Weights) -> None:
    write_shards(folder, old(weights))
    write_safe(folder, weights)


def only_bin(folder: Path, weights: Weights) -> None:
    (folder / SAFE).unlink()
    torch.save({**weights, HEAD: weights[EMBEDDING]}, folder / BIN)


def bin_shards(folder: Path, weights: Weights) -> None:
    (folder / SAFE).unlink()
    write_shards(folder, untied(weights), "bin")


def shards(folder: Path, weights: Weights) -> None:
    (folder / SAFE).unlink()
    write_shards(folder, untied(weights))


def bin_beside(folder: Path, weights: Weights) -> None:
    torch.save(old(weights), folder / BIN)


def only_head(folder: Path, weights: Weights) -> None:
    write_safe(folder, {HEAD if n == EMBEDDING else n: t for n, t in weights.items()})


def named_file(folder: Path, weights: Weights) -> None:
    """A file that config.json names."""
    write_safe(folder, old(weights))
    write_safe(folder, weights, "special.safetensors")
    configure(folder, transformers_weights="special.safetensors")


def mixed_dtypes(folder: Path, weights: Weights) -> None:
    write_safe(folder, weights | {UP: weights[UP].double(), EMBEDDING: weights[EMBEDDING].half()})


def signed_zeros(folder: Path, weights: Weights) -> None:
    """Equal numbers of other bits: tied, with the bits of the embedding."""
    table = weights[EMBEDDING].clone()
    table[0] = 0.0
    write_safe(folder, {**weights, EMBEDDING: table, HEAD: table * -0.0 + table})
    other = table.clone()
    other[0] = -0.0
    write_safe(folder, {**weights, EMBEDDING: table, HEAD: other})


SOUND = {
    "tied, the head apart": lambda f, w: write_safe(f, untied(w)),
    "tied, the head once more": lambda f, w: write_safe(f, {**w, HEAD: w[EMBEDDING].clone()}),
    "tied, the head alone": only_head,
    "tied, zeros of either sign": signed_zeros,
    "untied": lambda f, w: (write_safe(f, untied(w)), configure(f, tie_word_embeddings=False)),
    "extra tensors": lambda f, w: write_safe(f, {**w, "other.weight": w[UP].clone()}),
    "without the body's prefix": lambda f, w: write_safe(f, rows_of_transformers_4(w)),
    "an old index": stale_index,
    "bin": only_bin,
    "bin in shards": bin_shards,
    "bin beside safetensors": bin_beside,
    "shards": shards,
    "named in config.json": named_file,
    "mixed dtypes": mixed_dtypes,
}


@pytest.fixture(scope="module")
def tied(family_base) -> tuple[Path, Weights]:
    """A base whose configuration ties the head, and its weights."""
    base = family_base("qwen2")
    return base, load_file(base / SAFE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("situation", SOUND)
def test_a_folder_is_what_from_pretrained_sees(situation, dtype, tied, tmp_path):
    base, weights = tied
    folder = shutil.copytree(base, tmp_path / "base")
    SOUND[situation](folder, weights)
    model = load_base(folder, dtype=dtype)[0]
    live, checkpoint = tensors(model), Checkpoint(folder, dtype)
    assert checkpoint.parameters.keys() == live.keys()
    assert checkpoint.compute_fingerprint() == compute_fingerprint(live)
    assert checkpoint.compute_full_digest() == compute_full_digest(live)
    checkpoint.require_same_weights(live)


@pytest.mark.slow
@pytest.mark.parametrize("situation", SOUND)
def test_what_was_extracted_and_exported_is_the_tuned_model(situation, tied, tmp_path):
    base, weights = tied
    folder = shutil.copytree(base, tmp_path / "base")
    SOUND[situation](folder, weights)
    model, processor = load_base(folder)
    with torch.no_grad():
        for weight in tensors(model).values():
            weight.view(-1)[::3] += 0.5
    want = model(IDS).logits
    model.save_pretrained(tmp_path / "tuned")
    processor.save_pretrained(tmp_path / "tuned")
    deriving.extract(folder, tmp_path / "tuned", tmp_path / "delta")
    assert torch.equal(mm_piece.load(folder, delta=tmp_path / "delta")[0](IDS).logits, want)
    exporting.export(tmp_path / "delta", tmp_path / "out", base=folder)
    exported = load_base(tmp_path / "out")[0]
    assert torch.equal(exported(IDS).logits, want)
    assert (exported.lm_head.weight is exported.model.embed_tokens.weight) == (
        exported.config.tie_word_embeddings
    )


def lacking(folder: Path, weights: Weights) -> None:
    write_safe(folder, {name: tensor for name, tensor in weights.items() if name != UP})


def missing_shard(folder: Path, weights: Weights) -> None:
    shards(folder, weights)
    (folder / "model-00002-of-00002.safetensors").unlink()


def turned_linear(folder: Path, weights: Weights) -> None:
    """A shape that only fused experts may have."""
    write_safe(folder, {**weights, UP: weights[UP].t()})


def twice(folder: Path, weights: Weights) -> None:
    write_safe(folder, {**weights, UP.removeprefix("model."): weights[UP] + 1})


def adapter(folder: Path, weights: Weights) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')


def quantised(folder: Path, weights: Weights) -> None:
    configure(folder, quantization_config={"quant_method": "fp8"})


def damaged_bin(folder: Path, weights: Weights) -> None:
    (folder / SAFE).unlink()
    (folder / BIN).write_bytes(b"\x80\x02no archive")


def nothing(folder: Path, weights: Weights) -> None:
    (folder / SAFE).unlink()


REFUSED = {
    "a weight is missing": (lacking, r"lacks 1 weights, 'model\.layers\.0\.mlp\.up_proj"),
    "a shard is missing": (missing_shard, "model-00002-of-00002.safetensors"),
    "another shape": (turned_linear, r"up_proj\.weight is \[16, 24\], the model has \[24, 16\]"),
    "an adapter": (adapter, r"holds adapter_config\.json"),
    "quantised": (quantised, "quantization_config"),
    "damaged": (damaged_bin, "base.*: Weights only load failed"),
    "no weights": (nothing, r"model\.safetensors"),
}


@pytest.mark.parametrize("situation", REFUSED)
def test_one_line_says_what_is_wrong(situation, tied, tmp_path):
    base, weights = tied
    spoil, said = REFUSED[situation]
    folder = shutil.copytree(base, tmp_path / "base")
    spoil(folder, weights)
    for call in (
        lambda: load_base(folder),
        lambda: Checkpoint(folder, "float32"),
        lambda: deriving.extract(base, folder, tmp_path / "x"),
        lambda: deriving.extract(folder, base, tmp_path / "x"),
    ):
        with pytest.raises(ModelError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_a_weight_that_stands_twice_is_refused(tied, tmp_path):
    base, weights = tied
    folder = shutil.copytree(base, tmp_path / "base")
    twice(folder, weights)
    with pytest.raises(ModelError, match=f"holds {UP} twice: as .*up_proj.* and .*up_proj"):
        Checkpoint(folder, "float32")


def test_a_delta_unties_nothing_and_follows_what_was_tied(tied, tmp_path):
    base, weights = tied
    apart = shutil.copytree(base, tmp_path / "apart")
    write_safe(apart, untied(weights))
    with pytest.raises(ModelError, match=f"{HEAD} of its own, which .* ties to {EMBEDDING}"):
        deriving.extract(base, apart, tmp_path / "x")
    deriving.extract(apart, base, tmp_path / "x")  # the head becomes what the embedding is
    found = mm_piece.load(apart, delta=tmp_path / "x")[0](IDS).logits
    assert torch.equal(found, load_base(base)[0](IDS).logits)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("inner", [None, False])
def test_a_vision_language_model_ties_as_its_outer_configuration_says(
    family, inner, family_base, tmp_path
):
    folder = shutil.copytree(family_base(family), tmp_path / "base")
    weights = load_file(folder / SAFE)
    table = next(tensor for name, tensor in weights.items() if "embed_tokens" in name)
    head = {"lm_head.weight": table + 0.1}
    if inner is not None:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        config["text_config"]["tie_word_embeddings"] = inner
        file.write_text(json.dumps(config))
    for content in (weights, weights | head):
        write_safe(folder, content)
        live, checkpoint = tensors(load_base(folder)[0]), Checkpoint(folder, "float32")
        assert checkpoint.compute_fingerprint() == compute_fingerprint(live)
        assert any(name.endswith("lm_head.weight") for name in live) == (content is not weights)


def test_a_model_that_is_not_what_its_files_hold_is_refused(tied):
    base, weights = tied
    checkpoint = Checkpoint(base, "float32")
    live = {name: tensor.clone() for name, tensor in tensors(load_base(base)[0]).items()}
    live[UP].view(-1)[0] += 1
    with pytest.raises(ModelError, match="other values"):
        checkpoint.require_same_weights(live)
    with pytest.raises(ModelError, match=r"up_proj\.weight: loaded none, in the files float32"):
        checkpoint.require_same_weights({n: t for n, t in live.items() if n != UP})
    with pytest.raises(ModelError, match=r"loaded bfloat16 \[24, 16\]"):
        checkpoint.require_same_weights({**live, UP: live[UP].bfloat16()})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_merged_by_peft_is_an_ordinary_base(tied, tmp_path):
    from peft import LoraConfig, get_peft_model

    base, _ = tied
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(load_base(base)[0], settings)
    merged, folder = adapted.merge_and_unload(), shutil.copytree(base, tmp_path / "base")
    merged.save_pretrained(folder)
    live = tensors(load_base(folder)[0])
    assert Checkpoint(folder, "float32").compute_fingerprint() == compute_fingerprint(live)
    assert torch.equal(next(iter(live.values())), next(iter(tensors(merged).values())))


def in_variant(folder: Path, weights: Weights) -> dict[str, object]:
    """Other weights beside those that are meant."""
    write_safe(folder, old(weights))
    write_safe(folder, weights, "model.fp16.safetensors")
    return {"variant": "fp16"}


def in_subfolder(folder: Path, weights: Weights) -> dict[str, object]:
    """Weights and configuration below a folder with the tokenizer and another model."""
    (folder / "inner").mkdir()
    shutil.copyfile(folder / "config.json", folder / "inner" / "config.json")
    write_safe(folder / "inner", weights)
    write_safe(folder, old(weights))
    configure(folder, rms_norm_eps=0.5)
    return {"subfolder": "inner"}


def whole_subfolder(folder: Path, weights: Weights) -> dict[str, object]:
    """A checkpoint with its own tokenizer below the folder of another."""
    shutil.copytree(folder, folder / "inner")
    write_safe(folder, old(weights))
    (folder / "tokenizer_config.json").write_text("{}")
    return {"subfolder": "inner"}


def in_bin(folder: Path, weights: Weights) -> dict[str, object]:
    torch.save({**weights, HEAD: weights[EMBEDDING]}, folder / BIN)
    write_safe(folder, old(weights))
    return {"use_safetensors": False}


def in_variant_shards(folder: Path, weights: Weights) -> dict[str, object]:
    write_shards(folder, weights)
    for file in sorted(folder.glob("model*")):
        if file.name != SAFE:
            name = file.name.replace(".safetensors.index", ".safetensors.index.fp16")
            file.rename(folder / name.replace("-of-00002.safe", "-of-00002.fp16.safe"))
    index = folder / "model.safetensors.index.fp16.json"
    index.write_text(index.read_text().replace("-of-00002.safe", "-of-00002.fp16.safe"))
    write_safe(folder, old(weights))
    return {"variant": "fp16"}


READ = [in_variant, in_variant_shards, in_subfolder, whole_subfolder, in_bin]


@pytest.mark.parametrize("lay_out", READ)
def test_options_say_which_files_are_read(lay_out, tied, tmp_path):
    base, weights = tied
    folder = shutil.copytree(base, tmp_path / "base")
    options = lay_out(folder, weights)
    model, processor = load_base(folder, **options)
    checkpoint = Checkpoint(folder, "float32", **options)
    assert (
        checkpoint.compute_fingerprint()
        == compute_fingerprint(tensors(model))
        == compute_fingerprint(weights)
    )
    exporting.write_folder(checkpoint, [], tmp_path / "out")
    again, other = load_base(tmp_path / "out")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert other("Is it 1?").input_ids == processor("Is it 1?").input_ids


@pytest.mark.slow
@pytest.mark.parametrize("lay_out", [in_variant, in_subfolder])
def test_a_store_knows_which_files_its_base_is_read_from(lay_out, tied, tmp_path):
    base, weights = tied
    folder = shutil.copytree(base, tmp_path / "base")
    options = lay_out(folder, weights)
    rows = [{"prompt": f"Is it {n}?", "answer": "yes"} for n in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    task = {"name": "t", "train": str(tmp_path / "rows.json"), "max_new_tokens": 2}
    content = {
        **{"base": str(folder), "store": str(tmp_path / "store"), "model": options},
        "tasks": [{**task, "test": task["train"]}],
        "select": {"method": "random", "density": 0.05, "exclude": []},
        "train": {"max_steps": 1, "learning_rate": 0.1, "disable_tqdm": True},
    }
    recipe = parse_recipe(json.dumps(content))
    assert not check(recipe).errors
    store = mm_piece.train(recipe)
    assert exporting.verify_base(store) == store.base.digest
    at_0 = mm_piece.load(store=store, at=0)[0]
    assert torch.equal(at_0(IDS).logits, load_base(base)[0](IDS).logits)
    want = mm_piece.load(store=store)[0](IDS).logits
    assert not torch.equal(at_0(IDS).logits, want)
    mm_piece.squash(store).save(tmp_path / "one")
    assert torch.equal(mm_piece.load(base, delta=tmp_path / "one")[0](IDS).logits, want)
    exported, _ = load_base(exporting.export(store, tmp_path / "out", at=1))
    assert torch.equal(exported(IDS).logits, want)


@pytest.mark.parametrize(
    "recorded",
    [
        {"subfolder": "../elsewhere"},
        {"subfolder": "/elsewhere"},
        {"variant": 3},
        {"trust_remote_code": True},
        ["variant"],
    ],
    ids=str,
)
def test_a_store_names_no_files_outside_of_its_base(recorded, tmp_path):
    with pytest.raises(StoreError, match="reading is .*; allowed: subfolder, variant"):
        reading_of(BaseRecord({"reading": recorded}), tmp_path)
