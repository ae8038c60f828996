"""Law 9: labels cover the answers only; and every format of rows that is read."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mm_piece.errors import DataError
from mm_piece.models import load_base
from mm_piece.tasks import IGNORED, collate, encode, encode_prompt, read, tokenizer_of


@pytest.fixture(scope="module")
def processor(base):
    return load_base(base)[1]


@pytest.fixture
def write(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 12), "red").save(tmp_path / name)

    def _write(*rows, name="rows.json"):
        file = tmp_path / name
        lines = "\n".join(json.dumps(row) for row in rows)
        file.write_text(lines if name.endswith("jsonl") else json.dumps(rows), encoding="utf-8")
        return str(file)

    return _write


def supervised(processor, encoded):
    labels = encoded["labels"][0]
    return tokenizer_of(processor).decode(labels[labels != IGNORED])


LLAVA = {
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "a box"},
    ],
}
ROWS = {
    "llava": LLAVA,
    "prompt-image": {"prompt": "What is it?", "answer": "a box", "image": "a.png"},
    "prompt-pic_path": {"prompt": "What is it?", "answer": "a box", "pic_path": "a.png"},
    "typed": {
        "images": ["a.png"],
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "a box"}]},
        ],
    },
    "messages": {
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": "<image>\nWhat is it?"},
            {"role": "assistant", "content": "a box"},
        ],
    },
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_formats_give_the_same_inputs(write, processor, kind, name):
    (example,) = read(write(ROWS[kind], name=name))
    (reference,) = read(write(LLAVA, name="reference.json"))
    ours, theirs = encode(example, processor), encode(reference, processor)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert example.prompt == "What is it?"
    assert example.answer == "a box"


def test_only_the_answer_is_supervised(write, processor):
    (example,) = read(write(LLAVA))
    encoded = encode(example, processor)
    assert supervised(processor, encoded) == "a box<|end|>"
    prompt = encode_prompt(example, processor)["input_ids"]
    answer = encoded["labels"][0] != IGNORED
    assert torch.equal(encoded["input_ids"][0][: prompt.shape[1]], prompt[0])
    assert answer.nonzero()[0] == prompt.shape[1]
    assert (encoded["input_ids"] == processor.image_token_id).sum() == 4


def test_every_answer_of_a_long_conversation_is_supervised(write, processor):
    row = {
        "images": ["a.png", "b.png"],
        "conversations": [
            {"from": "human", "value": "<image>\nFirst?"},
            {"from": "gpt", "value": "one"},
            {"from": "human", "value": "And <image> this?"},
            {"from": "gpt", "value": "two"},
            {"from": "human", "value": "Sum?"},
            {"from": "gpt", "value": "three"},
        ],
    }
    (example,) = read(write(row))
    encoded = encode(example, processor)
    assert supervised(processor, encoded) == "one<|end|>two<|end|>three<|end|>"
    assert encoded["pixel_values"].shape[0] == 2
    labels, ids = encoded["labels"], encoded["input_ids"]
    assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])


def test_text_only_rows(write, processor):
    (example,) = read(write({"prompt": "2 + 2?", "answer": "4"}))
    encoded = encode(example, processor)
    assert supervised(processor, encoded) == "4<|end|>"
    assert "pixel_values" not in encoded


def test_collate_pads_tokens_and_stacks_images(write, processor):
    rows = [LLAVA, {"prompt": "Which colour?", "answer": "deep red", "image": "b.png"}]
    encoded = [encode(example, processor) for example in read(write(*rows))]
    length = max(e["input_ids"].shape[1] for e in encoded)
    for left in (False, True):
        batch = collate(encoded, 0, left)
        assert batch["input_ids"].shape == batch["labels"].shape == (2, length)
        assert batch["pixel_values"].shape[0] == 2
        for number, example in enumerate(encoded):
            mask = batch["attention_mask"][number].bool()
            assert torch.equal(batch["input_ids"][number][mask], example["input_ids"][0])
            assert torch.equal(batch["labels"][number][mask], example["labels"][0])
            assert (batch["labels"][number][~mask] == IGNORED).all()


def test_slices(write):
    source = write(*[{"prompt": str(n), "answer": "x"} for n in range(10)])
    assert [e.row for e in read(f"{source}[2:4]")] == [2, 3]
    assert [e.row for e in read(f"{source}[:3]")] == [0, 1, 2]
    assert len(read("scenes:digits/test[:5]")) == 5


def test_images_may_lie_elsewhere(write, tmp_path):
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "sub" / "c.png")
    row = {"prompt": "?", "answer": "x", "image": "c.png"}
    assert read(write(row), images=str(tmp_path / "sub"))[0].pictures()[0].size == (4, 4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": None, "image": "a.png"}, "no known format"),
        ({"prompt": "?", "answer": None}, "no known format"),
        ({"prompt": "?", "answer": "x", "image": {"size": 3}}, "a path or bytes, not dict"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "question first"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "allowed: text, image"),
        (
            {"prompt": "?", "answer": "x", "image": "no.png"},
            r"row 1: image .*no\.png does not exist",
        ),
        ({**LLAVA, "image": ["a.png", "b.png"]}, r"row 1: 2 image\(s\) but 1 <image> mark"),
        (
            {"prompt": "<image> <image>?", "answer": "x", "image": "a.png"},
            "1 image.* but 2 <image>",
        ),
        ({"prompt": "a literal <image>", "answer": "x"}, r"row 1: 0 image\(s\) but 1 <image> mark"),
        ({"conversations": LLAVA["conversations"][:1], "image": "a.png"}, "end in an answer"),
        ({"prompt": "?", "answer": " "}, "must end in an answer"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "a turn needs 'from'"),
        ({"question": "?", "reply": "x"}, "no known format"),
        ("text", "must be an object"),
    ],
)
def test_bad_rows_are_named(write, row, message):
    with pytest.raises(DataError, match=message) as caught:
        read(write({"prompt": "fine", "answer": "x"}, row))
    assert "\n" not in str(caught.value)


def test_an_unreadable_image_is_named(write, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"row 0: image .*broken\.png cannot be read"):
        read(write({"prompt": "?", "answer": "x", "image": "broken.png"}))


def test_deep_pixels_are_refused_rather_than_clipped(write, tmp_path):
    Image.new("I;16", (4, 4), 40000).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png has mode I;16; convert it to 8 bits"):
        read(write({"prompt": "?", "answer": "x", "image": "deep.png"}))


def test_a_line_separator_inside_a_row_is_text(write):
    source = write({"prompt": "a\u2028b", "answer": "x"}, name="rows.jsonl")
    rows = Path(source).read_text(encoding="utf-8").replace("\\u2028", "\u2028")
    Path(source).write_text(rows, encoding="utf-8")
    assert read(source)[0].prompt == "a\u2028b"


@pytest.mark.parametrize(
    ("text", "message"), [("[]", "has no rows"), ("{}", "must hold a list"), ("[{", "is not JSON")]
)
def test_bad_files(tmp_path, text, message):
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        read(str(file))


def test_missing_file_and_unknown_scenes(tmp_path):
    with pytest.raises(DataError, match="cannot read .*absent.json"):
        read(str(tmp_path / "absent.json"))
    with pytest.raises(DataError, match="digits"):
        read("scenes:nowhere/train")
    with pytest.raises(DataError, match="scenes:NAME/SPLIT"):
        read("scenes:digits")
