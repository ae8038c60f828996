"""What is promised about the code itself: wings, budgets, seams, the wheel's content."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mm_piece

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mm_piece"
FILES = sorted(PACKAGE.rglob("*.py"))
# What everything may import; each of them only those before it.
SHARED = (
    "plaintext",
    "errors",
    "sizes",
    "threads",
    "stored_dtypes",
    "dtypes",
    "entries",
    "published_names",
    "families",
    "modules",
)
# What each wing may import besides: only wings above it, so that there are no circles of wings.
ALLOWED = {
    "files": set(),
    "distributed": set(),
    "metrics": set(),
    "importance": {"distributed"},
    "recipe": {"importance", "metrics"},
    "data": {"files", "metrics"},
    "deltas": {"distributed", "files"},
    "sparse": {"deltas", "distributed"},
    "models": {"data", "deltas", "distributed", "files", "recipe"},
    "selection": {"data", "distributed", "files", "importance", "recipe"},
    "store": {"deltas", "distributed", "files", "metrics", "models", "recipe"},
    "evaluation": {"data", "distributed", "metrics", "models", "recipe", "store"},
    "report": {"data", "files", "metrics", "sparse", "store"},
}
ALLOWED["training"] = set(ALLOWED) - {"report"}
ALLOWED["cli"] = set(ALLOWED)
WORDS = {"everything above but `report`": "training", "everything above": "cli"}


def wing_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_of(file) for file in FILES}


def imports(nodes: Iterable[ast.AST]) -> set[str]:
    """The modules of this package that some nodes import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in MODULES else node.module or "" for name in names}
    return {name for name in found if name.split(".")[0] == "mm_piece"}


