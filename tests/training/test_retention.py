"""PIECE-R: what a model is to keep, through a recipe, across a run that ends in the middle."""

import json
from shutil import copytree, rmtree

import pytest
import torch
from torch import nn

import mm_piece
from mm_piece import importance
from mm_piece.data import EncodedDataset, read
from mm_piece.errors import RecipeError, StoreError
from mm_piece.evaluation.answers import generate_batch
from mm_piece.models.base import load_base, tensors
from mm_piece.recipe import SelectionSettings
from mm_piece.selection import select
from mm_piece.selection.task import select_for_task
from mm_piece.store.delta_store import DeltaStore
from mm_piece.training import loop as training
from mm_piece.training import retention
from mm_piece.training.penalty import register_penalty
from mm_piece.training.retention import PROMPTS, generate_rehearsal, make_retention_importance

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(base, tmp_path_factory):
    """A model, its processor, and a task's examples as model inputs."""
    model, processor = load_base(base)
    folder = tmp_path_factory.mktemp("encoded")
    return model, processor, EncodedDataset(read("scenes:charts/train[:12]"), processor, folder)


def test_the_model_is_asked_about_the_tasks_images(world):
    model, processor, encoded = world
    own = generate_rehearsal(model, encoded, SelectionSettings(), 0, 96).examples
    assert 0 < len(own) <= 12
    images = [
        picture.tobytes() for example in encoded.examples for picture in example.open_images()
    ]
    for example in own:
        assert example.prompt == PROMPTS[example.row % len(PROMPTS)]
        assert [picture.tobytes() in images for picture in example.open_images()] == [True]
        assert generate_batch(model, processor, [example], 32) == [example.answer]
    assert {example.prompt for example in own} == set(PROMPTS)


def test_texts_are_asked_without_images(world, tmp_path):
    model, processor, _ = world
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": "1 + 1?", "answer": "2"}] * 3))
    texts = EncodedDataset(read(str(tmp_path / "rows.json")), processor, tmp_path / "texts")
    own = generate_rehearsal(model, texts, SelectionSettings(prompts=("Say a.", "b?")), 0, 96)
    asked = [(example.prompt, example.images) for example in own.examples]
    assert asked == [("Say a.", []), ("b?", [])]


def test_no_more_images_are_asked_about_than_wanted(world):
    model, processor, encoded = world
    chosen = [
        [
            example.images[0]
            for example in generate_rehearsal(model, encoded, SelectionSettings(), seed, 5).examples
        ]
        for seed in (0, 0, 1)
    ]
    assert len(chosen[0]) == 5
    assert chosen[0] == chosen[1] != chosen[2]


def dense(sensitivities):
    """Rank one, relative to the mean of all weights: in plain fp32."""
    mean = torch.cat([scores.flatten() for scores in sensitivities.values()]).mean()
    found = {}
    for name, scores in sensitivities.items():
        whole = scores.flatten(1) if scores.dim() > 1 else scores[:, None]
        found[name] = (whole.sum(1)[:, None] * whole.sum(0) / whole.sum() / mean).view(scores.shape)
    return found


def test_scores_are_what_the_task_moves_over_what_is_at_stake(world, tmp_path):
    model, processor, encoded = world
    wanted = SelectionSettings(method="piece-r", density=0.05, prompts=("Why?",))
    every = importance.estimate(model, [*encoded])
    taught = [*generate_rehearsal(model, encoded, SelectionSettings(prompts=("What?",)), 1, 96)]
    stood = importance.estimate(model, taught, objective=importance.margin_sensitivity)
    shapes = {name: scores.shape for name, scores in stood.items()}
    earlier = importance.factor_scores(
        ((n, 0, scores.flatten()) for n, scores in stood.items()), shapes
    )
    found = select_for_task(
        model,
        encoded,
        wanted,
        tmp_path / "masks",
        seeds=(0, 3),
        cache_key={},
        make_retention=lambda: make_retention_importance(model, encoded, wanted, 3, [earlier]),
    )
    answers = [*generate_rehearsal(model, encoded, wanted, 3, 96)]
    names = importance.find_scorable_names(model, [*encoded], "piece-f", wanted.exclude)
    fisher = {name: every[name] for name in names}
    sensitivities = importance.estimate(model, answers, objective=importance.margin_sensitivity)
    kept = dense({n: scores for n, scores in sensitivities.items() if n in names}), dense(stood)
    relative = {n: f.sqrt() / (kept[0][n] + kept[1][n] + 0.1) for n, f in fisher.items()}
    expected = select(relative, 0.05)
    chosen, other = (
        {(name, int(place)) for name, index in mask.items() for place in index}
        for mask in (found.mask, expected)
    )
    assert len(chosen) == len(other)
    assert len(chosen & other) > 0.98 * len(chosen)  # bf16 moves a few at the threshold
    plain = select(fisher, 0.05)
    without = {(name, int(place)) for name, index in plain.items() for place in index}
    assert len(chosen & without) < 0.9 * len(chosen)


