"""What the rows of a task look like to its base: counts, notes and errors, for `mm-piece check`."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mm_piece.data import (
    IGNORE_INDEX,
    Example,
    ExampleDataset,
    encode_truncated,
    find_absent_columns,
    iter_problems,
)
from mm_piece.data.answers import find_omitted_texts
from mm_piece.data.processor import Processor, tokenizer_of
from mm_piece.data.special_tokens import has_special_token
from mm_piece.errors import DataError
from mm_piece.evaluation.matrix import open_task_source
from mm_piece.metrics.answers import ANSWER_METRICS
from mm_piece.recipe import GeneralTask, Task
from mm_piece.training.answer_check import (
    count_ambiguous_answers,
    count_answer_tokens,
    count_unrewarded_answers,
    has_no_option,
)
from mm_piece.training.base_parts import BaseParts

ProgressWrapper = Callable[[Iterable[Any], str], Iterable[Any]]
TokenText = tuple[str, bool]  # its text, and whether it is supervised


@dataclass
class SplitCheck:
    """A train or test source: what it holds, and what is wrong with it."""

    source: str
    asked: bool = False  # a test source: its answers do not count as tokens
    readable: bool = True  # its file, folder or data set could be opened
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
    optionless: bool = False  # a multiple choice in which no answer is an option
    answer_lengths: list[int] = field(default_factory=list)  # tokens, of a test source's `encoded`
    errors: list[str] = field(default_factory=list)


@dataclass
class TaskCheck:
    """One task: its splits, and how they relate."""

    name: str
    metric: str
    max_length: int | None
    train: SplitCheck | None
    test: SplitCheck
    max_new_tokens: int
    shared: int = 0  # test rows whose question and images stand in the train set too
    commonest: str = ""  # the commonest answer of the test set
    floor: float = 0.0  # what always giving it would score
    example: list[TokenText] = field(default_factory=list)

    @property
    def splits(self) -> list[SplitCheck]:
        """Its sources; a general task is not trained."""
        if self.train is None:
            return [self.test]
        return [self.train, self.test]


def check_task(
    task: GeneralTask,
    parts: BaseParts,
    rows: int,
    progress: ProgressWrapper,
) -> TaskCheck:
    """Read a task's sources; decode and tokenize up to `rows` rows of each."""
    train = SplitCheck(task.train) if isinstance(task, Task) else None
    test = SplitCheck(task.test, asked=True)
    found = TaskCheck(
        task.name,
        task.metric,
        task.max_length,
        train,
        test,
        max_new_tokens=task.max_new_tokens,
    )

    opened = _open_splits(task, found)
    if opened is None:
        return found

    sound = {}
    for split, examples in opened:
        if _check_split(split, examples, parts, task, rows, progress):
            sound[split.asked] = examples
    training_examples = sound.get(False)
    test_examples = sound.get(True)

    found.shared = _count_shared_questions(training_examples or (), test_examples or ())
    if test_examples:
        found.commonest, found.floor = _score_commonest_answer(task, test_examples)
        test.unrewarded = count_unrewarded_answers(test_examples, task.metric)
        test.ambiguous = count_ambiguous_answers(test_examples, task.metric)
        test.optionless = has_no_option(test_examples, task.metric)

    shown = training_examples or test_examples
    if shown and not any(split.errors for split in found.splits):
        found.example = _decode_tokens(shown[0], parts.processor, task)
    return found


def _open_splits(
    task: GeneralTask,
    found: TaskCheck,
) -> list[tuple[SplitCheck, ExampleDataset]] | None:
    """Open a task's sources; None if its columns are in none of them.

    Each row would lack such a column: that is one error of the task, and no row is looked at.
    """
    opened = []
    for split in found.splits:
        try:
            opened.append((split, open_task_source(task, split.source)))
        except DataError as error:
            split.readable = False
            split.errors.append(str(error))

    # a source that cannot be opened may have the column
    if len(opened) == len(found.splits):
        absent_columns = find_absent_columns([examples for _, examples in opened])
        if absent_columns:
            for split in found.splits:
                split.errors.append(f"task {task.name!r}: {absent_columns}")
            return None
    return opened


def _check_split(
    split: SplitCheck,
    examples: ExampleDataset,
    parts: BaseParts,
    task: GeneralTask,
    max_rows: int,
    progress: ProgressWrapper,
) -> bool:
    """Look at every row of one source; return whether all of them are sound."""
    split.errors = [str(problem) for problem in iter_problems(examples)]
    if split.errors:
        return False

    digests = set()
    for example in examples:
        digests.add(example.compute_digest())
        split.images += len(example.images)
        if not example.images:
            split.text_only += 1
    split.rows = len(examples)
    split.repeated = split.rows - len(digests)
    split.unread = sorted(examples.find_unread_fields())

    chosen = _spread_evenly(split.rows, max_rows)
    for position in progress(chosen, f"{task.name}: {split.source}"):
        _check_example(split, examples[position], parts, task)
    return True


