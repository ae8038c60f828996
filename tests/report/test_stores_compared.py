"""The page about several stores: means and intervals by hand, configurations told apart by "
"their settings."""

import re
from math import sqrt
from statistics import mean, stdev

import pytest
import torch
from click.testing import CliRunner

from mm_piece.cli import main
from mm_piece.deltas.delta import Delta
from mm_piece.errors import StoreError
from mm_piece.metrics import continual
from mm_piece.metrics.intervals import compute_interval
from mm_piece.report import compare_stores, render_comparison, report_comparison
from mm_piece.report.drawing import ScatterPlane
from mm_piece.report.formats import format_spread
from mm_piece.store.delta_store import DeltaStore

NAMES = ("language_model.model.layers.0.mlp.up_proj.weight", "vision_tower.a.weight")
BASE = {"folder": "base", "dtype": "float32", "family": "llava", "parameters": 24, "bytes": 96}


def make(
    path, method, seed, last, rate=1e-3, fingerprint="f", tasks=("a", "b"), measured=True, more=""
):
    listed = ", ".join(f"{{name: {task}, train: x, test: x}}" for task in tasks)
    recipe = (
        f"base: base\nstore: {path}\nseed: {seed}\ntasks: [{listed}]\n"
        f"select: {{method: {method}}}\ntrain: {{learning_rate: {rate}}}\n{more}"
    )
    base = BASE | {"fingerprint": fingerprint * 64}
    store = DeltaStore.create(path, base, recipe)
    for number, task in enumerate(tasks):
        index = {name: torch.arange(2 + number, dtype=torch.int32) for name in NAMES[: number + 1]}
        zeros = {name: torch.zeros(len(i)) for name, i in index.items()}
        ones = {name: torch.ones(len(i)) for name, i in index.items()}
        parent = store.entries[-1].sha256 if store.entries else ""
        groups = {"language": {"changed": 2 + number}, "vision": {"changed": 3 * number}}
        shapes = {name: (3, 4) for name in index}
        facts = {"task": task, "base": fingerprint * 64, "parent": parent}
        info = {"method": method, "groups": groups}
        store.append(Delta.from_change(index, zeros, ones, shapes, **facts, info=info))
    if measured:
        results = {
            "tasks": [*tasks],
            "matrix": [[0.0, 0.5], [1.0, 0.5], [last, 0.75]],
            "base_ability": [1.0, 0.9, last],
            "base_ability_name": "base",
            "seconds": {task: {"select": 1.0 + seed, "train": 2.0, "loss": 1.0} for task in tasks},
        }
        store.write_results(results)
    return store


@pytest.fixture
def stores(tmp_path):
    return [
        make(tmp_path / "one", "piece-f", 1, 0.2),
        make(tmp_path / "two", "piece-f", 2, 0.4),
        make(tmp_path / "three", "piece-f", 3, 0.6),
        make(tmp_path / "chance", "random", 1, 0.8),
        make(tmp_path / "fast", "piece-f", 1, 0.1, rate=1e-2),
    ]


def test_runs_that_differ_in_their_seed_alone_are_one_way(stores):
    configurations = {
        configuration.title: configuration
        for configuration in compare_stores(stores).configurations
    }
    assert {
        title: [run.name for run in configuration.runs]
        for title, configuration in configurations.items()
    } == {
        "piece-f, learning_rate 0.001": ["one", "two", "three"],
        "piece-f, learning_rate 0.01": ["fast"],
        "random": ["chance"],
    }


def test_a_way_that_is_held_says_so(tmp_path):
    """Also where no other configuration has its method: the mask alone would get the credit."""
    held = make(tmp_path / "held", "random", 1, 0.8, more="penalty: 0.02\nrehearsal: 0.2\n")
    configurations = compare_stores(
        [held, make(tmp_path / "free", "piece-f", 1, 0.2)]
    ).configurations
    assert {configuration.title for configuration in configurations} == {
        "random, rehearsal 0.2, penalty 0.02",
        "piece-f",
    }