def recipe_writer(base, folder):
    """A function that writes a recipe of up to three tasks, whose store lies in `folder`."""

    def _recipe(store="store", tasks=3, own=0.0, penalty=0.0, train=(), **settings):
        content = {
            "base": str(base),
            "rehearsal": own,
            "penalty": penalty,
            "store": str(folder / store),
            "tasks": [
                {
                    "name": name,
                    "train": f"scenes:{name}/train[:6]",
                    "test": f"scenes:{name}/test[:1]",
                    "max_new_tokens": 1,
                }
                for name in ("digits", "charts", "words")[:tasks]
            ],
            "select": {"method": "piece-r", "density": 0.05, **settings},
            "train": {"max_steps": 1, "learning_rate": 0.01, **dict(train)},
        }
        (folder / f"{store}.yaml").write_text(json.dumps(content))
        return folder / f"{store}.yaml"

    return _recipe


@pytest.fixture
def recipe(base, tmp_path):
    return recipe_writer(base, tmp_path)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """The folder of two stores, with three tasks and with the first two of them."""
    folder = tmp_path_factory.mktemp("trained")
    write = recipe_writer(base, folder)
    mm_piece.train(write("whole"))
    mm_piece.train(write("part", tasks=2))
    return folder


def bytes_of(store):
    names = ("*.safetensors", "kept/*.safetensors")
    return {
        str(file.relative_to(store.path)): file.read_bytes()
        for pattern in names
        for file in sorted(store.path.glob(pattern))
    }


def test_earlier_tasks_count(recipe, base):
    store = mm_piece.train(recipe(tasks=2))
    alone = [f"kept/{number:04d}.safetensors" for number in (1, 2)]
    assert [name for name in bytes_of(store) if "kept" in name] == alone
    first, _ = store.delta(1), store.delta(2)
    assert first.info["method"] == "piece-r"
    found = retention.read_sensitivity(store.path / alone[0], store.entries[0].sha256)
    model, processor = mm_piece.load(base, store, at=1)
    encoded = EncodedDataset(read("scenes:digits/train[:6]"), processor, store.path / "encoded")
    again = retention.estimate_sensitivity(model, encoded.sample(1000, 42), SelectionSettings())
    assert found is not None
    assert all(torch.equal(found.rows[name], rows) for name, rows in again.rows.items())


def test_another_kind_of_importance_is_not_read(tmp_path):
    found = importance.FactoredImportance({"a": torch.ones(2)}, {"a": torch.ones(3)})
    retention.write_sensitivity(tmp_path / "kept" / "a", found, "d" * 64)
    tensors, said = retention.sealed.read_checksummed(tmp_path / "kept" / "a")
    assert retention.read_sensitivity(tmp_path / "kept" / "a", "d" * 64) is not None
    retention.sealed.write_checksummed(tmp_path / "kept" / "a", tensors, {**said, "of": "fisher"})
    assert retention.read_sensitivity(tmp_path / "kept" / "a", "d" * 64) is None


@pytest.mark.parametrize("damage", ["gone", "cut", "other", "of another delta"])
def test_what_is_missing_is_made_again(recipe, trained, tmp_path, damage):
    copytree(trained / "part", tmp_path / "part")
    file = tmp_path / "part" / "kept" / "0001.safetensors"
    content, second = file.read_bytes(), file.with_name("0002.safetensors").read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        changed = content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]
        file.write_bytes({"cut": content[:-9], "other": changed}.get(damage, second))
    part = mm_piece.train(recipe("part"))
    assert bytes_of(part) == bytes_of(DeltaStore.open(trained / "whole"))
    assert not any((part.path / "work").iterdir())


