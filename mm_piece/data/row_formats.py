"""From a row of any known format to an example.

* `conversations` or `messages`: a list of turns (`turns`); a `system` text may stand beside it
* a question and an answer: `prompt`, `question`, `query` or `instruction` (with `input`), and
  `answer`, `response` or `output`; earlier pairs of them in `history`. Several right answers are a
  list in `answer`, whose first is trained on, or in `answers`, whose commonest is if there is no
  `answer`; `answers` are all that count as right, the answer that is trained on among them.

Images stand in `image`, `images` or `pic_path`, in the order of the `<image>` marks and of the
image parts that name none themselves. A question without marks gets one for each image at its
beginning.
"""

from collections.abc import Iterable, Mapping
from mimetypes import guess_type
from pathlib import Path
from typing import Any

from PIL import Image

from mm_piece.data.arrow_features import UnsupportedValue
from mm_piece.data.conversations import (
    IMAGE_MARK,
    Turn,
    make_unsupported_error,
    parse_turns,
    split_at_marks,
)
from mm_piece.data.example import Example, Message, text_of
from mm_piece.data.fields import TrackedFields, is_filled, is_missing, to_object_list
from mm_piece.data.images import ImageSource, parse_image
from mm_piece.data.question_pairs import (
    ANSWER_FIELDS,
    QUESTION_FIELDS,
    parse_accepted_answers,
    parse_pair_turns,
    require_accepted_answer,
    text_of_value,
)
from mm_piece.errors import DataError, format_value

_TURN_FIELDS = ("conversations", "messages")
_IMAGE_FIELDS = ("image", "pic_path", "images")
_UNSUPPORTED_FIELDS = {
    **dict.fromkeys(("video", "videos"), "videos are"),
    **dict.fromkeys(("audio", "audios"), "audio is"),
}
_OVERRIDDEN_FIELDS = {  # a column that was asked for stands before what the row has by itself
    **dict.fromkeys(("prompt", "answer"), _TURN_FIELDS),
    **dict.fromkeys(("image", "images"), _IMAGE_FIELDS),
    "messages": ("conversations",),
}


def build_row_fields(raw: Mapping[Any, Any], columns: Mapping[Any, str]) -> TrackedFields:
    """The fields of a raw row, with those that `columns` finds in it in place of its own.

    A column that is empty in a row hides nothing that the row has by itself.
    """
    mapped = {field: raw[name] for field, name in columns.items() if name in raw}
    found = {field: value for field, value in mapped.items() if is_filled(value)}
    others = {name for field in found for name in _OVERRIDDEN_FIELDS.get(field, ())} - found.keys()
    hidden = (others | found.keys()) - set(columns.values())

    own = {name: v for name, v in raw.items() if name not in others and not is_missing(v)}
    fields = TrackedFields({**mapped, **own, **found})
    fields.hidden_values = {name: raw[name] for name in raw if name in hidden}
    fields.read_names |= set(columns.values()) - found.keys()
    return fields


def build_example(
    row: TrackedFields, number: int, source: str, folder: Path, prompt: str | None = None
) -> Example:
    """The example of one row; every field that is read is taken.

    Image paths are relative to `folder`; `prompt` is the question of rows without one of that name.
    Raises DataError in one line for a row of no known format, turns out of order, videos, and
    images that do not match their marks.
    """
    location = f"{source} row {number}"
    row.read_value("id")
    _require_no_video(row, location)
    listed = _parse_listed_images(row, folder, location)
    accepted = parse_accepted_answers(row, location)

    has_no_pair = not row.has_value(*QUESTION_FIELDS, *ANSWER_FIELDS, "answers")
    name = row.choose_field(*_TURN_FIELDS) if has_no_pair or row.has_value(*_TURN_FIELDS) else None
    if name:
        turns = parse_turns(row.raw_values[name], folder, location, row, name)
    else:
        turns = _add_image_marks(parse_pair_turns(row, prompt, accepted, location), len(listed))
    turns = _add_system_turn(turns, text_of_value(row.read_value("system"), location), location)

    images = _match_images(turns, listed, location)
    kind = str(row.read_value("kind", "question_type") or "")
    if not images:
        require_no_unread_media(row.find_unread_fields(), location)

    messages: list[Message] = [
        {"role": turn.role, "content": _to_typed_content(turn.content), **turn.reasoning}
        for turn in turns
    ]
    _require_turn_order(messages, location)
    require_accepted_answer(text_of(messages[-1]), accepted, location)
    untrained_turns = _find_untrained_turns(turns, location)
    return Example(number, messages, images, source, kind, accepted, untrained_turns)


def _require_no_video(row: TrackedFields, location: str) -> None:
    for key, what in _UNSUPPORTED_FIELDS.items():
        if row.has_value(key):
            raise make_unsupported_error(what, f"the row has {key!r}", location)
    for name in _IMAGE_FIELDS:
        if media_kind_of(row.raw_values.get(name)) in ("video", "audio"):
            raise make_unsupported_error(
                "videos and audio are",
                f"{name!r} is {format_value(row.raw_values[name])}",
                location,
            )


