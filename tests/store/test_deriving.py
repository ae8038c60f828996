"""Derived deltas hold the same bits as the models they stand for."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from derived_store import RECIPE, made_store, step
from tiny_llava import make_llava

import mm_piece
from mm_piece.deltas.delta import (
    Delta,
    compute_fingerprint,
    compute_full_digest,
    find_changed_indices,
)
from mm_piece.dtypes import view_bits
from mm_piece.entries import read_entries
from mm_piece.errors import (
    BaseError,
    ConflictError,
    DeltaError,
    MismatchError,
    ModelError,
    OrderError,
    PositionError,
    StoreError,
)
from mm_piece.files import safetensors as tensorfile
from mm_piece.models.base import load_base, tensors
from mm_piece.models.checkpoint import Checkpoint
from mm_piece.models.skeleton import find_weight_files
from mm_piece.store import deriving
from mm_piece.store.base_record import describe_base
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.exporting import verify_base
from mm_piece.store.inspection import diff_positions
from mm_piece.store.squashing import squash


def live_of(base, dtype):
    return tensors(load_base(base, dtype=dtype)[0])


def same(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(view_bits(left[name]), view_bits(right[name])) for name in left)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Borders between slices everywhere, also inside these tiny tensors."""
    monkeypatch.setattr(tensorfile.TensorLocation.iter_slices, "__defaults__", (97,))


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def stored(request, base, tmp_path_factory):
    path = tmp_path_factory.mktemp("derive") / request.param
    return (*made_store(path, base, request.param), request.param)


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_squashed_delta_is_the_position(stored, base, tmp_path, at):
    store, states, _ = stored
    delta = squash(store, at)
    assert delta.parent == ""
    delta.save(tmp_path / "one.safetensors")
    if at:  # an empty delta has no dtype to load in
        model, _ = mm_piece.load(base, delta=tmp_path / "one.safetensors")
        assert same(tensors(model), states[at])
    changed = sum(len(find_changed_indices(states[0][n], states[at][n])) for n in states[0])
    assert delta.entries == changed


def test_squash_drops_what_came_back(base, tmp_path):
    store, states = made_store(tmp_path / "s", base, count=1)
    live = {name: tensor.clone() for name, tensor in states[1].items()}
    index = {name: find_changed_indices(states[0][name], live[name]) for name in live}
    before = {name: read_entries(live[name], at) for name, at in index.items()}
    after = {name: read_entries(states[0][name], at) for name, at in index.items()}
    shapes = {name: live[name].shape for name in index}
    fields = {"task": "undo", "base": store.base.fingerprint, "info": {}}
    parent = store.entries[-1].sha256
    store.append(Delta.from_change(index, before, after, shapes, parent=parent, **fields))
    assert squash(store).entries == 0


def test_squash_of_another_base_or_position_is_refused(stored, tmp_path):
    store, _, _ = stored
    with pytest.raises(PositionError, match="allowed: 0…3"):
        squash(store, 4)
    other = make_llava(tmp_path / "other", seed=5)
    with pytest.raises(BaseError, match="another base"):
        squash(store, base=other)


@pytest.mark.slow
def test_extract_is_the_inverse_of_export(stored, base, tmp_path):
    store, states, dtype = stored
    mm_piece.export(store, at=2, to=tmp_path / "tuned", shard_size="20KiB")
    found = deriving.extract(base, tmp_path / "tuned", tmp_path / "x.safetensors")
    squashed = squash(store, 2)
    delta = Delta.load(tmp_path / "x.safetensors")
    assert delta.task == "x"
    assert found["entries"] == delta.entries == squashed.entries
    assert found["of"] == sum(tensor.numel() for tensor in states[0].values())
    assert delta.before == squashed.before
    assert same(delta.values, squashed.values)
    assert same(delta.indices, squashed.indices)
    # Streamed or from memory: one file format, the same bytes.
    assert delta.to_bytes() == (tmp_path / "x.safetensors").read_bytes()
    model, _ = mm_piece.load(base, delta=tmp_path / "x.safetensors")
    assert same(tensors(model), states[2])


