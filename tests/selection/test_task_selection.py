"""A task's mask through a recipe: budgets, methods, and masks kept for other runs."""

import json

import pytest
import torch

import mm_piece
from mm_piece import importance
from mm_piece.data import EncodedDataset, EncodedList, LengthGroupedBatches, read
from mm_piece.errors import RecipeError, SelectionError, StoreError
from mm_piece.families import group_of
from mm_piece.importance import RULES, Rule, estimate
from mm_piece.models.base import load_base
from mm_piece.recipe import SelectionSettings
from mm_piece.selection import Budgets, select, select_all
from mm_piece.selection import task as selection

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(base, tmp_path):
    rows = [{"prompt": f"{n} + 1?", "answer": str(n + 1)} for n in range(4)]
    (tmp_path / "text.json").write_text(json.dumps(rows))
    task = {"name": "sums", "train": f"{tmp_path}/text.json", "test": f"{tmp_path}/text.json[:1]"}

    def _recipe(store="store", task_density=None, rate=0.01, times=1, rows="", **select):
        content = {
            "base": str(base),
            "store": str(tmp_path / store),
            "tasks": [
                {**task, "name": f"sums{n}", "max_new_tokens": 1, "density": task_density}
                for n in range(times)
            ],
            "select": select,
            "train": {"max_steps": 1, "learning_rate": rate, "max_grad_norm": 0},
        }
        for each in content["tasks"]:
            each["train"] += rows
        (tmp_path / "recipe.yaml").write_text(json.dumps(content))
        return tmp_path / "recipe.yaml"

    return _recipe


@pytest.fixture
def estimates(monkeypatch):
    """How often scores were streamed."""
    calls = []
    real = importance.stream_scores

    def stream(*args, **options):
        calls.append(args)
        return real(*args, **options)

    monkeypatch.setattr(selection.importance, "stream_scores", stream)
    return calls


def mask_of(store):
    return {name: index.long() for name, index in store.delta(1).indices.items()}


def test_a_task_of_texts_leaves_the_tower_alone(recipe):
    store = mm_piece.train(recipe(density={"vision": 0.1, "projector": 0.1, "language": 0.1}))
    groups = store.delta(1).info["groups"]
    assert groups["vision"]["patchable"] == groups["vision"]["changed"] == 0
    assert groups["language"]["changed"] > 0


def test_a_pattern_that_no_example_reaches_is_left_out(recipe):
    density = {"vision_tower.*": 0.1, "*.q_proj.weight": 0.1}
    names = mask_of(mm_piece.train(recipe(density=density)))
    assert names and all(name.endswith("q_proj.weight") for name in names)


def test_a_floor_that_no_example_reaches_is_left_out(recipe):
    store = mm_piece.train(recipe(density=0.1, floor={"vision": 0.05, "language": 0.05}))
    groups = store.delta(1).info["groups"]
    assert groups["vision"]["changed"] == 0
    assert store.delta(1).info["k"] == int(0.1 * store.delta(1).info["patchable"])


def test_a_budget_that_reaches_nothing_is_named(recipe):
    with pytest.raises(SelectionError, match=r"density 0.1 of 0 patchable entries \(vision\)"):
        mm_piece.train(recipe(density={"vision": 0.1}))


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"density": {"*.kproj.*": 0.1}}, r"no patchable weight is called '\*\.kproj\.\*'"),
        ({"density": 0.1, "floor": {"vision": 0.9}}, "floor of vision"),
        ({"density": 0.1, "floor": {"embedding": 0.01}}, "no patchable entries in embedding"),
    ],
)
def test_budgets_that_do_not_fit_the_base_are_found_at_once(recipe, tmp_path, select, message):
    with pytest.raises(SelectionError, match=message):
        mm_piece.train(recipe(**select))
    assert not (tmp_path / "store").exists()


def test_ceilings_that_the_task_cannot_meet_are_named(recipe):
    """The base could, but a task of texts reaches the language model alone."""
    with pytest.raises(SelectionError, match="the ceilings leave"):
        mm_piece.train(recipe(density=0.1, ceiling={"language": 0.01}))


@pytest.mark.parametrize("method", ["fggm", "migu"])
def test_rows_as_their_papers_have_them(recipe, method):
    store = mm_piece.train(recipe(method=method))
    info = store.delta(1).info
    assert (info["method"], info["density"]) == (method, 0.3)
    assert 0.25 < info["k"] / info["patchable"] < 0.35
    assert store.recipe.count("unit: row") == store.recipe.count("scope: tensor") == 1


def test_auto_says_what_it_chose(recipe):
    info = mm_piece.train(recipe(density="auto", ceiling=0.2)).delta(1).info
    assert info["density"] == "auto"
    assert 0 < info["k"] <= 0.2 * info["patchable"]


