"""Tables of Arrow, of a disk or of the Hub: rows on demand, no copies, failures in one line."""

import gc
import io
import os
import subprocess
import sys
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow
import pytest
from made_up_rows import COLOURS, SAVED, data_of, labelled, meaning, read_all, write_json
from PIL import Image
from pyarrow import parquet

from mm_piece.data import read
from mm_piece.errors import DataError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """Whatever `datasets` keeps goes with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def reference(tmp_path):
    write_json(tmp_path / "reference")
    return read_all(tmp_path / "reference" / "rows.json")


def test_a_row_group_is_all_that_a_table_holds(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    held = io.BytesIO()
    Image.fromarray(noise).save(held, "PNG")  # 0.36 MB
    rows = [{"prompt": "?", "answer": "x", "image": held.getvalue()}] * 60
    parquet.write_table(
        pyarrow.Table.from_pylist(rows),
        tmp_path / "a.parquet",
        row_group_size=4,
        use_dictionary=False,
    )
    before = pyarrow.total_allocated_bytes()
    examples = read(str(tmp_path / "a.parquet"))
    assert len([example.images for example in examples]) == 60
    gc.collect()  # a group that went may still be held by what read it
    assert pyarrow.total_allocated_bytes() - before < 16 * len(held.getvalue())


def test_images_may_be_bytes_beside_conversations_and_may_be_missing(tmp_path):
    rows = [
        {
            "images": [{"bytes": data_of("red"), "path": None}],
            "conversations": [
                {"from": "human", "value": "<image>\nWhich?"},
                {"from": "gpt", "value": "red"},
            ],
        },
        {
            "images": None,
            "conversations": [{"from": "human", "value": "1?"}, {"from": "gpt", "value": "1"}],
        },
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    seen, told = read(str(tmp_path / "rows.parquet"))
    assert seen.images == [data_of("red")]
    assert (told.images, told.answer) == ([], "1")


def test_a_label_of_no_class_is_no_answer(tmp_path):
    table = labelled().data.table
    unknown = table.set_column(1, table.schema.field(1), [[0, 1, 2, -1, 0, 1]])
    parquet.write_table(unknown, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"row 3: no known format; .* it has 'image'"):
        read_all(tmp_path / "rows.parquet")


def asked_of(monkeypatch, answer):
    """Let `answer` stand for the Hub, and return what it was asked."""
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return answer(**options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_the_hub_s_whole_split_goes_through_the_cache(monkeypatch, reference):
    asked = asked_of(monkeypatch, lambda **_: labelled())
    assert meaning(read_all("hf:a/b-c.d/train")) == meaning(reference)
    assert meaning(read_all("hf:a/b:en@refs/pr/1/test[2:]")) == meaning(reference)[2:]
    assert meaning(read_all("hf:a/b:en@v1/test[:]")) == meaning(reference)
    assert asked == [
        (("a/b-c.d", None), {"split": "train", "revision": None}),
        (("a/b", "en"), {"split": "test", "revision": "refs/pr/1"}),
        (("a/b", "en"), {"split": "test", "revision": "v1"}),
    ]


def test_a_slice_of_the_hub_s_split_is_streamed(monkeypatch, reference):
    taken = []

    def stream(**_):
        def rows():
            for row in labelled().cast_column("image", datasets.Image(decode=False)):
                taken.append(row["label"])
                yield row

        return datasets.IterableDataset.from_generator(rows, features=labelled().features)

    asked = asked_of(monkeypatch, stream)
    examples = read_all("hf:a/b/train[1:4]")
    assert meaning(examples) == meaning(reference)[1:4]
    assert asked == [
        (("a/b", None), {"split": "train", "revision": None, "streaming": True}),
    ]
    assert len(taken) <= 5


def test_streamed_images_that_lie_elsewhere_are_fetched(monkeypatch, reference):

    memory = fsspec.filesystem("memory")
    rows = {"image": [], "label": []}
    for number in range(6):
        if number < 5:
            memory.pipe_file(f"/given/{number}.png", data_of(COLOURS[number % 3]))
        held = data_of(COLOURS[number % 3]) if number == 5 else None
        rows["image"].append({"bytes": held, "path": f"memory://given/{number}.png"})
        rows["label"].append(number % 3)
    table = datasets.Dataset.from_dict(rows, features=labelled().features)
    asked_of(monkeypatch, lambda **_: table.to_iterable_dataset())
    assert meaning(read_all("hf:a/b/train[:6]")) == meaning(reference)


def test_image_paths_of_the_hub_s_rows_start_where_the_images_are(monkeypatch, tmp_path):
    rows = write_json(tmp_path)
    asked_of(monkeypatch, lambda **_: datasets.Dataset.from_list(rows))
    assert read("hf:a/b/train", images=str(tmp_path))[2].images == [tmp_path / "2.png"]
    monkeypatch.chdir(tmp_path)
    assert read("hf:a/b/train")[2].images == [Path("2.png")]


@pytest.mark.parametrize("source", ["hf:a/b/train", "hf:a/b/train[:5]"])
def test_what_the_hub_says_is_one_line(monkeypatch, source):
    def fail(**_):
        raise ValueError("Unknown split.\n  Should be one of: test")

    asked_of(monkeypatch, fail)
    with pytest.raises(
        DataError, match="^cannot read hf:a/b/train: Unknown split. Should be one of"
    ):
        read(source)


def test_what_made_a_data_set_fail_is_told(monkeypatch):
    def fail(**_):
        try:
            raise KeyError("a column")
        except KeyError as error:
            raise datasets.exceptions.DatasetGenerationError("an error occurred") from error

    asked_of(monkeypatch, fail)
    with pytest.raises(DataError, match="^cannot read hf:a/b/train: 'a column'"):
        read("hf:a/b/train")


CACHELESS = """
import sys
from mm_piece.errors import DataError
from mm_piece.data import read
for source in sys.argv[1:]:
    assert len(read(source, columns={"answer": "label"}, prompt="?")) == 6
for source in ("hf:someone/something/train", "hf:someone/something/train[:5]"):
    try:
        read(source)
    except DataError as error:
        print(error)
"""


@pytest.mark.slow
def test_local_tables_leave_no_copy_and_an_absent_hub_is_one_line(tmp_path):
    sources = [str(SAVED[kind](tmp_path / kind)) for kind in ("parquet", "saved", "csv", "jsonl")]
    home = tmp_path / "home"
    settings = {"HF_HOME": str(home), "HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CACHELESS, *sources],
        capture_output=True,
        text=True,
        env=os.environ | settings,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("cannot read hf:someone/something/train: ") for line in lines)
    assert not [file for file in home.rglob("*") if file.is_file()]
