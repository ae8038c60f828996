"""From a row of any known format to an example.

* `conversations` or `messages`: a list of turns; a `system` text may stand beside it
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
    "video": "videos are",
    "videos": "videos are",
    "audio": "audio is",
    "audios": "audio is",
}
# A mapped column stands before the fields that the row has by itself.
_OVERRIDDEN_FIELDS = {
    "prompt": _TURN_FIELDS,
    "answer": _TURN_FIELDS,
    "image": _IMAGE_FIELDS,
    "images": _IMAGE_FIELDS,
    "messages": ("conversations",),
}
_MEDIA_KINDS = ("image", "video", "audio")
_MAX_PATH_LENGTH = 4096  # PATH_MAX of Linux; a longer text names no file


def build_row_fields(
    raw: Mapping[Any, Any],
    columns: Mapping[Any, str],
) -> TrackedFields:
    """Return the fields of a raw row, with the columns of `columns` in place of its own.

    A column that is empty in a row hides nothing that the row has by itself.
    """
    mapped = {field: raw[name] for field, name in columns.items() if name in raw}
    found = {field: value for field, value in mapped.items() if is_filled(value)}

    overridden: set[str] = set()
    for field in found:
        fields_behind = _OVERRIDDEN_FIELDS.get(field, ())
        overridden.update(fields_behind)
    overridden -= found.keys()

    own = {}
    for name, value in raw.items():
        if name not in overridden and not is_missing(value):
            own[name] = value

    # own fields win over empty columns, filled columns over own fields
    values = {**mapped, **own, **found}
    fields = TrackedFields(values)
    fields.column_names = {field: columns[field] for field in found}

    # a mapped column is in use, even where it has the name of a field that is hidden
    source_columns = set(columns.values())
    hidden = overridden | found.keys()
    hidden -= source_columns
    for name, value in raw.items():
        if name in hidden:
            fields.hidden_values[name] = value

    # the field that a column is mapped to counts in its place
    fields.read_names |= source_columns - found.keys()
    return fields


def build_example(
    row: TrackedFields,
    number: int,
    source: str,
    folder: Path,
    prompt: str | None = None,
) -> Example:
    """Build the example of one row, and mark the fields that it reads.

    Image paths are relative to `folder`; `prompt` is the question of rows without one of that name.
    Raises DataError in one line for a row of no known format, turns out of order, videos, and
    images that do not match their marks.
    """
    location = f"{source} row {number}"
    row.read_value("id")  # counts as read: it says nothing about the task
    _require_no_video(row, location)
    listed_images = _parse_listed_images(row, folder, location)
    accepted = parse_accepted_answers(row, location)

    turn_field = _choose_turn_field(row)
    if turn_field:
        turns = parse_turns(row.raw_values[turn_field], folder, location, row, turn_field)
    else:
        pair_turns = parse_pair_turns(row, prompt, accepted, location)
        turns = _add_image_marks(pair_turns, len(listed_images))
    system = text_of_value(row.read_value("system"), location)
    turns = _add_system_turn(turns, system, location)

    images = _match_images(turns, listed_images, location)
    kind = row.read_value("kind", "question_type")
    if not images:  # only after every reader has read its fields
        require_no_unread_media(row.find_unread_fields(), location)

    messages = [_make_message(turn) for turn in turns]
    _require_turn_order(messages, location)
    require_accepted_answer(text_of(messages[-1]), accepted, location)
    return Example(
        row=number,
        messages=messages,
        images=images,
        source=source,
        kind=str(kind or ""),
        accepted=accepted,
        untrained_turns=_find_untrained_turns(turns, location),
    )


def _require_no_video(row: TrackedFields, location: str) -> None:
    for field, what in _UNSUPPORTED_FIELDS.items():
        if row.has_value(field):
            raise make_unsupported_error(what, f"the row has {field!r}", location)

    # an image field may name a video, too
    for field in _IMAGE_FIELDS:
        value = row.raw_values.get(field)
        if media_kind_of(value) in ("video", "audio"):
            seen = f"{field!r} is {format_value(value)}"
            raise make_unsupported_error("videos and audio are", seen, location)


def _choose_turn_field(row: TrackedFields) -> str | None:
    """Return the field of the row's conversation; None if the row is a question and an answer."""
    has_pair = row.has_value(*QUESTION_FIELDS, *ANSWER_FIELDS, "answers")
    if has_pair and not row.has_value(*_TURN_FIELDS):
        return None
    return row.choose_field(*_TURN_FIELDS)


def _parse_listed_images(
    row: TrackedFields,
    folder: Path,
    location: str,
) -> list[ImageSource]:
    """Return the images of the row's image field, gaps left out."""
    field = row.choose_field(*_IMAGE_FIELDS)
    if field is None:
        return []

    path = field  # for the names of unread fields
    given = to_object_list(row.raw_values[field])
    if isinstance(given, list):
        path = f"{field}[]"
    else:
        given = [given]

    images = []
    for value in given:
        image = parse_image(value, folder, location, row, path)
        if image is not None:
            images.append(image)
    return images


def _add_image_marks(turns: list[Turn], num_images: int) -> list[Turn]:
    """Return the turns; without any mark, the first question gets one for each image."""
    if _list_image_slots(turns):
        return turns

    first, *others = turns
    marks = [None] * num_images
    content = [*marks, *first.content]
    return [first._replace(content=content), *others]


def _list_image_slots(turns: list[Turn]) -> list[ImageSource | None]:
    """Return the turns' own images in order, with None in the places of the row's images."""
    slots = []
    for turn in turns:
        for piece in turn.content:
            if not isinstance(piece, str):
                slots.append(piece)
    return slots


