"""Every field of a row is read, refused by name or told as unread; what is empty hides nothing."""

import json

import pytest
from row_styles import LLAVA, PLAIN, meaning

from mm_piece.data import IGNORE_INDEX, encode, encode_truncated, read
from mm_piece.data.answers import find_omitted_texts
from mm_piece.data.image_folder import MetadataRows
from mm_piece.data.special_tokens import has_special_token
from mm_piece.errors import DataError
from mm_piece.models.base import load_processor

ASK = {"prompt": "What is it?", "answer": "a box", "image": "red.png"}
BLANKS = ("", " ", [], [None], [""], None, float("nan"), {}, {"bytes": None, "path": None})


@pytest.mark.parametrize("blank", BLANKS, ids=str)
@pytest.mark.parametrize(
    ("field", "row"),
    [
        ("image", PLAIN | {"images": ["red.png"]}),
        ("image", PLAIN | {"pic_path": "red.png"}),
        ("images", PLAIN | {"image": "red.png"}),
        ("prompt", {"question": "What is it?", "answer": "a box", "image": "red.png"}),
        ("question", {"instruction": "What is it?", "answer": "a box", "image": "red.png"}),
        ("answer", {"prompt": "What is it?", "response": "a box", "image": "red.png"}),
        ("conversations", {"messages": LLAVA["conversations"], "image": "red.png"}),
        ("conversations", ASK),
        ("messages", ASK),
        ("system", LLAVA),
        ("history", ASK),
        ("videos", ASK),
        ("audio", ASK),
    ],
)
def test_what_is_empty_hides_nothing(read_rows, field, row, blank):
    rows = read_rows({field: blank, **row}, LLAVA)
    assert meaning(rows[0])[:2] == meaning(rows[1])[:2]
    assert rows.find_unread_fields() == set()


@pytest.mark.parametrize("blank", BLANKS, ids=str)
def test_empty_columns_hide_nothing(read_rows, blank):
    columns = {"image": "photo", "prompt": "q", "answer": "a", "messages": "talk"}
    row = dict.fromkeys(columns.values(), blank)
    rows = read_rows(ASK | row, LLAVA | row, columns=columns)
    assert [meaning(one) for one in rows] == [meaning(read_rows(LLAVA)[0])] * 2
    assert (
        read_rows({**PLAIN, "prompt": blank, "image": "red.png"}, prompt="Which?")[0].prompt
        == "Which?"
    )


def test_empty_items_and_keys_hide_nothing(read_rows):
    for answers in ({"answer": ["", "a"]}, {"answers": ["", "", "a"]}, {"answers": [None, "a"]}):
        (example,) = read_rows({"prompt": "?"} | answers)
        assert (example.answer, example.accepted[-1:]) == ("a", ["a"])
    for image in (
        {"bytes": "", "path": "red.png"},
        {"image": "", "url": "red.png"},
        ["", "red.png"],
    ):
        assert len(read_rows(PLAIN | {"image": image})[0].images) == 1
    turns = [
        {"from": "", "role": "user", "value": "", "content": "What is it?"},
        {"from": "gpt", "role": "", "value": None, "content": "a box"},
    ]
    (example,) = read_rows({"messages": turns})
    assert (example.prompt, example.answer) == ("What is it?", "a box")
    (example,) = read_rows(
        {"system": "Be brief.", "messages": [{"role": "system", "content": ""}, *turns]}
    )
    assert [message["role"] for message in example.messages] == ["system", "user", "assistant"]


def test_an_empty_question_beside_an_image_stays_one(read_rows):
    rows = read_rows(
        {**ASK, "prompt": ""}, {**ASK, "prompt": None, "q": ""}, columns={"prompt": "q"}
    )
    assert [example.prompt for example in rows] == ["", ""]


def answered(**more):
    turns = [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "bad"},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": "good"},
    ]
    turns[1] |= more
    return {"messages": turns}


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        (ASK | {"id": 7, "source": "web"}, {"source"}),
        (ASK | {"question": "What is it?", "images": ["red.png"]}, set()),
        (ASK | {"question": "Other?", "response": "b", "images": ["green.png"]}, None),
        (LLAVA | {"messages": LLAVA["conversations"][:1]}, {"messages"}),
        (LLAVA | {"prompt": "?", "answer": "x"}, {"prompt", "answer"}),
        (ASK | {"input": "more"}, {"input"}),
        (ASK | {"kind": "a", "question_type": "b"}, {"question_type"}),
        (ASK | {"answers": [{"answer": "a box", "answer_id": 1}]}, {"answers[].answer_id"}),
        (ASK | {"answers": {"text": ["x"], "answer_start": [1]}}, None),
        (ASK | {"image": {"path": "red.png", "caption": "c"}}, {"image.caption"}),
        (ASK | {"image": [{"path": "red.png", "caption": "c"}]}, {"image[].caption"}),
        (answered(name="n", reasoning_content="hm"), {"messages[].name"}),
        (answered(tool_calls=[], function_call=None, loss=None), set()),
        (answered(train=True, custom=0), {"messages[].custom"}),
    ],
)
def test_fields_that_nothing_reads_are_told(read_rows, row, unread):
    others = {
        2: {"question", "response", "images"},
        8: {"answers[].text", "answers[].answer_start"},
    }
    number = 2 if "response" in row else 8
    assert read_rows(row).find_unread_fields() == (others[number] if unread is None else unread)


