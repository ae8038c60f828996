"""Laws of foreign formats: bit exact both ways, as PEFT merges, and refused when not sound."""

import json
import math
from collections import namedtuple

import pytest
import safetensors
import safetensors.torch
import torch
from made_deltas import noise, same

from mm_piece import families
from mm_piece.deltas import interchange
from mm_piece.deltas.delta import Delta, compute_fingerprint
from mm_piece.deltas.header import DELTA_DTYPES
from mm_piece.deltas.interchange import (
    make_checkpoint_patches,
    make_sparse_patches,
    read_foreign_delta,
    write_foreign_delta,
)
from mm_piece.deltas.interchange.shira import MERGEABLE_DTYPES
from mm_piece.dtypes import SAFETENSORS_DTYPES, view_bits
from mm_piece.errors import DamageError, DeltaError, FormatError, MismatchError, PieceError

SHAPES = {"scale": (), "a.bias": (7,), "b": (5, 6), "c": (2, 3, 4), "d.values": (2, 1, 3, 2)}
FORMS = ("vllm", "coo")
DTYPES = [SAFETENSORS_DTYPES[name] for name in DELTA_DTYPES]
FLOATS = [dtype for dtype in DTYPES if dtype.is_floating_point]
KINDS = [
    *(("vllm", dtype) for dtype in FLOATS),
    *(("coo", dtype) for dtype in DTYPES),
]
# Stands in for vLLM's class: its fields, in its order.
CheckpointWeightPatch = namedtuple("CheckpointWeightPatch", "name shape dtype values indices")
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant|.*is_gradient_checkpointing")


def between(base, after) -> Delta:
    """The delta from one set of tensors to another."""
    every = {name: torch.arange(tensor.numel()) for name, tensor in base.items()}
    flat = [{name: tensor.reshape(-1) for name, tensor in side.items()} for side in (base, after)]
    shapes = {name: tensor.shape for name, tensor in base.items()}
    return Delta.from_change(
        every, *flat, shapes, task="ocr", base=compute_fingerprint(base), info={}
    )


