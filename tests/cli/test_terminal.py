"""Law 12: what a file, a store or a model says never speaks to the terminal nor shadows a fact."""

import ast
import json
import logging
import re
import sys
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner
from made_store import RECIPE, delta_for

import mm_piece
from mm_piece.cli import main, options
from mm_piece.deltas.delta import Delta
from mm_piece.distributed import progress
from mm_piece.distributed.progress import print_line
from mm_piece.errors import PieceError
from mm_piece.plaintext import make_printable
from mm_piece.report import report_store
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.model_card import format_model_card

PACKAGE = Path(mm_piece.__file__).parent
# Colour, a title, a link, C1's own introducer, direction, no width, line breaks, rich's markup.
SPEAKS = [
    *("\x1b[31m\x1b[2J", "\x1b]0;title\x07", "\x1b]8;;http://x\x1b\\y\x1b]8;;\x1b\\", "\x9b31m"),
    *("\u202eevil\u202c", "\u2066\u200b\u200d\ufeff\u00ad", "a\r\nb\tc", "\x00\x08\x7f\x85"),
    *("\u2028\u2029", "\ud800", "\U000e0001\ue000"),
]
MARKUP = "[/nope][bold][link=http://x]y[/link]:smile:[red]"
HOSTILE = "".join(SPEAKS) + MARKUP
RECIPE_OF_ROWS = '{"base": BASE, "store": "store", "tasks": [TASK]}'


def run(*arguments, status=0):
    """What a command prints, with all that click would take out where nobody looks."""
    result = CliRunner().invoke(main, [*map(str, arguments)], color=True)
    assert result.exit_code == status, result.output
    return result


def require_clean(text):
    """Nothing but characters that show themselves, and the ends of lines."""
    strange = {char for char in text if not char.isprintable() and char != "\n"}
    assert not strange, ascii("".join(strange))
    return text


# --- the one function -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", SPEAKS)
def test_what_speaks_is_escaped(text):
    shown = make_printable(text)
    assert shown.isprintable()
    assert "\\" in shown
    lines = make_printable(text, lines=True)
    assert lines.replace("\n", "").replace("\t", "").isprintable()


@pytest.mark.parametrize(
    "text", ["", "Größe 猫 हिन्दी עברית 🐈", "a  b", "\u3000x\xa0", "\\x1b", "[x]"]
)
def test_what_shows_itself_stays(text):
    assert make_printable(text) == make_printable(text, lines=True) == text


def test_an_escape_says_what_it_stands_for():
    assert make_printable("\x1b\n\u202e\ud800") == r"\x1b\n\u202e\ud800"
    assert make_printable("a\n\tb\r", lines=True) == "a\n\tb\\r"


# --- the only way ---------------------------------------------------------------------------------


def _prints(file: Path):
    """Calls that reach a terminal."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if re.search(
            r"^print$|\bclick\.(confirm|prompt)$|\b(echo|secho|print_exc|print_exception|Console|tqdm|trange)$"
            r"|\b(stdout|stderr)\.write(lines)?$|tqdm\.write$",
            called,
        ):
            yield called


def test_everything_goes_through_the_seam():
    """Commands print by `options`, all else by `progress`; training's own bar names nothing."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        calls = {call for call in _prints(file)} - {"echo"}
        if calls:
            found[file.relative_to(PACKAGE).as_posix()] = calls
    seams = {"cli/options.py", "distributed/progress.py", "training/callbacks.py"}
    assert set(found) == seams
    assert found["training/callbacks.py"] == {"tqdm"}
    for file in PACKAGE.glob("cli/*.py"):
        text = file.read_text(encoding="utf-8")
        assert "from click import" not in text
        assert file.name == "options.py" or "click.echo" not in text


def test_one_line_stays_one_line(capsys):
    options.echo(HOSTILE)
    print_line(HOSTILE)
    out = require_clean(capsys.readouterr().out)
    assert out.count("\n") == 2
    assert out.count(MARKUP) == 2
    options.echo_lines("a\n" + HOSTILE)
    assert capsys.readouterr().out.startswith("a\n\\x1b")


def test_bars_show_titles_that_are_safe(monkeypatch):
    titles = []
    monkeypatch.setattr(progress, "tqdm", lambda items, title, *_, **__: titles.append(title))
    progress.progress_bar([], HOSTILE, "row")
    assert titles == [make_printable(HOSTILE)]


