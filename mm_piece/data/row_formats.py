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

from mm_piece.data.arrow_features import Unsupported
from mm_piece.data.conversations import MARK, Turn, pieces, refusal, turns_of
from mm_piece.data.example import Example, Message, text_of
from mm_piece.data.fields import Fields, is_filled, is_gap, list_objects
from mm_piece.data.images import Picture, image_of
from mm_piece.data.question_pairs import (
    ANSWERS,
    QUESTIONS,
    accepted_answers,
    pair_turns,
    require_accepted,
    text_of_value,
)
from mm_piece.errors import DataError, short

_TURNS = ("conversations", "messages")
_IMAGES = ("image", "pic_path", "images")
_REFUSED = {
    **dict.fromkeys(("video", "videos"), "videos are"),
    **dict.fromkeys(("audio", "audios"), "audio is"),
}
_HIDES = {  # a column that was asked for stands before what the row has by itself
    **dict.fromkeys(("prompt", "answer"), _TURNS),
    **dict.fromkeys(("image", "images"), _IMAGES),
    "messages": ("conversations",),
}


def fields_of(raw: Mapping[Any, Any], columns: Mapping[Any, str]) -> Fields:
    """The fields of a raw row, with those that `columns` finds in it in place of its own.

    A column that is empty in a row hides nothing that the row has by itself.
    """
    mapped = {field: raw[name] for field, name in columns.items() if name in raw}
    found = {field: value for field, value in mapped.items() if is_filled(value)}
    others = {name for field in found for name in _HIDES.get(field, ())} - found.keys()
    hidden = (others | found.keys()) - set(columns.values())

    own = {name: v for name, v in raw.items() if name not in others and not is_gap(v)}
    fields = Fields({**mapped, **own, **found})
    fields.hidden = {name: raw[name] for name in raw if name in hidden}
    fields.read |= set(columns.values()) - found.keys()
    return fields


def example_of(
    row: Fields, number: int, source: str, folder: Path, prompt: str | None = None
) -> Example:
    """The example of one row; every field that is read is taken.

    Image paths are relative to `folder`; `prompt` is the question of rows without one of that name.
    Raises DataError in one line for a row of no known format, turns out of order, videos, and
    images that do not match their marks.
    """
    where = f"{source} row {number}"
    row.take("id")
    _require_no_video(row, where)
    listed = _listed_images(row, folder, where)
    accepted = accepted_answers(row, where)

    alone = not row.holds(*QUESTIONS, *ANSWERS, "answers")
    name = row.choose(*_TURNS) if alone or row.holds(*_TURNS) else None
    if name:
        turns = turns_of(row.given[name], folder, where, row, name)
    else:
        turns = _with_marks(pair_turns(row, prompt, accepted, where), len(listed))
    turns = _with_system(turns, text_of_value(row.take("system"), where), where)

    images = _matched(turns, listed, where)
    kind = str(row.take("kind", "question_type") or "")
    if not images:
        require_no_file(row.unread(), where)

    messages: list[Message] = [
        {"role": turn.role, "content": _typed(turn.content), **turn.reasoning} for turn in turns
    ]
    _require_order(messages, where)
    require_accepted(text_of(messages[-1]), accepted, where)
    unlearned = _unlearned(turns, where)
    return Example(number, messages, images, source, kind, accepted, unlearned)


def _require_no_video(row: Fields, where: str) -> None:
    for key, what in _REFUSED.items():
        if row.holds(key):
            raise refusal(what, f"the row has {key!r}", where)
    for name in _IMAGES:
        if kind_of(row.given.get(name)) in ("video", "audio"):
            raise refusal("videos and audio are", f"{name!r} is {short(row.given[name])}", where)


def _listed_images(row: Fields, folder: Path, where: str) -> list[Picture]:
    name = row.choose(*_IMAGES)
    if name is None:
        return []
    given = list_objects(row.given[name])
    listed, path = (given, f"{name}[]") if isinstance(given, list) else ([given], name)
    images = (image_of(one, folder, where, row, path) for one in listed)
    return [image for image in images if image is not None]


