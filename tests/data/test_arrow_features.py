"""Values of every feature type of `datasets` are read as what they stand for, from every source."""

import datetime
import decimal
import pickle
from pathlib import Path

import datasets
import pyarrow
import pytest
from datasets.features.features import _FEATURE_TYPES
from made_up_rows import data_of
from pyarrow import parquet

from mm_piece.data import read
from mm_piece.data.arrow import ParquetRows
from mm_piece.data.arrow_features import UnsupportedValue
from mm_piece.data.sources import open_raw_rows
from mm_piece.errors import DataError

FILE = {"bytes": b"\1\2", "path": None}
PICTURE = {"bytes": data_of("red"), "path": "a.png"}
CLASSES = datasets.ClassLabel(names=["cat", "dog"])
JSON = '{"a": [1, 2.4595, null, "x"]}'
OTHERS = ("Audio", "Mesh", "Video", "Pdf", "Nifti", "BioSequence", "BioStructure")
# A feature of each type, a stored value, and what it stands for where that is something else.
TYPES = {
    "Value": (datasets.Value("large_string"), "text", None),
    "ClassLabel": (CLASSES, 1, "dog"),
    "Translation": (datasets.Translation(languages=["de", "en"]), {"de": "a", "en": "b"}, None),
    "TranslationVariableLanguages": (
        datasets.TranslationVariableLanguages(languages=["de", "en"]),
        {"language": ["de", "en"], "translation": ["a", "b"]},
        None,
    ),
    "List": (datasets.List(CLASSES), [1, 0], ["dog", "cat"]),
    "LargeList": (datasets.LargeList(CLASSES), [1, None], ["dog", None]),
    "Array2D": (datasets.Array2D((1, 2), "int32"), [[1, 2]], None),
    "Array3D": (datasets.Array3D((1, 1, 2), "int32"), [[[1, 2]]], None),
    "Array4D": (datasets.Array4D((1, 1, 1, 2), "int32"), [[[[1, 2]]]], None),
    "Array5D": (datasets.Array5D((1, 1, 1, 1, 2), "int32"), [[[[[1, 2]]]]], None),
    "Image": (datasets.Image(), PICTURE, None),
    "Json": (datasets.Json(), JSON, {"a": [1, 2.4595, None, "x"]}),
    **{name: (_FEATURE_TYPES[name](), FILE, UnsupportedValue(name)) for name in OTHERS},
}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_no_type_is_left_out():
    assert set(TYPES) == set(_FEATURE_TYPES), "say what values of a new type stand for"


def table():
    """A row with a value of each type: alone, in a list, and deep in lists and objects."""
    kinds = {
        f"{kind} {way}": wrap
        for kind in TYPES
        for way, wrap in {
            "alone": lambda value: value,
            "listed": lambda value: [value, None],
            "deep": lambda value: {"inner": [{"x": value}]},
        }.items()
    }
    features = {"alone": lambda f: f, "listed": datasets.List}
    features["deep"] = lambda f: {"inner": datasets.LargeList({"x": f})}

    def feature(name, of):
        kind, way = name.split()
        return features[way](of(kind))

    stored = {name: wrap(TYPES[name.split()[0]][1]) for name, wrap in kinds.items()}
    given = datasets.Features({name: feature(name, lambda k: TYPES[k][0]) for name in kinds})
    # To encode some types takes their libraries; stored are all of them as the same two fields.
    plain = datasets.Features({name: feature(name, storable) for name in kinds})
    rows = datasets.Dataset.from_dict({name: [value] for name, value in stored.items()}, plain)
    wanted = {name: wrap(meant(name.split()[0])) for name, wrap in kinds.items()}
    return rows.data.table.replace_schema_metadata(given.arrow_schema.metadata), wanted


def storable(kind):
    names = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    return names if kind in OTHERS else TYPES[kind][0]


def meant(kind):
    _, stored, value = TYPES[kind]
    return stored if value is None else value


def save_parquet(stored):
    parquet.write_table(stored, "rows.parquet")
    return "rows.parquet"


def save_folder(stored):
    datasets.Dataset(datasets.table.InMemoryTable(stored)).save_to_disk("saved")
    return "saved"


def save_data_set(stored):
    Path("own/data").mkdir(parents=True)
    parquet.write_table(stored, "own/data/train.parquet")
    return "hf:own/data/train"


@pytest.mark.parametrize(
    ("save", "part"),
    [(save_parquet, ""), (save_folder, ""), (save_data_set, ""), (save_data_set, "[:1]")],
)
def test_values_are_what_they_stand_for(tmp_path, monkeypatch, save, part):
    monkeypatch.chdir(tmp_path)
    # `datasets` 5.2 fails to weigh translations, which it does before it saves.
    monkeypatch.setattr(datasets.Dataset, "_estimate_nbytes", lambda self: 1)
    stored, wanted = table()
    raw, _ = open_raw_rows(save(stored), (0, 1 if part else None))
    assert raw[0] == wanted


def test_without_what_datasets_knows_values_are_what_arrow_says(tmp_path):
    """JSON is a type of parquet's own; class names and types of files stand in metadata alone."""
    stored, wanted = table()
    parquet.write_table(stored.replace_schema_metadata({}), tmp_path / "rows.parquet")
    row = ParquetRows(tmp_path / "rows.parquet")[0]
    assert row["Json alone"] == wanted["Json alone"]
    assert row["Json deep"] == wanted["Json deep"]
    assert (row["ClassLabel alone"], row["Audio alone"], row["Image alone"]) == (1, FILE, PICTURE)


