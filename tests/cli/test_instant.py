"""Commands that look at stores start at once, show whole names, and end quietly when unread."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from made_store import delta_for, make
from PIL import Image

from mm_piece.cli import main

TINY = Path(__file__).parents[2] / "checkpoints" / "tiny"
LEARNING = {"torch", "transformers", "accelerate", "datasets"}  # each takes seconds to import
TABLES = {"pandas", "sklearn", "scipy", "matplotlib"}
HUB = {"huggingface_hub.hf_api", "httpx"}

# Prints the modules that each command leaves behind, in one process: none of them unloads any.
COMMANDS = """
import json, sys
from click.testing import CliRunner
from mm_piece.cli import main

for command in json.loads(sys.argv[1]):
    result = CliRunner().invoke(main, command)
    if result.exit_code != int(sys.argv[2]):
        sys.exit(f"{command}: {result.output}")
    print(json.dumps(list(sys.modules)))
"""


def imported_by(commands, status=0):
    """The modules that are there after each command, which ends with that status."""
    program = [sys.executable, "-c", COMMANDS, json.dumps(commands), str(status)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [set(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_commands_import_no_more_than_they_need(tmp_path):
    store, first = str(TINY), str(TINY / "0001-digits.safetensors")
    commands = [
        ["--help"],
        ["log", store],
        ["results", store],
        ["gc", store, "--dry-run"],
        ["show", store, "--at", "1"],
        ["verify", store],
        ["verify", first],
        ["diff", first, f"{store}@2"],
        ["fork", store, str(tmp_path / "fork"), "--at", "1"],
        ["report", store, "--to", str(tmp_path / "report.html")],
        ["squash", store, str(tmp_path / "one.safetensors")],
    ]
    found = imported_by(commands)
    assert len(found) == len(commands)
    for command, modules in zip(commands, found, strict=True):
        name = command[0]
        if name == "squash":  # it computes with tensors, but asks transformers nothing
            assert not modules & (LEARNING - {"torch"})
            continue
        assert not modules & (LEARNING | HUB), command
        assert not modules & TABLES, command
        # listings of the manifest and of results decode no delta, read no recipe, take no lock
        if name in ("--help", "log", "results"):
            assert not modules & {"numpy", "pydantic", "filelock"}, command


@pytest.mark.slow
def test_a_wrong_position_or_task_is_told_before_torch_is_imported(picture):
    store = str(TINY)
    commands = [
        ["eval", store, "--at", "9"],
        ["eval", store, "--kl", "--at", "-1"],
        ["eval", store, "--suite", "general", "--at", "9"],
        ["eval", store, "--task", "digit"],
        ["ask", str(picture), "How many?", "--store", store, "--at", "9"],
    ]
    found = imported_by(commands, status=2)
    assert len(found) == len(commands)
    for command, modules in zip(commands, found, strict=True):
        assert not modules & LEARNING, command


@pytest.mark.parametrize("as_json", [False, True])
def test_names_stay_whole_where_nobody_looks(tmp_path, as_json):
    name = "long" * 49
    store = make(tmp_path / "store")
    store.append(delta_for(store, name))
    options = ["--json"] if as_json else []
    shown = CliRunner().invoke(main, ["log", str(store.path), *options]).stdout
    assert name in shown
    if not as_json:
        file = store.entries[0].file
        (line,) = [line for line in shown.splitlines() if name in line]
        assert line.rstrip().endswith(file)


@pytest.fixture
def picture(tmp_path):
    """A file with a picture."""
    file = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(file)
    return file


UNREAD = [["log", "--json"], ["results"], ["show", "--at", "1"]]


@pytest.mark.slow
@pytest.mark.parametrize("command", UNREAD, ids=" ".join)
def test_a_command_that_nobody_reads_ends_without_a_word(command):
    """As in `mm-piece results STORE | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    name, *options = command
    done = subprocess.run(
        [sys.executable, "-m", "mm_piece", name, str(TINY), *options],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_another_broken_pipe_is_told(monkeypatch, tmp_path):
    """One that is not of what the command prints: of a worker, or of a connection."""

    def fail(_):
        raise BrokenPipeError(32, "Broken pipe", "worker")

    monkeypatch.setattr("mm_piece.store.delta_store.DeltaStore.open", fail)
    monkeypatch.setattr("mm_piece.cli.is_output_closed", lambda: False)
    result = CliRunner().invoke(main, ["log", str(tmp_path)])
    assert (result.exit_code, result.stderr) == (2, "Error: worker: Broken pipe\n")
