"""Rows of every format say the same; a row that cannot be used is named in one line."""

import base64
from pathlib import Path

import pytest
from made_up_rows import IMAGES, data_of
from PIL import Image
from row_styles import LLAVA, PLAIN, meaning

from mm_piece.errors import DataError


@pytest.mark.parametrize(
    "row",
    [
        PLAIN | {"image": "red.png"},
        PLAIN | {"pic_path": "red.png"},
        PLAIN | {"images": ["red.png"]},
        PLAIN | {"image": {"path": "red.png", "bytes": None}},
        PLAIN | {"images": {"path": ["red.png"], "bytes": [None]}},
        PLAIN | {"image": "red.png", "prompt": "<image>\nWhat is it?"},
        {"question": "What is it?", "answer": "a box", "image": "red.png"},
        {"query": "What is it?", "response": "a box", "images": ["red.png"]},
        {"instruction": "What is it?", "input": "", "output": "a box", "images": ["red.png"]},
        {"messages": LLAVA["conversations"], "image": "red.png"},
        {"conversations": {"from": ["human", "gpt"], "value": ["<image>What is it?", "a box"]}}
        | {"image": "red.png"},
    ],
)
def test_questions_and_answers_say_the_same(read_rows, row):
    ours, theirs = read_rows(row, LLAVA)
    assert meaning(ours) == meaning(theirs)
    assert (ours.prompt, ours.answer) == ("What is it?", "a box")


def test_a_question_gets_a_mark_for_each_image(read_rows):
    (example,) = read_rows(PLAIN | {"images": IMAGES})
    kinds = [part["type"] for part in example.messages[0]["content"]]
    assert kinds == ["image", "image", "image", "text"]


def test_text_and_image_rows_mix(read_rows):
    rows = read_rows(PLAIN, PLAIN | {"image": "red.png"}, PLAIN | {"image": ""}, LLAVA)
    assert [len(example.images) for example in rows] == [0, 1, 0, 1]


def test_earlier_pairs_and_what_an_instruction_is_about(read_rows):
    row = {"instruction": "Translate.", "input": "Haus", "output": "house", "history": [["a", "b"]]}
    (example,) = read_rows(row)
    texts = [part["text"] for message in example.messages for part in message["content"]]
    assert texts == ["a", "b", "Translate.\nHaus", "house"]
    assert read_rows(row, columns={"prompt": "instruction"})[0].prompt == "Translate.\nHaus"


@pytest.mark.parametrize(
    ("row", "answer", "accepted"),
    [
        ({"answer": "a"}, "a", []),
        ({"answer": "a", "answers": ["b", "a"]}, "a", ["b", "a"]),
        ({"answer": "The cat.", "answers": ["dog", "cat"]}, "The cat.", ["dog", "cat"]),
        ({"answer": "two", "answers": [2, 3]}, "two", ["2", "3"]),
        ({"answer": "B", "answers": ["(B) cat"]}, "B", ["(B) cat"]),
        ({"answer": "a", "answers": ["", None]}, "a", []),
        ({"answers": ["a", "b", "b"]}, "b", ["a", "b", "b"]),
        ({"answers": ["a", "b"]}, "a", ["a", "b"]),
        ({"answers": [{"answer": "a"}, {"answer": "b"}, {"answer": "b"}]}, "b", ["a", "b", "b"]),
        ({"answers": {"answer": ["b", "a"], "answer_id": [1, 2]}}, "b", ["b", "a"]),
        ({"answer": ["a", "b", "b"]}, "a", ["a", "b", "b"]),
        ({"answer": None, "answers": "b"}, "b", ["b"]),
        ({"answer": 7}, "7", []),
        ({"answer": 0.5}, "0.5", []),
        ({"answer": True}, "True", []),
        ({"answer": float("nan"), "answers": [4]}, "4", ["4"]),
    ],
)
def test_right_answers(read_rows, row, answer, accepted):
    (example,) = read_rows({"prompt": "?"} | row)
    assert (example.answer, example.accepted) == (answer, accepted)


