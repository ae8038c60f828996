"""Documentation that cannot rot: README's code runs, its help and tables are what tools print."""

import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from eval import tables
from mm_piece import families
from mm_piece.cli import main
from mm_piece.evaluation.suites import HARNESSES, load_suite
from mm_piece.recipe import load_recipe, parse_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.mark.slow
def test_python_blocks_run(tmp_path, monkeypatch):
    for part in ("base", "store.json", "recipe.yaml"):
        assert (ROOT / "checkpoints" / "tiny" / part).exists()
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(ROOT / "checkpoints" / "tiny", tmp_path / "checkpoints" / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))  # README adds a family
    scope = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), scope)  # noqa: S102
    assert scope["delta"].entries > 0


def test_the_example_recipe_is_valid():
    (example,) = [block for block in blocks("yaml") if "store:" in block]
    assert parse_recipe(example).tasks[0].metric == "vqa"


def test_the_example_suite_is_valid(tmp_path):
    (example,) = [block for block in blocks("yaml") if "lm-eval:" in block]
    (tmp_path / "suite.yaml").write_text(example)
    assert set(load_suite(str(tmp_path / "suite.yaml")).harness_configs()) == set(HARNESSES)


@pytest.mark.parametrize("file", sorted((ROOT / "pipelines").glob("*.yaml")), ids=lambda f: f.name)
def test_recipes_are_valid_and_say_how_to_run(file):
    load_recipe(file)
    header = file.read_text(encoding="utf-8").split("\nbase:")[0]
    for word in ("# Run:", "# Needs:", "# Expect:"):
        assert word in header


def test_help_is_current():
    shown = CliRunner().invoke(main, ["--help"], prog_name="mm-piece").output
    assert f"<!-- help -->\n```\n{shown}```\n<!-- end -->" in README


def test_console_commands_exist():
    commands = set(main.commands)
    for line in "\n".join(blocks("console")).splitlines():
        for used in re.findall(r"mm-piece (\w+)", line):
            assert used in commands


@pytest.mark.slow
def test_commands_about_deltas_run(tmp_path, monkeypatch):
    (block,) = [block for block in blocks("console") if "mm-piece squash" in block]
    shutil.copytree(ROOT / "checkpoints" / "tiny", tmp_path / "checkpoints" / "tiny")
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        result = CliRunner().invoke(main, line.split()[1:])
        assert result.exit_code == 0, f"{line}: {result.output}"


def test_tables_are_rebuilt_from_the_results():
    for document in tables.DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        assert tables.fill_tables(text) == text, document


def test_each_question_of_a_newcomer_opens_at_most_two_files():
    """Each of them holds what the table says."""
    text = (ROOT / "docs" / "dev" / "architecture.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "?" in line]
    assert len(rows) == 6
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)` \(`(\w+)`\)", row)
        assert 1 <= len(named) <= 2, row
        for file, symbol in named:
            path = ROOT / file if file.startswith("tests/") else ROOT / "mm_piece" / file
            code = path.read_text(encoding="utf-8")
            assert re.search(rf"^\s*(def {symbol}\(|{symbol}\b.* = )", code, re.M), (file, symbol)
    for file in re.findall(r"`(\w+/\w+\.py)`", text):
        assert (ROOT / "mm_piece" / file).is_file(), file
