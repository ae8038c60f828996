"""What is promised about the code itself: order of imports, budgets, seams, the wheel's content."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mm_piece

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mm_piece"
# Each module may import only those above it.
ORDER = (
    *("plaintext", "errors", "strictjson", "metrics", "intervals", "scoring", "names", "recipe"),
    *("atomic", "codec", "tensorfile", "sharding", "deltaheader", "deltafile", "sealed"),
    *("delta", "merging", "comparison", "manifest", "store", "layout", "interchange"),
    "progress",
    *(
        "mask",
        "owners",
        "parameter_reads",
        "importance",
        "stability",
        "triton_kernels",
        "products",
        "patches",
        "sparse",
        "changes",
        "scenes",
        "tasks",
    ),
    *(
        "preprocessing",
        "placing",
        "models",
        "generation",
        "skeleton",
        "trainer",
        "checkpoint",
        "assembly",
    ),
    *("attachment", "loading", "exporting", "derive", "card", "hub", "sharing"),
    *(
        "evaluation",
        "divergence",
        "keeping",
        "maskfile",
        "selection",
        "measuring",
        "suite",
        "parts",
        "opening",
        "checking",
        "training",
        "report",
        "cli",
        "__main__",
    ),
)
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """The modules of this package that a file imports, wherever in it; type checking aside."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mm_piece"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


def test_every_module_has_its_place():
    assert {module_of(file) for file in FILES} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_upwards(file):
    name = module_of(file)
    if name == "__init__":
        return
    above = set(ORDER[: ORDER.index(name) + 1])
    assert imported(file) <= above


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_budgets(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 300
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a file opens with what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 40, f"{node.name} has {length} lines"


def test_frameworks_stay_behind_their_seams():
    allowed = {
        "transformers": {
            "models",
            "generation",
            "skeleton",
            "trainer",
            "preprocessing",
            "assembly",
            "sharding",
        },
        "open_clip": {"assembly"},
        "datasets": {"tasks"},
        "PIL": {"scenes", "tasks", "report", "preprocessing", "assembly"},
        "huggingface_hub": {"checkpoint", "hub"},
        "deepspeed": {"sharding"},
        "accelerate": {"sharding"},
        "lm_eval": {"suite"},
        "lmms_eval": {"suite"},
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
                assert seam is None or module_of(file) in seam, f"{file} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_nothing_is_pickled(file):
    text = file.read_text(encoding="utf-8")
    for word in ("pickle", "torch.load", "torch.save", "joblib", "eval(", "exec("):
        assert not re.search(rf"(?<![\w.]){re.escape(word)}", text), word


def test_names_are_exported_lazily():
    code = "import mm_piece, sys; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
    assert len(mm_piece.__all__) <= 17
    for name in mm_piece.__all__:
        assert getattr(mm_piece, name) is not None


def test_folders_beside_the_package_are_no_packages():
    for folder in ("pipelines", "checkpoints", "eval"):
        assert not list((ROOT / folder).rglob("__init__.py"))


def test_every_package_folder_is_in_the_wheel():
    folders = {"mm_piece", *(f"mm_piece.{p.parent.name}" for p in PACKAGE.glob("*/__init__.py"))}
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = text.split("packages = ")[1].split("]")[0] + "]"
    assert set(ast.literal_eval(listed)) == folders


def test_no_traces_of_a_workplace():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    indexes = ["py" + "pi.org", "python" + "hosted", "/" + "work/", "/" + "root/"]
    for name in tracked.stdout.splitlines():
        file = ROOT / name
        if file.suffix in (".py", ".md", ".toml", ".yaml", ".json", ".html") and file.is_file():
            text = file.read_text(encoding="utf-8")
            assert not [index for index in indexes if index in text], name
