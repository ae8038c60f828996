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
    train: SplitCheck | None = None
    training_examples: ExampleDataset | None = None
    if isinstance(task, Task):
        train, training_examples = _check_split(task, task.train, parts, rows, progress)
    test, test_examples = _check_split(task, task.test, parts, rows, progress, asked=True)

    # only of sound splits: a missing column would be named twice
    is_sound = not test.errors and not (train and train.errors)
    if is_sound:
        sources = [source for source in (training_examples, test_examples) if source]
        test.errors += find_absent_columns(task, sources)

    found = TaskCheck(task.name, task.metric, task.max_length, train, test)
    found.shared = _count_shared_questions(training_examples or (), test_examples or ())
    if test_examples:
        found.commonest, found.floor = _score_commonest_answer(task, test_examples)
        _check_answers(test, test_examples, task.metric)

    shown = training_examples or test_examples
    if shown and is_sound and not test.errors:
        found.example = _decode_tokens(shown[0], parts.processor, task)
    return found


def _check_split(
    task: GeneralTask,
    source: str,
    parts: BaseParts,
    max_rows: int,
    progress: ProgressWrapper,
    *,
    asked: bool = False,
) -> tuple[SplitCheck, ExampleDataset | None]:
    """Read one source; return what it holds, and its examples if all rows are sound."""
    split = SplitCheck(source, asked)
    problems = iter_problems(source, task.images, task.columns, task.prompt)
    split.errors = [str(problem) for problem in problems]
    if split.errors:
        return split, None

    examples = read_task_source(task, source)
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
    for position in progress(chosen, f"{task.name}: {source}"):
        _check_example(split, examples[position], parts, task)
    return split, examples


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


def _check_answers(
    split: SplitCheck,
    examples: Sequence[Example],
    metric: str,
) -> None:
    """Count the rows whose `answers` most likely are not meant as all that count as right."""
    with_accepted = [example for example in examples if example.accepted]
    if not with_accepted:
        return

    # all rows at once: some metrics weigh words by how many rows hold them
    score = ANSWER_METRICS[metric]
    own = [example.answer for example in with_accepted]
    accepted = [example.accepted for example in with_accepted]
    own_scores = score(own, accepted)
    split.unrewarded = sum(own_score == 0 for own_score in own_scores)

    if metric == "choice":
        # options are not answers that mean the same: one of them does not answer another
        for options in accepted:
            scores = score(options, [options[:1]] * len(options))
            if not all(scores):
                split.ambiguous += 1


def iter_notes(
    split: SplitCheck,
    max_length: int | None,
    max_positions: int,
) -> Iterator[str]:
    """Yield what is no error of a split and most likely not meant, a line each."""
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

    # with a max_length they are cut to it
    if max_length is None:
        num_long = sum(length > max_positions for length in split.lengths)
        if num_long:
            yield (
                f"{num_long} rows are longer than the base's {max_positions} positions; "
                "set max_length"
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