def test_a_task_may_have_its_own_density(recipe):
    info = mm_piece.train(recipe(density=0.1, task_density=0.25)).delta(1).info
    assert info["density"] == 0.25
    assert info["k"] == int(0.25 * info["patchable"])


def test_a_density_of_a_task_must_fit_the_rest(recipe):
    with pytest.raises(RecipeError, match="go with one density"):
        mm_piece.train(recipe(floor={"vision": 0.001}, task_density={"vision": 0.1}))


def test_masks_are_found_again(recipe, tmp_path, estimates):
    """By another store and rate; not by another density, seed, task or rule of the user's."""
    kept = {"density": 0.1, "cache": str(tmp_path / "masks")}
    first = mm_piece.train(recipe("one", **kept))
    assert len(estimates) == 1
    again = mm_piece.train(recipe("two", rate=0.02, memory="1MiB", batch_size=2, **kept))
    assert len(estimates) == 1
    assert mask_of(first).keys() == mask_of(again).keys()
    assert all(torch.equal(mask_of(first)[n], index) for n, index in mask_of(again).items())
    assert list(mask_of(first)) == list(mask_of(again))
    mm_piece.train(recipe("three", **{**kept, "density": 0.2}))
    assert len(estimates) == 2
    mm_piece.train(recipe("four", **{**kept, "method": "mm_piece.importance.piece_f"}))
    mm_piece.train(recipe("five", **{**kept, "method": "mm_piece.importance.piece_f"}))
    assert len(estimates) == 4
    mm_piece.train(recipe("six", task_density=0.2, **kept))
    assert len(estimates) == 4


def test_masks_of_other_seeds_data_and_positions_are_others(recipe, tmp_path, estimates):
    kept = {"density": 0.1, "cache": str(tmp_path / "masks")}
    mm_piece.train(recipe("one", **kept))
    mm_piece.train(recipe("two", **kept), "seed=5")
    assert len(estimates) == 2
    mm_piece.train(recipe("three", rows="[:3]", samples=3, **kept))
    mm_piece.train(recipe("four", rows="[1:]", samples=3, **kept))
    assert len(estimates) == 4
    mm_piece.train(recipe("five", times=2, **kept))  # the first one's is there
    assert len(estimates) == 5


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def product(moments):
    return (moments.mean * moments.weight).abs()


def test_a_rule_is_added_in_one_place(recipe, tmp_path, estimates, monkeypatch):
    """One entry of the table, and recipes know its name and defaults, train by it and cache it."""
    mine = Rule(product, needs=("mean",), reads_weights=True, defaults={"density": 0.05})
    monkeypatch.setitem(RULES, "mine", mine)
    cache = str(tmp_path / "masks")

    store = mm_piece.train(recipe("one", method="mine", cache=cache))
    info = store.delta(1).info
    assert (info["method"], info["density"]) == ("mine", 0.05)
    assert info["k"] == int(0.05 * info["patchable"])
    again = mm_piece.train(recipe("two", method="mine", cache=cache))
    assert again.entries[0].sha256 == store.entries[0].sha256
    assert len(estimates) == 1

    snip = mm_piece.train(recipe("three", method="snip", density=0.05, cache=cache))
    assert same(mask_of(snip), mask_of(store))
    model, _ = mm_piece.load(store=store)
    assert mm_piece.position(model) == 1
    with pytest.raises(RecipeError, match="unknown method 'min'; allowed: .*random, mine, or"):
        mm_piece.train(recipe("four", method="min"))


OWN = Rule(product, needs=("mean",), reads_weights=True)
WITH_DEFAULTS = Rule(product, defaults={"xi": 0.5, "density": 0.2})


def test_a_rule_of_one_s_own_is_of_the_same_type(recipe):
    """A dotted path names a `Rule`, or a function that gets all there is."""
    stores = [
        mm_piece.train(recipe(name, method=method, density=0.05))
        for name, method in (
            ("table", "snip"),
            ("rule", f"{__name__}.OWN"),
            ("function", f"{__name__}.product"),
        )
    ]
    assert all(same(mask_of(store), mask_of(stores[0])) for store in stores)
    with pytest.raises(SelectionError, match="defaults .* write xi, density into the recipe"):
        mm_piece.train(recipe("defaults", method=f"{__name__}.WITH_DEFAULTS"))


@pytest.mark.parametrize("given", [{"needs": ("mean", "output")}, {"needs": ("hessian",)}])
def test_a_rule_s_needs_can_be_provided(given):
    with pytest.raises(ValueError, match="allowed: mean and square of gradients, or output alone"):
        Rule(product, **given)
    with pytest.raises(ValueError, match="per_example"):
        Rule(product, needs=(), per_example=False)


def cut(data):
    return data[:100]


def flipped(data):
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("damage", [cut, flipped])
def test_damaged_masks_are_made_anew(recipe, tmp_path, estimates, damage):
    kept = {"density": 0.1, "cache": str(tmp_path / "masks")}
    first = mm_piece.train(recipe("one", **kept))
    (file,) = (tmp_path / "masks").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    again = mm_piece.train(recipe("two", **kept))
    assert len(estimates) == 2
    assert first.entries[0].sha256 == again.entries[0].sha256