OPTIONS = ["cat", "dog"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "?", "answer": "red", "answers": OPTIONS},
        {"prompt": "?", "response": "red", "answers": "cat"},
        {"prompt": "?", "answer": 1, "answers": OPTIONS},
        {"prompt": "?", "answer": "red", "answers": [{"answer": "cat"}, {"answer": "dog"}]},
        {"prompt": "?", "answer": ["red", "cat"], "answers": {"answer": OPTIONS}},
        LLAVA | {"answers": OPTIONS},
        {"messages": LLAVA["conversations"], "image": "red.png", "answer": OPTIONS},
    ],
)
def test_an_answer_that_would_score_nothing_is_refused(read_rows, row):
    with pytest.raises(DataError, match="row 1: the answer .* is none of its `answers`"):
        read_rows(PLAIN, row)


def test_columns_say_which_of_the_options_is_right(read_rows):
    row = {"q": "?", "label": "red", "answers": OPTIONS, "answer": "red"}
    both = {"answer": "label", "answers": "label"}
    for columns in ({"answers": "answer"}, both):
        (example,) = read_rows(row, columns={"prompt": "q", **columns})
        assert (example.answer, example.accepted) == ("red", ["red"])


def test_kinds(read_rows):
    rows = read_rows(PLAIN | {"kind": "colour"}, PLAIN | {"question_type": "what"}, PLAIN)
    assert [example.kind for example in rows] == ["colour", "what", ""]


def test_columns_and_the_prompt_of_rows_without_one(read_rows):
    row = {"text": "What is it?", "label": "a box", "file": "red.png", "image": "no.png"}
    columns = {"prompt": "text", "answer": "label", "image": "file"}
    assert meaning(read_rows(row, columns=columns)[0]) == meaning(read_rows(LLAVA)[0])
    columns = {"answer": "label", "image": "file"}
    assert read_rows(row, columns=columns, prompt="Which?")[0].prompt == "Which?"
    assert read_rows(PLAIN, prompt="Which?")[0].prompt == "What is it?"
    # columns are for train and test rows: one that a row has not is left alone
    assert read_rows(LLAVA, columns={"prompt": "text"})[0].prompt == "What is it?"
    both = LLAVA | {"text": "Which?", "answer": "red"}
    assert read_rows(both, columns={"prompt": "text"})[0].prompt == "Which?"
    assert read_rows(both)[0].prompt == "What is it?"
    with pytest.raises(DataError, match="columns: image: no row of .* has a field 'pictrue'"):
        read_rows(PLAIN, columns={"image": "pictrue"})


