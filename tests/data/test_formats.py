"""Law: a conversation reads back equal, in whichever format it is written."""

import base64

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up_rows import COLOURS, IMAGES, data_of
from PIL import Image

# How a conversation is written: its turns, the names of its images in order, and its system text.


def as_llava(turns, images, system):
    names = {"user": "human", "assistant": "gpt"}
    said = [{"from": names[role], "value": marked(content)} for role, content in turns]
    first = [{"from": "system", "value": system}] if system else []
    return {"id": 7, "image": images, "conversations": first + said}


def as_sharegpt(turns, images, system):
    names = {"user": "user", "assistant": "chatgpt"}
    said = [{"from": names[role], "value": marked(content)} for role, content in turns]
    return {"images": images, "conversations": said, "system": system}


def as_messages(turns, images, system):
    said = [{"role": role, "content": marked(content)} for role, content in turns]
    first = [{"role": "system", "content": system}] if system else []
    return {
        "images": [{"bytes": None, "path": image} for image in images],
        "messages": first + said,
    }


def as_placeholders(turns, images, system):
    return typed(turns, system, lambda _: {"type": "image"}, iter(images)) | {"images": images}


def as_parts(turns, images, system):
    return typed(turns, system, lambda name: {"type": "image", "image": name}, iter(images))


def as_padded_parts(turns, images, system):
    """As Arrow gives them back: every part has every field."""
    fields = dict.fromkeys(("type", "text", "image", "video"))
    row = typed(
        turns, system, lambda name: {"type": "image", "image": {"path": name}}, iter(images)
    )
    for turn in row["messages"]:
        turn["content"] = [fields | part for part in turn["content"]]
    return row | {"videos": None, "image": None}


def as_openai(turns, images, system):
    data = {name: data_of(colour) for name, colour in zip(IMAGES, COLOURS, strict=True)}

    def part(name):
        url = f"data:image/png;base64,{base64.b64encode(data[name]).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}

    return typed(turns, system, part, iter(images))


def marked(content):
    return "".join("<image>" if piece is None else piece for piece in content)


def typed(turns, system, part, images):
    said = [("system", [system])] if system else []
    messages = [
        {
            "role": role,
            "content": [
                part(next(images)) if piece is None else {"type": "text", "text": piece}
                for piece in content
            ],
        }
        for role, content in [*said, *turns]
    ]
    return {"messages": messages}


def expected(turns, system):
    """Typed content, written down once more: texts between images lose their outer line breaks."""
    said = [("system", [system])] if system else []
    return [
        {
            "role": role,
            "content": [
                {"type": "image"} if piece is None else {"type": "text", "text": piece.strip("\n")}
                for piece in content
                if piece is None or piece.strip("\n")
            ],
        }
        for role, content in [*said, *turns]
    ]


FORMATS = (
    *(as_llava, as_sharegpt, as_messages, as_placeholders, as_parts, as_padded_parts, as_openai),
)
words = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=12)
questions = st.lists(words, min_size=1, max_size=3).map(
    lambda texts: [piece for text in texts for piece in (None, text)][1:]
)
answers = words.filter(str.strip).map(lambda text: [text])
conversations = st.lists(st.tuples(questions, answers), min_size=1, max_size=3).map(
    lambda pairs: [turn for asked, told in pairs for turn in (("user", asked), ("assistant", told))]
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=conversations, system=st.just("") | words.filter(str.strip), seed=st.randoms())
def test_every_format_says_the_same(read_rows, turns, system, seed):
    images = [seed.choice(IMAGES) for _, content in turns for piece in content if piece is None]
    rows = read_rows(*(write(turns, images, system) for write in FORMATS))
    for example in rows:
        assert example.messages == expected(turns, system)
        assert example.compute_digest() == rows[0].compute_digest()
    colours = dict(zip(IMAGES, COLOURS, strict=True))
    shown = [Image.new("RGB", (1, 1), colours[name]).getpixel((0, 0)) for name in images]
    for example in rows:
        assert [picture.getpixel((0, 0)) for picture in example.open_images()] == shown
