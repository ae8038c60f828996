"""`mm-piece check`: what is wrong with a recipe and its data, in one line each, before training."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from mm_piece.cli import check_tables, main
from mm_piece.cli.check import _leave_out_middle, _show_example
from mm_piece.cli.check_tables import _format_histogram
from mm_piece.errors import DataError, ModelError, RecipeError, StoreError
from mm_piece.evaluation.matrix import read_task_source
from mm_piece.recipe import load_recipe
from mm_piece.store.delta_store import DeltaStore
from mm_piece.training.loop import train
from mm_piece.training.recipe_check import check

pytestmark = pytest.mark.slow


@pytest.fixture
def world(base, tmp_path, monkeypatch):
    """A recipe over five train and four test rows; two of these ask what is trained."""
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        Image.new("RGB", (12, 8), (60 * number, 0, 0)).save(f"{number}.png")
    rows = [
        {"prompt": "Which?", "answer": word, "image": f"{number}.png"}
        for number, word in enumerate(["red", "red", "blue", "green"])
    ]
    text = {"prompt": "2 + 2? " + "well, " * 40, "answer": "4"}
    write("train.json", [*rows[:3], rows[0], text])
    trained = [{**row, "answer": "blue"} for row in rows[:2]]
    write("test.json", [rows[3], *trained, {**rows[2], "prompt": "Where?", "answer": "there"}])
    recipe = tmp_path / "recipe.yaml"
    task = {"name": "colours", "train": "train.json", "test": "test.json", "max_length": 60}
    recipe.write_text(json.dumps({"base": str(base), "store": "store", "tasks": [task]}))
    return recipe


def write(name, rows):
    with open(name, "w", encoding="utf-8") as file:  # noqa: PTH123 - relative to the test's folder
        json.dump(rows, file)


def run(*arguments):
    return CliRunner().invoke(main, ["check", *map(str, arguments)])


def test_counts_lengths_and_floor(world):
    (task,) = check(world).tasks
    assert (task.train.rows, task.train.images, task.train.text_only) == (5, 4, 1)
    assert (task.train.repeated, task.test.repeated) == (1, 0)
    assert (task.train.truncated, task.test.truncated) == (1, 0)
    assert len(task.train.lengths) == 5
    assert max(task.train.lengths) > 60
    assert (task.shared, task.commonest) == (2, "blue")
    assert task.floor == pytest.approx(1 / 2)
    assert [supervised for _, supervised in task.example] == [False, True]
    assert task.example[1][0] == "red<|end|>"
    assert check(world).errors == []


def test_the_floor_is_the_metrics_own(world):
    text = world.read_text().replace('"max_length"', '"metric": "edit", "max_length"')
    world.write_text(text)
    (task,) = check(world).tasks
    assert 1 / 2 < task.floor < 1


def test_it_prints_a_table_and_writes_nothing(world, tmp_path):
    before = sorted(tmp_path.iterdir())
    result = run(world)
    assert result.exit_code == 0
    for part in ("colours", "2 of 4", "50.0%", "⟦red<|end|>⟧", "nothing wrong was found"):
        assert part in result.output
    content = json.loads(run(world, "--json").stdout)
    assert content["errors"] == []
    assert content["tasks"][0]["shared"] == 2
    assert sorted(tmp_path.iterdir()) == before


def test_rows_limit_what_is_decoded(world):
    (task,) = check(world, rows=2).tasks
    assert (task.train.rows, task.train.encoded, task.test.encoded) == (5, 2, 2)


def _no_image(rows):
    rows[1]["image"] = "absent.png"


def _empty_image(rows):
    rows[1]["image"] = "empty.png"
    open("empty.png", "wb").close()  # noqa: PTH123, SIM115 - relative to the test's folder


def _no_picture(rows):
    rows[1]["image"] = "text.png"
    write("text.png", ["no picture"])


def _cut_off(rows):
    rows[1]["image"] = "cut.jpg"
    Image.effect_noise((200, 200), 90).save("cut.jpg")
    with open("cut.jpg", "r+b") as file:  # noqa: PTH123
        file.truncate(3000)


def _deep(rows):
    rows[1]["image"] = "deep.png"
    Image.new("I;16", (4, 4), 40000).save("deep.png")


def _mismatch(rows):
    rows[1]["prompt"] = "<image> and <image>?"


def _literal(rows):
    rows[4]["prompt"] = "What does <image> mean?"


def _video(rows):
    rows[1]["video"] = "clip.mp4"


def _unknown(rows):
    rows[1] = {"frage": "?", "antwort": "!"}


def _silent(rows):
    rows[1]["answer"] = " "


def _silent_before(rows):
    turns = [("human", "<image>a?"), ("gpt", ""), ("human", "b?"), ("gpt", "c")]
    rows[1] = {"image": "1.png", "conversations": [{"from": f, "value": v} for f, v in turns]}


def _pictured(rows):
    turns = [("human", "a?"), ("gpt", "<image>b")]
    rows[1] = {"image": "1.png", "conversations": [{"from": f, "value": v} for f, v in turns]}


def _columns(rows):
    recipe = Path("recipe.yaml")
    text = recipe.read_text().replace('"max_length"', '"columns": {"prompt": "qq"}, "max_length"')
    recipe.write_text(text)


def _image_elsewhere(rows):
    rows[1]["photo"] = rows[1].pop("image")


def _video_elsewhere(rows):
    del rows[1]["image"]
    rows[1]["frames"] = ["a.mp4"]


def _video_as_image(rows):
    rows[1]["image"] = "a.mp4"


def _tools(rows):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]
    turns[1]["tool_calls"] = [{"function": {"name": "look"}}]
    rows[1] = {"messages": turns}


MISTAKES = {
    _image_elsewhere: r"row 1: nothing reads 'photo', which names the image '1\.png'; say `columns",
    _video_elsewhere: r"row 1: videos and audio are not supported: 'frames' names 'a\.mp4'",
    _video_as_image: r"row 1: videos and audio are not supported: 'image' is 'a\.mp4'",
    _tools: r"row 1: tool turns are not supported: it has 'tool_calls'",
    _no_image: r"train\.json row 1: image .*absent\.png does not exist",
    _empty_image: r"train\.json row 1: image .*empty\.png is empty",
    _no_picture: r"train\.json row 1: image .*text\.png cannot be read",
    _cut_off: r"train\.json row 1: image .*cut\.jpg cannot be read",
    _deep: r"train\.json row 1: image .*deep\.png has mode I;16; convert it to 8 bits",
    _mismatch: r"train\.json row 1: 1 image\(s\) but 2 <image> mark\(s\)",
    _literal: r"train\.json row 4: 0 image\(s\) but 1 <image> mark\(s\)",
    _video: r"train\.json row 1: .*video",
    _unknown: r"train\.json row 1: no known format.*frage, antwort",
    _silent: r"train\.json row 1: answer 1 is empty",
    _silent_before: r"train\.json row 1: answer 1 is empty",
    _pictured: r"train\.json row 1: answer 1 holds an image",
    _columns: r"'colours': columns: prompt: no row of train\.json or test\.json has a field 'qq'",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__.lstrip("_"))
def test_mistakes_in_rows_are_one_line_each(world, mistake):
    with open("train.json", encoding="utf-8") as file:  # noqa: PTH123
        rows = json.load(file)
    mistake(rows)
    write("train.json", rows)
    (error,) = check(world).errors
    assert "\n" not in error
    result = run(world)
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert line == f"Error: {error}"
    assert re.search(MISTAKES[mistake], error), error


def test_columns_are_mapped(world):
    """Every mapped column is found, in `check` and in training."""
    names = {"prompt": "q", "answer": "label", "image": "file"}
    for file in ("train.json", "test.json"):
        with open(file, encoding="utf-8") as opened:  # noqa: PTH123
            rows = json.load(opened)
        write(file, [{names[key]: value for key, value in row.items()} for row in rows])
    text = world.read_text().replace(
        '"max_length"', f'"columns": {json.dumps(names)}, "max_length"'
    )
    world.write_text(text)
    result = run(world)
    assert result.exit_code == 0, result.stderr
    assert "⟦red<|end|>⟧" in result.output
    (task,) = load_recipe(world).tasks
    assert len(read_task_source(task, task.train)) == 5
    assert check(world).notes == []


def test_what_is_most_likely_not_meant_is_noted(world):
    with open("train.json", encoding="utf-8") as file:  # noqa: PTH123
        rows = json.load(file)
    rows[0] |= {"choices": ["red", "blue"], "id": 7}
    rows[1]["prompt"] = "Is <|end|> the end?"
    rows[2]["prompt"] = "long " * 99
    write("train.json", rows)
    world.write_text(world.read_text().replace(', "max_length": 60', ""))
    found = check(world)
    assert found.errors == []
    assert found.notes == [
        "train.json: nothing reads the fields choices",
        "train.json: 1 rows hold special tokens of the base, which are not read as text",
        "train.json: 1 rows are longer than the base's 256 positions; set max_length",
    ]
    result = run(world)
    assert result.exit_code == 0
    assert all(f"Note: {note}" in result.output for note in found.notes)
    assert json.loads(run(world, "--json").stdout)["notes"] == found.notes


def test_fields_of_turns_without_effect_are_noted(world):
    with open("train.json", encoding="utf-8") as file:  # noqa: PTH123
        rows = json.load(file)
    image = {"type": "image", "image": rows[0]["image"], "max_pixels": 9}
    turns = [{"role": "user", "content": [image, {"type": "text", "text": "Which?"}]}]
    turns.append({"role": "assistant", "content": "red", "reasoning_content": "hm", "loss": True})
    rows[0] = {"messages": turns}
    write("train.json", rows)
    assert check(world).notes == [
        "train.json: nothing reads the fields messages[].content[].max_pixels",
        "train.json: the base's chat template leaves out 'reasoning_content' of turns in 1 rows",
    ]


def test_one_source_for_both_tells_its_mistakes_once(world):
    with open("train.json", encoding="utf-8") as file:  # noqa: PTH123
        rows = json.load(file)
    rows[1]["image"] = "absent.png"
    write("train.json", rows)
    world.write_text(world.read_text().replace("test.json", "train.json"))
    assert len(check(world).errors) == 1


def test_all_mistakes_are_told(world):
    with open("train.json", encoding="utf-8") as file:  # noqa: PTH123
        rows = json.load(file)
    rows[0]["image"], rows[2]["answer"] = "x.png", ""
    write("train.json", rows)
    write("test.json", [])
    errors = check(world).errors
    assert len(errors) == 3
    assert "test.json has no rows" in errors[2]
    assert run(world).stderr.count("Error: ") == 3


def test_images_alone_can_be_too_long(world):
    world.write_text(world.read_text().replace('"max_length": 60', '"max_length": 16'))
    write("train.json", [{"prompt": "?", "answer": "x", "image": ["0.png"] * 4}])
    errors = check(world).errors
    assert errors == ["train.json row 0: max_length 16 leaves no room for text"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"store"', '"stroe"', "unknown key 'stroe'; did you mean 'store'"),
        ('"max_length"', '"max_lenght"', "unknown key 'tasks.0.max_lenght'; did you mean"),
        ('"max_length": 60', '"metric": "bleeu"', "unknown 'bleeu'; allowed: 'exact'"),
        ('"max_length": 60', '"columns": {"promt": "q"}', "unknown 'promt'; allowed: 'prompt'"),
        ('"tasks"', '"train": {"learning_rat": 1}, "tasks"', "did you mean 'learning_rate'"),
    ],
)
def test_mistakes_in_the_recipe(world, before, after, message):
    world.write_text(world.read_text().replace(before, after))
    with pytest.raises(RecipeError, match=message):
        check(world)
    result = run(world)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "before", "after", "message"),
    [
        (
            "sacrebleu.metrics.bleu",
            '"max_length"',
            '"metric": "bleu", "max_length"',
            "metric 'bleu' needs sacrebleu: pip install 'mm-piece[bleu]'",
        ),
        (
            "tensorboard",
            '"tasks"',
            '"train": {"report_to": "tensorboard"}, "tasks"',
            "train: report_to: tensorboard is not installed: pip install 'mm-piece[tensorboard]'",
        ),
    ],
)
def test_what_is_not_installed_is_told(world, monkeypatch, module, before, after, message):
    world.write_text(world.read_text().replace(before, after))
    assert run(world).exit_code == 0

    monkeypatch.setitem(sys.modules, module, None)
    result = run(world)
    assert (result.exit_code, result.stderr) == (2, f"Error: {message}\n")


def test_image_tokens_are_folded(capsys):
    _show_example("task", [("a<image><image><image><image><image>b", False), ("c", True)])
    assert "a<image>×5b⟦c⟧" in capsys.readouterr().out


def test_histogram():
    assert _format_histogram([]) == ""
    assert _format_histogram([3, 3, 3]) == "█"
    assert _format_histogram([1, 2, 2]) == "▄█"
    assert len(_format_histogram(range(1000))) == 20


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ('"model": {"dtype": "bfloat"}', "unknown dtype 'bfloat'"),
        ('"select": {"density": {"head": 0.1}}', "selects none|head"),
        ('"train": {"output_dir": "x"}', "'output_dir' is not a setting here"),
        ('"train": {"eval_strategy": "epoch"}', "'eval_strategy' is not a setting here"),
        ('"train": {"report_to": "flyte"}', "train: report_to: flyte: .* requires flytekit"),
        ('"model": {"trust_remote_code": true}', "'trust_remote_code' is not an option here"),
        ('"model": {"atn_implementation": "sdpa"}', "did you mean 'attn_implementation'"),
        ('"train": {"per_device_eval_batch_size": 0}', "per_device_eval_batch_size .* at least 1"),
        ('"train": {"per_device_eval_batch_size": 2.5}', "a whole number of at least 1, not 2.5"),
        ('"train": {"gradient_accumulation_steps": 0}', "gradient_accumulation_steps .* at least"),
        (
            '"train": {"learning_rate": "high"}',
            "learning_rate must be a number of at least 0, not 'high'",
        ),
        ('"train": {"save_strategy": "best"}', "save_strategy must be no, steps or epoch"),
        ('"train": {"num_train_epochs": 0}', "leave no step to train"),
        ('"model": {"dtype": [1]}', r"unknown dtype \[1\]; allowed: float32"),
        ('"select": {"density": {}}', "density: no group has a density; groups: vision, "),
        ('"select": {"density": true}', r"density True is out of \(0, 1\]"),
        ('"select": {"xi": .inf}', "select.xi: must be a finite number, not inf"),
        ('"select": {"exclude": "head"}', "select.exclude: must be a list, .* not 'head'"),
        ('"train": {"learning_rate": -1}', "learning_rate must be a number of at least 0, not -1"),
        ('"model": {"foo": 1}', "model: unknown option 'foo'; allowed: dtype, attn_implementation"),
        ('"store": "twice"', "key 'store' stands twice"),
    ],
)
def test_settings_are_looked_at(world, key, message):
    world.write_text(world.read_text().replace('"tasks"', f'{key}, "tasks"'))
    result = run(world)
    assert result.exit_code == 2
    assert re.search(message, result.stderr), result.stderr


def test_a_base_without_its_weights_is_named(world, base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    world.write_text(world.read_text().replace(str(base), str(copy)))
    assert "no file named model.safetensors" in run(world).stderr


def test_a_long_list_of_errors_is_cut(world):
    write("train.json", [{f"field{'x' * n}": "?"} for n in range(70)])
    assert len(check(world).errors) == 70
    stderr = run(world).stderr
    assert stderr.count("Error: ") == 50
    assert "… and 20 more" in stderr


def test_one_mistake_in_many_rows_is_one_line(world):
    rows = [{"prompt": "?", "answer": "x", "image": f"no{n}.png"} for n in range(1999)]
    rows += [{"prompt": "?", "answer": "x", "image": "0.png"}, {"prompt": "?", "answer": ""}]
    write("train.json", rows)
    write("test.json", [{"prompt": "a?", "answer": ""}, {"prompt": "b?", "answer": "x"}])
    result = run(world, "--json")
    assert len(json.loads(result.stdout)["errors"]) == 2001
    lines = result.stderr.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(
        r"Error: train\.json row 0: image no0\.png .* … and 1,998 more rows", lines[0]
    )
    assert lines[1] == "Error: train.json row 2000: answer 1 is empty"
    assert lines[2] == "Error: test.json row 0: answer 1 is empty"


def test_a_wrong_folder_of_images_is_one_line_for_each_source(world):
    Path("pictures").mkdir()
    for number in range(4):
        Path(f"{number}.png").rename(f"pictures/{number}.png")
    lines = run(world).stderr.splitlines()
    rows = {"train.json": 4, "test.json": 4}
    assert lines == [
        f"Error: {source}: none of the images of its {number} rows is there; the first was looked "
        f"for as {Path.cwd()}/{0 if source == 'train.json' else 3}.png, as there is no `images`; "
        "it is there with 'images: pictures'"
        for source, number in rows.items()
    ]
    with pytest.raises(DataError) as caught:
        train(world)
    assert f"Error: {caught.value}" == lines[0]


def test_a_misspelt_column_is_one_line_for_the_task(world):
    for file in ("train.json", "test.json"):
        rows = json.loads(Path(file).read_text())
        write(file, [{"label": row["answer"], **_without(row, "answer")} for row in rows])
    add_key(world, '"columns": {"answer": "lable"}')
    told = (
        "task 'colours': columns: answer: no row of train.json or test.json has a field 'lable'; "
        "did you mean 'label'? (the fields are 'label, prompt, image')"
    )
    assert check(world).errors == [told]
    assert run(world).stderr == f"Error: {told}\n"
    with pytest.raises(DataError) as caught:
        train(world)
    assert str(caught.value) == told


def _without(row, key):
    return {name: value for name, value in row.items() if name != key}


def add_key(world, key):
    """Give the recipe's task another key."""
    world.write_text(world.read_text().replace('"max_length"', f'{key}, "max_length"'))


