"""Documentation that cannot rot: its code runs, its tables and outputs are what tools print."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner

import mm_piece
from eval import tables
from mm_piece import families
from mm_piece.cli import main
from mm_piece.evaluation.suites import HARNESSES, load_suite
from mm_piece.recipe import load_recipe, parse_recipe
from mm_piece.recipe.schema import Recipe

ROOT = Path(__file__).parents[2]


def load_hooks():
    """Load what mkdocs runs while it builds; it is no part of a package."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = load_hooks()
PAGES = sorted(HOOKS.list_documents())  # README and the other documents that stand elsewhere too
# Recipes' own test runs the blocks of their page, on data that it makes.
RUN_ELSEWHERE = {"pipelines/README.md"}
DECISIONS = "docs/dev/decisions/"
# One page for each decision; the index among them leads to the others.
DECISION_INDEX = DECISIONS + "README.md"
DECISION_PAGES = [p for p in PAGES if p.startswith(DECISIONS) and p != DECISION_INDEX]


@cache
def read_page(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(language, *pages):
    """Return the code of one language on some pages, by default on all."""
    text = "\n".join(map(read_page, pages or PAGES))
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


PAGES_THAT_RUN = [p for p in PAGES if blocks("python", p) and p not in RUN_ELSEWHERE]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Work in a folder with a copy of the shipped store."""
    shutil.copytree(ROOT / "checkpoints" / "tiny", tmp_path / "checkpoints" / "tiny")
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_THAT_RUN)
def test_python_blocks_run(page, tiny, monkeypatch, capsys):
    """One after another; where an output follows a block, it is the block's."""
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))  # a page adds a family
    scope = {}
    parts = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", read_page(page), re.S)
    for code, shown in parts:
        exec(compile(code, page, "exec"), scope)  # noqa: S102
        printed = capsys.readouterr().out
        assert not shown or printed == shown


def test_readme_and_the_quickstart_have_code_that_runs():
    assert {"README.md", "docs/quickstart.md"} <= set(PAGES_THAT_RUN)


def test_readme_shows_what_its_commands_print():
    """Of the commands that are instant; spaces aside, which depend on the terminal."""
    (commands,) = [block for block in blocks("console", "README.md") if "mm-piece results" in block]
    printed = set()
    for line in commands.splitlines():
        _, name, *arguments = shlex.split(line)
        if name in ("results", "log"):
            result = CliRunner().invoke(main, [name, str(ROOT / arguments[0])])
            printed |= {" ".join(line.split()) for line in result.output.splitlines()}

    (shown,) = [block for block in blocks("text", "README.md") if "base ability" in block]
    for line in shown.splitlines():
        assert " ".join(line.split()) in printed


def test_readme_draws_deltas_of_the_shipped_store():
    drawing = blocks("text", "README.md")[0]
    manifest = json.loads(read_page("checkpoints/tiny/store.json"))
    deltas = manifest["deltas"][:3]
    assert [delta["task"] for delta in deltas] == re.findall(r"─ (\w+) ─", drawing)
    sizes = [f"{delta['bytes'] / 1e6:.2f} MB" for delta in deltas]
    assert sizes == re.findall(r"[\d.]+ MB", drawing)


def test_readme_is_read_at_once():
    assert len(read_page("README.md").splitlines()) <= 200


def test_the_example_recipe_is_the_one_that_is_run():
    (example,) = blocks("yaml", "README.md")
    assert read_page("pipelines/photos.yaml").endswith(example)
    assert parse_recipe(example).tasks[0].name == "photos"


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


@pytest.mark.parametrize("page", PAGES)
def test_every_generated_part_is_known_and_can_be_made(page):
    """Also: every key of a recipe has a meaning in `docs/reference/recipe-keys.yaml`."""
    filled = HOOKS.fill_parts(read_page(page))
    assert filled.count("<!-- generated: ") == read_page(page).count("<!-- generated: ")
    if page == "docs/reference/cli.md":
        for name in ("--version", *main.commands):
            assert re.search(rf"^(## |  ){name}\b", filled, re.M), name
    if page == "docs/reference/recipe.md":
        assert all(f"| `{key}` |" in filled for key in Recipe.model_fields)


def test_a_key_without_a_meaning_is_seen(tmp_path, monkeypatch):
    (tmp_path / "keys.yaml").write_text("Recipe: {base: a model}", encoding="utf-8")
    monkeypatch.setattr(HOOKS, "MEANINGS", tmp_path / "keys.yaml")
    with pytest.raises(ValueError, match="Recipe: cache, general"):
        HOOKS.list_keys(Recipe)


def test_every_exported_name_is_in_the_reference():
    named = re.findall(r"^::: mm_piece\.(\w+)$", read_page("docs/reference/api.md"), re.M)
    assert sorted(named) == sorted(mm_piece.__all__)


def headings(page):
    """Return the anchors of a page, as a git host and mkdocs both make them."""
    text = re.sub(r"```.*?```", "", HOOKS.fill_parts(read_page(page)), flags=re.S)
    found = set()
    for title in re.findall(r"^#+ (.+)$", text, re.M):
        words = re.sub(r"[^\w\s-]", "", title.lower()).split()
        found.add("-".join(words))
    return found


