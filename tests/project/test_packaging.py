"""What tells others about the project: its metadata, its citation, its extras, its image."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
(VERSION,) = re.findall(r'^version = "(.+)"$', PYPROJECT, re.M)
EXTRAS = dict(
    re.findall(
        r"^(\w+) = \[(.+)\]$",
        PYPROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0],
        re.M,
    )
)


def find_requirements(extra):
    """Return the names of the packages of an extra."""
    return set(re.findall(r'"([\w-]+)', EXTRAS[extra]))


def test_the_citation_is_of_this_version():
    assert CITATION["version"] == VERSION


def test_the_changelog_has_this_version_with_its_date():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {VERSION} ({CITATION['date-released']})\n" in text


def test_the_citation_has_what_its_schema_requires():
    assert CITATION["cff-version"] == "1.2.0"
    assert all(CITATION[key] for key in ("message", "title", "authors"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", CITATION["date-released"])


def test_the_citation_names_the_papers_authors_as_the_readme_does():
    paper = CITATION["preferred-citation"]
    names = [f"{author['given-names']} {author['family-names']}" for author in paper["authors"]]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for said in (", ".join(names), paper["title"], paper["url"]):
        assert said in readme


def test_every_hint_names_an_extra():
    """Messages and pages that say `mm-piece[NAME]` or `.[NAME]`."""
    files = [*(ROOT / "mm_piece").rglob("*.py"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")]
    named = set()
    for file in (*files, ROOT / "examples" / "README.md", ROOT / "Dockerfile"):
        named |= set(re.findall(r"(?:mm-piece|\.)\[(\w+)\]", file.read_text(encoding="utf-8")))
    assert {"bleu", "captions", "tensorboard", "test"} <= named <= set(EXTRAS)


@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - {"eval", "test"}))
def test_tests_have_what_an_extra_brings(extra):
    assert find_requirements(extra) <= find_requirements("test")


def test_the_image_is_sent_what_it_copies():
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for line in re.findall(r"^COPY (.+)$", dockerfile, re.M):
        *sources, _ = [word for word in line.split() if not word.startswith("--")]
        for source in sources:
            assert (ROOT / source).exists()
            assert any(fnmatch(path.split("/")[0], source) for path in sent), source


def test_the_image_runs_as_no_root():
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"^USER (.+)$", dockerfile, re.M) == ["$UID"]
    assert "ARG UID=1000\n" in dockerfile