def test_extract_takes_dense_changes_and_none(base, tmp_path):
    model, processor = load_base(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    model.save_pretrained(tmp_path / "tuned")
    processor.save_pretrained(tmp_path / "tuned")
    found = deriving.extract(base, tmp_path / "tuned", tmp_path / "x.safetensors")
    assert found["entries"] == found["of"]
    loaded, _ = mm_piece.load(base, delta=tmp_path / "x.safetensors")
    assert same(tensors(loaded), tensors(model))
    assert deriving.extract(base, base, tmp_path / "y.safetensors")["entries"] == 0
    assert Delta.load(tmp_path / "y.safetensors").entries == 0


def test_extract_names_what_does_not_fit(base, tmp_path):
    wide = make_llava(tmp_path / "wide")
    file = wide / "model.safetensors"
    content = safetensors.torch.load_file(file)
    name = next(key for key in content if key.endswith("lm_head.weight"))
    content[name] = torch.cat([content[name], content[name]])
    safetensors.torch.save_file(content, file)
    to = tmp_path / "x.safetensors"
    with pytest.raises(ModelError, match=r"lm_head\.weight is \[522, 24\], the model has"):
        deriving.extract(base, wide, to)
    embedding = next(key for key in content if "embed_tokens" in key)
    content[embedding] = content[name].clone()
    safetensors.torch.save_file(content, file)
    config = json.loads((wide / "config.json").read_text())
    config["text_config"]["vocab_size"] = 522
    (wide / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"embed_tokens\.weight has the shapes"):
        deriving.extract(base, wide, to)
    del content[name]
    safetensors.torch.save_file(content, file)
    with pytest.raises(ModelError, match="lm_head"):
        deriving.extract(base, wide, to)
    (wide / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no file named model.safetensors"):
        deriving.extract(base, wide, to)
    with pytest.raises(ModelError, match="no such folder"):
        deriving.extract(base, "./nowhere", to)
    with pytest.raises(DeltaError, match="No such file or directory"):
        deriving.extract(base, base, tmp_path / "no" / "x.safetensors")
    assert not to.exists()
    assert not list(tmp_path.glob(".*"))


def test_merge_and_its_conflicts(base, tmp_path):
    live = live_of(base, "bfloat16")
    mark, start = compute_fingerprint(live), {name: tensor.clone() for name, tensor in live.items()}
    ours = step({name: t.clone() for name, t in start.items()}, mark, 0.2, 1, task="ours")
    theirs = step({name: t.clone() for name, t in start.items()}, mark, 0.2, 2, task="theirs")
    with pytest.raises(ConflictError, match="'ours' and 'theirs'"):
        deriving.merge([ours, theirs], base)
    expected = {name: tensor.clone() for name, tensor in start.items()}
    ours.apply(expected)
    for name, index in theirs.indices.items():
        expected[name].view(-1)[index.long()] = theirs.values[name]
    deriving.merge([ours, theirs], base, "last").save(tmp_path / "m.safetensors")
    model, _ = mm_piece.load(base, delta=tmp_path / "m.safetensors")
    assert same(tensors(model), expected)
    with pytest.raises(BaseError, match="another base"):
        deriving.merge([ours], make_llava(tmp_path / "other", seed=9))


def test_without_a_task_whose_mask_is_its_own(base, tmp_path):
    model, _ = load_base(base)
    live, path = tensors(model), tmp_path / "s"
    start = {name: tensor.clone() for name, tensor in live.items()}
    names = sorted(live)
    recipe = RECIPE.format(tasks=", ".join(f"{{name: t{i}, train: x, test: x}}" for i in range(3)))
    store = DeltaStore.create(path, describe_base(model, base, None, path).facts, recipe)
    for number in range(3):  # t0 has its own tensors, t1 and t2 share some
        part = {name: live[name] for name in (names[8:], names[:4], names[2:6])[number]}
        parent = store.entries[-1].sha256 if len(store) else ""
        store.append(step(part, store.base.fingerprint, 0.5, number, parent, f"t{number}"))
    new = deriving.remove_task(store, "t0", tmp_path / "less")
    assert [entry.task for entry in new.entries] == ["t1", "t2"]
    assert [entry.parent for entry in new.entries] == ["", new.entries[0].sha256]
    assert new.recipe.count("name: t") == 2
    model, _ = mm_piece.load(store=tmp_path / "less")
    expected = {name: (live if name in names[:6] else start)[name] for name in tensors(model)}
    assert same(tensors(model), expected)
    for task, other in (("t1", "t2"), ("t2", "t1")):
        with pytest.raises(ConflictError, match=f"'{task}' cannot be taken out: '{other}'"):
            deriving.remove_task(store, task, tmp_path / "never")
    with pytest.raises(StoreError, match="it has t0, t1, t2"):
        deriving.remove_task(store, "t9", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_places_of_a_diff(stored, tmp_path):
    store, _, _ = stored
    found = diff_positions(f"{store.path}@1", store.path)
    assert found["overlap"]["tasks"] == ["task1", "task2", "task3"]
    one = store.path / store.entries[0].file
    assert diff_positions(one, f"{store.path}@1")["groups"]["vision"]["different"] == 0
    with pytest.raises(PositionError):
        diff_positions(f"{store.path}@7", store.path)
    with pytest.raises(StoreError, match="not a delta store"):
        diff_positions(tmp_path, store.path)


def test_a_single_delta_out_of_order_says_where_it_starts(stored, base):
    store, _, _ = stored
    with pytest.raises(OrderError, match=store.entries[0].sha256[:12]):
        mm_piece.load(base, delta=store.path / store.entries[1].file)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_has_the_identity_of_its_model(base, dtype):
    live = live_of(base, dtype)
    checkpoint = Checkpoint(Path(base), dtype)
    assert checkpoint.compute_fingerprint() == compute_fingerprint(live)
    assert checkpoint.compute_full_digest() == compute_full_digest(live)


def test_the_base_is_verified_to_the_last_bit(stored, base, tmp_path):
    store, states, _ = stored
    assert verify_base(store) == store.base.digest == compute_full_digest(states[0])
    changed = make_llava(tmp_path / "base")
    content = safetensors.torch.load_file(changed / "model.safetensors")
    name = max(content, key=lambda key: content[key].numel())
    row = content[name].view(-1)  # entry 1 is not among the sampled ones: their stride is odd, > 1
    row[1] += 0.5
    safetensors.torch.save_file(content, changed / "model.safetensors")
    with pytest.raises(BaseError, match="expected digest"):
        verify_base(store, changed)


def test_export_is_there_whole_or_not_at_all(stored, base, tmp_path, monkeypatch):
    store, states, _ = stored
    wrong = replace(store.delta(3), before={name: "0" * 64 for name in store.delta(3).before})
    monkeypatch.setattr(DeltaStore, "deltas", lambda self, at: [wrong])
    with pytest.raises(OrderError):
        mm_piece.export(store, at=3, to=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_delta_of_weights_that_are_not_there_makes_no_checkpoint(stored, base, tmp_path):
    store, _, _ = stored
    delta = squash(store, 1)
    for row in (delta.shapes, delta.indices, delta.values, delta.before):
        row["language_model.model.layers.99.mlp.up_proj.weight"] = row.pop(next(iter(row)))
    delta.save(tmp_path / "odd.safetensors")
    with pytest.raises(MismatchError, match="layers.99.* which is not there"):
        mm_piece.export(tmp_path / "odd.safetensors", tmp_path / "out", base=base)
    with pytest.raises(MismatchError, match="layers.99.* which is not there"):
        mm_piece.load(base, delta=tmp_path / "odd.safetensors")
    assert not (tmp_path / "out").exists()


def test_a_store_alone_is_loaded_as_one(stored, base, tmp_path):
    """Also refused as one: beside a delta, or with a revision, which only a base has."""
    store, states, dtype = stored
    last, _ = mm_piece.load(str(store.path))
    assert same(tensors(last), states[3])
    first, _ = mm_piece.load(store.path, at=1)
    assert same(tensors(first), states[1])
    with pytest.raises(StoreError, match="a store or a single delta, not both"):
        mm_piece.load(store.path, delta=store.path / "0001-digits.safetensors")
    with pytest.raises(StoreError, match="revision goes with a base"):
        mm_piece.load(store.path, revision="main")


def test_results_of_the_base_are_not_exported(stored, base, tmp_path):
    store, _, _ = stored
    moved = tmp_path / "base"
    shutil.copytree(base, moved)
    results = ("ability.json", "trainer_state.json", "all_results.json", "eval_results.json")
    for name in (*results, "added_tokens.json", "extra.jinja"):
        (moved / name).write_text("{}")
    folder = mm_piece.export(store, tmp_path / "out", base=moved)  # at the last position
    names = {file.name for file in folder.iterdir()}
    assert names.isdisjoint(results)
    assert {"config.json", "tokenizer.json", "added_tokens.json", "extra.jinja"} <= names


@pytest.mark.slow
def test_export_in_shards_is_what_a_full_save_holds(stored, base, tmp_path):
    store, states, dtype = stored
    (tmp_path / "out").mkdir()  # an empty folder may be there
    mm_piece.export(store, at=3, to=tmp_path / "out", shard_size="20KiB")
    files = find_weight_files(str(tmp_path / "out"))
    assert len(files) > 3
    for file in files:
        held = safetensors.torch.load_file(file)
        assert sum(t.nbytes for t in held.values()) <= 20 * 1024 or len(held) == 1
        assert file.stat().st_mode & 0o777 == (tmp_path / "out/config.json").stat().st_mode & 0o777
    model, _ = load_base(tmp_path / "out", dtype=dtype)
    assert same(tensors(model), states[3])
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype
    with pytest.raises(StoreError, match="shard size '5 apples'"):
        mm_piece.export(store, at=3, to=tmp_path / "out2", shard_size="5 apples")


@pytest.mark.slow
def test_extract_stays_small(tmp_path):
    """Two checkpoints of 96 MB each pass through a few pieces of memory."""
    code = """
import resource, sys, torch
from tiny_llava import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
import mm_piece, mm_piece.store.deriving
sizes = dict(vocab_size=261, hidden_size=512, intermediate_size=1024, num_hidden_layers=20)
model = LlamaForCausalLM(LlamaConfig(num_attention_heads=8, **sizes)).bfloat16()
model.save_pretrained('old')
for p in model.parameters(): p.data.view(-1)[::1000] += 1
model.save_pretrained('new')
for p in ('old', 'new'): make_tokenizer().save_pretrained(p)
del model
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(mm_piece.store.deriving.extract('old', 'new', 'd.safetensors'))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    path = os.pathsep.join(
        [str(Path(__file__).parents[1] / "support"), str(Path(mm_piece.__file__).parent.parent)]
    )
    env = {**os.environ, "PYTHONPATH": path}
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert int(out.stdout.split()[-1]) < 60
