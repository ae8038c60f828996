"""Law 9: labels cover the answers only, whatever format a row has."""

import json

import pytest
import torch
from PIL import Image

from mm_piece.data import IGNORE_INDEX, collate, encode, encode_prompt, read, tokenizer_of
from mm_piece.models.base import load_processor


@pytest.fixture(scope="module")
def processor(base):
    return load_processor(base)


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
    return tokenizer_of(processor).decode(labels[labels != IGNORE_INDEX])


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
    answer = encoded["labels"][0] != IGNORE_INDEX
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
    assert torch.equal(labels[labels != IGNORE_INDEX], ids[labels != IGNORE_INDEX])


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
            assert (batch["labels"][number][~mask] == IGNORE_INDEX).all()