def _parse_listed_images(row: TrackedFields, folder: Path, location: str) -> list[ImageSource]:
    name = row.choose_field(*_IMAGE_FIELDS)
    if name is None:
        return []
    given = to_object_list(row.raw_values[name])
    listed, path = (given, f"{name}[]") if isinstance(given, list) else ([given], name)
    images = (parse_image(one, folder, location, row, path) for one in listed)
    return [image for image in images if image is not None]


def _add_image_marks(turns: list[Turn], images: int) -> list[Turn]:
    """The turns; without any mark, the first question gets one for each image."""
    if not all(isinstance(piece, str) for turn in turns for piece in turn.content):
        return turns
    first = turns[0]._replace(content=[*[None] * images, *turns[0].content])
    return [first, *turns[1:]]


def _add_system_turn(turns: list[Turn], system: str | None, location: str) -> list[Turn]:
    """The turns after the row's system text, if there is one; it stands in for an empty turn."""
    if not is_filled(system):
        return turns
    others = [turn for turn in turns if turn.role != "system" or is_filled(turn.content)]
    return [Turn("system", split_at_marks(str(system), location)), *others]


def _find_untrained_turns(turns: list[Turn], location: str) -> tuple[int, ...]:
    """The positions of the answers that are marked as not to be learned."""
    answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
    untrained_turns = tuple(number for number in answers if not turns[number].is_trained)
    if len(untrained_turns) == len(answers):
        raise DataError(f"{location}: every answer is marked as not to be learned")
    return untrained_turns


def _match_images(turns: list[Turn], listed: list[ImageSource], location: str) -> list[ImageSource]:
    """The images in the order of their places: the turns' own, or the next one listed."""
    image_slots = [piece for turn in turns for piece in turn.content if not isinstance(piece, str)]
    if image_slots.count(None) != len(listed):
        raise DataError(
            f"{location}: {len(listed)} image(s) but {image_slots.count(None)} {IMAGE_MARK} "
            "mark(s) in the text"
        )
    waiting = iter(listed)
    return [next(waiting) if piece is None else piece for piece in image_slots]


def _to_typed_content(content: Iterable[Any]) -> list[dict[str, str]]:
    """Typed content: an image entry for each image, text between them without its outer breaks."""
    parts = [{"type": "text", "text": ""}]
    for piece in content:
        if isinstance(piece, str):
            parts[-1]["text"] += piece
        else:
            parts += [{"type": "image"}, {"type": "text", "text": ""}]
    stripped = ({k: v.strip("\n") for k, v in content_part.items()} for content_part in parts)
    return [content_part for content_part in stripped if content_part.get("text") != ""]


def _require_turn_order(messages: list[Message], location: str) -> None:
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise DataError(f"{location}: turns must alternate, question first, and end in an answer")
    if not roles:
        raise DataError(f"{location}: the conversation must end in an answer")
    for number, message in enumerate((m for m in messages if m["role"] == "assistant"), start=1):
        if not text_of(message).strip():
            raise DataError(f"{location}: answer {number} is empty")
        if any(content_part["type"] == "image" for content_part in message["content"]):
            raise DataError(
                f"{location}: answer {number} holds an image; images belong to questions"
            )


# --- fields that nothing reads: harmless, unless what they name belongs to the task


def require_no_unread_media(unread: Iterable[tuple[str, Any]], location: str) -> None:
    """Raise DataError for an image, video or sound that the row names in one of these fields."""
    for name, value in unread:
        for found in _to_item_list(value):
            _require_no_media(found, name, location)


def media_kind_of(value: Any) -> str | None:
    """`image`, `video` or `audio` for such a file, its name, or a list with one; else None."""
    return next((kind for item in _to_item_list(value) if (kind := _guess_media_kind(item))), None)


def _require_no_media(found: Any, name: str, location: str) -> None:
    kind, shown = _guess_media_kind(found), format_value(found)
    if isinstance(found, UnsupportedValue):
        raise DataError(
            f"{location}: nothing reads {name!r}, {found}, which is not supported; "
            "allowed: text and images"
        )
    if kind == "image":
        hint = f"say `columns: {{image: {name}}}` in the recipe"
        if "[]" in name:
            hint = "images stand in the row's `images` or in parts of type image"
        raise DataError(
            f"{location}: nothing reads {name!r}, which names the image {shown}; {hint}"
        )
    if kind:
        raise DataError(
            f"{location}: videos and audio are not supported: {name!r} names {shown}; "
            "allowed: text and images"
        )


def _to_item_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _guess_media_kind(value: Any) -> str | None:
    """What kind of file a value is or names; an image of `datasets` is `{bytes, path}`."""
    if isinstance(value, Image.Image):
        return "image"
    if isinstance(value, Mapping) and value.keys() == {"bytes", "path"} and is_filled(value):
        return _guess_media_kind(value["path"]) or "image"
    if not isinstance(value, str) or len(value) > 4096 or any(c.isspace() for c in value):
        return None
    kind, _, _ = (guess_type(value, strict=False)[0] or "").partition("/")
    return kind if kind in ("image", "video", "audio") else None
