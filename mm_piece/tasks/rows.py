"""From a row of any known format to an example.

* `conversations` or `messages`: a list of turns (`turns`); a `system` text may stand beside it
* a question and an answer: `prompt`, `question`, `query` or `instruction` (with `input`), and
  `answer`, `response` or `output`; earlier pairs of them in `history`. Several right answers are a
  list in `answer`, whose first is trained on, or in `answers`, whose commonest is if there is no
  `answer`.

Images stand in `image`, `images` or `pic_path`, in the order of the `<image>` marks and of the
image parts that name none themselves. A question without marks gets one for each image at its
beginning.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mm_piece.errors import DataError, short
from mm_piece.tasks.examples import Example, Message, text_of
from mm_piece.tasks.inline import image_of
from mm_piece.tasks.pictures import Picture
from mm_piece.tasks.turns import MARK, Turn, pieces, refusal, turns_of
from mm_piece.tasks.unread import kind_of, require_no_file

_TURNS = ("conversations", "messages")
_QUESTIONS = ("question", "query", "instruction")
_ANSWERS = ("answer", "response", "output")
_IMAGES = ("image", "pic_path", "images")
_REFUSED = {
    **dict.fromkeys(("video", "videos"), "videos are"),
    **dict.fromkeys(("audio", "audios"), "audio is"),
}
_READ = {
    *(*_TURNS, "prompt", *_QUESTIONS, *_ANSWERS, "answers", *_IMAGES, *_REFUSED),
    *("id", "system", "input", "history", "kind", "question_type"),
}
_HIDES = {  # a column that was asked for stands before what the row has by itself
    **dict.fromkeys(("prompt", "answer"), _TURNS),
    **dict.fromkeys(("image", "images"), _IMAGES),
    "messages": ("conversations",),
}


def renamed(raw: Any, columns: Mapping[Any, str]) -> Any:
    """The raw row with the fields that `columns` finds in it, without others of their kind."""
    if not isinstance(raw, Mapping):
        return raw
    found = {field: raw[name] for field, name in columns.items() if name in raw}
    hidden = {name for field in found for name in _HIDES.get(field, ())}
    return {**{name: value for name, value in raw.items() if name not in hidden}, **found}


def unread(row: Any) -> set[str]:
    """The fields of a (renamed) row that nothing reads."""
    return {str(n) for n in row if n not in _READ} if isinstance(row, Mapping) else set()


def example_of(
    raw: Any, number: int, source: str, folder: Path, prompt: str | None = None
) -> Example:
    """The example of one raw row; image paths are relative to `folder`.

    `prompt` is the question of rows without one of that name. Raises DataError in one line for a
    row of no known format, turns out of order, videos, and images that do not match their marks.
    """
    where = f"{source} row {number}"
    if not isinstance(raw, Mapping):
        raise DataError(f"{where}: a row must be an object, not {short(raw)}")
    raw = {name: value for name, value in raw.items() if not _is_gap(value)}
    _require_no_video(raw, where)
    listed = _listed_images(raw, folder, where)
    accepted = _accepted(raw, where)
    given = _first(raw, _TURNS)
    if given is not None:
        turns = turns_of(given, folder, where)
    else:
        turns = _pairs(raw, prompt, accepted, where)
        if None not in (piece for _, content in turns for piece in content):
            turns[0][1][:0] = [None] * len(listed)
    if system := _text(raw.get("system"), where):
        turns = [("system", pieces(system, where)), *turns]
    images = _matched(turns, listed, where)
    if not images:
        require_no_file({name: raw[name] for name in raw if name not in _READ}, where)
    messages: list[Message] = [{"role": role, "content": _typed(given)} for role, given in turns]
    _require_order(messages, where)
    kind = str(_first(raw, ("kind", "question_type")) or "")
    return Example(number, messages, images, source, kind, accepted)


def _require_no_video(raw: Mapping[str, Any], where: str) -> None:
    for key, what in _REFUSED.items():
        if raw.get(key):
            raise refusal(what, f"the row has {key!r}", where)
    for name in _IMAGES:
        if kind_of(raw.get(name)) in ("video", "audio"):
            raise refusal("videos and audio are", f"{name!r} is {short(raw[name])}", where)


def _pairs(
    raw: Mapping[str, Any], prompt: str | None, accepted: list[str], where: str
) -> list[Turn]:
    """The turns of a row that has a question and an answer."""
    question, answer = _question(raw, prompt, where), _answer(raw, accepted, where)
    if question is None or answer is None:
        has, lacks = ", ".join(map(str, raw)), "a question" if question is None else "an answer"
        raise DataError(
            f"{where}: no known format; it lacks {lacks}: expected conversations or messages, or "
            "prompt and answer (`columns` may say what they are called, `prompt` may give the "
            f"question); it has {short(has, 200)}"
        )
    try:
        pairs = [*(raw.get("history") or []), (question, answer)]
        return [
            (role, pieces(text, where))
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: history must be a list of pairs of texts") from error


def _question(raw: Mapping[str, Any], prompt: str | None, where: str) -> str | None:
    question = _text(raw.get("prompt"), where)
    if question is None:
        question = prompt if prompt is not None else _text(_first(raw, _QUESTIONS), where)
    if question is None or question != raw.get("instruction"):
        return question
    more = _text(raw.get("input"), where)  # what an instruction is about
    return f"{question}\n{more}" if more else question


def _answer(raw: Mapping[str, Any], accepted: list[str], where: str) -> str | None:
    """The answer to train on: the first of several in `answer`, the commonest of `answers`."""
    answer = _first(raw, _ANSWERS)
    if isinstance(answer, list):
        answer = answer[0] if answer else None
    if answer is None and accepted:
        answer = Counter(accepted).most_common(1)[0][0]  # of equally common ones the first
    return _text(answer, where)


def _accepted(raw: Mapping[str, Any], where: str) -> list[str]:
    """All right answers, where a row has several; VQA gives each as an object with `answer`."""
    given = raw.get("answers")
    if given is None and isinstance(raw.get("answer"), list):
        given = raw["answer"]
    if isinstance(given, Mapping):  # lists side by side, as Arrow may keep a list of objects
        given = given.get("answer")
    listed = given if isinstance(given, list) else [given]
    plain = (a.get("answer", a) if isinstance(a, Mapping) else a for a in listed)
    return [text for text in (_text(answer, where) for answer in plain) if text is not None]


def _is_gap(value: Any) -> bool:
    """Whether a table has nothing there: None, or NaN in a column of numbers."""
    return value is None or isinstance(value, float) and math.isnan(value)


def _text(value: Any, where: str) -> str | None:
    """A text, None for a gap; numbers and truth values are written out."""
    if _is_gap(value):
        return None
    if not isinstance(value, str | bool | int | float):
        raise DataError(f"{where}: a text or a number is expected, not {short(value)}")
    return str(value)


def _first(raw: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The value of the first of some fields that the row has."""
    return next((raw[name] for name in names if name in raw), None)


def _listed_images(raw: Mapping[str, Any], folder: Path, where: str) -> list[Picture]:
    given = _first(raw, _IMAGES)
    images = (image_of(g, folder, where) for g in (given if isinstance(given, list) else [given]))
    return [image for image in images if image is not None]


def _matched(turns: list[Turn], listed: list[Picture], where: str) -> list[Picture]:
    """The images in the order of their places: the turns' own, or the next one listed."""
    places = [piece for _, content in turns for piece in content if not isinstance(piece, str)]
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