def test_the_official_sums_depend_on_the_batches(recipe, tmp_path, estimates):
    kept = {"density": 0.1, "cache": str(tmp_path / "masks"), "method": "piece-f-official"}
    mm_piece.train(recipe("one", **kept))
    mm_piece.train(recipe("two", **kept, batch_size=2))
    assert len(estimates) == 2


def test_the_official_sums_are_over_whole_batches(base, tmp_path):
    model, processor = load_base(base)
    encoded = EncodedDataset(read("scenes:digits/train[:10]"), processor, tmp_path / "encoded")
    wanted = SelectionSettings(density=0.02, method="piece-f-official", batch_size=3, exclude=())
    facts = {"seeds": (0, 0), "cache_key": {}}
    found = selection.select_for_task(model, encoded, wanted, tmp_path / "mask", **facts)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    batches = LengthGroupedBatches(
        EncodedList([encoded[place] for place in order], 0), 3, windowed=False
    )
    assert [len(batch["labels"]) for batch in batches] == [3, 3, 3, 1]
    expected = select(estimate(model, batches, "piece-f-official"), 0.02)
    assert expected.keys() == found.mask.keys()
    assert all(torch.equal(expected[name], index) for name, index in found.mask.items())


def test_a_cache_that_cannot_be_made_is_named(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SelectionError, match="select.cache: cannot write to .*file/masks"):
        mm_piece.train(recipe(density=0.1, cache=str(tmp_path / "file" / "masks")))
    assert not (tmp_path / "store").exists()


def test_sums_may_lie_on_the_host(recipe):
    device, host = (
        mm_piece.train(recipe(place, density=0.1, accumulators=place))
        for place in ("device", "host")
    )
    assert all(torch.equal(mask_of(device)[n], index) for n, index in mask_of(host).items())


def test_resources_may_change_and_selections_may_not(recipe):
    mm_piece.train(recipe(density=0.1))
    mm_piece.train(recipe(density=0.1, memory="1MiB", accumulators="host"))
    with pytest.raises(StoreError, match="select.density was 0.1, here it is 0.2"):
        mm_piece.train(recipe(density=0.2))


def test_groups_keep_their_floor(recipe, base):
    model, processor = load_base(base)
    examples = EncodedDataset(
        read("scenes:digits/train[:3]"), processor, base.parent / "encoded-floor"
    )
    wanted = SelectionSettings(density=0.02, floor={"vision": 0.03}, method="piece-s")
    found = selection.select_for_task(
        model, examples, wanted, base.parent / "floor", seeds=(0, 0), cache_key={}
    )
    vision = sum(len(i) for n, i in found.mask.items() if group_of(n) == "vision")
    assert found.num_selected == int(0.02 * sum(found.sizes.values()))
    assert vision >= int(0.03 * sum(s for n, s in found.sizes.items() if group_of(n) == "vision"))


def test_a_delta_does_not_depend_on_the_memory(recipe):
    stores = [
        mm_piece.train(recipe(memory, density=0.1, memory=memory)) for memory in ("64KiB", "8GiB")
    ]
    assert stores[0].entries[0].sha256 == stores[1].entries[0].sha256


@pytest.mark.parametrize(
    ("select", "count"),
    [
        ({"density": 1.0}, 0),
        ({"density": {"language": 1.0}}, 0),
        ({"density": {"language": 1.0, "embedding": 0.5}, "exclude": ["head"]}, 1),
        ({"density": {"language": 1.0}, "method": "fggm", "unit": "row", "scope": "tensor"}, 0),
    ],
)
def test_no_example_is_scored_where_there_is_no_choice(recipe, estimates, select, count):
    store = mm_piece.train(recipe(rate=0.1, **select))
    assert len(estimates) == count
    info = store.delta(1).info
    assert info["samples"] == (4 if count else 0)
    language = info["groups"]["language"]
    assert language["selected"] == language["patchable"] > 0
    if not count:
        assert info["k"] == sum(group["selected"] for group in info["groups"].values())


@pytest.mark.parametrize("unit", ["entry", "row"])
def test_everything_is_what_a_full_density_selects_from_scores(base, unit):
    model, _ = load_base(base)
    scores = {name: torch.rand(weight.shape) for name, weight in model.named_parameters()}
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    budgets = Budgets(1.0, unit=unit)
    whole = select_all(shapes, budgets)
    expected = select(scores, 1.0, unit=unit)
    assert list(whole) == list(expected)
    for name, index in expected.items():
        assert torch.equal(whole[name], index) and whole[name].dtype == index.dtype
    assert select_all(shapes, Budgets(0.999, unit=unit)) is None
    assert select_all(shapes, Budgets("auto", ceiling=1.0)) is None
