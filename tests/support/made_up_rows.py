"""One small set of images with questions and answers, saved in every way that is read."""

import io
import json

import datasets
from PIL import Image
from pyarrow import parquet

from mm_piece.data import read

COLOURS = ("red", "green", "blue")
IMAGES = [f"{colour}.png" for colour in COLOURS]
PROMPT = "Which colour?"


def data_of(colour, size=(5, 4)):
    held = io.BytesIO()
    Image.new("RGB", size, colour).save(held, "PNG")
    return held.getvalue()


def labelled(count=6):
    """A data set as ImageNet's: images and class labels."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLOURS))}
    rows = {
        "image": [{"bytes": data_of(COLOURS[n % 3]), "path": f"{n}.png"} for n in range(count)],
        "label": [n % 3 for n in range(count)],
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def write_json(folder, count=6):
    """The same as labelled image files and JSON."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(count):
        (folder / f"{number}.png").write_bytes(data_of(COLOURS[number % 3]))
        rows.append({"prompt": PROMPT, "answer": COLOURS[number % 3], "image": f"{number}.png"})
    (folder / "rows.json").write_text(json.dumps(rows))
    return rows


def save_jsonl(folder):
    lines = "\n \n".join(json.dumps(row) for row in write_json(folder))
    (folder / "rows.jsonl").write_text("\ufeff" + lines + "\r\n\n", encoding="utf-8")
    return folder / "rows.jsonl"


def save_shards(folder):
    rows = write_json(folder)
    (folder / "rows.json").unlink()
    for number in range(3):
        lines = [json.dumps(row) + "\n" for row in rows[2 * number : 2 * number + 2]]
        (folder / f"rows-{number}-of-3.jsonl").write_text("".join(lines))
    return folder


def save_csv(folder):
    lines = [f'"{PROMPT}",{row["answer"]},{row["image"]}' for row in write_json(folder)]
    (folder / "rows.csv").write_text("prompt,answer,image\n" + "\n".join(lines) + "\n")
    return folder / "rows.csv"


def save_parquet(folder):
    folder.mkdir()
    table = labelled().data.table  # with what `datasets` knows of its columns
    parquet.write_table(table, folder / "rows.parquet", row_group_size=4)
    return folder / "rows.parquet"


def save_shards_of_parquet(folder):
    folder.mkdir()
    table = labelled().data.table
    for number in range(2):
        file = folder / f"train-{number:05}-of-00002.parquet"
        parquet.write_table(table.slice(3 * number, 3), file)
    return folder


def save_arrow(folder):
    labelled().save_to_disk(folder)
    return folder


def save_metadata(folder):
    table = [{"file_name": row.pop("image"), **row} for row in write_json(folder)]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in table))
    return folder


SAVED = {
    "json": lambda folder: [write_json(folder), folder / "rows.json"][1],
    "jsonl": save_jsonl,
    "csv": save_csv,
    "parquet": save_parquet,
    "a folder of shards": save_shards,
    "a glob": lambda folder: save_shards(folder) / "rows-*.jsonl",
    "a folder of parquet": save_shards_of_parquet,
    "saved": save_arrow,
    "metadata": save_metadata,
}


def read_all(source, **options):
    return read(str(source), columns={"answer": "label"}, prompt=PROMPT, **options)


def meaning(examples):
    return [(example.row, example.messages, example.compute_digest()) for example in examples]