def _add_system_turn(
    turns: list[Turn],
    system: str | None,
    location: str,
) -> list[Turn]:
    """Return the turns after the row's system text, if there is one; it replaces an empty turn."""
    if not is_filled(system):
        return turns

    content = split_at_marks(str(system), location)
    extended = [Turn("system", content)]
    for turn in turns:
        if turn.role != "system" or is_filled(turn.content):
            extended.append(turn)
    return extended


def _find_untrained_turns(turns: list[Turn], location: str) -> tuple[int, ...]:
    """Return the positions of the answers that are marked as not to be learned."""
    answers = [position for position, turn in enumerate(turns) if turn.role == "assistant"]
    untrained = [position for position in answers if not turns[position].is_trained]
    if len(untrained) == len(answers):
        raise DataError(f"{location}: every answer is marked as not to be learned")
    return tuple(untrained)


def _match_images(
    turns: list[Turn],
    listed: list[ImageSource],
    location: str,
) -> list[ImageSource]:
    """Return the images in the order of their places: the turns' own, or the next one listed."""
    slots = _list_image_slots(turns)
    num_marks = slots.count(None)  # an image part without an image of its own counts, too
    if num_marks != len(listed):
        raise DataError(
            f"{location}: {len(listed)} image(s) but {num_marks} {IMAGE_MARK} mark(s) in the text; "
            f"{_explain_marks(len(listed), num_marks)}"
        )

    waiting = iter(listed)
    return [next(waiting) if image is None else image for image in slots]


def _explain_marks(num_images: int, num_marks: int) -> str:
    """Return how a row gets as many marks as images."""
    if not num_marks:
        return (
            f"put {IMAGE_MARK} into the text where each image belongs, or write content as parts, "
            "one of type image; a row of prompt and answer needs no mark"
        )
    if not num_images:
        return f"give the row its images, or take {IMAGE_MARK} out of the text"
    return "each mark stands for one image, in order"


def _make_message(turn: Turn) -> Message:
    return {
        "role": turn.role,
        "content": _to_typed_content(turn.content),
        **turn.reasoning,  # under the names that chat templates read
    }


def _to_typed_content(content: Iterable[Any]) -> list[dict[str, str]]:
    """Return typed content: an entry for each image, and the texts between them.

    Texts lose their outer line breaks, as those beside an `<image>` mark only set it apart.
    """
    typed = []
    text = ""  # since the last image
    for piece in content:
        if isinstance(piece, str):
            text += piece
            continue
        typed += _to_text_parts(text)
        typed.append({"type": "image"})
        text = ""
    typed += _to_text_parts(text)
    return typed


def _to_text_parts(text: str) -> list[dict[str, str]]:
    """Return a text as typed content; an empty one is no part."""
    stripped = text.strip("\n")
    if not stripped:
        return []
    return [{"type": "text", "text": stripped}]


def _require_turn_order(messages: list[Message], location: str) -> None:
    """Raise DataError unless questions and answers alternate and answers are non-empty texts."""
    roles = [message["role"] for message in messages if message["role"] != "system"]
    num_pairs = len(roles) // 2
    if roles != ["user", "assistant"] * num_pairs:
        raise DataError(f"{location}: turns must alternate, question first, and end in an answer")
    if not roles:
        raise DataError(f"{location}: the conversation must end in an answer")

    answers = [message for message in messages if message["role"] == "assistant"]
    for number, answer in enumerate(answers, start=1):
        if not text_of(answer).strip():
            raise DataError(f"{location}: answer {number} is empty")
        if any(part["type"] == "image" for part in answer["content"]):
            raise DataError(
                f"{location}: answer {number} holds an image; images belong to questions"
            )


# --- fields that nothing reads: harmless, unless what they name belongs to the task


def require_no_unread_media(unread: Iterable[tuple[str, Any]], location: str) -> None:
    """Raise DataError if one of these fields names an image, a video or a sound."""
    for name, value in unread:
        for item in _to_item_list(value):
            _require_no_media(item, name, location)


def media_kind_of(value: Any) -> str | None:
    """Return the kind of a media file: `image`, `video` or `audio`; None for anything else.

    A value may be a file's content, its name, or a list, of which the first such item counts.
    """
    for item in _to_item_list(value):
        kind = _guess_media_kind(item)
        if kind:
            return kind
    return None


def _require_no_media(item: Any, name: str, location: str) -> None:
    if isinstance(item, UnsupportedValue):
        raise DataError(
            f"{location}: nothing reads {name!r}, {item}, which is not supported; "
            "allowed: text and images"
        )

    kind = _guess_media_kind(item)
    shown = format_value(item)
    if kind == "image":
        hint = f"say `columns: {{image: {name}}}` in the recipe"
        if "[]" in name:  # `columns` names fields of the row alone
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
    """Return the kind of a media file by its name; None for any other value.

    An image of `datasets` is `{bytes, path}`, and its path may be empty.
    """
    if isinstance(value, Image.Image):
        return "image"
    if isinstance(value, Mapping):
        if value.keys() != {"bytes", "path"} or not is_filled(value):
            return None
        return _guess_media_kind(value["path"]) or "image"

    if not isinstance(value, str) or len(value) > _MAX_PATH_LENGTH:
        return None
    if any(map(str.isspace, value)):  # prose, not a file's name
        return None

    media_type, _ = guess_type(value, strict=False)
    if not media_type:
        return None
    kind = media_type.split("/")[0]
    return kind if kind in _MEDIA_KINDS else None