def test_test_rows_that_are_trained_are_noted(world):
    assert check(world).notes == []
    rows = json.loads(Path("test.json").read_text())
    write("test.json", rows[:3])
    assert check(world).notes == [
        "test.json: 2 of 3 rows ask what is trained: their question and images stand in "
        "train.json too"
    ]


def test_answers_that_are_longer_than_the_model_may_answer_are_noted(world):
    rows = json.loads(Path("test.json").read_text())
    rows[0]["answer"] = "red and green and blue"
    write("test.json", rows)
    assert check(world).notes == []
    add_key(world, '"max_new_tokens": 21')
    (note,) = check(world).notes
    assert note == (
        "test.json: 1 of 4 rows have an answer longer than max_new_tokens 21, the longest has "
        "22 tokens: the model is stopped before its end"
    )
    # the shortest of several right answers is enough
    write("test.json", [{**rows[0], "answers": ["red", rows[0]["answer"]]}, *rows[1:]])
    assert check(world).notes == []


def test_a_choice_without_options_is_noted(world):
    add_key(world, '"metric": "choice"')
    (note,) = check(world).notes
    assert note == (
        "test.json: metric choice, but no answer is an option's letter or one of the options in "
        "its row"
    )
    rows = json.loads(Path("test.json").read_text())
    for options in (
        {"answer": "B"},
        {"choices": ["blue", "green"]},
        {"prompt": "Which, red or green?"},
    ):
        write("test.json", [{**rows[0], **options}, *rows[1:]])
        assert not any("metric choice" in note for note in check(world).notes)


