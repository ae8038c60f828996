"""What `make fast` leaves out carries the mark, and what it runs starts no process of Python.

A test's reach is followed by names, through functions and fixtures of its file, of `conftest.py`
and of the modules beside the tests.
"""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
STARTS_PROCESSES = {"executable", "get_context"}  # of sys and multiprocessing
EXTRAS = {
    "import deepspeed",
    "import lm_eval",
    "import lmms_eval",
    "import open_clip",
    "import peft",
    "import pycocoevalcap",
    "import timm",
    "import trl",
}


class Module:
    """A file of tests or of their support: what each of its names uses, and what it imports."""

    def __init__(self, file: Path) -> None:
        self.uses: dict[str, set[str]] = {}
        self.imports: dict[str, tuple[str, str]] = {}
        self.tests: dict[str, ast.FunctionDef] = {}
        self.all_slow = False
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            self._read(node)

    def _read(self, node: ast.stmt) -> None:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                self.imports[alias.asname or alias.name] = (node.module or "", alias.name)

        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            self.uses[node.name] = names_in(node)
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                self.tests[node.name] = node

        elif isinstance(node, ast.Assign):
            for target in node.targets:
                self.uses |= {name: names_in(node.value) for name in names_in(target)}
            if ast.unparse(node.targets[0]) == "pytestmark":
                self.all_slow = is_slow_mark(node.value)

    def is_slow(self, test: str) -> bool:
        """Return whether a test has the mark, by itself or with its whole file."""
        return self.all_slow or any(map(is_slow_mark, self.tests[test].decorator_list))


def names_in(node: ast.AST) -> set[str]:
    """Return every name that a piece of code mentions, and `import x` for what it imports."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            found.add(part.id)
        elif isinstance(part, ast.Attribute):
            found.add(part.attr)
        elif isinstance(part, ast.arg):
            found.add(part.arg)
        elif isinstance(part, ast.Import):
            found |= imports_of(*(alias.name for alias in part.names))
        elif isinstance(part, ast.ImportFrom):
            found |= imports_of(part.module or "", *(alias.name for alias in part.names))
        elif isinstance(part, ast.Call) and ast.unparse(part.func) == "pytest.importorskip":
            found |= imports_of(ast.literal_eval(part.args[0]))
    return found


def imports_of(*modules: str) -> set[str]:
    """Return `import x` for each part of the modules' names: ours are called as what they use."""
    return {f"import {part}" for module in modules for part in module.split(".")}


def is_slow_mark(node: ast.expr) -> bool:
    """Return whether an expression is the mark, or a list that holds it."""
    marks = node.elts if isinstance(node, ast.List) else [node]
    return "pytest.mark.slow" in map(ast.unparse, marks)


SUPPORT = {
    file.stem: Module(file)
    for folder in ("support", "hardening")
    for file in (TESTS / folder).glob("*.py")
}
CONFTEST = Module(TESTS / "conftest.py")
FILES = sorted(TESTS.rglob("test_*.py"))


def find_reach(module: Module, name: str, reached: set[tuple[int, str]]) -> set[str]:
    """Return every name that a name of a module leads to."""
    if (id(module), name) in reached:
        return set()
    reached.add((id(module), name))

    if name in module.imports:
        source, original = module.imports[name]
        return find_reach(SUPPORT[source], original, reached) if source in SUPPORT else set()

    found = set(module.uses[name]) if name in module.uses else set()
    for used in sorted(found):
        owner = module if used in module.uses or used in module.imports else CONFTEST
        found |= find_reach(owner, used, reached)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_starts_processes_or_needs_an_extra_is_marked(file):
    module = Module(file)
    unmarked = []
    for test in module.tests:
        words = find_reach(module, test, set()) & (STARTS_PROCESSES | EXTRAS)
        if words and not module.is_slow(test):
            unmarked.append(f"{test}: {', '.join(sorted(words))}")
    assert not unmarked


def test_the_reach_of_a_test_is_seen():
    module = Module(TESTS / "laws" / "test_resuming.py")
    assert "executable" in find_reach(module, "test_told_to_stop", set())
    assert "executable" not in find_reach(module, "found_in", set())
