"""The examples run, write nothing beside them, and print what they are said to."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from extras import needs

import mm_piece

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOK = EXAMPLES / "quickstart.ipynb"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs an example where it finds checkpoints, and returns what it prints."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(checkout)
    monkeypatch.syspath_prepend(EXAMPLES)  # as of a script that is run

    def _run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        made = {file.name for file in checkout.iterdir()}
        assert made <= {"checkpoints", "photos"}
        return capsys.readouterr().out

    return _run


@pytest.mark.slow
def test_a_loop_of_one_s_own_learns(run):
    printed = run("own_training_loop.py")
    before, after = map(int, re.findall(r"(\d+) of 30 right", printed))
    assert after >= before + 10
    assert "88,232 of 1,764,912 weights changed" in printed  # 5 %


@pytest.mark.slow
def test_one_file_has_what_the_store_has(run, tmp_path):
    printed = run("ship_one_delta.py", tmp_path)
    file = tmp_path / "two-tasks.safetensors"
    assert f"{file}: {file.stat().st_size:,} bytes" in printed
    assert "the same bits as in the store: True" in printed
    assert printed.count("(right: ") == 3


@pytest.mark.slow
def test_a_rule_of_one_s_own_selects_in_python_and_in_a_recipe(run):
    printed = run("own_rule.py")
    assert "in Python: 88,232 entries" in printed
    assert "selected 78,095 of 1,561,904 entries (5%)" in printed
    before, after = map(float, re.findall(r"textures ([\d.]+)%\n", printed))
    assert after >= before + 30


@pytest.mark.slow
@needs("nbclient")
def test_the_notebook_shows_what_its_code_prints():
    """Where it does not any more: `make examples`."""
    import nbformat
    from notebooks import collect_texts, execute_notebook

    texts = collect_texts(nbformat.read(NOTEBOOK, as_version=4))
    assert texts
    assert collect_texts(execute_notebook(NOTEBOOK)) == texts


def test_the_notebook_is_small_and_has_its_pictures():
    assert NOTEBOOK.stat().st_size < 200_000
    assert NOTEBOOK.read_text(encoding="utf-8").count('"image/png": "') == 2


@pytest.mark.slow
def test_photos_in_folders_are_learned(run, tmp_path):
    """The recipe that README prints, with one epoch of ten."""
    printed = run("make_photos.py")
    numbers = [int(number) for number in re.findall(r"(\d+) images", printed)]
    assert (sum(numbers), len(numbers)) == (80, 18)

    (asked,) = re.findall(r"mm-piece ask (\S+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert Path(asked).is_file()

    recipe = ROOT / "pipelines" / "photos.yaml"
    store = mm_piece.train(recipe, f"store={tmp_path / 'store'}", "train.num_train_epochs=1")
    assert store.entries[0].entries == 156_190
    classes = {folder.name for folder in Path("photos/test").iterdir()}
    assert {row["answer"] for row in store.answers(1)["photos"]} == classes


def test_examples_are_short():
    assert len(SCRIPTS) == 4
    for script in SCRIPTS:
        assert len(script.read_text(encoding="utf-8").splitlines()) < 40


def test_the_readme_names_every_example():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for file in (*SCRIPTS, NOTEBOOK):
        assert f"]({file.name})" in text
