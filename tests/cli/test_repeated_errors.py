"""A mistake that stands in many rows is one line; different mistakes stay apart."""

import pytest

from mm_piece.cli.repeated_errors import group_errors

ONE_MISTAKE = [
    "image my photos/{}.png does not exist (looked for as '/a b/my photos/{}.png')",
    "image {}.png cannot be read: it is no image of a known format",
    "image 'https://a.b/{}.png' is a URL; images must be files here: download it first",
    "{} image(s) but 0 <image> mark(s) in the text",
    "answer {} is empty",
    "nothing reads 'photo', which names the image 'a/{}.png'; say `columns: {{image: photo}}`",
    "the answer 'x{}' is none of its `answers`, which are all: ['a{}', 'b']; where they are",
    "a turn needs a text 'value', not {}",
]
DIFFERENT = [
    "nothing reads 'photo', which names the image '1.png'",
    "nothing reads 'picture', which names the image '1.png'",
    "nothing reads 'messages[].content[].photo', which names the image '1.png'",
    "nothing reads 'messages[].content[].picture', which names the image '1.png'",
    "videos are not supported: the row has 'video'",
    "videos are not supported: the row has 'videos'",
    "no known format; it lacks a question; it has 'a.x, b.y'",
    "no known format; it lacks a question; it has 'a.x, c.y'",
    "image 1.png does not exist",
    "image 1.png is empty: it has no bytes",
]


@pytest.mark.parametrize("message", ONE_MISTAKE)
def test_one_mistake_is_told_with_its_rows(message):
    errors = [f"a row 7.json row {row}: {message.format(row, row + 1)}" for row in range(3)]
    assert group_errors(errors) == [(errors[0], 2)]


def test_different_mistakes_stay_apart():
    errors = [f"a.json row {row}: {message}" for row, message in enumerate(DIFFERENT)]
    assert group_errors(errors) == [(error, 0) for error in errors]
    same = ["a.json row 1: answer 1 is empty", "b.json row 1: answer 1 is empty"]
    assert group_errors(same) == [(same[0], 0), (same[1], 0)]


def test_errors_of_no_row_stay_by_themselves():
    errors = ["cannot read 1.json: it does not exist", "cannot read 2.json: it does not exist"]
    assert group_errors(errors) == [(error, 0) for error in errors]