def test_columns_that_were_not_asked_for_are_told(read_rows):
    row = ASK | {"photo": "green.png", "messages": answered()["messages"], "q": "Which?"}
    rows = read_rows(row, columns={"image": "photo", "prompt": "q"})
    assert rows[0].images[0].name == "green.png"
    assert rows.find_unread_fields() == {"image", "messages", "prompt"}


def test_fields_of_parts_are_told(read_rows):
    image = {"type": "image", "image": "red.png", "max_pixels": 1, "resized_height": 2, "text": ""}
    url = {"type": "image_url", "image_url": {"url": "red.png", "detail": "low"}}
    text = {"type": "text", "text": "?", "cache_control": {"type": "ephemeral"}}
    turns = [
        {"role": "user", "content": [image, url, text], "weight": 1},
        {"role": "assistant", "content": "x", "weight": 1},
    ]
    assert read_rows({"messages": turns}).find_unread_fields() == {
        "messages[].weight",  # of the question, which is not learned
        "messages[].content[].max_pixels",
        "messages[].content[].resized_height",
        "messages[].content[].image_url.detail",
        "messages[].content[].cache_control",
    }


def test_images_that_nothing_reads_are_refused(read_rows):
    turns = answered()["messages"]
    with pytest.raises(
        DataError, match=r"nothing reads 'messages\[\].images', .* 'red.png'; images"
    ):
        read_rows({"messages": [{**turns[0], "images": ["", "red.png"]}, *turns[1:]]})
    with pytest.raises(DataError, match="nothing reads 'photos', which names the image 'red.png'"):
        read_rows(PLAIN | {"photos": ["", "red.png"]})
    with pytest.raises(DataError, match="audio are not supported: 'clips' names 'a.wav'"):
        read_rows(PLAIN | {"clips": [None, "a.wav"]})


MARKS = [
    *(("loss", off) for off in (False, 0, 0.0)),
    *((name, 0) for name in ("weight", "loss_scale", "loss_weight", "loss_mask")),
    *((name, False) for name in ("train", "training", "train_on_turn", "trainable")),
    ("masked", True),
]


def supervised(example, processor):
    inputs = encode(example, processor)
    labels = inputs["labels"][0]
    return processor.tokenizer.decode(labels[labels != IGNORE_INDEX])


@pytest.mark.parametrize(("name", "off"), MARKS)
def test_turns_marked_so_are_not_learned(read_rows, base, name, off):
    processor = load_processor(base)
    on = type(off)(not off)
    row = answered(**{name: off})
    row["messages"][3][name] = on
    row["messages"][0][name] = off
    rows = read_rows(row, answered(**{name: on}), row | {"system": "s"})
    assert [supervised(one, processor) for one in rows] == [
        "good<|end|>",
        "bad<|end|>good<|end|>",
        "good<|end|>",
    ]
    assert rows.find_unread_fields() == set()
    assert rows[0].compute_digest() != rows[1].compute_digest()


def test_an_answer_of_another_s_is_learned(read_rows, base):
    row = answered()
    row["messages"][3]["loss"] = False
    (example,) = read_rows(row)
    assert supervised(example, load_processor(base)) == "bad<|end|>"
    assert supervised(example.with_answer("new"), load_processor(base)) == "bad<|end|>new<|end|>"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"weight": 0.5}, r"'messages\[\].weight' is 0.5: a turn is learned \(1, true\) or not"),
        ({"loss": "false"}, r"'messages\[\].loss' is 'false': a turn is learned"),
        ({"loss_scale": 2}, r"'messages\[\].loss_scale' is 2"),
        ({"loss": False, "weight": 1}, "'loss' and 'weight' of a turn disagree"),
        ({"mask": True}, r"'messages\[\].mask' is not supported: formats disagree .* say `loss`"),
        ({"train_detail": [{"begin_offset": 0}]}, r"'messages\[\].train_detail' is not supported"),
        (
            {"function_call": {"name": "look"}},
            "tool turns are not supported: it has 'function_call'",
        ),
        ({"reasoning_content": ["hm"]}, r"'messages\[\].reasoning_content' must be a text"),
        ({"thinking": "a <image>"}, r"'messages\[\].thinking' holds <image>"),
    ],
)
def test_marks_without_a_clear_sense_are_refused(read_rows, more, message):
    with pytest.raises(DataError, match=f"rows.json row 0: {message}"):
        read_rows(answered(**more))