def _with_marks(turns: list[Turn], images: int) -> list[Turn]:
    """The turns; without any mark, the first question gets one for each image."""
    if not all(isinstance(piece, str) for turn in turns for piece in turn.content):
        return turns
    first = turns[0]._replace(content=[*[None] * images, *turns[0].content])
    return [first, *turns[1:]]


def _with_system(turns: list[Turn], system: str | None, where: str) -> list[Turn]:
    """The turns after the row's system text, if there is one; it stands in for an empty turn."""
    if not is_filled(system):
        return turns
    others = [turn for turn in turns if turn.role != "system" or is_filled(turn.content)]
    return [Turn("system", pieces(str(system), where)), *others]


def _unlearned(turns: list[Turn], where: str) -> tuple[int, ...]:
    """The positions of the answers that are marked as not to be learned."""
    answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
    unlearned = tuple(number for number in answers if not turns[number].learned)
    if len(unlearned) == len(answers):
        raise DataError(f"{where}: every answer is marked as not to be learned")
    return unlearned


def _matched(turns: list[Turn], listed: list[Picture], where: str) -> list[Picture]:
    """The images in the order of their places: the turns' own, or the next one listed."""
    places = [piece for turn in turns for piece in turn.content if not isinstance(piece, str)]
    if places.count(None) != len(listed):
        raise DataError(
            f"{where}: {len(listed)} image(s) but {places.count(None)} {MARK} mark(s) in the text"
        )
    waiting = iter(listed)
    return [next(waiting) if piece is None else piece for piece in places]


def _typed(content: Iterable[Any]) -> list[dict[str, str]]:
    """Typed content: an image entry for each image, text between them without its outer breaks."""
    parts = [{"type": "text", "text": ""}]
    for piece in content:
        if isinstance(piece, str):
            parts[-1]["text"] += piece
        else:
            parts += [{"type": "image"}, {"type": "text", "text": ""}]
    stripped = ({k: v.strip("\n") for k, v in part.items()} for part in parts)
    return [part for part in stripped if part.get("text") != ""]


def _require_order(messages: list[Message], where: str) -> None:
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise DataError(f"{where}: turns must alternate, question first, and end in an answer")
    if not roles:
        raise DataError(f"{where}: the conversation must end in an answer")
    for number, message in enumerate((m for m in messages if m["role"] == "assistant"), start=1):
        if not text_of(message).strip():
            raise DataError(f"{where}: answer {number} is empty")
        if any(part["type"] == "image" for part in message["content"]):
            raise DataError(f"{where}: answer {number} holds an image; images belong to questions")


# --- fields that nothing reads: harmless, unless what they name belongs to the task


def require_no_file(unread: Iterable[tuple[str, Any]], where: str) -> None:
    """Raise DataError for an image, video or sound that the row names in one of these fields."""
    for name, value in unread:
        for found in _items(value):
            _require_none(found, name, where)


def kind_of(value: Any) -> str | None:
    """`image`, `video` or `audio` for such a file, its name, or a list with one; else None."""
    return next((kind for item in _items(value) if (kind := _kind(item))), None)


def _require_none(found: Any, name: str, where: str) -> None:
    kind, shown = _kind(found), short(found)
    if isinstance(found, Unsupported):
        raise DataError(
            f"{where}: nothing reads {name!r}, {found}, which is not supported; "
            "allowed: text and images"
        )
    if kind == "image":
        hint = f"say `columns: {{image: {name}}}` in the recipe"
        if "[]" in name:
            hint = "images stand in the row's `images` or in parts of type image"
        raise DataError(f"{where}: nothing reads {name!r}, which names the image {shown}; {hint}")
    if kind:
        raise DataError(
            f"{where}: videos and audio are not supported: {name!r} names {shown}; "
            "allowed: text and images"
        )


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _kind(value: Any) -> str | None:
    """What kind of file a value is or names; an image of `datasets` is `{bytes, path}`."""
    if isinstance(value, Image.Image):
        return "image"
    if isinstance(value, Mapping) and value.keys() == {"bytes", "path"} and is_filled(value):
        return _kind(value["path"]) or "image"
    if not isinstance(value, str) or len(value) > 4096 or any(c.isspace() for c in value):
        return None
    kind, _, _ = (guess_type(value, strict=False)[0] or "").partition("/")
    return kind if kind in ("image", "video", "audio") else None
