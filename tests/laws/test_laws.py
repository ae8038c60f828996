"""Laws 2, 5 and 8 on the whole path: train, stop, resume, load at any position, move, export."""

import json
import shutil
import time
from dataclasses import replace

import pytest
import torch
from forking import start_fork
from tiny_llava import make_llava
from tiny_recipe import deltas_of, measured, recipe_for

import mm_piece
from mm_piece.deltas.delta import Delta
from mm_piece.deltas.merging import collect_indices, replay_deltas
from mm_piece.entries import read_entries
from mm_piece.errors import BaseError, MismatchError, OrderError, PositionError, StoreError
from mm_piece.models.base import load_base, tensors
from mm_piece.store.delta_store import DeltaStore
from mm_piece.training import loop as training

pytestmark = pytest.mark.slow


def snapshot(model):
    return {name: tensor.clone() for name, tensor in tensors(model).items()}


def same_bits(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def trained(request, base, tmp_path_factory):
    """A store of three tasks, and the live model's weights as they stood at each position."""
    seen = {}
    store_path = tmp_path_factory.mktemp("stores") / request.param
    with pytest.MonkeyPatch.context() as patch:
        measure = training.measure_position

        def watch(store, recipe, model, processor, *, position, test):
            seen[position] = snapshot(model)
            measure(store, recipe, model, processor, position=position, test=test)

        patch.setattr(training, "measure_position", watch)
        store = mm_piece.train(recipe_for(base, store_path, dtype=request.param))
    return store, seen


def test_a_run_loads_its_base_once(base, tmp_path, monkeypatch):
    """A new run, and one that goes on: a base of billions of weights takes minutes to load."""
    calls = []
    real = load_base

    def count(*args, **options):
        calls.append(args)
        return real(*args, **options)

    for module in ("training.run_setup", "store.loading"):
        monkeypatch.setattr(f"mm_piece.{module}.load_base", count)
    recipe = recipe_for(base, tmp_path / "store")
    mm_piece.train(recipe)
    assert len(calls) == 1
    mm_piece.train(recipe)  # finished: nothing is loaded
    assert len(calls) == 1


def test_load_at_t_is_the_model_that_stood_there(trained, base):
    store, seen = trained
    assert sorted(seen) == [0, 1, 2, 3]
    for position, expected in seen.items():
        model, _ = mm_piece.load(base, store=store.path, at=position)
        assert same_bits(tensors(model), expected)
    assert not same_bits(seen[0], seen[1])
    assert not same_bits(seen[2], seen[3])


def test_checkout_anywhere_and_back_is_the_identity(trained, base):
    store, seen = trained
    model, _ = mm_piece.load(base, store=store.path, at=2)
    for position in (0, 3, 1, 1, 2, 0, 1, 3, 0):
        mm_piece.checkout(model, at=position)
        assert same_bits(tensors(model), seen[position])


def test_checkout_writes_touched_entries_alone(trained, base):
    store, _ = trained
    model, _ = mm_piece.load(base, store=store.path, at=1)
    touched = {name for delta in store.deltas() for name in delta.indices}
    versions = {name: t._version for name, t in model.state_dict().items()}
    mm_piece.checkout(model, at=3)
    written = sum(t._version != versions[name] for name, t in model.state_dict().items())
    assert 0 < written <= len(touched) < len(versions)


def test_export_holds_the_same_bits(trained, base, tmp_path):
    store, seen = trained
    for position in (0, 2):
        folder = mm_piece.export(store, at=position, to=tmp_path / str(position))
        model, _ = load_base(folder, dtype=store.base.dtype)
        assert same_bits(tensors(model), seen[position])


def test_a_single_delta_patches_its_base(trained, base):
    store, seen = trained
    model, _ = mm_piece.load(base, delta=store.path / store.entries[0].file)
    assert same_bits(tensors(model), seen[1])
    with pytest.raises(MismatchError):
        mm_piece.load(base, delta=store.path / store.entries[2].file)


def test_results_are_complete(trained):
    store, _ = trained
    results = store.results()
    assert results["tasks"] == ["digits", "words", "charts"]
    assert [len(row) for row in results["matrix"]] == [3, 3, 3, 3]
    assert len(results["base_ability"]) == 4
    assert set(store.answers(2)) == {"digits", "words", "charts", "base"}


def test_training_again_changes_nothing(trained, base):
    store, _ = trained
    before = {file: file.read_bytes() for file in store.path.glob("*.*") if file.is_file()}
    mm_piece.train(recipe_for(base, store.path, dtype=store.base.dtype))
    assert all(file.read_bytes() == content for file, content in before.items())


def test_a_task_can_be_added_later(trained, base, tmp_path):
    store, _ = trained
    recipe = recipe_for(base, tmp_path / "grown", dtype=store.base.dtype)
    mm_piece.train(recipe.model_copy(update={"tasks": recipe.tasks[:2]}))
    grown = mm_piece.train(recipe)
    assert deltas_of(grown) == deltas_of(store)
    assert measured(grown) == measured(store)
    with pytest.raises(StoreError, match=r"another 'tasks': tasks\[2\] was {.*, here it is absent"):
        mm_piece.train(recipe.model_copy(update={"tasks": recipe.tasks[:2]}))


def test_positions_out_of_range_are_refused(trained, base):
    store, _ = trained
    for position in (-1, 4):
        with pytest.raises(PositionError, match="0.*3"):
            mm_piece.load(base, store=store.path, at=position)

    model, _ = mm_piece.load(base, store=store.path, at=1)
    for position in (-1, 4, None, True, 1.0):
        with pytest.raises(PositionError, match="0.*3"):
            mm_piece.checkout(model, position)
    assert mm_piece.position(model) == 1


def test_another_base_is_refused(trained, tmp_path):
    from tiny_llava import make_llava

    store, _ = trained
    other = make_llava(tmp_path / "other", seed=9)
    with pytest.raises(MismatchError, match="another base"):
        mm_piece.load(other, store=store.path, at=1)
    with pytest.raises(BaseError, match="another base"):
        mm_piece.train(recipe_for(other, store.path, dtype=store.base.dtype))


def test_another_recipe_is_refused(trained, base):
    store, _ = trained
    changed = "another 'select': select.method was 'piece-f', here it is 'piece-s'"
    with pytest.raises(StoreError, match=changed):
        mm_piece.train(recipe_for(base, store.path, "piece-s", store.base.dtype))
    recipe = recipe_for(base, store.path, dtype=store.base.dtype)
    unset = {"train": {**recipe.train, "eval_steps": None}}
    with pytest.raises(StoreError, match="train.eval_steps was absent, here it is None"):
        mm_piece.train(recipe.model_copy(update=unset))


def test_another_number_of_examples_a_step_is_refused(trained, base):
    """How a step is divided may change, what it learns may not."""
    store, _ = trained
    recipe = recipe_for(base, store.path, dtype=store.base.dtype)
    step = recipe.train.get("per_device_train_batch_size", 8)
    halves = {"per_device_train_batch_size": step // 2, "gradient_accumulation_steps": 2}
    mm_piece.train(recipe.model_copy(update={"train": {**recipe.train, **halves}}))
    other = {**recipe.train, "per_device_train_batch_size": 2 * step}
    with pytest.raises(
        StoreError, match=f"learns {step} examples of '.*' a step, here it would be {2 * step}"
    ):
        mm_piece.train(recipe.model_copy(update={"train": other}))
    mm_piece.train(recipe)


def test_a_run_goes_on_after_base_and_store_have_moved(trained, base, tmp_path):
    store, _ = trained
    shutil.copytree(store.path, tmp_path / "store")
    shutil.copytree(base, tmp_path / "base")
    dtype = store.base.dtype
    moved = mm_piece.train(recipe_for(tmp_path / "base", tmp_path / "store", dtype=dtype))
    assert deltas_of(moved) == deltas_of(store)
    other = make_llava(tmp_path / "other", seed=4)
    with pytest.raises(BaseError, match="another base"):
        mm_piece.train(recipe_for(other, tmp_path / "store", dtype=dtype))


def test_a_chain_that_breaks_on_the_way_writes_nothing(trained, base, monkeypatch):
    """The last delta of a move does not fit: none before it may have been written."""
    store, seen = trained
    model, _ = mm_piece.load(base, store=store.path, at=0)
    third, delta = store.delta(3), DeltaStore.delta
    wrong = replace(third, before=dict.fromkeys(third.before, "0" * 64))
    monkeypatch.setattr(DeltaStore, "delta", lambda s, at: wrong if at == 3 else delta(s, at))
    monkeypatch.setattr(Delta, "apply", None)  # whoever writes comes here
    with pytest.raises(OrderError):
        mm_piece.checkout(model, at=3)
    assert same_bits(tensors(model), seen[0])
    monkeypatch.undo()
    mm_piece.checkout(model, at=3)
    assert same_bits(tensors(model), seen[3])


@pytest.mark.parametrize("at", [0, 3])
def test_a_model_in_another_dtype_is_not_moved(trained, base, at):
    store, _ = trained
    model = mm_piece.load(base, store=store.path, at=2)[0].to(torch.float64)
    before = snapshot(model)
    with pytest.raises(MismatchError, match="the model is torch.float64"):
        mm_piece.checkout(model, at=at)
    assert same_bits(tensors(model), before)


def test_a_model_that_was_changed_does_not_go_back(trained, base):
    store, _ = trained
    model, _ = mm_piece.load(base, store=store.path, at=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    before = snapshot(model)
    with pytest.raises(MismatchError, match="was changed since"):
        mm_piece.checkout(model, at=0)
    assert same_bits(tensors(model), before)


def test_a_store_with_another_history_moves_no_model(trained, base, tmp_path):
    store, seen = trained
    shutil.copytree(store.path, tmp_path / "store")
    model, _ = mm_piece.load(base, store=tmp_path / "store", at=2)
    manifest = json.loads((tmp_path / "store" / "store.json").read_text())
    del manifest["deltas"][1:]
    (tmp_path / "store" / "store.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="another history"):
        mm_piece.checkout(model, at=1)
    assert same_bits(tensors(model), seen[2])


def test_other_values_than_a_delta_expects_are_refused(trained, base):
    """The fingerprint is a sample; the digests of the touched values are what proves the base."""
    store, _ = trained
    deltas = store.deltas(2)
    model, _ = load_base(base, dtype=store.base.dtype)
    index = collect_indices(deltas)
    values = {name: read_entries(tensors(model)[name], where) for name, where in index.items()}
    replay_deltas(deltas, index, values)
    with pytest.raises(OrderError, match="starts from delta"):
        replay_deltas(deltas[::-1], index, values)
    name = next(iter(deltas[0].indices))
    values[name][torch.searchsorted(index[name], deltas[0].indices[name][0])] += 1
    with pytest.raises(BaseError, match="starts from base"):
        replay_deltas(deltas, index, values)


def test_a_damaged_chain_leaves_the_live_model_untouched(trained, base, tmp_path):
    store, seen = trained
    copy = shutil.copytree(store.path, tmp_path / "copy")
    model, _ = mm_piece.load(base, store=copy, at=1)
    file = copy / store.entries[2].file
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(mm_piece.PieceError):
        mm_piece.checkout(model, at=3)
    assert same_bits(tensors(model), seen[1])


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    store = mm_piece.train(recipe_for(base, tmp_path_factory.mktemp("whole") / "store", "piece-s"))
    return deltas_of(store), measured(store)


class Crash(Exception):
    """Ends a run in the middle."""


@pytest.mark.parametrize("step", [1, 3, 6, 8, 14])  # of all three tasks
def test_stop_at_any_step_and_resume_is_uninterrupted(
    uninterrupted, base, tmp_path, step, monkeypatch
):
    recipe = recipe_for(base, tmp_path / "store", "piece-s")
    steps = []

    def crash(*_, **__):
        steps.append(len(steps) + 1)
        if steps[-1] == step:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr("mm_piece.training.stopping.GracefulStop.on_step_end", crash)
        with pytest.raises(Crash):
            mm_piece.train(recipe)
    store = mm_piece.train(recipe)
    assert deltas_of(store) == uninterrupted[0]
    assert measured(store) == uninterrupted[1]


def test_killed_runs_resume(uninterrupted, base, tmp_path):
    """kill -9 at a few instants of the whole run, then the same command again."""
    recipe = recipe_for(base, tmp_path / "store", "piece-s")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    for seconds in (0.3, 1.2, 2.0):
        process = start_fork("-m", "mm_piece", "train", str(file))
        deadline = time.monotonic() + 120
        # the clock starts when the work does
        while "position" not in process.stdout() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(seconds)
        process.kill()
        if (tmp_path / "store" / "store.json").exists():
            DeltaStore.open(tmp_path / "store").verify()
    store = mm_piece.train(recipe)
    assert deltas_of(store) == uninterrupted[0]
    assert measured(store) == uninterrupted[1]
