"""Tables on a narrow terminal: summaries first, names that can be told apart."""

import json
from pathlib import Path

import pytest
from click import unstyle
from click.testing import CliRunner

from mm_piece.cli import main, options
from mm_piece.cli.options import cut_middle
from mm_piece.distributed.progress import print_line

TINY = Path(__file__).parents[2] / "checkpoints" / "tiny"


def run(*arguments):
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("command", [("show", TINY, "--at", 2), ("diff", f"{TINY}@1", f"{TINY}@2")])
def test_tensors_come_on_request(command):
    names = [tensor["name"] for tensor in json.loads(run(*command, "--json"))["tensors"]]
    short = run(*command)
    assert f"{len(names)} tensors are changed: --tensors lists them" in short
    assert not [name for name in names if name in short]
    assert short.count("\n") < 40

    long = run(*command, "--tensors")
    assert all(name in long for name in names)
    assert long.index("language") < min(long.index(f" {name} ") for name in names)


def test_groups_in_which_nothing_changed_are_one_line():
    shown = run("show", TINY, "--at", 1)
    assert "nothing changed in embedding, head" in shown
    rows = [line.split()[0] for line in shown.splitlines() if line.strip()]
    assert {"vision", "projector", "language"} <= set(rows)
    assert not {"embedding", "head"} & set(rows)


def test_long_names_lose_their_middle():
    assert cut_middle("short", 5) == "short"
    assert cut_middle("0123456789", 7) == "0…56789"
    assert all(len(cut_middle("x" * 50, length)) == length for length in range(1, 50))


def test_names_that_end_alike_keep_their_start(monkeypatch, capsys):
    monkeypatch.setattr(options.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "50")
    names = [f"000{n}-a-task.safetensors" for n in range(5)]
    rows = [(str(n), "a" * 20, name) for n, name in enumerate(names)]
    options.show_rows(("position", "task", "file"), rows)
    shown = [line.split()[-1] for line in unstyle(capsys.readouterr().out).splitlines()[3:-1]]
    assert [name[:4] for name in shown] == [name[:4] for name in names]


def test_lines_of_a_run_are_wrapped_too(monkeypatch, capsys):
    monkeypatch.setattr(options.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    print_line("digits: changed 16,261 entries of vision (1.60% of its norm), 8,763 of projector")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and max(map(len, lines)) <= 40


def test_a_table_fits_its_terminal(monkeypatch, capsys):
    monkeypatch.setattr(options.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"vision_tower.encoder.layers.{n}.self_attn.out_proj.weight" for n in range(12)]
    rows = [(name, "vision", 123_456_789, "128x384") for name in names]
    options.show_rows(("tensor", "group", "entries", "shape"), rows)
    lines = unstyle(capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 80
    shown = [line.split()[0] for line in lines if "…" in line]
    assert len(set(shown)) == len(names)
    assert all(line.split()[1:] == ["vision", "123,456,789", "128x384"] for line in lines[3:-1])


@pytest.mark.parametrize("stream", ["out", "err"])
def test_a_terminal_breaks_lines_between_words(monkeypatch, capsys, stream):
    text = "  Note: " + "a-hyphen and/a/path-of-a/file " * 8
    options.echo(text, err=stream == "err")
    assert getattr(capsys.readouterr(), stream) == f"{text}\n"

    monkeypatch.setattr(getattr(options.sys, f"std{stream}"), "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    options.echo(text, err=stream == "err")
    lines = getattr(capsys.readouterr(), stream).splitlines()
    assert max(map(len, lines)) <= 40
    assert lines[0].startswith("  Note: ")
    assert " ".join(lines).split() == text.split()
