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
    row: TrackedFields, prompt: str | None, accepted: list[str], location: str
) -> list[Turn]:
    """The turns of a row that has a question and an answer."""
    question, answer = (
        _parse_question(row, prompt, location),
        _parse_answer(row, accepted, location),
    )
    if question is None or answer is None:
        has = ", ".join(map(str, row.raw_values))
        lacks = "a question" if question is None else "an answer"
        raise DataError(
            f"{location}: no known format; it lacks {lacks}: expected conversations or "
            "messages, or "
            "prompt and answer (`columns` may say what they are called, `prompt` may give the "
            f"question); it has {format_value(has, 200)}"
        )
    return [
        Turn(role, split_at_marks(text, location))
        for pair in (*_parse_history(row, location), (question, answer))
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def parse_accepted_answers(row: TrackedFields, location: str) -> list[str]:
    """All right answers, where a row has several; VQA gives each as an object with `answer`."""
    given = row.read_value("answers")
    if not is_filled(given) and isinstance(row.raw_values.get("answer"), list):
        given = row.read_value("answer")
    listed = to_object_list(given)
    plain = (
        row.add_nested_fields(one, "answers[]").read_value("answer")
        if isinstance(one, Mapping)
        else one
        for one in (listed if isinstance(listed, list) else [listed])
    )
    return [text_of_value(one, location) or "" for one in plain if is_filled(one)]


def require_accepted_answer(answer: str, accepted: list[str], location: str) -> None:
    """Raise DataError if a row's answer would score nothing, as only others count as right.

    The rules that compare whole answers decide: one that finds it among them is enough.
    """
    if not accepted or answer in accepted:
        return
    rules = (ANSWER_METRICS[name] for name in ("exact", "vqa", "choice"))
    if not any(rule([answer], [accepted])[0] for rule in rules):
        raise DataError(
            f"{location}: the answer {format_value(answer)} is none of its `answers`, which "
            "are all that "
            f"count as right: {format_value(accepted)}; where they are options to choose from, let "
            "`columns: {answers: …}` name the field of the right one"
        )


def text_of_value(value: Any, location: str) -> str | None:
    """A text, None for nothing; numbers and truth values are written out."""
    if not isinstance(value, str) and not is_filled(value):
        return None
    if not isinstance(value, str | bool | int | float | Decimal):
        raise DataError(f"{location}: a text or a number is expected, not {format_value(value)}")
    return str(value)


def _parse_question(row: TrackedFields, prompt: str | None, location: str) -> str | None:
    """The question: the row's `prompt`, else the recipe's, else what else the row has."""
    if prompt is not None and not row.has_value("prompt"):
        question: str | None = prompt
    else:
        question = text_of_value(row.read_value(*QUESTION_FIELDS), location)
    if question is None or question != row.raw_values.get("instruction"):
        return question
    more = text_of_value(row.read_value("input"), location)  # what an instruction is about
    return f"{question}\n{more}" if more else question


def _parse_history(row: TrackedFields, location: str) -> list[list[str]]:
    """The pairs of texts before the question."""
    given = row.read_value("history")
    if not is_filled(given):
        return []
    pairs = given if isinstance(given, list) else [given]
    for pair in pairs:
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise DataError(f"{location}: history must be a list of pairs of texts")
    return pairs


def _parse_answer(row: TrackedFields, accepted: list[str], location: str) -> str | None:
    """The answer to train on: the first of several in `answer`, the commonest of `answers`."""
    answer = row.read_value(*ANSWER_FIELDS)
    if isinstance(answer, list):
        answer = next(filter(is_filled, answer), None)
    if not is_filled(answer) and accepted:
        answer = Counter(accepted).most_common(1)[0][0]  # of equally common ones the first
    return text_of_value(answer, location)