def test_a_store_that_train_would_refuse_is_named(world, tmp_path):
    before = sorted(tmp_path.iterdir())
    for store, told in {
        "train.json": "store train.json is a file; name a folder",
        str(tmp_path): f"store {tmp_path} holds '0.png' and is no store; name another",
    }.items():
        world.write_text(re.sub('"store": "[^"]*"', f'"store": "{store}"', world.read_text()))
        assert check(world).errors == [told]
        result = run(world)
        assert (result.exit_code, result.stderr) == (2, f"Error: {told}\n")
        with pytest.raises(StoreError) as caught:
            train(world)
        assert str(caught.value) == told
    assert sorted(tmp_path.iterdir()) == before


def test_a_store_of_another_recipe_is_named(world, tmp_path):
    settings = '"select": {"samples": 2}, "train": {"max_steps": 1}'
    world.write_text(world.read_text().replace('"tasks"', f'{settings}, "tasks"'))
    store = train(world)
    assert check(world).errors == []

    add_key(world, '"metric": "vqa"')  # may differ: it is measured again
    before = store.recipe
    assert check(world).errors == []
    assert DeltaStore.open(store.path).recipe == before

    world.write_text(world.read_text().replace('"samples": 2', '"samples": 3'))
    (told,) = check(world).errors
    assert told.startswith("store store was made by a recipe with another 'select': select.samples")
    with pytest.raises(StoreError) as caught:
        train(world)
    assert str(caught.value) == told

    # a row that is wrong says nothing of the store
    rows = tmp_path / "train.json"
    sound = rows.read_text()
    rows.write_text(json.dumps([{}, *json.loads(sound)]))
    row_error, store_error = check(world).errors
    assert row_error.startswith("train.json row 0: ") and row_error.endswith("it has no field")
    assert store_error == told
    rows.write_text(sound)

    # a path that is wrong is not the store's either: that follows, and is no second mistake
    world.write_text(world.read_text().replace("train.json", "trian.json"))
    (told,) = check(world).errors
    assert told.startswith("cannot read trian.json: ")