def situation(dtype, nan: bool):
    """A base of all ranks, a delta to odd bit patterns in half of it, and what is then there."""
    base = {name: noise(shape, dtype, seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    after = {name: tensor.clone() for name, tensor in base.items()}
    for seed, tensor in enumerate(after.values()):
        view_bits(tensor)[::2] = view_bits(noise((tensor.numel(),), dtype, 100 + seed))[::2]
    zero = -(2 ** (8 * dtype.itemsize - 1))  # negative zero, then denormals
    view_bits(after["b"])[:3] = torch.tensor([zero, 1, zero + 1])
    for row in () if nan else after.values():
        view_bits(row)[row.view(-1).float().isnan()] = 0
    return base, between(base, after), after


def leads_to(delta, base, after) -> bool:
    """Whether the delta turns the base into `after`, and holds nothing that stays."""
    live = {name: tensor.clone() for name, tensor in base.items()}
    delta.apply(live)
    changed = between(base, after)
    rows = zip(delta.indices.values(), map(changed.indices.get, delta.indices), strict=True)
    assert delta.entries == changed.entries and all(same(*pair) for pair in rows)
    return all(same(live[name], after[name]) for name in base)


def rewrite(path, edit) -> None:
    """Change a file's rows and its one metadata field, and maybe put another text there."""
    with safetensors.safe_open(str(path), "pt") as file:
        rows = {key: file.get_tensor(key).clone() for key in list(file.keys())}
        ((field, text),) = file.metadata().items()
    fields = json.loads(text) if text.startswith("{") else {}
    other = edit(rows, fields)
    text = other if isinstance(other, str) else json.dumps(fields)
    safetensors.torch.save_file(rows, path, {field: text})


def put(row, *where):
    """An edit that writes where[-1] at the entry where[:-1] of a row."""
    return lambda rows, _: rows[row].__setitem__(where[:-1], where[-1])


def swap(key, change):
    return lambda rows, _: rows.update({key: change(rows[key]).clone()})


def renamed(old, new):
    """An edit that keeps all rows and adds those whose name changes."""
    return lambda rows, _: rows.update({k.replace(old, new): r.clone() for k, r in rows.items()})


@pytest.mark.parametrize(("form", "dtype"), KINDS, ids=str)
def test_there_and_back(form, dtype, tmp_path):
    base, delta, after = situation(dtype, nan=form == "coo")
    write_foreign_delta(delta, tmp_path / "x", form)
    back = read_foreign_delta(tmp_path / "x", form, base, task="ocr")
    assert leads_to(back, base, after)
    assert (back.base, back.parent, back.task) == (compute_fingerprint(base), "", "ocr")
    assert back.shapes == delta.shapes and back.before == delta.before
    (tmp_path / "old").hardlink_to(tmp_path / "x")  # a write replaces the file, not its content
    write_foreign_delta(between(base, base), tmp_path / "x", form)
    assert read_foreign_delta(tmp_path / "x", form, base, task="ocr").entries == 0
    write_foreign_delta(back, tmp_path / "x", form)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "old").read_bytes()
    assert not (tmp_path / "x").samefile(tmp_path / "old")


@pytest.mark.parametrize("form", FORMS)
def test_any_order_is_read_and_unchanged_entries_are_dropped(form, tmp_path):
    base, delta, after = situation(torch.float32, nan=False)
    write_foreign_delta(delta, tmp_path / "x", form)

    def turn(rows, _):
        for key, row in rows.items():
            rows[key] = row.flip(-1) if row.is_floating_point() else row.flip(-1).long()

    rewrite(tmp_path / "x", turn)
    view_bits(base["b"])[::4] = view_bits(after["b"])[::4]  # some of it already stands
    back = read_foreign_delta(tmp_path / "x", form, base, task="t")
    assert leads_to(back, base, after)
    assert back.info["imported"] == form and back.info["unchanged"] > 0


def test_the_lines_in_the_docstring_make_vllm_patches(tmp_path):
    base, delta, after = situation(torch.bfloat16, nan=False)
    write_foreign_delta(delta, tmp_path / "x", "vllm")
    text = (interchange.__doc__ or "").split("without us:\n\n")[1].split("\n\n")[0]
    scope = {"path": tmp_path / "x", "json": json, "safetensors": safetensors, "torch": torch}
    scope["CheckpointWeightPatch"] = CheckpointWeightPatch
    exec("if True:\n" + text, scope)
    patches = {patch.name: patch for patch in scope["patches"]}
    for fields, sent in zip(
        make_checkpoint_patches(delta), make_sparse_patches(delta), strict=True
    ):
        patch, own = patches.pop(fields["name"]), CheckpointWeightPatch(**fields)
        assert patch[:3] == own[:3] and patch.shape == SHAPES[patch.name]
        assert list(sent) == ["name", "indices", "values", "full_shape"]
        assert sent["full_shape"] == patch.shape
        assert same(patch.values, own.values) and same(patch.values, sent["values"])
        assert same(patch.indices, own.indices) and same(patch.indices, sent["indices"])
        # The worker's rule: NaN everywhere, the values at the indices, then all that is not NaN.
        new = torch.full((math.prod(patch.shape),), float("nan"), dtype=patch.dtype)
        new = new.index_copy_(0, patch.indices.long(), patch.values).view(patch.shape)
        assert same(torch.where(new.isnan(), base[patch.name], new), after[patch.name])
    assert not patches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vllm_gets_no_nan_and_no_integers(dtype, tmp_path):
    after = torch.tensor([0, 1, math.nan if dtype in FLOATS else 1, 0]).to(dtype)
    delta = between({"a": torch.zeros(4).to(dtype)}, {"a": after})
    for make in (
        make_checkpoint_patches,
        make_sparse_patches,
        lambda d: write_foreign_delta(d, tmp_path / "x", "vllm"),
    ):
        with pytest.raises(FormatError, match="a: expected floating numbers"):
            make(delta)
    assert not list(tmp_path.iterdir())


def test_names_are_translated(tmp_path):
    base = {"language_model.lm_head.weight": torch.zeros(2, 2), "b": torch.zeros(2)}
    live = {"lm_head.weight": torch.ones(2, 2), "b": torch.ones(2)}
    file = tmp_path / "x", "coo"
    write_foreign_delta(between({name: tensor * 0 for name, tensor in live.items()}, live), *file)
    delta = read_foreign_delta(
        *file, base, task="t", rename=lambda name: families.hub_name(name, "llava")
    )
    assert delta.indices.keys() == base.keys()
    with pytest.raises(MismatchError, match=r"found lm_head.weight \(1 of 2 names not there\)"):
        read_foreign_delta(*file, base, task="t")
    with pytest.raises(MismatchError, match="expected 2 names in the base, found 1"):
        read_foreign_delta(*file, base, task="t", rename=lambda _: "b")


def test_formats_and_files_that_are_not_there(tmp_path):
    delta = between({"a": torch.zeros(3)}, {"a": torch.ones(3)})
    with pytest.raises(FormatError, match="unknown format 'x'; known: vllm, coo, shira"):
        read_foreign_delta(tmp_path / "x", "x", {}, task="t")
    with pytest.raises(FormatError, match="'shira' can be read only"):
        write_foreign_delta(delta, tmp_path / "x", "shira")
    with pytest.raises(DeltaError, match="cannot be written"):
        write_foreign_delta(delta, tmp_path / "no" / "x", "coo")
    for form in interchange.FORMATS:
        with pytest.raises(FormatError, match="No such file"):
            read_foreign_delta(tmp_path / "x", form, {}, task="t")
    delta.save(tmp_path / "own", codec="raw")
    with pytest.raises(FormatError, match="JSON in the metadata field weight_patches"):
        read_foreign_delta(tmp_path / "own", "vllm", {}, task="t")


@pytest.mark.parametrize("form", FORMS)
def test_damage_never_escapes_as_another_error(form, tmp_path):
    base = {"a": torch.zeros(2, 3), "b\nc": torch.zeros(2)}
    path = tmp_path / "x"
    write_foreign_delta(
        between(base, {name: tensor + 1 for name, tensor in base.items()}), path, form
    )
    whole, refused = path.read_bytes(), 0
    for at in range(0, len(whole), 2):
        flipped = bytes([whole[at] ^ (1, 4, 128)[at % 3]])
        for data in (whole[:at], whole[:at] + flipped + whole[at + 1 :]):
            path.write_bytes(data)
            try:
                read_foreign_delta(path, form, base, task="t")
            except PieceError as error:
                refused += 1
                assert len(str(error).splitlines()) == 1
    assert refused > 0.75 * len(whole)


def small_model(dtype):
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(20, 12), torch.nn.Linear(12, 8, bias=False))
    with torch.no_grad():
        model[0].weight[::2] = -0.0
    return model.to(dtype)


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in families.weights(model).items()}


