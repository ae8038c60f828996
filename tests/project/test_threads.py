"""Waiting threads leave the cores to others, unless the environment says how they wait."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mm_piece.cli import main
from mm_piece.threads import prefer_passive_waiting

TINY = Path(__file__).parents[2] / "checkpoints" / "tiny"
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.fixture
def before_torch(monkeypatch):
    """A process without a word about waiting, in which torch is not imported yet."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for name in VARIABLES:
        # set first: what the code sets in its place is taken back too
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_command_lets_waiting_threads_sleep(before_torch):
    assert CliRunner().invoke(main, ["log", str(TINY)]).exit_code == 0
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize("name", VARIABLES)
def test_what_the_environment_says_stays(before_torch, name):
    before_torch.setenv(name, "7")
    prefer_passive_waiting()
    assert {key: os.environ.get(key) for key in VARIABLES} == {
        **dict.fromkeys(VARIABLES),
        name: "7",
    }


def test_nothing_is_set_once_torch_has_read_it(before_torch):
    before_torch.setitem(sys.modules, "torch", object())
    prefer_passive_waiting()
    assert "OMP_WAIT_POLICY" not in os.environ


@pytest.mark.slow
def test_torch_takes_it_where_train_is_named_first():
    settings = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", "import mm_piece; mm_piece.train"],
        env={**settings, "OMP_DISPLAY_ENV": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