def test_a_row_without_anything_to_learn_is_refused(read_rows):
    row = answered(loss=False)
    row["messages"][3]["loss"] = False
    with pytest.raises(DataError, match="row 0: every answer is marked as not to be learned"):
        read_rows(row)


THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content and loop.last %}[{{ m.reasoning_content }}]{% endif %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


UNSEEN = {"'reasoning_content' of turns", "'thinking' of turns"}


def test_reasoning_reaches_a_template_that_reads_it(read_rows, base):
    processor = load_processor(base)
    row = answered(reasoning_content="hm", thinking="so")
    row["messages"][3]["reasoning_content"] = "aha"
    (example,) = read_rows(row)
    assert find_omitted_texts(example, processor) == UNSEEN
    assert supervised(example, processor) == "bad<|end|>good<|end|>"
    processor.chat_template = THINKING
    assert supervised(example, processor) == "bad<|end|>[aha]good<|end|>"
    # of an earlier turn
    assert find_omitted_texts(example, processor) == UNSEEN
    last = example.messages[2:]
    example = type(example)(0, last, [], "rows")
    assert find_omitted_texts(example, processor) == set()


def test_long_reasoning_is_cut_like_other_texts(read_rows, base):
    processor = load_processor(base)
    processor.chat_template = THINKING
    turns = answered()["messages"][2:]
    turns[1] |= {"content": "good answer", "reasoning_content": "m" * 99}
    (example,) = read_rows({"messages": turns})
    inputs, cut = encode_truncated(example, processor, 40)
    assert inputs["input_ids"].shape[1] <= 40
    assert cut
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert text.endswith("m]good answer<|end|>")


def test_special_tokens_in_reasoning_are_seen(read_rows, base):
    (example,) = read_rows(answered(reasoning_content="<|end|>"))
    assert has_special_token(example, load_processor(base))


def test_an_object_has_each_field_once(tmp_path):
    text = '{"prompt": "?", "answer": "x", "answer": ""}'
    (tmp_path / "rows.jsonl").write_text(text)
    (tmp_path / "rows.json").write_text(f"[{text}]")
    for name in ("rows.json", "rows.jsonl"):
        with pytest.raises(DataError, match="is not JSON: the name 'answer'"):
            read(str(tmp_path / name))


def test_names_of_metadata_are_not_hidden():
    rows = [
        {"file_name": "a.png", "image": ""},
        {"file_name": "", "image": "b.png"},
        {"file_name": "a.png", "image": "b.png"},
    ]
    named = MetadataRows(rows)
    assert [named[0], named[1]] == [{"image": "a.png"}, {"image": "b.png"}]
    with pytest.raises(DataError, match="row 2 has both file_name"):
        named[2]


def test_lists_side_by_side_must_be_equally_long(read_rows):
    lists = {"from": ["human", "gpt"], "value": ["a"]}
    with pytest.raises(DataError, match="must be a list of turns"):
        read_rows({"conversations": lists})
    content = {"type": ["image", "text"], "text": [None, "?"]}
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]
    (example,) = read_rows({"messages": turns, "image": "red.png"})
    assert [part["type"] for part in example.messages[0]["content"]] == ["image", "text"]
    assert json.dumps(example.messages[0])


def test_mapped_columns_count_as_read_and_are_told_by_their_own_names(read_rows):
    """A column that is read is none that nothing reads; one that is not keeps its name."""
    row = {"q": "What is it?", "label": "a box", "photo": "red.png"}
    columns = {"prompt": "q", "answer": "label", "image": "photo"}
    assert read_rows(row, columns=columns).find_unread_fields() == set()
    several = row | {"labels": ["a box", "box"]}
    rows = read_rows(several, columns=columns | {"answers": "labels"})
    assert rows.find_unread_fields() == set()

    talk = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x", "w": 1}]
    rows = read_rows(row | {"talk": talk}, columns=columns | {"messages": "talk"})
    assert rows.find_unread_fields() == {"label", "q", "talk[].w"}