def test_a_long_example_is_cut_on_a_terminal():
    tokens = [("a" * 3000, False), ("b" * 40, True), ("c" * 1000, False), ("d" * 10, True)]
    assert _leave_out_middle(tokens) == [
        ("a" * 700, False),
        ("\n… 2,850 characters left out …\n", False),
        ("c" * 490, False),
        ("d" * 10, True),
    ]
    short = [("a" * 1100, False), ("b" * 100, True)]
    assert _leave_out_middle(short) == short


def test_examples_are_cut_on_a_terminal_alone(monkeypatch, capsys):
    _show_example("task", [("a" * 3000, False), ("b", True)])
    assert "a" * 3000 in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    _show_example("task", [("a" * 3000, False), ("b", True)])
    assert "… 1,801 characters left out …" in capsys.readouterr().out


LONG_NAME = "visual-commonsense-reasoning-with-rationales"


def make_task(name, **split):
    counts = {"rows": 120_000, "images": 120_000, "text_only": 0, "repeated": 0, "encoded": 3}
    split = {**counts, "lengths": [410, 1280, 22000], "truncated": 1, "errors": ["x"], **split}
    return {
        "name": name,
        "metric": "rouge-l",
        "commonest": "a long answer that is the commonest of all",
        "floor": 0.5,
        "train": split,
        "test": split,
        "shared": 3,
    }


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_tables_fit_a_terminal(monkeypatch, capsys, width):
    monkeypatch.setattr(check_tables, "_find_terminal_width", lambda: width)
    tasks = [make_task(LONG_NAME), make_task("t2")]
    check_tables.show_splits(tasks)
    check_tables.show_floors(tasks)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    (header,) = [line for line in lines if "images" in line]
    names = header.split()
    assert names[:4] == ["task", "split", "rows", "images"]
    assert names[-1] == "errors"
    left_out = "  Left out at 80 columns: text only; repeated; tokens: least, median, 95 %, most"
    assert (left_out in lines) == (width == 80)
    named = [line.split()[0] for line in lines if line.startswith("  vis")]
    assert len(named) == 3
    for name in named:
        assert name.endswith("les")
        assert name == LONG_NAME or name.count("…") == 1