def find_dead_links(page):
    """Return the links of a page to files of the repository that lead nowhere."""
    text = HOOKS.CODE.sub("", read_page(page))
    dead = []
    for link in re.findall(r"\]\((?!\w+:)([^)]*)\)", text):
        file, _, anchor = link.partition("#")
        target = HOOKS.resolve(page, file) if file else page
        if not (ROOT / target).is_file() or (anchor and anchor not in headings(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert not find_dead_links(page)


def test_a_dead_link_is_seen(tmp_path, monkeypatch):
    page = "[a](README.md), [b](README.md#install), [c](none.md), [d](README.md#none), [e](#e)"
    pages = {"page.md": page, "README.md": "## Install"}
    monkeypatch.setattr(sys.modules[__name__], "read_page", pages.__getitem__)
    assert find_dead_links("page.md") == ["none.md", "README.md#none", "#e"]


def find_sentences(page):
    """Return what a page says: its sentences of ten words or more, outside of code and tables."""
    text = re.sub(r"```.*?```", "", read_page(page), flags=re.S)
    text = re.sub(r"^\|.*$", "", text, flags=re.M)
    sentences = re.split(r"(?<=[.:;])\s+|\n\n|\n\* ", text)
    return {" ".join(s.split()) for s in sentences if len(s.split()) >= 10}


def find_repetitions(pages):
    said = {}
    repeated = []
    for page in pages:
        for sentence in find_sentences(page):
            other = said.setdefault(sentence, page)
            if other != page:
                repeated.append((other, page, sentence))
    return repeated


def test_nothing_is_said_twice():
    assert not find_repetitions(PAGES)


def test_a_repeated_sentence_is_seen(monkeypatch):
    said = "One sentence that is long enough stands on both of them."
    pages = {"a.md": f"| a table |\n\n{said}", "b.md": said.replace(" on ", "\non ")}
    monkeypatch.setattr(sys.modules[__name__], "read_page", pages.__getitem__)
    assert find_repetitions(pages) == [("a.md", "b.md", said)]


def test_every_page_is_in_the_navigation():
    navigation = read_page("mkdocs.yml").split("\nnav:\n")[1]
    places = re.findall(r": ([\w/-]+\.md)$", navigation, re.M)
    pages = set(PAGES) - set(DECISION_PAGES)  # their index is in it
    assert sorted(places) == sorted(map(HOOKS.find_place, pages))


def test_the_index_lists_every_decision_by_its_title():
    listed = re.findall(r"^\* \[(.+)\]\((.+)\)$", read_page(DECISION_INDEX), re.M)
    titled = [(read_page(page).splitlines()[0], page) for page in DECISION_PAGES]
    assert sorted((f"# {title}", DECISIONS + file) for title, file in listed) == sorted(titled)


def find_faults_of_a_decision(text):
    """Return the headings of a decision that are not as all have them: parts, and their order."""
    parts = re.findall(r"^## (.+)$", text, re.M)
    known = [part for part in ("Decision", "Alternative", "Evidence") if part in parts]
    return [] if parts == known and parts[:1] == ["Decision"] else parts or ["no part"]


@pytest.mark.parametrize("page", DECISION_PAGES)
def test_decisions_have_the_same_parts(page):
    assert not find_faults_of_a_decision(read_page(page))


def test_other_parts_of_a_decision_are_seen():
    assert find_faults_of_a_decision("# A title")
    assert find_faults_of_a_decision("## Evidence")
    assert find_faults_of_a_decision("## Decision\n## Evidence\n## Alternative")
    assert find_faults_of_a_decision("## Decision\n## Decision")
    assert not find_faults_of_a_decision("## Decision\n## Evidence")


def test_every_law_names_its_tests():
    rows = re.findall(r"^\| (\d+)\. .+ \| (.+) \|$", read_page("docs/dev/laws.md"), re.M)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    assert rows
    for number, cell in rows:
        files = re.findall(r"`([\w/]+\.py)`", cell)
        assert files, number
        for file in files:
            assert (ROOT / "tests" / file).is_file(), file


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        place = HOOKS.find_place(page)
        folder = re.sub(r"(\b(index|README))?\.md$", "", place)
        assert (tmp_path / folder / "index.html").is_file(), place
    shown = (tmp_path / "reference" / "recipe" / "index.html").read_text(encoding="utf-8")
    assert "What the model learns, in this order" in shown


def test_console_commands_exist():
    commands = set(main.commands)
    for line in "\n".join(blocks("console")).splitlines():
        for used in re.findall(r"mm-piece (\w+)", line):
            assert used in commands


@pytest.mark.slow
def test_commands_about_deltas_run(tiny):
    (block,) = [block for block in blocks("console") if "mm-piece squash" in block]
    for line in block.splitlines():
        result = CliRunner().invoke(main, line.split()[1:])
        assert result.exit_code == 0, f"{line}: {result.output}"


def test_tables_are_rebuilt_from_the_results():
    assert set(tables.DOCUMENTS) == {page for page in PAGES if "<!-- table: " in read_page(page)}
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
