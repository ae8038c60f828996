"""The command line: what it prints, and one line with exit status 2 for every mistake."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tiny_llava import make_llava
from tiny_recipe import RECIPE

import mm_piece
from mm_piece.cli import main
from mm_piece.deltas.delta import Delta
from mm_piece.dtypes import view_bits
from mm_piece.metrics.continual import summarise_matrix
from mm_piece.models.base import load_base, tensors
from mm_piece.store.delta_store import DeltaStore

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe_file(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    file = folder / "recipe.yaml"
    text = RECIPE.format(base=base, store=folder / "store", method="piece-f", dtype="float32")
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def store(recipe_file):
    run("train", str(recipe_file))
    return recipe_file.parent / "store"


def run(*args, status=0):
    result = CliRunner().invoke(main, list(args))
    assert result.exit_code == status, result.output
    return result.stdout


def mistake(*args):
    """What a mistake prints: exactly one line, status 2, no traceback."""
    result = CliRunner().invoke(main, list(args))
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ")
    assert result.stderr.strip().count("\n") == 0, result.stderr
    return result.stderr


def test_train_ends_with_what_was_learned_and_what_it_cost(store, recipe_file):
    lines = run("train", str(recipe_file)).splitlines()
    cells = [line.split() for line in lines]
    assert lines[0] == "loading torch and transformers"
    assert lines[1] == "all 3 tasks are learned already"

    results = json.loads(run("results", str(store), "--json"))
    matrix = results["matrix"]
    rows = [row for row in cells if len(row) == 5 and row[0] in ("1", "2", "3")]
    for task, row in enumerate(rows):
        column = [line[task] for line in matrix]
        scores = [f"{100 * score:.1f}" for score in (column[0], column[task + 1], column[3])]
        assert row == [str(task + 1), results["tasks"][task], *scores]
    assert len(rows) == 3

    before, *_, after = results["base_ability"]
    names = ", ".join(results["general"])
    assert f"base ability ({names}): {before:.1%} before, {after:.1%} now" in lines
    assert any(line.startswith("3 deltas: ") and " would take " in line for line in lines)
    commands = [line.split()[:2] for line in lines if line.startswith("  mm-piece ")]
    assert commands == [["mm-piece", name] for name in ("report", "results", "export")]


def test_log(store):
    content = json.loads(run("log", str(store), "--json"))
    assert content["base"]["family"] == "llava"
    assert [d["position"] for d in content["deltas"]] == [1, 2, 3]
    assert set(content["deltas"][0]) == {"position", "task", "file", "sha256", "entries", "bytes"}
    assert "0001-digits.safetensors" in run("log", str(store))


def test_show(store):
    content = json.loads(run("show", str(store), "--at", "2", "--json"))
    assert content["task"] == "words"
    assert content["entries"] == sum(tensor["entries"] for tensor in content["tensors"])
    assert {tensor["group"] for tensor in content["tensors"]} <= {"vision", "projector", "language"}
    assert "words" in run("show", str(store), "--at", "2")


def test_verify_and_results(store):
    assert json.loads(run("verify", str(store), "--json")) == {"deltas": 3, "ok": True}
    assert "3 deltas verified" in run("verify", str(store))
    assert len(json.loads(run("results", str(store), "--json"))["matrix"]) == 4
    shown = run("results", str(store))
    metrics = summarise_matrix(DeltaStore.open(store).results()["matrix"])
    learned, backward = metrics["learned"], metrics["bwt"]
    assert f"learned  {learned:>7.1%} " in shown
    assert f"bwt  {backward:>+7.1%} " in shown
    assert "R[T][j] − R[j][j]" not in shown
    assert "R[T][j] − R[j][j]" in run("results", str(store), "--explain")
    both = CliRunner().invoke(main, ["results", str(store), "--explain", "--json"])
    assert both.exit_code == 2 and "--explain is for people" in both.stderr


def test_eval_repeats_the_matrix(store):
    matrix = DeltaStore.open(store).results()["matrix"]
    scores = json.loads(run("eval", str(store), "--at", "2", "--json"))
    assert [scores[task] for task in ("digits", "words", "charts")] == matrix[2]
    assert list(json.loads(run("eval", str(store), "--task", "words", "--json"))) == ["words"]


def test_eval_tells_how_far_the_base_is(store):
    there = json.loads(run("eval", str(store), "--at", "0", "--kl", "--json"))
    gone = json.loads(run("eval", str(store), "--at", "3", "--kl", "--json"))
    assert there.keys() == gone.keys() >= {"digits", "words", "charts"}
    assert set(there.values()) == {0.0}
    assert all(nats > 0 for nats in gone.values())
    assert "KL from the base" in run("eval", str(store), "--kl", "--task", "words")


def test_ask(store, base, tmp_path):
    Image.new("RGB", (30, 30), "blue").save(tmp_path / "blue.png")
    image = str(tmp_path / "blue.png")
    delta = str(store / "0001-digits.safetensors")
    options = ["--max-new-tokens", "3"]
    first = run("ask", image, "What is it?", "--store", str(store), "--at", "1", *options)
    assert first == run(
        "ask", image, "What is it?", "--base", str(base), "--delta", delta, *options
    )


def test_ask_looks_at_the_image_before_it_loads_a_model(store, tmp_path, monkeypatch):
    monkeypatch.setattr("mm_piece.store.loading.load", lambda **_: pytest.fail("loaded"))
    (tmp_path / "notes.png").write_text("no image")
    for name in ("notes.png", "absent.png"):
        assert name in mistake("ask", str(tmp_path / name), "What?", "--store", str(store))


def test_export(store, tmp_path):
    run("export", str(store), str(tmp_path / "merged"), "--at", "3")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "merged" / "config.json").is_file()
    assert "not empty" in mistake("export", str(store), str(tmp_path / "merged"))


def test_report(store, tmp_path):
    run("report", str(store), "--to", str(tmp_path / "page.html"))
    assert "data:image/" in (tmp_path / "page.html").read_text(encoding="utf-8")


def edited(recipe_file, tmp_path, *changes):
    text = recipe_file.read_text(encoding="utf-8")
    for old, new in (*changes, (str(recipe_file.parent / "store"), str(tmp_path / "new"))):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "edited.yaml").write_text(text, encoding="utf-8")
    return str(tmp_path / "edited.yaml")


BAD_RECIPES = [
    (("density: 0.02", "densty: 0.02"), "did you mean 'density'"),
    (("density: 0.02", "density: 1.5"), "out of (0, 1]"),
    (("density: 0.02", "density: 1e-9"), "selects none"),
    (("method: piece-f", "method: piece-x"), "allowed: piece-f"),
    (("method: piece-f", "method: no.such"), "allowed: piece-f"),
    (("scenes:words/train", "scenes:wrods/train"), "wrods"),
    (("scenes:words/train[:24]", "absent.json"), "cannot read absent.json"),
    (("scenes:words/train[:24]", "scenes:words/train[5:5]"), "has no rows"),
    (("learning_rate: 1e-2", "learning_rte: 1e-2"), "learning_rte"),
    (("learning_rate: 1e-2", "learning_rate: abc"), "train: "),
    (("learning_rate: 1e-2", "eval_strategy: steps"), "train: "),
    (("num_train_epochs: 1", "num_train_epochs: two"), "train: "),
    (("method: piece-f", "method: os.getcwd"), "a dotted path to a rule"),
    (("samples: 6", "memory: 1"), "at least 1KiB"),
    (("dtype: float32", "dtype: float33"), "unknown dtype 'float33'"),
    (("base: ", "base: /absent"), "there is no such folder"),
    (("learning_rate: 1e-2", "per_device_eval_batch_size: 0"), "at least 1"),
    (("learning_rate: 1e-2", "save_strategy: best"), "no, steps or epoch"),
    (("density: 0.02", "density: {}"), "no group has a density"),
]


@pytest.mark.parametrize(("change", "message"), BAD_RECIPES)
def test_bad_recipes_write_nothing(recipe_file, tmp_path, change, message):
    assert message in mistake("train", edited(recipe_file, tmp_path, change))
    assert not (tmp_path / "new" / "store.json").exists()


def test_bad_data_writes_nothing(recipe_file, tmp_path):
    rows = [{"prompt": "?", "answer": "x", "image": "gone.png"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    change = ("scenes:words/train[:24]", str(tmp_path / "rows.json"))
    message = mistake("train", edited(recipe_file, tmp_path, change))
    assert "row 0" in message
    assert "gone.png" in message
    assert not (tmp_path / "new").exists()


def test_a_folder_with_something_else_becomes_no_store(recipe_file, tmp_path):
    (tmp_path / "new").mkdir()
    recipe = edited(recipe_file, tmp_path)
    (tmp_path / "new" / "notes.txt").write_text("mine")
    assert "holds 'notes.txt' and is no store" in mistake("train", recipe)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["notes.txt"]
    (tmp_path / "file").write_text("")
    assert "file is a file" in mistake("train", recipe, "--set", f"store={tmp_path / 'file'}")


def test_a_run_that_diverges_or_does_not_move_stores_nothing(recipe_file, tmp_path):
    """And the store it began, which holds no delta, takes the mended recipe."""
    diverges = edited(recipe_file, tmp_path, ("learning_rate: 1e-2", "learning_rate: 1e39"))
    assert "no longer finite" in mistake("train", diverges)
    idle = edited(recipe_file, tmp_path, ("learning_rate: 1e-2", "dataloader_drop_last: true"))
    idle = ("train", idle, "--set", "train.per_device_train_batch_size=64")
    assert "train: " in mistake(*idle)
    assert "train no step on 24 examples" in mistake(*idle, "--set", "train.max_steps=3")
    assert DeltaStore.open(tmp_path / "new").entries == []
    run("train", edited(recipe_file, tmp_path))
    assert len(DeltaStore.open(tmp_path / "new")) == 3
    DeltaStore.open(tmp_path / "new").verify()


def test_mistakes_with_stores(store, recipe_file, tmp_path):
    assert "0…3" in mistake("eval", str(store), "--at", "4")
    assert "1…3" in mistake("show", str(store), "--at", "-1")
    assert "not a delta store" in mistake("log", str(tmp_path))
    told = mistake("eval", str(store), "--task", "x")
    assert told.startswith(f"Error: {store}: unknown task 'x'; it has ")
    (tmp_path / "file").write_text("")
    target = f"store={tmp_path / 'file' / 'inside'}"
    mistake("train", str(recipe_file), "--set", target)
    copy = shutil.copytree(store, tmp_path / "copy")
    file = copy / "0002-words.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "0002-words" in mistake("verify", str(copy))
    assert "0002-words" in mistake("eval", str(copy), "--at", "2")
    assert "cannot be read" in mistake("ask", str(file), "?", "--store", str(store))


def test_debug_shows_the_traceback(tmp_path):
    result = CliRunner().invoke(main, ["--debug", "log", str(tmp_path)])
    assert isinstance(result.exception, mm_piece.PieceError)


# --- comparing, deriving, shipping ---------------------------------------------------------------


def same_model(left, right):
    left, right = tensors(left), tensors(right)
    return all(torch.equal(view_bits(left[name]), view_bits(right[name])) for name in right)


def test_squash_export_and_extract_are_one_position(store, base, tmp_path):
    one, out, again = (str(tmp_path / name) for name in ("one.safetensors", "out", "x.safetensors"))
    assert "wrote" in run("squash", str(store), one, "--at", "2", "--task", "two")
    assert "exists" not in run("export", one, out, "--base", str(base), "--shard-size", "20KiB")
    assert "entries (" in run("extract", str(base), out, again)
    expected, _ = mm_piece.load(store=store, at=2)
    assert same_model(load_base(out)[0], expected)
    assert same_model(mm_piece.load(base, delta=again)[0], expected)
    assert "two" in run("show", one)
    assert run("verify", one) == "1 delta verified\n"
    assert "is one delta file: --base checks the base of a store" in mistake(
        "verify", one, "--base"
    )
    total = json.loads(run("diff", one, f"{store}@2", "--json"))["groups"]
    assert sum(row["equal"] for row in total.values()) == Delta.load(one).entries
    assert all(row["left"] == row["different"] == 0 for row in total.values())


def test_what_is_there_is_not_replaced(store, base, tmp_path):
    delta = store / DeltaStore.open(store).entries[0].file
    before = delta.read_bytes()
    for command in (
        ("squash", str(store), str(delta)),
        ("extract", str(base), str(base), str(delta)),
        ("merge", str(base), str(delta), str(delta)),
        ("convert", str(delta), str(delta), "--format", "vllm"),
    ):
        assert "exists; name a new file" in mistake(*command)
    assert delta.read_bytes() == before


def test_diff_prints_tensors_groups_and_overlap(store):
    shown = run("diff", f"{store}@1", str(store))
    for word in ("both, different", "language", "shared entries", "digits", "charts"):
        assert word in shown
    # the second position has the first delta too: three deltas, each two of them once
    assert len(re.findall(r"^ +(digits|words|charts) +(digits|words|charts) ", shown, re.M)) == 3
    assert "allowed: 0…3" in mistake("diff", f"{store}@1", f"{store}@9")
    assert "position 'x'; allowed: 0…3" in mistake("diff", f"{store}@x", str(store))
    assert "not a delta store" in mistake("diff", str(store), "nowhere")


def test_diff_tells_the_sides_apart(store, tmp_path):
    first = DeltaStore.open(store).delta(1)
    replaced = {name: values + 1 for name, values in first.values.items()}
    changed = replace(first, values=replaced)
    (tmp_path / "one.safetensors").write_bytes(changed.to_bytes())
    shown = run("diff", f"{store}@1", str(tmp_path / "one.safetensors"))
    assert re.search(r"^ +digits \(left\) +digits \(right\) ", shown, re.M)


def test_verify_reads_the_base_to_the_last_bit(store, base):
    assert run("verify", str(store), "--base") == "3 deltas verified, and the base\n"
    digest = json.loads(run("verify", str(store), "--base", str(base), "--json"))["base"]
    assert len(digest) == 64


def test_merge_decides_conflicts_by_rule(store, base, tmp_path):
    first = store / DeltaStore.open(store).entries[0].file
    squashed, to = str(tmp_path / "two.safetensors"), str(tmp_path / "m.safetensors")
    run("squash", str(store), squashed, "--at", "2")
    conflict = mistake("merge", str(base), to, str(first), squashed)
    assert "rules that decide: last, first, sum, ties" in conflict
    run("merge", str(base), to, str(first), squashed, "--rule", "last")
    assert same_model(mm_piece.load(base, delta=to)[0], mm_piece.load(store=store, at=2)[0])
    new = str(tmp_path / "new.safetensors")
    assert "known: error, last" in mistake("merge", str(base), new, str(first), "--rule", "mean")


def test_without_says_whose_entries_they_are(store, tmp_path):
    told = mistake("without", str(store), "digits", str(tmp_path / "less"))
    assert "'digits' cannot be taken out" in told
    assert "it has digits, words, charts" in mistake("without", str(store), "ocr", str(tmp_path))


def test_formats_there_and_back(store, base, tmp_path):
    delta = store / DeltaStore.open(store).entries[0].file
    expected = Delta.load(delta)
    for form in ("vllm", "coo"):
        there, back = str(tmp_path / form), str(tmp_path / f"{form}.safetensors")
        run("convert", str(delta), there, "--format", form)
        run("import", there, str(base), back, "--format", form, "--task", "digits")
        found = Delta.load(back)
        assert found.before == expected.before
        assert all(torch.equal(found.values[n], expected.values[n]) for n in expected.values)
    run("convert", str(delta), str(tmp_path / "raw"), "--format", "raw")
    assert Delta.load(tmp_path / "raw").entries == expected.entries
    assert "known: gap, raw, vllm, coo" in mistake("convert", str(delta), "x", "--format", "zip")


def test_fork_push_pull_and_gc(store, tmp_path):
    branch, copy = tmp_path / "branch", tmp_path / "copy"
    assert "positions 0…1" in run("fork", str(store), str(branch), "--at", "1")
    assert "positions 0…3" in run("push", str(store), f"file://{copy}")
    assert "positions 0…3, verified" in run("pull", str(copy), str(branch))
    assert run("verify", str(branch)).startswith("3 deltas")
    extra = branch / "0009-crashed.safetensors"
    shutil.copyfile(branch / DeltaStore.open(branch).entries[0].file, extra)
    assert extra.name in run("gc", str(branch), "--dry-run")
    assert extra.exists()
    assert json.loads(run("gc", str(branch), "--json"))["removed"] == [extra.name]
    assert not extra.exists()
    assert "allowed" in mistake("fork", str(store), str(tmp_path / "no"), "--at", "4")
    assert "is a store already" in mistake("fork", str(store), str(branch), "--at", "1")


@pytest.mark.parametrize("command", ["squash", "export"])
def test_another_base_is_refused(store, tmp_path, command):
    other = make_llava(tmp_path / "other", seed=6)
    told = mistake(command, str(store), str(tmp_path / "to"), "--base", str(other))
    assert "another base" in told
    assert not (tmp_path / "to").exists()
