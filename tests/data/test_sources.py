"""Rows come from files and folders of every kind, when they are asked for and not before."""

import json
import re
import tracemalloc
from pathlib import Path

import datasets
import pytest
from made_up_rows import COLOURS, SAVED, data_of, labelled, meaning, read_all, write_json
from PIL import ImageFile

from mm_piece.data import iter_problems, open_examples, read
from mm_piece.errors import DataError


@pytest.fixture
def reference(tmp_path):
    write_json(tmp_path / "reference")
    return read_all(tmp_path / "reference" / "rows.json")


@pytest.mark.parametrize("kind", SAVED)
def test_every_source_gives_the_same_rows(tmp_path, reference, kind):
    source = SAVED[kind](tmp_path / "given")
    examples = read_all(source)
    assert meaning(examples) == meaning(reference)
    assert meaning(read_all(f"{source}[1:5]")) == meaning(reference)[1:5]
    assert [example.answer for example in reversed(examples)] == list(reversed(COLOURS)) * 2


def test_classes_are_folders(tmp_path):
    for name in ("cat/a.PNG", "cat/b.png", "sea lion/c.png", "cat/notes.txt", "cat/.hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data_of("red"))
    examples = read(str(tmp_path), prompt="What is it?")
    assert [example.answer for example in examples] == ["cat", "cat", "sea lion"]
    assert [example.images[0].name for example in examples] == ["a.PNG", "b.png", "c.png"]
    with pytest.raises(DataError, match=r"row 0: no known format; .* it has 'image, answer'"):
        read(str(tmp_path))
    (tmp_path / "cat" / "small").mkdir()
    (tmp_path / "cat" / "small" / "d.png").write_bytes(data_of("red"))
    with pytest.raises(DataError, match=r"image .*d\.png is not in .*/CLASS: name the folder"):
        read(str(tmp_path), prompt="What is it?")


def test_a_folder_of_class_folders_names_them(tmp_path):
    for name in ("train/cat/a.png", "train/dog/b.png", "val/cat/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data_of("red"))
    deeper = f"one level deeper, name {tmp_path / 'train'}, {tmp_path / 'val'}, or add metadata"
    with pytest.raises(DataError, match=re.escape(deeper)):
        read(str(tmp_path), prompt="What is it?")
    assert len(read(str(tmp_path / "train"), prompt="What is it?")) == 2


def test_metadata_names_one_image_or_several(tmp_path):
    write_json(tmp_path)
    rows = [
        {"file_name": "0.png", "prompt": "?", "answer": "x"},
        {"file_names": ["1.png", "2.png"], "prompt": "?", "answer": "x"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    one, two = read(str(tmp_path))
    assert one.images == [tmp_path / "0.png"]
    assert two.images == [tmp_path / "1.png", tmp_path / "2.png"]


def test_it_is_a_sequence(reference):
    assert len(reference) == 6
    assert [example.row for example in reference] == list(range(6))
    assert reference[-1].row == 5
    part = reference[1:5]
    assert (len(part), [example.row for example in part[1::2]]) == (4, [2, 4])
    assert [example.row for example in reference[::-2]] == [5, 3, 1]
    assert [example.row for example in part + reference[:1]] == [1, 2, 3, 4, 0]
    with pytest.raises(IndexError):
        part[4]


def test_slices_of_sources(tmp_path):
    source = SAVED["json"](tmp_path / "given")
    assert [e.row for e in read(f"{source}[2:4]")] == [2, 3]
    assert [e.row for e in read(f"{source}[:3]")] == [0, 1, 2]
    assert [e.row for e in read(f"{source}[4:9]")] == [4, 5]
    assert [e.row for e in read("scenes:digits/test[3:5]")] == [3, 4]
    with pytest.raises(DataError, match=r"rows\.json\[6:\] has no rows"):
        read(f"{source}[6:]")


@pytest.mark.parametrize("kind", ["parquet", "saved", "json"])
def test_reading_decodes_no_image(tmp_path, monkeypatch, kind):
    source = SAVED[kind](tmp_path / "given")

    def load(image):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    examples = read_all(source)
    assert len(examples[0].images) == 1
    with pytest.raises(DataError, match="decoded"):
        examples[0].open_images()


def test_lines_are_not_held(tmp_path):
    row = json.dumps({"prompt": "?" * 100_000, "answer": "x"})
    (tmp_path / "rows.jsonl").write_text("\n".join([row] * 100))
    tracemalloc.start()
    examples = read(str(tmp_path / "rows.jsonl"))
    assert tracemalloc.get_traced_memory()[0] < 1e6
    tracemalloc.stop()
    assert examples[99].prompt == "?" * 100_000


def test_all_problems_are_told(tmp_path):
    rows = write_json(tmp_path)
    rows[1] = {"prompt": "?"}
    (tmp_path / "4.png").write_bytes(b"")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    told = [str(error) for error in iter_problems(open_examples(str(tmp_path / "rows.json")))]
    assert len(told) == 2
    assert "row 1: no known format" in told[0]
    assert "row 4: image" in told[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[]", "has no rows"),
        ("a.json", "{}", r"must hold a list of rows, not \{\}"),
        ("a.json", '{"data": [{"prompt": "?"}]}', "must hold a list of rows"),
        ("a.json", "[{", "is not JSON: Expecting property name"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', r"is not JSON: .* is called \.jsonl"),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.json", f'[{{"prompt": "?", "answer": {"9" * 5000}}}]', "is not JSON"),
        ("a.json", b"\xff\xfe[\x00", "it is not UTF-8 text"),
        ("a.jsonl", "\n \n", "has no rows"),
        ("a.jsonl", '{"prompt": "?", "answer": 1}\n\n{"a', r"row 1 is not JSON: .* at character 2"),
        ("a.jsonl", b'{"prompt": "\xff"}', "row 0: it is not UTF-8 text"),
        ("a.csv", "prompt,answer\n", "has no rows"),
        ("a.csv", "prompt,answer\n?\n", "row 0 has not as many fields as the header"),
        ("a.csv", "prompt,answer\n?,x\n?,x,y\n", "row 1 has not as many fields as the header"),
        ("a.csv", 'prompt,answer\n"?', "row 0 is not CSV: unexpected end"),
        ("a.csv", b"prompt\n\xff", "line 2 is not UTF-8 text"),
        ("a.tsv", 'prompt\tanswer\n"?', "row 0 is not TSV: unexpected end"),
        ("a.tsv", "prompt\tanswer\n?,x\n", "row 0 has not as many fields as the header"),
        ("a.parquet", "PAR1 and no more", "cannot read .*a.parquet: "),
        (
            "a.txt",
            "text",
            r"a file of rows ends in one of \.json, \.jsonl, \.csv, \.tsv, \.parquet",
        ),
        ("state.json", "{}", "cannot read"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        read(str(tmp_path if name == "state.json" else tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_line_separator_inside_a_row_is_text(tmp_path):
    row = json.dumps({"prompt": "a\u2028b", "answer": "x"}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_text(row, encoding="utf-8")
    assert read(str(tmp_path / "rows.jsonl"))[0].prompt == "a\u2028b"


def test_the_end_of_a_name_may_be_in_capitals(tmp_path, reference):
    source = SAVED["json"](tmp_path / "given").rename(tmp_path / "given" / "ROWS.JSON")
    assert meaning(read_all(source)) == meaning(reference)


@pytest.mark.parametrize(("suffix", "mark"), [("csv", ","), ("tsv", "\t")])
def test_text_in_a_table_stays_as_it_is_written(tmp_path, suffix, mark):
    file = tmp_path / f"rows.{suffix}"
    file.write_text(f'prompt{mark}answer\n"a, ""b""\t\nc"{mark}007\n')
    (example,) = read(str(file))
    assert (example.prompt, example.answer) == ('a, "b"\t\nc', "007")


def test_sources_that_are_not_there(tmp_path):
    for source, message in [
        (tmp_path / "absent.json", r"cannot read .*absent\.json: it does not exist$"),
        (tmp_path / "absent-*.json", "no file has such a name"),
        (
            "data/absent.json",
            rf"cannot read data/absent\.json: {Path.cwd()}/data/absent\.json does not exist "
            r"\(paths count from the folder that the command runs in\)$",
        ),
        ("data/absent-*.json", f"no file has such a name; looked for as {Path.cwd()}/data/absent-"),
        ("someone/something", r"does not exist .*; .* is written hf:someone/something/SPLIT"),
        (
            "https://a.b/c.json",
            r"cannot read https://a\.b/c\.json: it is a URL; rows must be files",
        ),
        ("scenes:nowhere/train", "digits"),
        ("scenes:digits", "scenes:NAME/SPLIT"),
        ("hf:someone/something", r"hf:OWNER/NAME\[:CONFIG\]\[@REVISION\]/SPLIT"),
        (tmp_path, "holds no rows"),
    ]:
        with pytest.raises(DataError, match=message):
            read(str(source))


def test_a_folder_of_several_things_asks_for_one(tmp_path):
    datasets.DatasetDict({"train": labelled(), "test": labelled()}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match="several splits; name one: .*both/train, .*both/test"):
        read_all(tmp_path / "both")
    assert len(read_all(tmp_path / "both" / "test")) == 6
    for name in ("train.json", "test.json"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(DataError, match=r"several tables: test\.json, train\.json; name one"):
        read(str(tmp_path))