def imported(file: Path) -> set[str]:
    """What a file imports of this package's wings and shared modules, wherever in it."""
    found = imports(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    return {name.split(".")[1] for name in found if "." in name}


def is_foreign(wing: str, found: set[str]) -> set[str]:
    """What a wing or a shared module imports, and may not."""
    if wing in SHARED:
        return found - set(SHARED[: SHARED.index(wing)])
    return found - set(SHARED) - {wing} - ALLOWED[wing]


def test_every_module_has_its_place():
    assert {wing_of(file) for file in FILES} - {"__init__", "__main__"} == {*SHARED, *ALLOWED}


def test_wings_import_only_what_stands_above_them():
    for number, (wing, allowed) in enumerate(ALLOWED.items()):
        assert allowed <= set(list(ALLOWED)[:number]), wing


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_keep_to_the_table(file):
    if wing_of(file) in ("__init__", "__main__"):  # names exported lazily, and the command
        return
    assert not is_foreign(wing_of(file), imported(file))


def test_the_table_is_no_wider_than_it_is_used():
    used: dict[str, set[str]] = {wing: set() for wing in ALLOWED}
    for file in FILES:
        used.setdefault(wing_of(file), set()).update(imported(file) - set(SHARED))
    for wing, allowed in ALLOWED.items():
        if wing not in WORDS.values():
            assert used[wing] - {wing} == allowed, wing


def test_an_import_against_the_table_is_seen():
    assert is_foreign("data", {"errors", "files", "store"}) == {"store"}
    assert is_foreign("errors", {"dtypes"}) == {"dtypes"}


def test_no_modules_import_each_other_in_a_circle():
    """At their top level, where a circle would break the second of them."""
    graph = {}
    for file in FILES:
        body = ast.parse(file.read_text(encoding="utf-8")).body
        graph[module_of(file)] = imports(body) - {"mm_piece"}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_contributing_shows_the_table():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown, beside = {}, []
    for line in text.split("## Layout")[1].split("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0].startswith("`"):
            alike = WORDS.get(cells[2])
            listed = set(re.findall(r"`(\w+)`", cells[2]))
            shown[cells[0].strip("`")] = ALLOWED[alike] if alike else listed
        elif len(cells) == 2 and cells[0].startswith("`"):
            beside.append(cells[0].strip("`"))
    assert list(shown.items()) == list(ALLOWED.items())
    assert sorted(beside) == sorted(SHARED)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_budgets(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a file opens with what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


def attributes_set(function: ast.AST) -> set[str]:
    """The attributes of `self` that a method assigns."""
    return {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def late_attributes(text: str) -> set[str]:
    """The attributes of a module's classes that exist only after some call."""
    late = set()
    for kind in ast.walk(ast.parse(text)):
        if isinstance(kind, ast.ClassDef):
            methods = [node for node in kind.body if isinstance(node, ast.FunctionDef)]
            others = [node for node in kind.body if not isinstance(node, ast.FunctionDef)]
            declared = {
                node.id
                for other in others
                for node in ast.walk(other)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            }
            for method in methods:
                if method.name == "__init__":
                    declared |= attributes_set(method)
            late |= {name for method in methods for name in attributes_set(method)} - declared
    return late


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_every_attribute_is_there_from_the_start(file):
    assert not late_attributes(file.read_text(encoding="utf-8"))


def test_an_attribute_that_is_born_late_is_seen():
    text = "class A:\n    def __enter__(self):\n        self.late, self.later = 1, 2\n"
    assert late_attributes(text) == {"late", "later"}
    assert not late_attributes("class A:\n    late: int\n    later = 1\n" + text[9:])


LAYOUT_TOKENS = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def docstring_lines(text: str) -> set[int]:
    """The lines of all docstrings."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node):
            docstring = node.body[0]
            found |= {*range(docstring.lineno, (docstring.end_lineno or 0) + 1)}
    return found


def tokens_per_line(text: str) -> float:
    """How many tokens a line of code has, without comments, docstrings and layout."""
    left_out = docstring_lines(text)
    num_tokens = 0
    lines = set()
    fstring_depth = 0  # from Python 3.12 on, an f-string is many tokens
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        fstring_depth -= name == "FSTRING_END"
        first, last = token.start[0], token.end[0]
        if token.type not in LAYOUT_TOKENS and first not in left_out:
            num_tokens += fstring_depth == 0 and name != "FSTRING_END"
            lines |= {*range(first, last + 1)}
        fstring_depth += name == "FSTRING_START"
    return num_tokens / max(len(lines), 1)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_file_is_packed(file):
    """One step a line: a file that is short by dense lines is not simple."""
    density = tokens_per_line(file.read_text(encoding="utf-8"))
    assert density <= 7.5, f"{density:.2f} tokens a line of code"


def test_a_packed_line_is_seen():
    packed = "total, names = sum(sizes[n] for n in left), [n for n in left if n not in taken]\n"
    assert tokens_per_line(packed) > 25
    assert tokens_per_line('"""A docstring."""\n# and a comment\ntotal = 0\n') == 3
    assert tokens_per_line("name = f\"{a + b:>{width}} {f'{c}'}\"\n") == 3, "on every Python"


def test_what_lies_in_a_store_is_known_to_its_wing_alone():
    names = {"store.json", "recipe.yaml", "results.json", ".lock", "kept", "work", "logs"}
    strays = {}
    for file in FILES:
        if wing_of(file) == "store":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = {*node.value.split("/")}
                if parts & names:
                    strays[file] = node.value
    assert not strays


def test_frameworks_stay_behind_their_seams():
    allowed = {
        "transformers": {"distributed", "evaluation", "models", "published_names", "training"},
        "open_clip": {"models"},
        "datasets": {"data"},
        "PIL": {"data", "models", "report"},
        "huggingface_hub": {"models", "store"},
        "deepspeed": {"distributed"},
        "accelerate": {"distributed"},
        "lm_eval": {"evaluation"},
        "lmms_eval": {"evaluation"},
    }
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                seam = allowed.get(name.split(".")[0])
                assert seam is None or wing_of(file) in seam, f"{file} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_nothing_is_pickled(file):
    text = file.read_text(encoding="utf-8")
    for word in ("pickle", "torch.load", "torch.save", "joblib", "eval(", "exec("):
        assert not re.search(rf"(?<![\w.]){re.escape(word)}", text), word


@pytest.mark.slow
def test_names_are_exported_lazily():
    code = "import mm_piece, sys; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
    assert set(mm_piece.__all__) <= set(dir(mm_piece))
    assert len(mm_piece.__all__) <= 17
    for name in mm_piece.__all__:
        assert getattr(mm_piece, name) is not None


def test_folders_beside_the_package_are_no_packages():
    for folder in ("pipelines", "checkpoints", "eval", "examples"):
        assert not list((ROOT / folder).rglob("__init__.py"))


def test_every_package_folder_is_in_the_wheel():
    for file in FILES:
        assert (file.parent / "__init__.py").is_file(), "setuptools finds packages by this file"
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'include = ["mm_piece*"]' in text
    assert (PACKAGE / "py.typed").is_file()


def test_no_traces_of_a_workplace():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    indexes = ["py" + "pi.org", "python" + "hosted", "/" + "work/", "/" + "root/"]
    suffixes = (".py", ".md", ".toml", ".yaml", ".json", ".html", ".ipynb", ".cff")
    for name in tracked.stdout.splitlines():
        file = ROOT / name
        if file.suffix in suffixes and file.is_file():
            text = file.read_text(encoding="utf-8")
            assert not [index for index in indexes if index in text], name