def adapt(model, folder, targets=("0", "1")):
    """Save a SHiRA adapter of random values and zeros; return weights before and after a merge."""
    from peft import PeftModel, ShiraConfig, get_peft_model

    config = ShiraConfig(r=2, target_modules=list(targets), init_weights=False)
    before = weights_of(model)
    tuned = get_peft_model(model, config, adapter_name=folder.name)
    for row in (row for row in tuned.parameters() if row.requires_grad):
        row.data.div_(3)[::3] = 0  # thirds need all the bits
    tuned.save_pretrained(folder.parent)
    merged = PeftModel.from_pretrained(tuned.unload(), folder).merge_and_unload()
    return before, weights_of(merged)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", MERGEABLE_DTYPES, ids=str)
def test_shira_is_what_peft_merges(dtype, tmp_path):
    base, merged = adapt(small_model(dtype), tmp_path / "x")
    delta = read_foreign_delta(tmp_path / "x", "shira", base, task="t")
    assert leads_to(delta, base, merged)
    assert delta.info["imported"] == "shira" and delta.info["unchanged"] > 0
    assert (delta.values["0.weight"] == 0).any()  # -0 + 0 is 0
    rewrite(tmp_path / "x" / "adapter_model.safetensors", swap(WHERE, torch.Tensor.float))
    assert leads_to(read_foreign_delta(tmp_path / "x", "shira", base, task="t"), base, merged)


@pytest.mark.slow
def test_shira_of_a_transformers_model(base, tmp_path):
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16)
    rename = families.make_translator(model)
    before, merged = adapt(model, tmp_path / "x", targets=("q_proj", "linear_1"))
    delta = read_foreign_delta(tmp_path / "x", "shira", before, task="t", rename=rename)
    assert len(delta.indices) == 5  # two layers of the text, two of the vision tower, the projector
    assert leads_to(delta, before, merged)


