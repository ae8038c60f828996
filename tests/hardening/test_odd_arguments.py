"""Every exported name, given what it cannot take, raises a PieceError of one line."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from quick_store import make_store
from torch import nn

import mm_piece
from mm_piece import Delta, DeltaStore, PieceError
from mm_piece.data import collate, encode, encode_prompt, read

NAME = "language_model.model.layers.1.mlp.down_proj.weight"
NOT_POSITIONS = ["2", 1.0, True, -1, 99, None.__class__, [1], b"1"]
NOT_PATHS = [5, None, b"x", ["x"], 1.5]


@pytest.fixture(scope="module")
def world(base, tmp_path_factory):
    """What the calls of the table are made with."""
    folder = tmp_path_factory.mktemp("odd")

    store = make_store(base, folder / "store", positions=2)
    model, processor = mm_piece.load(store=store, at=1)
    found = SimpleNamespace(base=base, folder=folder, store=store, model=model)
    found.processor, found.examples = processor, read("scenes:digits/train[:2]")
    found.batches = [encode(example, processor) for example in read("scenes:digits/train[:2]")]
    found.scores, found.mask = {NAME: torch.rand(24, 32)}, {NAME: torch.arange(3)}
    found.file, found.new, found.delta = folder / "file", folder / "new", store.delta(1)
    found.file.write_text("x")
    return found


def without(batch, *names):
    return {name: value for name, value in batch.items() if name not in names}


def unanswered(batch):
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


def with_tensor(batch, name, change):
    return {**batch, name: change(batch[name])}


def inside(context, call):
    with context:
        return call()


# name -> calls of a world, each of which must be refused
CALLS = {
    "Delta": [
        *(lambda w, p=p: Delta.load(p) for p in NOT_PATHS),
        *(lambda w, p=p: w.delta.save(p) for p in NOT_PATHS),
        lambda w: Delta.load(w.folder),
        lambda w: Delta.load(w.folder / "absent"),
        lambda w: Delta.load(w.file),
        lambda w: Delta.from_bytes(b""),
        lambda w: w.delta.save(w.folder),
        lambda w: w.delta.save(w.folder / "absent" / "x"),
        lambda w: w.delta.save(w.new, codec="zip"),
        lambda w: w.delta.require_applicable({}),
        lambda w: w.delta.apply({name: torch.zeros(2) for name in w.delta.shapes}),
    ],
    "DeltaStore": [
        *(lambda w, p=p: DeltaStore.open(p) for p in NOT_PATHS),
        lambda w: DeltaStore.open(w.file),
        lambda w: DeltaStore.open(w.folder / "absent"),
        lambda w: DeltaStore.create(w.file, {"fingerprint": "0" * 64}, "x"),
        lambda w: DeltaStore.create(5, {"fingerprint": "0" * 64}, "x"),
        *(lambda w, a=a: w.store.delta(a) for a in NOT_POSITIONS),
        *(lambda w, a=a: w.store.deltas(a) for a in NOT_POSITIONS),
        *(lambda w, a=a: w.store.answers(a) for a in NOT_POSITIONS),
        lambda w: w.store.write_results({"matrix": float("nan")}),
    ],
    "attach": [
        *(lambda w, a=a: mm_piece.attach(w.model, w.store, a) for a in NOT_POSITIONS),
        *(lambda w, p=p: mm_piece.attach(w.model, p, 1) for p in NOT_PATHS),
        lambda w: mm_piece.attach(w.model, w.file, 1),
        lambda w: mm_piece.attach("model", w.store, 1),
        lambda w: mm_piece.attach(nn.Linear(2, 2), w.store, 1),
        lambda w: mm_piece.attach(w.model, w.store, 1, base=w.folder),
    ],
    "checkout": [
        *(lambda w, a=a: mm_piece.checkout(w.model, a) for a in [*NOT_POSITIONS]),
        lambda w: mm_piece.checkout("model", 1),
        lambda w: mm_piece.checkout(None, 1),
        lambda w: mm_piece.checkout(nn.Linear(2, 2), 1),
    ],
    "estimate": [
        lambda w: mm_piece.estimate("model", w.batches),
        lambda w: mm_piece.estimate(w.model, None),
        lambda w: mm_piece.estimate(w.model, iter(w.batches)),
        lambda w: mm_piece.estimate(w.model, w.batches[0]),
        lambda w: mm_piece.estimate(w.model, []),
        lambda w: mm_piece.estimate(w.model, [{}]),
        lambda w: mm_piece.estimate(w.model, [None]),
        lambda w: mm_piece.estimate(w.model, ["a text"]),
        lambda w: mm_piece.estimate(w.model, [without(w.batches[0], "labels")]),
        lambda w: mm_piece.estimate(w.model, [{**w.batches[0], "labels": None}]),
        lambda w: mm_piece.estimate(w.model, [w.batches[0], unanswered(w.batches[1])]),
        lambda w: mm_piece.estimate(w.model, [{k: v[:0] for k, v in w.batches[0].items()}]),
        lambda w: mm_piece.estimate(w.model, [{**w.batches[0], "input_ids": "text"}]),
        lambda w: mm_piece.estimate(w.model, [without(w.batches[0], "input_ids")]),
        lambda w: mm_piece.estimate(
            w.model, [{**w.batches[0], "input_ids": w.batches[0]["input_ids"] + 10_000}]
        ),
        lambda w: mm_piece.estimate(w.model, w.batches, method="piece-x"),
        lambda w: mm_piece.estimate(w.model, w.batches, method=5),
        lambda w: mm_piece.estimate(w.model, w.batches, names=["x"]),
        *(
            lambda w, m=m: mm_piece.estimate(w.model, w.batches, memory=m)
            for m in ("8 gigs", "-1GiB", "", None, 1.5, True, [1])
        ),
        *(
            lambda w, n=n, t=t: mm_piece.estimate(w.model, [with_tensor(w.batches[0], n, t)])
            for n, t in (
                ("input_ids", lambda ids: ids.float()),
                ("labels", lambda ids: ids.float()),
                ("input_ids", lambda ids: ids[0]),
                ("pixel_values", lambda pixels: pixels[:, :, :5]),
                ("pixel_values", lambda pixels: pixels[0, 0]),
            )
        ),
        lambda w: inside(torch.inference_mode(), lambda: mm_piece.estimate(w.model, w.batches)),
        lambda w: mm_piece.estimate(
            inside(torch.inference_mode(), lambda: nn.Linear(2, 2)), [{"labels": None}]
        ),
        lambda w: inside(
            mm_piece.sparse_tuning(w.model, w.mask), lambda: mm_piece.estimate(w.model, w.batches)
        ),
    ],
    "evaluate": [
        lambda w: mm_piece.evaluate(w.model, w.processor, w.examples, "guess"),
        lambda w: mm_piece.evaluate("model", w.processor, w.examples),
        *(lambda w, p=p: mm_piece.evaluate(w.model, p, w.examples) for p in (None, "x", 5)),
        *(
            lambda w, e=e: mm_piece.evaluate(w.model, w.processor, e, max_new_tokens=2)
            for e in (None, 5, "x", [None], ["x"], {"a": 1})
        ),
        lambda w: mm_piece.evaluate(w.model, w.processor, w.batches, max_new_tokens=2),
    ],
    "export": [
        *(lambda w, a=a: mm_piece.export(w.store, w.new, a) for a in NOT_POSITIONS),
        *(lambda w, p=p: mm_piece.export(p, w.new, 1) for p in NOT_PATHS),
        *(lambda w, p=p: mm_piece.export(w.store, p, 1) for p in NOT_PATHS),
        lambda w: mm_piece.export(w.file, w.new, 1),
        lambda w: mm_piece.export(w.store, w.file, 1),
        lambda w: mm_piece.export(w.store, w.new, 1, base=w.folder),
        lambda w: mm_piece.export(w.store, w.new, 1, shard_size="much"),
        lambda w: mm_piece.export(w.store, w.new, 1, shard_size=None),
    ],
    "extract": [
        *(lambda w, p=p: mm_piece.extract(p, w.base, w.new) for p in NOT_PATHS),
        *(lambda w, p=p: mm_piece.extract(w.base, p, w.new) for p in NOT_PATHS),
        *(lambda w, p=p: mm_piece.extract(w.base, w.base, p) for p in NOT_PATHS),
        lambda w: mm_piece.extract(w.base, w.file, w.new),
        lambda w: mm_piece.extract(w.base, w.base, w.new, dtype="float"),
    ],
    "load": [
        *(lambda w, a=a: mm_piece.load(store=w.store, at=a) for a in NOT_POSITIONS),
        *(lambda w, p=p: mm_piece.load(store=p) for p in NOT_PATHS),
        *(lambda w, p=p: mm_piece.load(w.base, delta=p) for p in NOT_PATHS if p is not None),
        *(lambda w, p=p: mm_piece.load(p) for p in NOT_PATHS),
        lambda w: mm_piece.load(store=w.file),
        lambda w: mm_piece.load(w.base, at=1),
        lambda w: mm_piece.load(w.base, at="0"),
        lambda w: mm_piece.load(w.base, delta=w.file),
        lambda w: mm_piece.load(delta=w.file),
        lambda w: mm_piece.load(w.folder),
        lambda w: mm_piece.load(w.base, store=w.store, delta=w.file),
        lambda w: mm_piece.load(w.base, dtype="float"),
        lambda w: mm_piece.load(store=w.store, dtype=5),
    ],
    "position": [
        lambda w: mm_piece.position("model"),
        lambda w: mm_piece.position(nn.Linear(2, 2)),
    ],
    "pull": [
        *(lambda w, p=p: mm_piece.pull(p, w.new) for p in NOT_PATHS),
        *(lambda w, p=p: mm_piece.pull(w.store.path, p) for p in NOT_PATHS),
        lambda w: mm_piece.pull(w.file, w.new),
        lambda w: mm_piece.pull(w.store.path, w.file),
    ],
    "push": [
        *(lambda w, p=p: mm_piece.push(p, w.new) for p in NOT_PATHS),
        *(lambda w, p=p: mm_piece.push(w.store, p) for p in NOT_PATHS),
        lambda w: mm_piece.push(w.file, w.new),
        lambda w: mm_piece.push(w.store, w.file),
    ],
    "select": [
        *(lambda w, s=s: mm_piece.select(s) for s in (None, 5, [torch.ones(3)], {}, {"x": 5})),
        lambda w: mm_piece.select({"x": [1.0, 2.0]}),
        lambda w: mm_piece.select({"x": torch.empty(3, device="meta")}, 0.5),
        lambda w: mm_piece.select({"x": torch.tensor([1.0, float("nan")])}, 0.5),
        *(
            lambda w, d=d: mm_piece.select(w.scores, d)
            for d in (0, -1, 2, "much", True, None, {}, {"vision": "x"}, float("nan"), [0.1])
        ),
        lambda w: mm_piece.select(w.scores, 0.1, scope="layer"),
        lambda w: mm_piece.select(w.scores, 0.1, unit="column"),
        lambda w: mm_piece.select(w.scores, 0.1, floor=5),
    ],
    "sparse_tuning": [
        *(lambda w, m=m: mm_piece.sparse_tuning(w.model, m) for m in (None, [NAME], NAME, {}, 5)),
        lambda w: mm_piece.sparse_tuning("model", w.mask),
        lambda w: mm_piece.sparse_tuning(None, w.mask),
        lambda w: mm_piece.sparse_tuning(w.model, {"x": torch.arange(3)}),
        *(
            lambda w, i=i: mm_piece.sparse_tuning(w.model, {NAME: i})
            for i in (
                [0, 1],
                None,
                torch.ones(24, 32, dtype=torch.bool),
                torch.tensor([0.5]),
                torch.tensor([2, 1]),
                torch.tensor([1, 1]),
                torch.tensor([-1]),
                torch.tensor([24 * 32]),
                torch.tensor([[0, 1]]),
                torch.tensor(1),
                torch.empty(2, dtype=torch.int64, device="meta"),
            )
        ),
    ],
    "squash": [
        *(lambda w, a=a: mm_piece.squash(w.store, a) for a in NOT_POSITIONS),
        *(lambda w, p=p: mm_piece.squash(p) for p in NOT_PATHS),
        lambda w: mm_piece.squash(w.file),
    ],
    "train": [
        *(lambda w, p=p: mm_piece.train(p) for p in [*NOT_PATHS, {"base": "x"}]),
        lambda w: mm_piece.train(w.folder),
        lambda w: mm_piece.train(w.folder / "absent.yaml"),
        lambda w: mm_piece.train(w.file),
        lambda w: mm_piece.train("pipelines/tiny.yaml", "x"),
        lambda w: mm_piece.train("pipelines/tiny.yaml", 5),
        lambda w: mm_piece.train("pipelines/tiny.yaml", "store.x=1"),
    ],
}
# What `mm_piece.data` has for loops of one's own.
OF_TASKS = {
    "read": [
        *(lambda w, s=s: read(s) for s in (None, 5, b"x", ["x"], "")),
        *(lambda w, i=i: read("scenes:digits/train[:2]", images=i) for i in (5, ["x"])),
        *(lambda w, c=c: read("scenes:digits/train[:2]", columns=c) for c in (5, "x", ["x"])),
        lambda w: read("scenes:digits/train[:2]", prompt=5),
        lambda w: read(w.file),
        lambda w: read(w.folder / "absent.json"),
    ],
    "encode": [
        *(lambda w, e=e: encode(e, w.processor) for e in (None, "x", {"prompt": "?"})),
        *(lambda w, p=p: encode(w.examples[0], p) for p in (None, "x")),
        *(lambda w, e=e: encode_prompt(e, w.processor) for e in (None, "x")),
    ],
    "collate": [
        *(lambda w, b=b: collate(b, pad=0) for b in ([], None, 5, "x", [None], [{}])),
        lambda w: collate(w.batches[0], pad=0),
        lambda w: collate(w.examples, pad=0),
    ],
}
ROWS = [
    pytest.param(call, id=f"{name} {number}")
    for name, calls in {**CALLS, **OF_TASKS}.items()
    for number, call in enumerate(calls)
]


@pytest.mark.parametrize("call", ROWS)
def test_odd_arguments_are_one_line(call, world):
    with pytest.raises(PieceError) as refused:
        call(world)
    assert "\n" not in str(refused.value), inspect.getsource(call)
    assert not world.new.exists()


def test_the_table_has_every_exported_name():
    assert CALLS.keys() == set(mm_piece.__all__) - {"PieceError"}


def test_a_memory_may_be_written_as_in_recipes_and_gradients_be_off(world):
    expected = mm_piece.estimate(world.model, world.batches)
    with torch.no_grad():
        found = mm_piece.estimate(world.model, world.batches, memory="8GiB")
        assert not torch.is_grad_enabled()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_source_may_be_a_path(world):
    file = world.folder / "rows.json"
    file.write_text('[{"prompt": "?", "answer": "x"}]')
    assert read(file, images=world.folder)[0] == read(str(file), images=str(world.folder))[0]
