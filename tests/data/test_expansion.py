"""The text around images is found again, whatever a processor writes for an image."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_piece.data.expansion import find_text_positions

IMAGE, MARK, BREAK = 90, 91, 92  # no token of a text
WRITTEN = ([IMAGE], [IMAGE] * 4, [MARK, IMAGE, IMAGE, BREAK, IMAGE, IMAGE, BREAK, MARK])
TEXTS = st.lists(st.lists(st.integers(1, 5), max_size=6), min_size=1, max_size=4)


def decode(ids):
    return "".join(map(str, ids))


def joined(texts, between):
    found = [*texts[0]]
    for text, image in zip(texts[1:], between, strict=True):
        found += [*image, *text]
    return found


@given(TEXTS, st.data())
def test_every_token_is_found(texts, data):
    images = [data.draw(st.sampled_from(WRITTEN)) for _ in texts[1:]]
    plain = joined(texts, [[IMAGE]] * len(images))
    expanded = joined(texts, images)
    found = find_text_positions(plain, expanded, IMAGE, decode)
    assert sorted(found) == [index for index, token in enumerate(plain) if token != IMAGE]
    assert all(plain[index] == expanded[at] for index, at in found.items())
    places = [found[index] for index in sorted(found)]
    assert places == sorted(set(places))
    assert all(expanded[at] not in (IMAGE, MARK, BREAK) for at in places)


@pytest.mark.parametrize(
    ("plain", "expanded", "expected"),
    [
        # a line break before the image merges with the one that its marks begin with
        ([1, 2, IMAGE, 3, 4], [1, 25, MARK, IMAGE, 3, 4], {0: 0, 3: 4, 4: 5}),
        ([1, IMAGE, 2, 3, 4], [1, IMAGE, 52, 3, 4], {0: 0, 3: 3, 4: 4}),
        (
            [1, IMAGE, 2, 3, 4, 5, IMAGE, 6],
            [1, IMAGE, 52, 3, 4, 55, IMAGE, 6],
            {0: 0, 3: 3, 4: 4, 7: 7},
        ),
        ([1, 2, 3], [1, 2, 3], {0: 0, 1: 1, 2: 2}),
        # more than images was changed
        ([1, 2, 3], [1, 2, 4], None),
        ([1, 2, 3], [1, 2, 3, 3], None),
        ([1, 2, IMAGE, 3, 4], [1, 9, MARK, IMAGE, 3, 4], None),
        ([1, IMAGE, 2, 3, 4], [1, IMAGE, 9, 3, 4], None),
        ([1, 2, 3, 4, IMAGE, 5], [1, 9, 3, 4, IMAGE, 5], None),
        ([1, IMAGE, 2, 3, 4, 5], [1, IMAGE, 2, 3, 9, 5], None),
    ],
)
def test_what_touches_an_image_may_merge_with_it(plain, expanded, expected):
    assert find_text_positions(plain, expanded, IMAGE, decode) == expected