def test_tables_are_whole_where_no_terminal_shows_them(capsys):
    check_tables.show_splits([make_task(LONG_NAME, text_only=7)])
    check_tables.show_floors([make_task(LONG_NAME)])
    out = capsys.readouterr().out
    assert out.count(LONG_NAME) == 3
    for part in ("text only", "repeated", "tokens: least, median, 95 %, most", "█", "22000"):
        assert part in out
    assert "Left out" not in out
    assert "most tokens" not in out


def test_texts_that_a_template_leaves_out_are_noted(world, base, tmp_path):
    shutil.copytree(base, tmp_path / "deaf")
    file = tmp_path / "deaf" / "chat_template.jinja"
    loop = "for message in messages"
    file.write_text(file.read_text().replace(loop, f"{loop} if message.role != 'system'", 1))
    world.write_text(world.read_text().replace(str(base), str(tmp_path / "deaf")))
    rows = [{"prompt": f"{n}?", "answer": "x", "image": "0.png"} for n in range(3)]
    write("train.json", [{**rows[0], "system": "Be short."}, *rows[1:]])
    told = "the base's chat template leaves out system messages in 1 rows"
    assert check(world).notes == [f"train.json: {told}"]


def test_a_template_with_an_error_is_named_before_there_is_a_store(world, base, tmp_path):
    shutil.copytree(base, tmp_path / "broken")
    (tmp_path / "broken" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content ")
    world.write_text(world.read_text().replace(str(base), str(tmp_path / "broken")))
    told = "the base's chat template has an error in line 1"
    with pytest.raises(ModelError, match=told):
        check(world)
    with pytest.raises(ModelError, match=told):
        train(world)
    assert not (tmp_path / "store").exists()


def test_answers_that_are_most_likely_options_are_noted(world):
    row = {"prompt": "Which?", "answer": "cat", "answers": ["cat", "dog"]}
    own = {"prompt": "Which?", "answer": "cat", "answers": ["The cat.", "A cat"]}
    write("test.json", [row, own, {"prompt": "Which?", "answer": "cat"}])
    assert check(world).notes == []
    world.write_text(world.read_text().replace('"max_length"', '"metric": "choice", "max_length"'))
    (note,) = check(world).notes
    assert note.startswith("test.json: 1 rows count several options as right")


def test_answers_that_score_nothing_by_the_metric_are_noted(world):
    write("test.json", [{"prompt": "Which?", "answer": "A", "answers": ["A. cat"]}] * 3)
    (note,) = check(world).notes
    assert note == "test.json: 3 rows hold an answer that scores 0 against their own `answers`"
    world.write_text(world.read_text().replace('"max_length"', '"metric": "choice", "max_length"'))
    assert check(world).notes == []
