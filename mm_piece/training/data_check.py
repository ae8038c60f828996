"""What the rows of a task look like to its base: counts, notes and errors, for `mm-piece check`."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mm_piece.data import IGNORE_INDEX, Example, ExampleDataset, encode_truncated, iter_problems
from mm_piece.data.answers import find_omitted_texts
from mm_piece.data.processor import Processor, tokenizer_of
from mm_piece.data.special_tokens import has_special_token
from mm_piece.errors import DataError
from mm_piece.evaluation.matrix import find_absent_columns, read_task_source
from mm_piece.metrics.answers import ANSWER_METRICS
from mm_piece.recipe import GeneralTask, Task
from mm_piece.training.base_parts import BaseParts

ProgressWrapper = Callable[[Iterable[Any], str], Iterable[Any]]
TokenText = tuple[str, bool]  # its text, and whether it is supervised


@dataclass
class SplitCheck:
    """A train or test source: what it holds, and what is wrong with it."""

    source: str
    asked: bool = False  # a test source: its answers do not count as tokens
    rows: int = 0
    images: int = 0
    text_only: int = 0
    repeated: int = 0  # rows that stood there before, question, images and answer
    encoded: int = 0  # rows that were looked at token by token
    lengths: list[int] = field(default_factory=list)  # tokens of those rows, before any cut
    truncated: int = 0  # of those rows
    special: int = 0  # of those rows: what a text holds becomes a token with a meaning of its own
    unread: list[str] = field(default_factory=list)  # fields of rows that nothing reads
    left_out: dict[str, int] = field(default_factory=dict)  # what the template leaves out: rows
    unrewarded: int = 0  # rows whose own answer scores nothing
    ambiguous: int = 0  # rows of a multiple choice that count several options as right
    errors: list[str] = field(default_factory=list)


@dataclass
class TaskCheck:
    """One task: its splits, and how they relate."""

    name: str
    metric: str
    max_length: int | None
    train: SplitCheck | None
    test: SplitCheck
    shared: int = 0  # test rows whose question and images stand in the train set too
    commonest: str = ""  # the commonest answer of the test set
    floor: float = 0.0  # what always giving it would score
    example: list[TokenText] = field(default_factory=list)


def check_task(
    task: GeneralTask, parts: BaseParts, rows: int, progress: ProgressWrapper
) -> TaskCheck:
    train: SplitCheck | None = None
    training_examples: ExampleDataset | None = None
    if isinstance(task, Task):
        train, training_examples = _check_split(task, task.train, parts, rows, progress)
    test, test_examples = _check_split(task, task.test, parts, rows, progress, asked=True)
    if not (test.errors or (train and train.errors)):
        test.errors += find_absent_columns(
            task, [part for part in (training_examples, test_examples) if part]
        )
    known = {_question_digest(example) for example in training_examples or ()}
    shared = sum(_question_digest(example) in known for example in test_examples or ())
    found = TaskCheck(task.name, task.metric, task.max_length, train, test, shared)
    if test_examples:
        found.commonest, found.floor = _score_commonest_answer(task, test_examples)
        _check_answers(test, test_examples, task.metric)
    shown = training_examples or test_examples
    if shown and not (test.errors or (train and train.errors)):
        found.example = _decode_tokens(shown[0], parts.processor, task)
    return found


def _check_split(
    task: GeneralTask,
    source: str,
    parts: BaseParts,
    most: int,
    progress: ProgressWrapper,
    *,
    asked: bool = False,
) -> tuple[SplitCheck, ExampleDataset | None]:
    split = SplitCheck(source, asked)
    split.errors = [
        str(error) for error in iter_problems(source, task.images, task.columns, task.prompt)
    ]
    if split.errors:
        return split, None
    examples = read_task_source(task, source)
    split.rows = len(examples)
    split.images = sum(len(example.images) for example in examples)
    split.text_only = sum(not example.images for example in examples)
    split.unread = sorted(examples.find_unread_fields())
    split.repeated = split.rows - len({example.compute_digest() for example in examples})
    chosen = _spread_evenly(split.rows, most)
    for position in progress(chosen, f"{task.name}: {source}"):
        _check_example(split, examples[position], parts, task)
    return split, examples


def _check_example(
    split: SplitCheck, example: Example, parts: BaseParts, task: GeneralTask
) -> None:
    """Decode and tokenize one row."""
    processor = parts.processor
    split.encoded += 1
    split.special += bool(has_special_token(example, processor))
    try:
        inputs, _ = encode_truncated(example, processor, None, split.asked)
        parts.require_fit(example, inputs)
        for name in find_omitted_texts(example, processor):
            split.left_out[name] = split.left_out.get(name, 0) + 1
        split.lengths.append(inputs["input_ids"].shape[1])
        if split.lengths[-1] > (task.max_length or sys.maxsize):
            split.truncated += encode_truncated(example, processor, task.max_length, split.asked)[1]
    except DataError as error:
        split.errors.append(str(error))


def _check_answers(split: SplitCheck, examples: Sequence[Example], metric: str) -> None:
    """Count the rows whose `answers` most likely are not meant as all that count as right."""
    rows = [(example.answer, example.accepted) for example in examples if example.accepted]
    if not rows:
        return
    scores = ANSWER_METRICS[metric]([own for own, _ in rows], [accepted for _, accepted in rows])
    split.unrewarded = sum(score == 0 for score in scores)
    if metric == "choice":
        split.ambiguous = sum(
            not all(ANSWER_METRICS[metric](accepted, [accepted[:1]] * len(accepted)))
            for _, accepted in rows
        )


def iter_notes(split: SplitCheck, max_length: int | None, max_positions: int) -> Iterator[str]:
    if split.unread:
        yield f"nothing reads the fields {', '.join(split.unread)}"
    for name, rows in split.left_out.items():
        yield f"the base's chat template leaves out {name} in {rows} rows"
    if split.unrewarded:
        yield f"{split.unrewarded} rows hold an answer that scores 0 against their own `answers`"
    if split.ambiguous:
        yield (
            f"{split.ambiguous} rows count several options as right: all of their `answers`; if "
            "those are the options, let `columns: {answers: …}` name the field of the right one"
        )
    if split.special:
        yield f"{split.special} rows hold special tokens of the base, which are not read as text"
    long = sum(length > max_positions for length in split.lengths) if max_length is None else 0
    if long:
        yield f"{long} rows are longer than the base's {max_positions} positions; set max_length"


def _spread_evenly(count: int, most: int) -> Sequence[int]:
    """At most `most` positions out of `count`, evenly spread."""
    return range(count) if count <= most else [count * n // most for n in range(most)]


def _question_digest(example: Example) -> str:
    """What identifies a question: its texts and images, without the answer."""
    return replace(example, messages=example.messages[:-1], untrained_turns=()).compute_digest()


def _score_commonest_answer(task: GeneralTask, examples: Sequence[Example]) -> tuple[str, float]:
    """The commonest answer, and what a model that always gives it would score."""
    accepted = [example.accepted or [example.answer] for example in examples]
    commonest = Counter(answers[0] for answers in accepted).most_common(1)[0][0]
    scores = ANSWER_METRICS[task.metric]([commonest] * len(accepted), accepted)
    return commonest, sum(scores) / len(scores)


def _decode_tokens(example: Example, processor: Processor, task: GeneralTask) -> list[TokenText]:
    """The tokens of an encoded example as text, neighbours of one kind joined."""
    inputs, _ = encode_truncated(example, processor, task.max_length)
    tokenizer = tokenizer_of(processor)
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(inputs["input_ids"][0], inputs["labels"][0], strict=True):
        supervised = int(label) != IGNORE_INDEX
        if not runs or runs[-1][1] != supervised:
            runs.append(([], supervised))
        runs[-1][0].append(int(token))
    return [(tokenizer.decode(ids), supervised) for ids, supervised in runs]