VALUES = {
    "null": None,
    "bool": False,
    **dict.fromkeys((f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), 7),
    **dict.fromkeys(("float16", "float32", "float64"), 0.5),
    "time32[s]": datetime.time(1, 2, 3),
    "time64[us]": datetime.time(1, 2, 3),
    "timestamp[us]": datetime.datetime(2026, 1, 2),
    "timestamp[ms, tz=UTC]": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
    "date32": datetime.date(2026, 1, 2),
    "date64": datetime.date(2026, 1, 2),
    "duration[us]": datetime.timedelta(seconds=1),
    **dict.fromkeys(("decimal128(5, 2)", "decimal256(5, 2)"), decimal.Decimal("1.50")),
    **dict.fromkeys(("binary", "large_binary"), b"x"),
    **dict.fromkeys(("string", "large_string"), "007"),
}


def test_plain_values_are_as_datasets_gives_them(tmp_path):
    features = datasets.Features({name: datasets.Value(name) for name in VALUES})
    rows = datasets.Dataset.from_dict({n: [value] for n, value in VALUES.items()}, features)
    parquet.write_table(rows.data.table, tmp_path / "rows.parquet")
    assert ParquetRows(tmp_path / "rows.parquet")[0] == rows[0]


def one_row(tmp_path, feature, **columns):
    """The file of one row whose `value` is of a feature."""
    given = {"prompt": "?", **columns}
    features = {name: datasets.Value("string") for name in given} | {"value": feature[0]}
    rows = {name: [text] for name, text in given.items()} | {"value": [feature[1]]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features)).data.table
    parquet.write_table(data, tmp_path / "rows.parquet")
    return str(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("feature", "value", "answer"),
    [
        (datasets.Json(), "2.4595", "2.4595"),
        (datasets.Json(), '"x"', "x"),
        (datasets.Json(decode=False), '"x"', '"x"'),
        (datasets.List(datasets.Json()), ['"x"', "2"], "x"),
        (datasets.List(CLASSES), [1, 0], "dog"),
        (datasets.Value("decimal128(5, 2)"), decimal.Decimal("1.50"), "1.50"),
    ],
)
def test_answers_are_what_they_stand_for(tmp_path, feature, value, answer):
    source = one_row(tmp_path, (feature, value))
    assert read(source, columns={"answer": "value"})[0].answer == answer


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("answer", "a text or a number is expected, not a value of type Video"),
        ("image", "an image must be a path, .*, not a value of type Video"),
        (None, "nothing reads 'value', a value of type Video, which is not supported"),
    ],
)
def test_types_of_files_are_refused_by_name(tmp_path, field, message):
    more = {} if field == "answer" else {"answer": "x"}
    source = one_row(tmp_path, (datasets.Video(), FILE), **more)
    with pytest.raises(DataError, match=f"rows.parquet row 0: {message}"):
        read(source, columns={field: "value"} if field else {})


def test_a_file_that_nothing_reads_beside_an_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(data_of("red"))
    rows = read(one_row(tmp_path, (datasets.Pdf(), FILE), answer="x", image="a.png"))
    assert rows.find_unread_fields() == {"value"}


def test_an_image_that_nothing_reads_is_named(tmp_path):
    source = one_row(tmp_path, (datasets.Image(), PICTURE), answer="x")
    with pytest.raises(DataError, match="nothing reads 'value', which names the image"):
        read(source)


def test_images_have_the_mode_that_their_feature_says(tmp_path):
    source = one_row(tmp_path, (datasets.Image(mode="L"), PICTURE), answer="x")
    (image,) = read(source, columns={"image": "value"})[0].open_images()
    assert image.getpixel((0, 0)) == (76, 76, 76)  # red as grey


def test_images_may_stand_in_objects_and_lists(tmp_path):
    parts = [
        {"type": "text", "text": "What is it?", "image": None},
        {"type": "image", "text": None, "image": PICTURE},
    ]
    turns = [{"role": "user", "content": parts}]
    turns.append({"role": "assistant", "content": [{**parts[0], "text": "a box"}]})
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    part["image"] = datasets.Image()
    turn = {"role": datasets.Value("string"), "content": datasets.List(part)}
    features = datasets.Features({"messages": datasets.List(turn)})
    rows = datasets.Dataset.from_dict({"messages": [turns]}, features=features)
    parquet.write_table(rows.data.table, tmp_path / "rows.parquet")
    found = read(str(tmp_path / "rows.parquet"))
    assert found[0].images == [PICTURE["bytes"]]
    assert found.find_unread_fields() == set()


def test_a_type_that_datasets_lacks_is_left_as_it_is(tmp_path):
    rows = [{"prompt": "?", "answer": 1, "more": [("a", 1)]}]
    schema = pyarrow.schema(
        [("prompt", pyarrow.string()), pyarrow.field("answer", pyarrow.int64(), nullable=False)]
        + [("more", pyarrow.map_(pyarrow.string(), pyarrow.int64()))],
        metadata=datasets.Features({"answer": CLASSES}).arrow_schema.metadata,
    )
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    parquet.write_table(table, tmp_path / "rows.parquet")
    found = read(str(tmp_path / "rows.parquet"))
    assert (found[0].answer, found.find_unread_fields()) == ("dog", {"more"})


def test_damaged_values_and_doubled_columns_are_one_line(tmp_path):
    source = one_row(tmp_path, (datasets.Image(mode="L"), {"bytes": b"no", "path": None}))
    with pytest.raises(DataError, match=r"^cannot read .*rows.parquet row 0: "):
        read(source)
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    parquet.write_table(pyarrow.table(columns, names=["answer", "answer"]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="cannot read .*b.parquet: it has two columns 'answer'"):
        read(str(tmp_path / "b.parquet"))


def test_rows_reach_other_processes(tmp_path):
    rows = read(one_row(tmp_path, (CLASSES, 1)), columns={"answer": "value"})
    assert pickle.loads(pickle.dumps(rows))[0].answer == "dog"
