"""The commands of a checkout: what a commit runs is what `make check` begins with."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
HOOKS = ROOT / ".pre-commit-config.yaml"


def commands_at(stage):
    """Return the commands of the hooks that run at a stage, in their order."""
    config = yaml.safe_load(HOOKS.read_text(encoding="utf-8"))
    (repository,) = config["repos"]
    assert repository["repo"] == "local"  # nothing is downloaded
    usual = config["default_stages"]
    return [h["entry"] for h in repository["hooks"] if stage in h.get("stages", usual)]


def test_a_commit_runs_what_the_check_runs_before_its_tests():
    ((*quick, last),) = re.findall(r"^check: (\w+) (\w+) (\w+) (\w+)$", MAKEFILE, re.M)
    assert last == "test"
    assert commands_at("pre-commit") == [f"make {target}" for target in quick]


def test_a_push_runs_the_fast_tests():
    assert commands_at("pre-push") == ["make fast"]
    assert re.search(r'^fast:\n\t.* -m "not slow"$', MAKEFILE, re.M)


def test_both_kinds_of_hooks_are_installed():
    config = yaml.safe_load(HOOKS.read_text(encoding="utf-8"))
    assert config["default_install_hook_types"] == ["pre-commit", "pre-push"]