def test_a_run_that_ended_before_the_last_importance_goes_on(recipe, trained, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mm_piece.training.retention_run.write_sensitivity", die)
        mm_piece.train(recipe("part"))
    part = mm_piece.train(recipe("part"))
    assert bytes_of(part) == bytes_of(DeltaStore.open(trained / "whole"))


def test_does_not_depend_on_the_budget(recipe, trained):
    one = DeltaStore.open(trained / "part")
    other = mm_piece.train(recipe("other", tasks=2, memory="20KiB"))
    assert bytes_of(one) == bytes_of(other)


def test_other_methods_keep_nothing(recipe):
    store = mm_piece.train(recipe("plain", tasks=1, method="piece-f"))
    assert not (store.path / "kept").exists()


def test_a_copied_store_goes_on(recipe, tmp_path, capsys):
    mm_piece.train(recipe("here", tasks=1))
    copytree(tmp_path / "here", tmp_path / "there")
    there, here = mm_piece.train(recipe("there", tasks=2)), mm_piece.train(recipe("here", tasks=2))
    assert bytes_of(there) == bytes_of(here)
    assert capsys.readouterr().out.count("1 of 2 tasks are learned already") == 2


def test_rehearsal_is_trained_beside_a_task(recipe, base, monkeypatch, capsys):
    """As many as the share says, given by the model as it stood before the task."""
    taught, real = [], training.fit

    def fit(tuning, examples, *args):
        taught.append([one["input_ids"] for one in examples])
        return real(tuning, examples, *args)

    monkeypatch.setattr("mm_piece.training.loop.fit", fit)
    asked = {"method": "random", "prompts": ["Why?", "What?"]}
    store = mm_piece.train(recipe(tasks=2, own=0.5, **asked))
    assert "3 rehearsal examples are trained beside 6 of the task" in "".join(capsys.readouterr())
    for position, name in enumerate(("digits", "charts")):
        model, processor = mm_piece.load(base, store, at=position)
        encoded = EncodedDataset(read(f"scenes:{name}/train[:6]"), processor, store.path / "again")
        select = SelectionSettings(prompts=("Why?", "What?"))
        own = generate_rehearsal(model, encoded, select, 42 + position, 3)
        assert len(own) == 3
        expected = [*encoded, *own]
        assert len(expected) == len(taught[position]) == 9
        pairs = zip(expected, taught[position], strict=True)
        assert all(torch.equal(one["input_ids"], ids) for one, ids in pairs)
        assert store.delta(position + 1).info["rehearsal"] == 3


def test_a_run_with_rehearsal_goes_on_to_the_same_bits(recipe, monkeypatch):
    whole = mm_piece.train(recipe("whole", tasks=2, own=1.0))

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mm_piece.training.loop.measure_changes", die)
        mm_piece.train(recipe("part", tasks=2, own=1.0))
    part = mm_piece.train(recipe("part", tasks=2, own=1.0))
    assert bytes_of(part) == bytes_of(whole)
    with pytest.raises(StoreError, match="rehearsal was 1.0, here it is 0.0"):
        mm_piece.train(recipe("part", tasks=2, own=0.0))


@pytest.mark.parametrize("share", [-0.1, 1.5, "some", float("nan")])
def test_a_share_of_rehearsal_is_one(recipe, share, tmp_path):
    with pytest.raises(RecipeError, match="rehearsal") as told:
        mm_piece.train(recipe(own=share))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("factory", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_sees_the_penalty_in_its_gradient(factory):
    """As if penalty / 2 * stake * (value - start) ** 2 were in the loss; nothing else is moved."""
    start, pull, aim = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0]), torch.tensor([2.0, 3.0])
    held, priced, free = (nn.Parameter(start.clone()) for _ in range(3))
    ours, theirs = factory([held, free], lr=0.05), factory([priced], lr=0.05)
    register_penalty(ours, {held: (start, pull)})
    for _ in range(5):
        (held - aim).square().sum().backward()
        ((priced - aim).square().sum() + (pull / 2 * (priced - start).square()).sum()).backward()
        ours.step()
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
    torch.testing.assert_close(held, priced)
    assert torch.equal(free, start)


