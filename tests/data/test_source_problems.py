"""What is wrong with all rows of a source is one line: a folder, a column."""

import json
from base64 import b64encode
from pathlib import Path

import pytest
from made_up_rows import data_of

from mm_piece.data import find_absent_columns, iter_problems, open_examples, read
from mm_piece.errors import DataError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder that the test runs in: an image `img/0.png`, and rows of three images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "img").mkdir()
    for number in range(3):
        (tmp_path / "img" / f"{number}.png").write_bytes(data_of("red"))
    write_rows("a.json", [f"{number}.png" for number in range(3)])
    return tmp_path


def write_rows(name, images):
    rows = [{"image": image, "prompt": "What?", "answer": "x"} for image in images]
    Path(name).write_text(json.dumps(rows))


def find_problems(source, images=None, columns=None):
    return [str(problem) for problem in iter_problems(open_examples(source, images, columns))]


NONE_IS_THERE = "none of the images of its 3 rows is there; "


def test_a_wrong_folder_of_images_is_one_line(folder):
    assert find_problems("a.json", "img") == []
    (told,) = find_problems("a.json", "imgs")
    assert told == (
        f"a.json: {NONE_IS_THERE}'images: imgs' was looked for as {folder}/imgs, which does not "
        "exist; it is there with 'images: img'"
    )
    with pytest.raises(DataError) as caught:
        read("a.json", "imgs")
    assert str(caught.value) == told

    (told,) = find_problems("a.json", "a.json")
    assert f"'images: a.json' was looked for as {folder}/a.json, which is a file" in told


def test_a_folder_that_is_too_high_too_deep_or_left_out_is_one_line(folder):
    Path("img/deep").mkdir()
    hint = "; it is there with 'images: img'"
    (told,) = find_problems("a.json", ".")
    first = f"{NONE_IS_THERE}the first was looked for as {folder}"
    assert told == f"a.json: {first}/0.png ('images: .'){hint}"
    (told,) = find_problems("a.json", "img/deep")
    assert told == f"a.json: {first}/img/deep/0.png ('images: img/deep'){hint}"
    (told,) = find_problems("a.json")
    assert told == f"a.json: {first}/0.png, as there is no `images`{hint}"

    write_rows("b.json", [f"img/{number}.png" for number in range(3)])
    (told,) = find_problems("b.json", "img")
    assert told.endswith("it is there with 'images: .'")
    write_rows("b.json", [f"other/{number}.png" for number in range(3)])
    (told,) = find_problems("b.json", "img")
    assert told == f"b.json: {first}/img/other/0.png ('images: img')"


def test_absolute_paths_of_absent_images_are_one_line():
    write_rows("a.json", [f"/nowhere/{number}.png" for number in range(3)])
    (told,) = find_problems("a.json", "img")
    assert told == f"a.json: {NONE_IS_THERE}the first is /nowhere/0.png"


def test_single_absent_images_are_told_by_row(folder):
    write_rows("a.json", ["0.png", "x.png", "y.png"])
    assert find_problems("a.json", "img") == [
        f"a.json row {row}: image img/{name} does not exist (looked for as '{folder}/img/{name}')"
        for row, name in [(1, "x.png"), (2, "y.png")]
    ]
    write_rows("a.json", ["x.png"])
    (told,) = find_problems("a.json", "img")
    assert told.startswith("a.json row 0: image img/x.png does not exist")
    (told,) = find_problems("a.json", str(folder / "img"))
    assert told == f"a.json row 0: image {folder}/img/x.png does not exist"


def test_images_in_rows_are_there(folder):
    inside = "data:image/png;base64," + b64encode(data_of("red")).decode()
    write_rows("a.json", ["x.png", inside, "y.png"])
    told = find_problems("a.json", "img")
    assert [problem.split(":")[0] for problem in told] == ["a.json row 0", "a.json row 2"]


def test_other_mistakes_are_told_beside_a_wrong_folder():
    rows = json.loads(Path("a.json").read_text())
    Path("a.json").write_text(json.dumps([*rows, {"frage": "?"}, {**rows[0], "answer": " "}]))
    told = find_problems("a.json", "imgs")
    assert len(told) == 3
    assert told[0].startswith("a.json: none of the images")
    assert told[1].startswith("a.json row 3: no known format")
    assert told[2] == "a.json row 4: answer 1 is empty"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("text.png", b"no image", "image img/text.png cannot be read: it is no image of a known"),
        ("empty.png", b"", "image img/empty.png is empty: it has no bytes"),
    ],
)
def test_files_that_are_no_images(name, content, told):
    Path("img", name).write_bytes(content)
    write_rows("a.json", ["0.png", name])
    (problem,) = find_problems("a.json", "img")
    assert problem.startswith(f"a.json row 1: {told}")


def test_a_url_is_named_as_one():
    write_rows("a.json", ["0.png", "https://a.b/c.png"])
    (told,) = find_problems("a.json", "img")
    assert told == (
        "a.json row 1: image 'https://a.b/c.png' is a URL; images must be files here: "
        "download it first"
    )


@pytest.mark.parametrize(
    "field", ["prompt", "answer", "answers", "image", "images", "messages", "conversations"]
)
def test_a_misspelt_column_is_named(field):
    Path("c.json").write_text(json.dumps([{"label": "x", "photo": "0.png"}, {"question": "?"}]))
    opened = open_examples("c.json", columns={field: "lable"})
    assert find_absent_columns([opened]) == (
        f"columns: {field}: no row of c.json has a field 'lable'; did you mean 'label'? (the "
        "fields are 'label, photo, question')"
    )
    opened = open_examples("c.json", columns={field: "xyz", "answer": "label"})
    if field != "answer":
        assert find_absent_columns([opened]) == (
            f"columns: {field}: no row of c.json has a field 'xyz'; the fields are "
            "'label, photo, question'"
        )


def test_a_column_need_be_in_one_source_only():
    Path("c.json").write_text(json.dumps([{"label": "x"}]))
    Path("d.json").write_text(json.dumps([{"question": "?"}, 3]))
    columns = {"answer": "label", "prompt": "question"}
    opened = [open_examples(name, columns=columns) for name in ("c.json", "d.json")]
    assert find_absent_columns(opened) is None
    told = find_absent_columns(opened[1:])
    assert "columns: answer: no row of d.json has a field 'label'" in told
    columns["answers"] = "labels"
    opened = [open_examples(name, columns=columns) for name in ("c.json", "d.json")]
    assert "no row of c.json or d.json has a field 'labels'" in find_absent_columns(opened)


def test_an_absent_image_column_is_one_line():
    (told,) = find_problems("a.json", "img", {"image": "imge"})
    assert told.startswith("columns: image: no row of a.json has a field 'imge'; did you mean")