def test_a_title_has_the_first_settings_and_the_number_of_the_others(tmp_path):
    """The page lists all of them."""
    others = "penalty: 0.02\nmodel: {dtype: bfloat16}\ngeneral: [{name: g, test: x}]\n"
    one = make(tmp_path / "one", "random", 1, 0.8, rate=1e-2, more=others)
    other = make(tmp_path / "other", "random", 1, 0.2, rate=1e-3)
    comparison = compare_stores([one, other])
    title, _ = [configuration.title for configuration in comparison.configurations]
    assert title.startswith("random, penalty 0.02, ")
    assert title.count(", ") == 4 and re.search(r", \d more settings?$", title)
    page = render_comparison(comparison)
    for key in comparison.differing:
        if key != "train.learning_rate":  # it has a column of its own
            assert f'<th scope="col">{key}</th>' in page


def test_means_and_intervals_by_hand(stores):
    comparison = compare_stores(stores)
    assert [configuration.runs[0].name for configuration in comparison.configurations] == [
        "chance",
        "one",
        "fast",
    ]
    configuration = comparison.configurations[1]
    values = [
        continual.overall_performance([[0.0, 0.5], [1.0, 0.5], [last, 0.75]])
        for last in (0.2, 0.4, 0.6)
    ]
    middle, half = compute_interval(configuration.values_of("op"))
    assert middle == pytest.approx(mean(values))
    assert half == pytest.approx(4.302653 * stdev(values) / sqrt(3))  # t of two degrees of freedom
    assert compute_interval(configuration.values_of("base_retained"))[0] == pytest.approx(0.4)
    assert compute_interval(configuration.values_of("select"))[0] == pytest.approx(3.0)
    (run,) = comparison.configurations[0].runs
    assert run.values["entries"] == (2 + 6) / 2
    assert run.values["bytes"] == mean(entry.bytes for entry in stores[3].entries)
    assert run.groups == {"language": 5, "vision": 3}
    assert run.seen.values == [1.0, pytest.approx((0.8 + 0.75) / 2)]


def test_the_page_says_what_does_not_compare(stores, tmp_path):
    page = render_comparison(compare_stores(stores))
    assert "different bases" not in page and "order of them" not in page
    assert "5 runs, 3 configurations" in page and "learning_rate 0.01" in page
    other = make(tmp_path / "other", "piece-f", 1, 0.5, fingerprint="e")
    turned = make(tmp_path / "turned", "piece-f", 1, 0.5, tasks=("b", "a"))
    page = render_comparison(compare_stores([stores[0], other, turned]))
    assert "2 different bases" in page and "order of them" in page
    assert page == render_comparison(compare_stores([stores[0], other, turned]))


def test_a_run_that_is_not_done_is_marked(stores):
    whole = compare_stores(stores[:2])
    page = render_comparison(whole)
    assert "unfinished" not in page
    ((first, second),) = ([run.name for run in found.runs] for found in whole.configurations)

    results = dict(stores[1].results())
    results["matrix"] = results["matrix"][:2]
    results["base_ability"] = results["base_ability"][:2]
    stores[1].write_results(results)
    comparison = compare_stores(stores[:2])
    # no mean over a whole run and a half one, and the whole one first
    assert [[run.name for run in found.runs] for found in comparison.configurations] == [
        [first],
        [second],
    ]
    page = render_comparison(comparison)
    assert "two has learned 1 of its 2 tasks: its scores are over these alone" in page
    assert page.count("(unfinished)") == 2  # its configuration, and the run itself