def test_a_fused_step_divides_the_penalty_by_no_scale_of_gradients():
    """Without clipping, a GradScaler leaves it to a fused optimizer to unscale."""
    start, pull = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])
    ends = []
    for scaled in (False, True):
        values = nn.Parameter(start.clone())
        optimizer = torch.optim.SGD([values], lr=0.05, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        register_penalty(optimizer, {values: (start, pull)})
        for _ in range(3):
            scaler.scale((values - 3).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends.append(values.detach())
    assert torch.equal(*ends)  # a scale of 2^10 costs no bits


def test_a_penalty_holds_what_is_at_stake(recipe, base, monkeypatch):
    """By the model's own answers and the tasks before, whatever chose the mask."""
    seen, real = [], training.fit

    def fit(tuning, examples, args, logs, pulls, *others):
        seen.append((tuning.mask, pulls))
        return real(tuning, examples, args, logs, pulls, *others)

    monkeypatch.setattr("mm_piece.training.loop.fit", fit)
    store = mm_piece.train(recipe(tasks=2, method="random", penalty=3.0))
    assert [name for name in bytes_of(store) if "kept" in name]
    for position, name in enumerate(("digits", "charts")):
        model, processor = mm_piece.load(base, store, at=position)
        encoded = EncodedDataset(read(f"scenes:{name}/train[:6]"), processor, store.path / "again")
        files = [store.path / "kept" / f"{at:04d}.safetensors" for at in range(1, position + 1)]
        earlier = [
            retention.read_sensitivity(file, entry.sha256)
            for file, entry in zip(files, store.entries, strict=False)
        ]
        assert None not in earlier
        kept = make_retention_importance(
            model, encoded, SelectionSettings(), 42 + position, earlier
        )
        mask, pulls = seen[position]
        assert pulls.keys() == mask.keys()
        for name, index in mask.items():
            assert torch.equal(pulls[name], 3.0 * kept.scores_at(name, index))
    assert max(float(pull.max()) for pull in seen[1][1].values()) > 0


def test_a_higher_penalty_moves_less(recipe, base):
    before = tensors(load_base(base)[0])

    def moved(penalty):
        many = {"max_steps": 12, "learning_rate": 0.003}
        settings = {"tasks": 1, "method": "random", "penalty": penalty, "train": many}
        store = mm_piece.train(recipe(f"store-{penalty}", **settings))
        after = tensors(mm_piece.load(base, store, at=1)[0])
        return sum(float((after[name] - before[name]).square().sum()) for name in after)

    assert moved(0.0) > 1.2 * moved(10.0) > 1.2 * moved(1000.0)


def test_a_run_with_a_penalty_goes_on_to_the_same_bits(recipe, monkeypatch, capsys):
    """Also from a checkpoint in the middle: entries are still held to where the task found them."""
    saving = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    whole = mm_piece.train(recipe("whole", tasks=2, penalty=30.0, train=saving))

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mm_piece.training.loop.measure_changes", die)
        mm_piece.train(recipe("part", tasks=2, penalty=30.0, train=saving))
    last = whole.path.parent / "part" / "work" / "0001" / "checkpoint-4"
    assert last.is_dir()
    rmtree(last)
    assert "resuming" not in capsys.readouterr().out
    part = mm_piece.train(recipe("part", tasks=2, penalty=30.0, train=saving))
    assert bytes_of(part) == bytes_of(whole)
    assert "resuming at step 2" in capsys.readouterr().out
    with pytest.raises(StoreError, match="penalty was 30.0, here it is 1.0"):
        mm_piece.train(recipe("part", tasks=2, penalty=1.0, train=saving))


@pytest.mark.parametrize("penalty", [-0.1, "some", float("nan"), float("inf")])
def test_a_penalty_is_a_number_from_zero(recipe, penalty, tmp_path):
    with pytest.raises(RecipeError, match="penalty") as told:
        mm_piece.train(recipe(penalty=penalty))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "store").exists()