def test_tables_take_no_markup(capsys):
    options.show_rows((HOSTILE, "n"), [(HOSTILE, 1234567)], title=MARKUP)
    out = require_clean(capsys.readouterr().out)
    flat = re.sub(r"\s+", "", out)
    assert "[/nope]" in flat and ":smile:" in flat and "1,234,567" in flat


def test_json_is_ascii_and_valid(capsys):
    content = {HOSTILE: [HOSTILE, 1.5, float("nan"), float("-inf"), None, True]}
    options.echo_json(content)
    out = require_clean(capsys.readouterr().out)
    assert out.isascii()
    assert json.loads(out) == {HOSTILE: [HOSTILE, 1.5, None, None, None, True]}


def test_logs_warnings_and_tracebacks_are_printable(capsys, caplog):
    shown, hook = warnings.formatwarning, sys.excepthook
    with pytest.raises(KeyError), options.printable_messages():
        logging.getLogger("other").warning("%s", HOSTILE)
        warned = warnings.formatwarning(UserWarning(HOSTILE), UserWarning, "f.py", 1, "")
        raise KeyError(HOSTILE + "\n\x1b")
    require_clean(caplog.records[0].getMessage().replace("\t", ""))
    require_clean(warned.replace("\t", ""))
    assert warnings.formatwarning is shown
    sys.excepthook(ValueError, ValueError("line\n" + HOSTILE), None)
    sys.excepthook = hook
    require_clean(capsys.readouterr().err.replace("\t", ""))


# --- a hostile store ------------------------------------------------------------------------------

FACTS = {"family": "llava", "dtype": "float32", "parameters": 12, "bytes": 48}


@pytest.fixture
def store(tmp_path):
    """Two deltas; whatever may be any text is hostile."""
    base = {"fingerprint": "ab" * 32, **FACTS, "hub": "a/\x9b31m\u202e", "more": HOSTILE}
    store = DeltaStore.create(tmp_path / "store", base, RECIPE + f"# {MARKUP}\n")
    info = {HOSTILE: {HOSTILE: HOSTILE}, "method": HOSTILE, "groups": {"vision": {"norm": 1}}}
    for task in ("first", "second"):
        store.append(delta_for(store, task, info=info))
    names = ["first" + HOSTILE, "[/nope]"]
    store.write_results({"tasks": names, "matrix": [[0.5, 0.5]] * 3, "stability": {HOSTILE: {}}})
    said = {"prompt": HOSTILE, "answer": HOSTILE, "prediction": HOSTILE, "score": 1}
    store.write_answers(1, {HOSTILE: [{"row": 0, **said}]})
    return store


def renamed(store):
    """Let the manifest call its tasks something that no delta may be called."""
    path = store.path / "store.json"
    content = json.loads(path.read_text())
    for entry in content["deltas"]:
        entry["task"] = "\x1b[2J\u202e[/nope]"
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("command", ["log", "results"])
def test_names_in_a_manifest_are_shown_as_text(store, command):
    renamed(store)
    shown = require_clean(run(command, store.path).output)
    assert "[/nope]" in re.sub(r"\s+", "", shown)
    assert json.loads(require_clean(run(command, store.path, "--json").output))


def test_a_delta_is_shown_as_text(store):
    shown = require_clean(run("show", store.path).output)
    assert "[/nope]" in shown
    content = json.loads(require_clean(run("show", store.path, "--json").output))
    assert content["info"][HOSTILE] == {HOSTILE: HOSTILE}


@pytest.mark.parametrize("command", ["verify", "show", "squash"])
def test_errors_about_a_store_are_one_clean_line(store, tmp_path, command):
    renamed(store)
    extra = [tmp_path / "to"] if command == "squash" else []
    error = run(command, store.path, *extra, status=2).stderr
    assert require_clean(error).startswith("Error: ") and error.count("\n") == 1


def test_diff_and_gc_show_text(store, tmp_path):
    other = tmp_path / f"o{HOSTILE}.safetensors".replace("\x00", "").replace("/", "").replace(
        "\ud800", ""
    )
    store.delta(1).save(other)
    require_clean(run("diff", other, store.path).output)
    assert json.loads(require_clean(run("diff", other, store.path, "--json").output))
    odd = store.path / "work" / "0001"
    odd.mkdir(parents=True)
    assert "work/0001" in require_clean(run("gc", store.path, "--dry-run").output)


