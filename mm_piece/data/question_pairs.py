"""A question and an answer that stand in fields of their own, and the pairs before them."""

from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from mm_piece.data.conversations import Turn, pieces
from mm_piece.data.fields import Fields, is_filled, list_objects
from mm_piece.errors import DataError, short
from mm_piece.metrics.answers import METRICS

QUESTIONS = ("prompt", "question", "query", "instruction")
ANSWERS = ("answer", "response", "output")


def pair_turns(row: Fields, prompt: str | None, accepted: list[str], where: str) -> list[Turn]:
    """The turns of a row that has a question and an answer."""
    question, answer = _question(row, prompt, where), _answer(row, accepted, where)
    if question is None or answer is None:
        has = ", ".join(map(str, row.given))
        lacks = "a question" if question is None else "an answer"
        raise DataError(
            f"{where}: no known format; it lacks {lacks}: expected conversations or messages, or "
            "prompt and answer (`columns` may say what they are called, `prompt` may give the "
            f"question); it has {short(has, 200)}"
        )
    return [
        Turn(role, pieces(text, where))
        for pair in (*_history(row, where), (question, answer))
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def accepted_answers(row: Fields, where: str) -> list[str]:
    """All right answers, where a row has several; VQA gives each as an object with `answer`."""
    given = row.take("answers")
    if not is_filled(given) and isinstance(row.given.get("answer"), list):
        given = row.take("answer")
    listed = list_objects(given)
    plain = (
        row.inside(one, "answers[]").take("answer") if isinstance(one, Mapping) else one
        for one in (listed if isinstance(listed, list) else [listed])
    )
    return [text_of_value(one, where) or "" for one in plain if is_filled(one)]


def require_accepted(answer: str, accepted: list[str], where: str) -> None:
    """Raise DataError if a row's answer would score nothing, as only others count as right.

    The rules that compare whole answers decide: one that finds it among them is enough.
    """
    if not accepted or answer in accepted:
        return
    rules = (METRICS[name] for name in ("exact", "vqa", "choice"))
    if not any(rule([answer], [accepted])[0] for rule in rules):
        raise DataError(
            f"{where}: the answer {short(answer)} is none of its `answers`, which are all that "
            f"count as right: {short(accepted)}; where they are options to choose from, let "
            "`columns: {answers: …}` name the field of the right one"
        )


def text_of_value(value: Any, where: str) -> str | None:
    """A text, None for nothing; numbers and truth values are written out."""
    if not isinstance(value, str) and not is_filled(value):
        return None
    if not isinstance(value, str | bool | int | float | Decimal):
        raise DataError(f"{where}: a text or a number is expected, not {short(value)}")
    return str(value)


def _question(row: Fields, prompt: str | None, where: str) -> str | None:
    """The question: the row's `prompt`, else the recipe's, else what else the row has."""
    if prompt is not None and not row.holds("prompt"):
        question: str | None = prompt
    else:
        question = text_of_value(row.take(*QUESTIONS), where)
    if question is None or question != row.given.get("instruction"):
        return question
    more = text_of_value(row.take("input"), where)  # what an instruction is about
    return f"{question}\n{more}" if more else question


def _history(row: Fields, where: str) -> list[list[str]]:
    """The pairs of texts before the question."""
    given = row.take("history")
    if not is_filled(given):
        return []
    pairs = given if isinstance(given, list) else [given]
    for pair in pairs:
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise DataError(f"{where}: history must be a list of pairs of texts")
    return pairs


def _answer(row: Fields, accepted: list[str], where: str) -> str | None:
    """The answer to train on: the first of several in `answer`, the commonest of `answers`."""
    answer = row.take(*ANSWERS)
    if isinstance(answer, list):
        answer = next(filter(is_filled, answer), None)
    if not is_filled(answer) and accepted:
        answer = Counter(accepted).most_common(1)[0][0]  # of equally common ones the first
    return text_of_value(answer, where)