def lay_out(form, path):
    """Write what a format calls a file; return the path of its rows, and the base."""
    if form == "shira":
        return path / "adapter_model.safetensors", adapt(small_model(torch.float32), path)[0]
    base, delta, _ = situation(torch.float32, nan=False)
    write_foreign_delta(delta, path, form)
    return path, base


WHERE = "base_model.model.0.shira_indices"
REFUSALS = {
    "twice": ("coo", put("b.coords", ..., slice(0, 2), 0), DamageError, "found 0 twice"),
    "outside": ("coo", put("b.coords", 0, 0, 5), DamageError, "from 0 to 4, found 0 to 5"),
    "turned": ("coo", swap("b.coords", lambda row: row.T.contiguous()), DamageError, "b.coords"),
    "dtype": ("coo", swap("b.values", torch.Tensor.half), DamageError, "found .*float16"),
    "shape": ("coo", lambda _, f: f["b"].update(shape=[6, 5]), MismatchError, r"\[6, 5\]"),
    "at the end": ("vllm", put("b.indices", 0, 30), DamageError, "from 0 to 29, found"),
    "negative": ("vllm", put("b.indices", 0, -1), DamageError, "from 0 to 29, found -1 to"),
    "narrow": ("vllm", swap("b.indices", torch.Tensor.short), DamageError, "int32.*int64"),
    "folded": ("vllm", swap("b.indices", lambda row: row[None]), DamageError, "b.indices: expec"),
    "short": ("vllm", swap("b.values", lambda row: row[1:]), DamageError, "b.indices: expected"),
    "NaN": ("vllm", put("b.values", 0, math.nan), DamageError, "b: expected floating numbers"),
    "no row": ("vllm", lambda r, _: r.pop("b.indices"), FormatError, "found no b.indices"),
    "odd row": ("vllm", lambda r, _: r.update(x=torch.ones(1)), FormatError, "found x"),
    "no field": ("vllm", lambda _, f: f.pop("b"), DamageError, "'b' in one"),
    "deep": ("vllm", lambda *_: "[" * 10**5, FormatError, "JSON in the metadata field"),
    "no mask": ("shira", lambda r, _: r.pop(WHERE), FormatError, f"found no {WHERE}"),
    "dense": ("shira", lambda r, _: r.update(head=torch.ones(2)), FormatError, "found head"),
    "again": ("shira", put(WHERE, ..., slice(0, 2), 0), DamageError, "found 0 twice"),
    "fraction": ("shira", swap(WHERE, lambda row: row + 0.5), DamageError, "found fractions"),
    "unknown": ("shira", renamed("l.0", "l.9"), MismatchError, r"found 9.weight \(1 of 3"),
    "two names": ("shira", renamed("base_model.model.", ""), MismatchError, "expected 4 names"),
}


@pytest.mark.slow
@pytest.mark.parametrize("problem", REFUSALS)
def test_refusals(problem, tmp_path):
    form, edit, error, match = REFUSALS[problem]
    path, (rows, base) = tmp_path / "x", lay_out(form, tmp_path / "x")
    rewrite(rows, edit)
    with pytest.raises(error, match=match) as caught:
        read_foreign_delta(path, form, base, task="t")
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.slow
def test_shira_needs_floating_matrices_and_its_settings(tmp_path):
    path, (_, base) = tmp_path / "x", lay_out("shira", tmp_path / "x")
    for weight in (torch.ones(12), torch.ones(12, 20).to(torch.float8_e5m2)):
        with pytest.raises(MismatchError, match="0.weight: expected a floating matrix"):
            read_foreign_delta(path, "shira", {**base, "0.weight": weight}, task="t")
    settings = path / "adapter_config.json"
    for text in ("[]", "[" * 10**5, '{"peft_type": "LORA", "r": 2}', '{"peft_type": "SHIRA"}'):
        settings.write_text(text)
        with pytest.raises(FormatError, match="adapter_config.json"):
            read_foreign_delta(path, "shira", base, task="t")
    settings.write_text('{"peft_type": "SHIRA", "r": 3}')
    with pytest.raises(DamageError, match="shira_weight: expected .*96.*, found .*64"):
        read_foreign_delta(path, "shira", base, task="t")