def test_file_names_in_errors_are_text(tmp_path):
    name = "x\x1b[31m\u202e\n\x9b"
    for arguments in (["log", name], ["verify", name], ["log", "a", name], ["check", name]):
        result = CliRunner().invoke(main, arguments, color=True)
        assert result.exit_code == 2
        require_clean(result.stderr)
    error = CliRunner().invoke(main, ["log", name]).stderr
    assert error.count("\n") == 1 and r"x\x1b[31m\u202e\n\x9b" in error
    assert r"\x1b" in CliRunner().invoke(main, [name], color=True).stderr


def test_an_error_of_the_system_names_its_file():
    assert options.format_error(OSError(28, "No space left on device", "a/b")) == (
        "a/b: No space left on device"
    )
    assert options.format_error(OSError(28, "No space left on device")) == "No space left on device"
    assert options.format_error(PieceError("x: y")) == "x: y"


# --- facts ----------------------------------------------------------------------------------------


def test_info_shadows_no_fact(store, tmp_path):
    lies = {"task": "another", "base": "cd" * 32, "parent": "ef" * 32, "entries": 999}
    lies |= {"tensors": [{"name": "lie"}], "info": {"task": "x"}}
    path = tmp_path / "d.safetensors"
    delta = delta_for(store, "honest", info=lies)
    delta.save(path)
    content = json.loads(run("show", path, "--json").output)
    assert (content["task"], content["base"]) == ("honest", delta.base)
    assert (content["parent"], content["entries"]) == (delta.parent, 4)
    assert [tensor["name"] for tensor in content["tensors"]] == ["w"]
    assert content["info"]["task"] == "another"
    lines = [line.split() for line in run("show", path).output.splitlines()]
    assert ["task", "honest"] in lines and ["entries", "4"] in lines
    assert ["info.task", "another"] in lines and ["info.entries", "999"] in lines
    assert ["task", "another"] not in lines


@pytest.mark.parametrize(
    "row",
    [{"norm": 10**400}, {"share": 10**400}, {"changed": 10**400, "norm": True}, {"norm": "x"}],
)
def test_a_change_report_of_any_size_is_shown(store, tmp_path, row):
    path = tmp_path / "d.safetensors"
    delta_for(store, "d", info={"groups": {"vision": row}}).save(path)
    assert "vision" in run("show", path).output


def test_what_is_no_patchable_number_does_not_break_the_report(tmp_path):
    for number, patchable in enumerate((0, -3, "x", 1.5, True, 10**30, [1], None)):
        base = {"fingerprint": "ab" * 32, **FACTS}
        recipe = "base: b\nstore: s\ntasks: [{name: a, train: x, test: x}]\n"
        store = DeltaStore.create(tmp_path / str(number), base, recipe)
        store.append(delta_for(store, "a", info={"patchable": patchable}))
        assert "33.3 %" in report_store(store.path).read_text(encoding="utf-8")  # 4 of 12


def test_a_report_says_what_a_base_lacks(tmp_path):
    recipe = "base: b\nstore: s\ntasks: [{name: a, train: x, test: x}]\n"
    DeltaStore.create(tmp_path / "s", {"fingerprint": "ab" * 32}, recipe)
    assert "its base has no family" in run("report", tmp_path / "s", status=2).stderr


# --- pages ----------------------------------------------------------------------------------------


def test_the_report_and_the_card_hold_no_controls(store):
    tag = "<script>x</script>"
    results = store.results()
    results["tasks"] = [HOSTILE + tag, "b"]
    store.write_results(results)
    (store.path / "recipe.yaml").write_text(
        "base: b\nstore: s\ntasks: [{name: a, train: x, test: x}]\n"
    )
    page = report_store(store.path).read_text(encoding="utf-8")
    assert not [char for char in page if not char.isprintable() and char not in "\n\t\xa0\u3000"]
    assert tag not in page and "&lt;script&gt;" in page
    run("report", store.path)
    hostile = store.base.with_facts({"family": HOSTILE})
    card = format_model_card(hostile, store.entries, results, "me/mine")
    require_clean(card)
    assert tag not in card
    for text, escaped in (("www.x.y", r"www\.x.y"), ("http://x", r"http\://x"), ("a@b", r"a\@b")):
        named = store.base.with_facts({"family": text})
        assert escaped in format_model_card(named, [], {}, "me/mine")


