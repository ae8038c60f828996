"""Whether the answers of test rows can score what they should by their task's metric."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mm_piece.data import Example, ExampleDataset
from mm_piece.data.processor import Processor, tokenizer_of
from mm_piece.metrics.answers import ANSWER_METRICS, normalise_text
from mm_piece.metrics.choice import parse_option


def count_unrewarded_answers(examples: Sequence[Example], metric: str) -> int:
    """Return how many rows hold an answer that scores nothing against their own `answers`."""
    with_accepted = [example for example in examples if example.accepted]
    if not with_accepted:
        return 0

    # all rows at once: some metrics weigh words by how many rows hold them
    score = ANSWER_METRICS[metric]
    own = [example.answer for example in with_accepted]
    accepted = [example.accepted for example in with_accepted]
    own_scores = score(own, accepted)
    return sum(own_score == 0 for own_score in own_scores)


def count_ambiguous_answers(examples: Sequence[Example], metric: str) -> int:
    """Return how many rows of a multiple choice count several options as right.

    Options are not answers that mean the same: one of them does not answer another.
    """
    if metric != "choice":
        return 0

    num_ambiguous = 0
    score = ANSWER_METRICS[metric]
    for example in examples:
        options = example.accepted
        scores = score(options, [options[:1]] * len(options))
        if not all(scores):
            num_ambiguous += 1
    return num_ambiguous


def has_no_option(examples: ExampleDataset, metric: str) -> bool:
    """Whether no answer of a multiple choice is an option: a letter, or a text that the row lists.

    Options stand in lists of the row or in its question.
    """
    if metric != "choice":
        return False

    for position, example in enumerate(examples):
        raw = examples.read_raw_row(position)
        listed = {normalise_text(text) for text in _iter_listed_texts(raw)}
        question = normalise_text(example.prompt)
        for answer in example.accepted or [example.answer]:
            text = normalise_text(answer)
            is_named = text in listed or f" {text} " in f" {question} "
            if parse_option(answer).letters or is_named:
                return False
    return True


def count_answer_tokens(example: Example, processor: Processor) -> int:
    """Return how many tokens the shortest right answer of a row has."""
    tokenizer = tokenizer_of(processor)
    lengths = []
    for answer in example.accepted or [example.answer]:
        encoded = tokenizer(answer, add_special_tokens=False)
        lengths.append(len(encoded["input_ids"]))
    return min(lengths)


def _iter_listed_texts(raw: Mapping[Any, Any]) -> Iterator[str]:
    """Yield the texts of a row's lists but its answers, such as `choices`."""
    for name, value in raw.items():
        if isinstance(value, list) and name != "answers":
            yield from (item for item in value if isinstance(item, str))