def test_the_page_names_learning_rates_and_what_differs(stores, tmp_path):
    comparison = compare_stores(stores)
    assert comparison.differing == ["select.method", "train.learning_rate", "seed"]
    page = render_comparison(comparison)
    assert "The recipes differ in select.method, train.learning_rate, seed." in page
    settings = page[page.index('id="settings"') :].partition("</section>")[0]
    rows = [re.sub(r"<[^>]*>|\s+", " ", row).split() for row in settings.split("<tr>")[2:]]
    assert sorted(rows) == [
        ["chance", "0.001", "random", "1"],
        ["fast", "0.01", "piece-f", "1"],
        ["one", "0.001", "piece-f", "1"],
        ["three", "0.001", "piece-f", "3"],
        ["two", "0.001", "piece-f", "2"],
    ]

    same = compare_stores([stores[0], make(tmp_path / "copy", "piece-f", 1, 0.2)])
    assert same.differing == [] and "The recipes are the same." in render_comparison(same)


def test_a_difference_within_a_task_is_named(stores, tmp_path):
    other = make(tmp_path / "other", "piece-f", 1, 0.2, more="general: [{name: g, test: y}]\n")
    recipe = other.recipe.replace("{name: b, train: x, test: x}", "{name: b, train: x, test: z}")
    other.write_recipe(recipe)
    assert compare_stores([stores[0], other]).differing[:2] == ["tasks.b.test", "general"]


def test_a_recipe_may_leave_the_learning_rate_open(stores):
    recipe = stores[0].recipe.replace("train: {learning_rate: 0.001}", "train: {}")
    stores[0].write_recipe(recipe)
    assert "transformers’ default" in render_comparison(compare_stores(stores[:2]))


def test_a_store_that_was_never_measured_has_costs_and_no_scores(stores, tmp_path):
    bare = make(tmp_path / "bare", "random", 2, 0.5, measured=False)
    configurations = {
        configuration.title: configuration
        for configuration in compare_stores([stores[0], bare]).configurations
    }
    assert configurations["random"].values_of("op") == [] and configurations["random"].values_of(
        "entries"
    ) == [4.0]
    assert "–" in render_comparison(compare_stores([stores[0], bare]))


def test_stores_that_are_called_alike_show_their_paths(tmp_path):
    stores = [make(tmp_path / part / "run", "random", n, 0.5) for n, part in enumerate("ab")]
    assert [run.name for run in compare_stores(stores).runs] == [
        str(store.path) for store in stores
    ]


def test_markup_in_names_is_text(tmp_path):
    page = render_comparison(compare_stores([make(tmp_path / "<b>x", "random", 1, 0.5)]))
    assert "<b>x" not in page and "&lt;b&gt;x" in page


def test_every_run_is_a_dot_where_its_scores_are(stores):
    plane, comparison = ScatterPlane(), compare_stores(stores)
    dots = plane.place_dots(comparison.configurations, "op", "base_retained")
    assert len(dots) == 5
    number, name, x, y = dots[0]
    assert (number, name.partition(":")[0]) == (0, "chance")
    assert (x, y) == (plane.scale_x((0.8 + 0.75) / 2), plane.scale_y(0.8))
    assert plane.scale_x(0) < plane.scale_x(1) and plane.scale_y(1) < plane.scale_y(0)


def test_through_the_command_line(stores, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(main, ["report", "one", "chance"])
    assert (ran.exit_code, ran.output) == (0, "wrote comparison.html\n")
    assert "2 runs, 2 configurations" in (tmp_path / "comparison.html").read_text()
    ran = CliRunner().invoke(main, ["report", "one", "chance", "--to", "deep/page.html"])
    assert (tmp_path / "deep" / "page.html").is_file()
    ran = CliRunner().invoke(main, ["report", "one", "nowhere"])
    assert ran.exit_code == 2 and "nowhere" in ran.output and len(ran.output.splitlines()) == 1
    with pytest.raises(StoreError, match="named twice"):
        report_comparison(["one", tmp_path / "one"])


def test_numbers_in_words():
    assert format_spread([]) == "–"
    assert format_spread([0.5]) == "50.0"
    assert format_spread([-0.123, -0.123]) == "−12.3 ± 0.0"