# --- data -----------------------------------------------------------------------------------------


@pytest.fixture
def rows(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def _write(*rows, name="rows.json"):
        Path(name).write_text(json.dumps(rows))
        task = {"name": "t", "train": name, "test": name}
        recipe = RECIPE_OF_ROWS.replace("BASE", json.dumps(str(base)))
        Path("recipe.json").write_text(recipe.replace("TASK", json.dumps(task)))
        return "recipe.json"

    return _write


def test_check_shows_rows_as_text(rows):
    text = HOSTILE.replace("\ud800", "")
    row = {"prompt": text + " ⟦not taught⟧\nError: x", "answer": text, f"unread{text}": 1}
    result = run("check", rows(row))
    shown = result.output
    for ours in ("\x1b[32m", "\x1b[0m", "\t"):
        shown = shown.replace(ours, "")
    require_clean(shown)
    assert "⟦not taught⟧" not in result.output
    assert "\n  Error: x" in result.output  # no line of its own
    assert result.output.count("⟦") == 2  # in the title, and before the answer
    for broken in ({"prompt": text}, {"prompt": "a", "answer": "b", "image": text}):
        result = run("check", rows(broken), status=2)
        require_clean(result.output)
        assert json.loads(run("check", "recipe.json", "--json", status=2).stdout)


def test_ask_prints_what_the_model_says(base, tmp_path, monkeypatch):
    from PIL import Image

    from mm_piece.evaluation import answers as evaluation
    from mm_piece.store import loading

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(loading, "load", lambda **_: (None, None))
    monkeypatch.setattr(evaluation, "move_to_accelerator", lambda model: model)
    monkeypatch.setattr(evaluation, "answer_question", lambda *_: "first\n" + HOSTILE)
    out = run("ask", tmp_path / "a.png", "?", "--base", base).output
    assert out.startswith("first\n")
    require_clean(out.replace("\t", ""))


# --- plain JSON -----------------------------------------------------------------------------------

NO_JSON = ['{"a": NaN}', '{"a": Infinity}', '{"a": -Infinity}', '{"a": 1e999}', '{"a": 1, "a": 1}']
NO_JSON += ['{"a": {"b": 1, "b": 2}}', '{"a": ' + "[" * 90 + "]" * 90 + "}"]


@pytest.mark.parametrize("text", NO_JSON)
@pytest.mark.parametrize("name", ["store.json", "results.json", "answers/0001.json"])
def test_files_of_a_store_are_plain_json(store, name, text):
    path = store.path / name
    sound = path.read_text().rstrip()
    path.write_text(sound[:-1] + ", " + text[1:])
    error = run("verify", store.path, status=2).stderr
    assert Path(name).name in error and "damaged JSON" in error and error.count("\n") == 1


@pytest.mark.parametrize("text", NO_JSON)
def test_headers_of_deltas_are_plain_json(store, text):
    from forged import forge, header_of

    delta = delta_for(store)
    header = json.dumps({**header_of(delta.to_bytes()), "info": "INFO"})
    payload = {
        f"w.{kind}": row
        for kind, row in (("indices", delta.indices["w"]), ("values", delta.values["w"]))
    }
    raw = header.replace('"gap"', '"raw"')
    assert Delta.from_bytes(forge(raw.replace('"INFO"', '{"a": 1}'), payload)).info == {"a": 1}
    with pytest.raises(PieceError, match="altered header"):
        Delta.from_bytes(forge(raw.replace('"INFO"', text), payload))


def test_what_would_not_be_read_is_not_written(store):
    for info in ({"a": float("nan")}, {1: "a", "1": "b"}, {"a": float("inf")}):
        with pytest.raises(PieceError, match="not plain JSON"):
            delta_for(store, info=info).to_bytes()
        with pytest.raises(PieceError, match="not plain JSON"):
            store.write_results({"tasks": ["a"], "matrix": [], **info})


def test_a_row_of_data_names_nothing_twice(tmp_path):
    from mm_piece.data import read

    for name, text in (("a.json", "[%s]"), ("a.jsonl", "%s")):
        row = '{"prompt": "a", "answer": "b", "answer": "c"}'
        (tmp_path / name).write_text(text % row)
        with pytest.raises(PieceError, match="the name 'answer' stands twice"):
            read(str(tmp_path / name))