def _check_example(
    split: SplitCheck,
    example: Example,
    parts: BaseParts,
    task: GeneralTask,
) -> None:
    """Decode and tokenize one row."""
    processor = parts.processor
    split.encoded += 1
    if has_special_token(example, processor):
        split.special += 1

    if split.asked:
        answer_length = count_answer_tokens(example, processor)
        split.answer_lengths.append(answer_length)

    try:
        inputs, _ = encode_truncated(example, processor, None, split.asked)
        parts.require_fit(example, inputs)
        for name in find_omitted_texts(example, processor):
            split.left_out[name] = split.left_out.get(name, 0) + 1

        num_tokens = inputs["input_ids"].shape[1]
        split.lengths.append(num_tokens)
        if num_tokens > (task.max_length or sys.maxsize):
            _, is_truncated = encode_truncated(example, processor, task.max_length, split.asked)
            split.truncated += is_truncated
    except DataError as error:
        split.errors.append(str(error))


def iter_notes(
    task: TaskCheck,
    split: SplitCheck,
    max_positions: int,
) -> Iterator[str]:
    """Yield what is no error of a task's split and most likely not meant, a line each."""
    if split.unread:
        yield f"nothing reads the fields {', '.join(split.unread)}"

    for name, rows in split.left_out.items():
        yield f"the base's chat template leaves out {name} in {rows} rows"

    if split.asked:
        yield from _iter_test_notes(task)

    if split.special:
        yield f"{split.special} rows hold special tokens of the base, which are not read as text"

    # with a max_length they are cut to it
    if task.max_length is None:
        num_long = sum(length > max_positions for length in split.lengths)
        if num_long:
            yield (
                f"{num_long} rows are longer than the base's {max_positions} positions; "
                "set max_length"
            )


def _iter_test_notes(task: TaskCheck) -> Iterator[str]:
    """Yield notes on what a task's test rows can show."""
    test = task.test
    if task.train and task.train.source == test.source:
        yield f"task {task.name!r} is tested on the rows that it is trained on"
    elif task.train and task.shared * 2 > test.rows:
        yield (
            f"{task.shared} of {test.rows} rows ask what is trained: "
            f"their question and images stand in {task.train.source} too"
        )

    if test.unrewarded:
        yield f"{test.unrewarded} rows hold an answer that scores 0 against their own `answers`"

    if test.ambiguous:
        yield (
            f"{test.ambiguous} rows count several options as right: all of their `answers`; if "
            "those are the options, let `columns: {answers: …}` name the field of the right one"
        )

    # ambiguous rows have their options in `answers`
    if test.optionless and not test.ambiguous:
        yield (
            "metric choice, but no answer is an option's letter or one of the options in its row"
        )

    num_long = sum(length > task.max_new_tokens for length in test.answer_lengths)
    if num_long:
        yield (
            f"{num_long} of {test.encoded} rows have an answer longer than max_new_tokens "
            f"{task.max_new_tokens}, the longest has {max(test.answer_lengths)} tokens: "
            "the model is stopped before its end"
        )


def _spread_evenly(count: int, most: int) -> Sequence[int]:
    """Return at most `most` positions out of `count`, evenly spread."""
    if count <= most:
        return range(count)
    return [count * number // most for number in range(most)]


def _count_shared_questions(
    training_examples: Sequence[Example],
    test_examples: Sequence[Example],
) -> int:
    """Return how many test examples ask a question that is trained."""
    trained_questions = {_question_digest(example) for example in training_examples}

    num_shared = 0
    for example in test_examples:
        if _question_digest(example) in trained_questions:
            num_shared += 1
    return num_shared


def _question_digest(example: Example) -> str:
    """Return what identifies a question: its texts and images, without the answer."""
    question = replace(example, messages=example.messages[:-1], untrained_turns=())
    return question.compute_digest()


def _score_commonest_answer(
    task: GeneralTask,
    examples: Sequence[Example],
) -> tuple[str, float]:
    """Return the commonest answer, and what a model that always gives it would score."""
    accepted = [example.accepted or [example.answer] for example in examples]
    counts = Counter(answers[0] for answers in accepted)
    ((commonest, _),) = counts.most_common(1)

    score = ANSWER_METRICS[task.metric]
    scores = score([commonest] * len(accepted), accepted)
    return commonest, sum(scores) / len(scores)


def _decode_tokens(
    example: Example,
    processor: Processor,
    task: GeneralTask,
) -> list[TokenText]:
    """Return the tokens of an encoded example as text, neighbours of one kind joined."""
    inputs, _ = encode_truncated(example, processor, task.max_length)
    ids = inputs["input_ids"][0].tolist()
    labels = inputs["labels"][0].tolist()

    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(ids, labels, strict=True):
        is_supervised = label != IGNORE_INDEX
        if not runs or runs[-1][1] != is_supervised:
            runs.append(([], is_supervised))
        run_ids, _ = runs[-1]
        run_ids.append(token)

    decode = tokenizer_of(processor).decode
    return [(decode(run_ids), is_supervised) for run_ids, is_supervised in runs]
