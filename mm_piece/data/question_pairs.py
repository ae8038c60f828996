"""A question and an answer that stand in fields of their own, and the pairs before them."""

from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from mm_piece.data.conversations import Turn, split_at_marks
from mm_piece.data.fields import TrackedFields, is_filled, to_object_list
from mm_piece.errors import DataError, format_value
from mm_piece.metrics.answers import ANSWER_METRICS

QUESTION_FIELDS = ("prompt", "question", "query", "instruction")
ANSWER_FIELDS = ("answer", "response", "output")


def parse_pair_turns(
    row: TrackedFields,
    prompt: str | None,
    accepted: list[str],
    location: str,
) -> list[Turn]:
    """Return the turns of a row that has a question and an answer.

    `prompt` is the question of a row without one of that name; `accepted` are the row's right
    answers. Raises DataError for a row that lacks either, and so is of no known format.
    """
    question = _parse_question(row, prompt, location)
    answer = _parse_answer(row, accepted, location)
    if question is None or answer is None:
        lacks = "a question" if question is None else "an answer"
        fields = ", ".join(map(str, row.raw_values))
        has = format_value(fields, 200) if fields else "no field"
        raise DataError(
            f"{location}: no known format; it lacks {lacks}: expected conversations or messages, "
            "or prompt and answer (`columns` may say what they are called, `prompt` may give the "
            f"question); it has {has}"
        )

    turns = []
    pairs = [*_parse_history(row, location), [question, answer]]
    for asked, answered in pairs:
        user_content = split_at_marks(asked, location)
        turns.append(Turn("user", user_content))
        assistant_content = split_at_marks(answered, location)
        turns.append(Turn("assistant", assistant_content))
    return turns


def parse_accepted_answers(row: TrackedFields, location: str) -> list[str]:
    """Return all right answers, where a row has several."""
    given = row.read_value("answers")
    # a list in `answer` is what others write in `answers`
    if not is_filled(given) and isinstance(row.raw_values.get("answer"), list):
        given = row.read_value("answer")
    listed = to_object_list(given)
    if not isinstance(listed, list):
        listed = [listed]

    accepted = []
    for value in listed:
        if isinstance(value, Mapping):  # VQA gives each as an object with `answer`
            fields = row.add_nested_fields(value, "answers[]")
            value = fields.read_value("answer")
        if is_filled(value):
            text = text_of_value(value, location)
            accepted.append(text or "")
    return accepted


def require_accepted_answer(
    answer: str,
    accepted: list[str],
    location: str,
) -> None:
    """Raise DataError if a row's answer would score nothing, as only others count as right.

    It counts as right if one metric that compares whole answers scores it.
    """
    if not accepted or answer in accepted:
        return

    for name in ("exact", "vqa", "choice"):
        score = ANSWER_METRICS[name]
        if score([answer], [accepted])[0]:
            return

    raise DataError(
        f"{location}: the answer {format_value(answer)} is none of its `answers`, which are all "
        f"that count as right: {format_value(accepted)}; where they are options to choose from, "
        "let `columns: {answers: …}` name the field of the right one"
    )


def text_of_value(value: Any, location: str) -> str | None:
    """Return a value as a text, None for nothing; numbers and truth values are written out."""
    if isinstance(value, str):
        return str(value)
    if not is_filled(value):
        return None
    if not isinstance(value, bool | int | float | Decimal):
        raise DataError(f"{location}: a text or a number is expected, not {format_value(value)}")
    return str(value)


def _parse_question(row: TrackedFields, prompt: str | None, location: str) -> str | None:
    """Return the question: the row's `prompt`, else the recipe's, else the row's other fields."""
    question = prompt
    if prompt is None or row.has_value("prompt"):
        value = row.read_value(*QUESTION_FIELDS)
        question = text_of_value(value, location)
    if question is None or question != row.raw_values.get("instruction"):
        return question

    # an instruction may have an input that it is about
    given = row.read_value("input")
    text = text_of_value(given, location)
    if not text:
        return question
    return f"{question}\n{text}"


def _parse_history(row: TrackedFields, location: str) -> list[list[str]]:
    """Return the pairs of a question and an answer before the row's own."""
    pairs = row.read_value("history")
    if not is_filled(pairs):
        return []

    if not isinstance(pairs, list):
        pairs = [pairs]  # it fails below: the message says what a history is
    for pair in pairs:
        if not isinstance(pair, list) or list(map(type, pair)) != [str, str]:
            raise DataError(f"{location}: history must be a list of pairs of texts")
    return pairs


def _parse_answer(row: TrackedFields, accepted: list[str], location: str) -> str | None:
    """Return the answer to train on: the first of `answer`, else the commonest of `answers`."""
    answer = row.read_value(*ANSWER_FIELDS)
    if isinstance(answer, list):
        filled = filter(is_filled, answer)
        answer = next(filled, None)

    if not is_filled(answer) and accepted:
        counts = Counter(accepted)
        [(answer, _)] = counts.most_common(1)  # of equally common ones the first
    return text_of_value(answer, location)