def test_addresses_of_images(read_rows, folder, tmp_path):
    file = (folder / "red.png").as_uri()
    (tmp_path / "two words.png").write_bytes(data_of("red"))
    for image in (file, str(folder / "red.png"), (tmp_path / "two words.png").as_uri()):
        (ours, theirs) = read_rows(PLAIN | {"image": image}, LLAVA)
        assert meaning(ours) == meaning(theirs)
    encoded = base64.b64encode(data_of("red")).decode()
    messages = [
        {"role": "user", "content": [{"type": "image", "base64": encoded}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a box"}]},
    ]
    wrapped = {"image": f"data:image/png;base64,{encoded[:9]}\n{encoded[9:]}"}
    for row in ({"messages": messages}, PLAIN | wrapped):
        assert read_rows(row)[0].images == [data_of("red")]


def user(*content):
    return {"messages": [{"role": "user", "content": list(content)}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": None, "image": "red.png"}, "no known format; .*; it has 'image'"),
        ({"prompt": "?", "answer": None}, "no known format; .*; it has 'prompt'"),
        ({"prompt": "?", "answer": []}, "no known format"),
        ({"question": "?", "reply": "x"}, "no known format; .*; it has 'question, reply'"),
        ({}, "no known format"),
        ("text", "a row must be an object, not 'text'"),
        ({"prompt": ["a"], "answer": "x"}, r"a text or a number is expected, not \['a'\]"),
        ({"conversations": "text"}, "must be a list of turns, not 'text'"),
        ({"conversations": ["text"]}, "a turn must be an object, not 'text'"),
        ({"conversations": []}, "must end in an answer"),
        ({"conversations": LLAVA["conversations"][:1], "image": "red.png"}, "end in an answer"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "question first"),
        ({"prompt": "?", "answer": " "}, "answer 1 is empty"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "a turn needs 'from', one of human"),
        ({"messages": [{"content": "x"}]}, "a turn needs 'role', one of human"),
        ({"messages": [{"role": "user", "content": None}]}, "a turn needs a text 'content'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "tool turns are not supported"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "tool turns are not"),
        (PLAIN | {"history": "text"}, "history must be a list of pairs of texts"),
        (PLAIN | {"history": [["a"]]}, "history must be a list of pairs of texts"),
        (PLAIN | {"history": ["ab"]}, "history must be a list of pairs of texts"),
        (PLAIN | {"history": [{"q": "a", "a": "b"}]}, "history must be a list of pairs of texts"),
        (PLAIN | {"image": "no.png"}, r"image .*no\.png does not exist"),
        (PLAIN | {"image": {"size": 3}}, "an image object needs one of bytes, image"),
        (PLAIN | {"image": 3}, "an image must be a path, bytes or an object .*, not int"),
        (PLAIN | {"image": "https://a.b/c.png"}, "is a URL; images must be files here: download"),
        (PLAIN | {"image": "data:image/png;base64,#"}, "data: address is not base64"),
        (PLAIN | {"image": "data:image/png;base64,aaaa"}, "image 1 cannot be read: it is no image"),
        (
            LLAVA | {"image": IMAGES[:2]},
            r"2 image.* but 1 <image> mark.*; each mark stands for one image",
        ),
        (PLAIN | {"prompt": "<image> <image>?", "image": "red.png"}, "1 image.* but 2 <image>"),
        (
            PLAIN | {"prompt": "a literal <image>"},
            r"0 image.* but 1 <image> mark.*; give the row its images",
        ),
        (PLAIN | {"answer": "<image>", "images": IMAGES}, r"3 image\(s\) but 1 <image> mark"),
        (user({"type": "image"}), r"0 image\(s\) but 1 <image> mark"),
        (user({"type": "image", "image": "red.png"}) | {"image": "red.png"}, "1 image.* but 0"),
        (
            user({"type": "text", "text": "What?"}) | {"image": "red.png"},
            r"1 image\(s\) but 0 <image> mark\(s\) in the text; put <image> into the text where "
            "each image belongs, or write content as parts, one of type image; a row of prompt",
        ),
        (user({"type": "video", "video": "a.mp4"}), "videos are not supported: content of type"),
        (user({"type": "input_audio"}), "audio is not supported: content of type 'input_audio'"),
        (user({"type": "text"}), r"content \{'type': 'text'\} is no part of type text"),
        (user({"type": ["text"], "text": "x"}), "is no part of type text"),
        (user("text"), "content 'text' is no part of type text"),
        (user({"type": "image_url", "image_url": {"url": "http://a/b"}}), "is a URL; images"),
        (PLAIN | {"video": "a.mp4"}, "videos are not supported: the row has 'video'"),
        (PLAIN | {"audios": ["a.wav"]}, "audio is not supported: the row has 'audios'"),
        (PLAIN | {"prompt": "<video>\nWhat?"}, "videos are not supported: the text holds <video>"),
        (PLAIN | {"prompt": "\ud800"}, "half a character"),
    ],
)
def test_bad_rows_are_named(read_rows, folder, row, message):
    with pytest.raises(DataError, match=f"rows.json row 1: .*{message}") as caught:
        read_rows(PLAIN, row)
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_paths_make_short_messages(read_rows):
    for name in ("/9j/" + "a" * 5000, "a\nb.png", "\0"):
        with pytest.raises(DataError, match="rows.json row 0: image") as caught:
            read_rows(PLAIN | {"image": name})
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 700


def test_images_may_lie_elsewhere(read_rows, tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "red.png")
    (example,) = read_rows(LLAVA, images=str(tmp_path))
    assert example.images == [Path(tmp_path / "red.png")]
    assert example.open_images()[0].size == (3, 2)
