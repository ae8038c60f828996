"""Whether the answers of test rows can score what they should by their task's metric."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mm_piece.data import Example, ExampleDataset
from mm_piece.data.processor import Processor, tokenizer_of
from mm_piece.metrics.answers import ANSWER_METRICS, normalise_text
from mm_piece.metrics.choice import parse_option


def count_unrewarded_answers(
    examples: Sequence[Example],
    metric: str,
) -> int:
    """Return how many rows hold an answer that scores nothing against their own `answers`."""
    own = []
    accepted = []
    for example in examples:
        if example.accepted:
            own.append(example.answer)
            accepted.append(example.accepted)
    if not own:
        return 0

    # all rows at once: some metrics weigh words by how many rows hold them
    score = ANSWER_METRICS[metric]
    own_scores = score(own, accepted)
    return own_scores.count(0)


def count_ambiguous_answers(
    examples: Sequence[Example],
    metric: str,
) -> int:
    """Return how many rows of a multiple choice count several options as right.

    Options are not answers that mean the same: one of them does not answer another.
    """
    if metric != "choice":
        return 0

    num_ambiguous = 0
    score = ANSWER_METRICS[metric]
    for example in examples:
        options = example.accepted
        first_alone = [options[:1]] * len(options)
        scores = score(options, first_alone)
        if not all(scores):
            num_ambiguous += 1
    return num_ambiguous


def has_no_option(
    examples: ExampleDataset,
    metric: str,
) -> bool:
    """Whether no answer of a multiple choice is an option: a letter, or a text that the row lists.

    Options stand in lists of the row or in its question.
    """
    if metric != "choice":
        return False

    for position, example in enumerate(examples):
        raw = examples.read_raw_row(position)
        listed = set(_iter_listed_texts(raw))
        question = normalise_text(example.prompt)
        for answer in _right_answers(example):
            if parse_option(answer).letters:
                return False

            text = normalise_text(answer)
            # between spaces: whole words alone
            is_asked = f" {text} " in f" {question} "
            if text in listed or is_asked:
                return False
    return True


def count_answer_tokens(
    example: Example,
    processor: Processor,
) -> int:
    """Return how many tokens the shortest right answer of a row has."""
    tokenizer = tokenizer_of(processor)
    lengths = []
    for answer in _right_answers(example):
        encoded = tokenizer(answer, add_special_tokens=False)
        ids = encoded["input_ids"]
        lengths.append(len(ids))
    return min(lengths)


def _right_answers(example: Example) -> list[str]:
    if example.accepted:
        return example.accepted
    return [example.answer]


def _iter_listed_texts(raw: Mapping[Any, Any]) -> Iterator[str]:
    """Yield the normalised texts of a row's lists but its answers, such as `choices`."""
    for name, value in raw.items():
        if name == "answers" or not isinstance(value, list):
            continue
        for item in value:
            if isinstance(item, str):
                yield normalise_text(item)
