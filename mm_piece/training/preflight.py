"""What a recipe's data look like to its base, before anything is trained."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mm_piece import importance
from mm_piece.data import IGNORED, Example, Rows, fitted, problems, tokenizer_of
from mm_piece.data.answers import left_out
from mm_piece.data.special_tokens import special_in
from mm_piece.distributed import alone, zero_of
from mm_piece.dtypes import as_dtype
from mm_piece.errors import DataError
from mm_piece.evaluation.matrix import absent_columns, rows_of
from mm_piece.families import weights
from mm_piece.metrics.answers import METRICS
from mm_piece.models.base import load_processor, positions_of, reading
from mm_piece.models.generation import generation_aside
from mm_piece.recipe import GeneralTask, Recipe, Task, load_recipe
from mm_piece.selection.task import require_places
from mm_piece.training.arguments import arguments
from mm_piece.training.base_parts import Parts, require_options_fit
from mm_piece.training.store_setup import checkpoint_of

Progress = Callable[[Iterable[Any], str], Iterable[Any]]
Token = tuple[str, bool]  # its text, and whether it is supervised


@dataclass
class Split:
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
    train: Split | None
    test: Split
    shared: int = 0  # test rows whose question and images stand in the train set too
    commonest: str = ""  # the commonest answer of the test set
    floor: float = 0.0  # what always giving it would score
    example: list[Token] = field(default_factory=list)


@dataclass
class Check:
    """Every task of a recipe; sound if no split has an error."""

    tasks: list[TaskCheck]
    positions: int  # that the base was made for
    base: list[str] = field(default_factory=list)  # notes on it

    @property
    def notes(self) -> list[str]:
        """What is no error and most likely not meant, a line each."""
        return self.base + [
            f"{split.source}: {note}"
            for task in self.tasks
            for split in (task.train, task.test)
            if split
            for note in _notes(split, task.max_length, self.positions)
        ]

    @property
    def errors(self) -> list[str]:
        """All errors, each one line that names source and row."""
        splits = [s for task in self.tasks for s in (task.train, task.test) if s]
        return list(dict.fromkeys(error for split in splits for error in split.errors))

    def content(self) -> dict[str, Any]:
        """The whole as plain values, for JSON."""
        tasks = [asdict(task) for task in self.tasks]
        return {"tasks": tasks, "notes": self.notes, "errors": self.errors}


def check(
    recipe: str | Path | Recipe,
    *overrides: str,
    rows: int = 1000,
    progress: Progress = lambda items, title: items,
) -> Check:
    """Look at a recipe's settings, base and data as training would, and write nothing.

    Every row is read and its images' headers are looked at; `rows` of each source, evenly spread,
    are decoded and tokenized. Raises RecipeError, ModelError, SelectionError for what is wrong
    with the recipe itself; what is wrong with the data stands in the result, all of it.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    zero_of(recipe.train, "float32")
    arguments(alone(recipe.train), Path(recipe.store) / "work", recipe.seed)
    importance.resolve(recipe.select.method)
    for task in (*recipe.tasks, *recipe.general):
        METRICS[task.metric]([], [])  # its library is there
    files = reading(recipe.model)
    processor = load_processor(recipe.base, recipe.revision, **files)
    require_options_fit(recipe.base, recipe.revision, recipe.model)
    parts = Parts(recipe.base, recipe.revision, processor, **files)
    notes = _require_base(recipe, parts)
    tasks = (*recipe.tasks, *recipe.general)
    if aside := generation_aside(recipe.base, recipe.revision, **files):
        left = ", ".join(aside)
        notes.append(f"base: answers are greedy, of its generation settings nothing reads {left}")
    found = [_task(task, parts, rows, progress) for task in tasks]
    notes = [*parts.notes, *notes]
    return Check(found, positions_of(recipe.base, recipe.revision, **files), notes)


def _require_base(recipe: Recipe, parts: Parts) -> list[str]:
    """Raise unless the base has entries to select and, where it is a folder, all finite weights.

    Returns a note on what its files hold besides.
    """
    shapes = {name: tuple(weight.shape) for name, weight in weights(parts.model).items()}
    require_places(recipe, shapes)
    if not Path(recipe.base).is_dir():
        return []
    checkpoint = checkpoint_of(recipe, as_dtype(recipe.model.get("dtype", "float32")))
    checkpoint.require_finite()
    if unread := checkpoint.skeleton.unread:
        return [
            f"{recipe.base}: nothing reads {len(unread)} tensors of its files, {unread[0]} first"
        ]
    return []


def _task(task: GeneralTask, parts: Parts, rows: int, progress: Progress) -> TaskCheck:
    train: Split | None = None
    taught: Rows | None = None
    if isinstance(task, Task):
        train, taught = _split(task, task.train, parts, rows, progress)
    test, asked = _split(task, task.test, parts, rows, progress, asked=True)
    if not (test.errors or (train and train.errors)):
        test.errors += absent_columns(task, [part for part in (taught, asked) if part])
    known = {_question(example) for example in taught or ()}
    shared = sum(_question(example) in known for example in asked or ())
    found = TaskCheck(task.name, task.metric, task.max_length, train, test, shared)
    if asked:
        found.commonest, found.floor = _floor(task, asked)
        _look_at_answers(test, asked, task.metric)
    shown = taught or asked
    if shown and not (test.errors or (train and train.errors)):
        found.example = _tokens(shown[0], parts.processor, task)
    return found


def _split(
    task: GeneralTask,
    source: str,
    parts: Parts,
    most: int,
    progress: Progress,
    *,
    asked: bool = False,
) -> tuple[Split, Rows | None]:
    split = Split(source, asked)
    split.errors = [
        str(error) for error in problems(source, task.images, task.columns, task.prompt)
    ]
    if split.errors:
        return split, None
    examples = rows_of(task, source)
    split.rows = len(examples)
    split.images = sum(len(example.images) for example in examples)
    split.text_only = sum(not example.images for example in examples)
    split.unread = sorted(examples.unread())
    split.repeated = split.rows - len({example.digest() for example in examples})
    chosen = _spread(split.rows, most)
    for position in progress(chosen, f"{task.name}: {source}"):
        _look(split, examples[position], parts, task)
    return split, examples


def _look(split: Split, example: Example, parts: Parts, task: GeneralTask) -> None:
    """Decode and tokenize one row."""
    processor = parts.processor
    split.encoded += 1
    split.special += bool(special_in(example, processor))
    try:
        inputs, _ = fitted(example, processor, None, split.asked)
        parts.require_fit(example, inputs)
        for name in left_out(example, processor):
            split.left_out[name] = split.left_out.get(name, 0) + 1
        split.lengths.append(inputs["input_ids"].shape[1])
        if split.lengths[-1] > (task.max_length or sys.maxsize):
            split.truncated += fitted(example, processor, task.max_length, split.asked)[1]
    except DataError as error:
        split.errors.append(str(error))


def _look_at_answers(split: Split, examples: Sequence[Example], metric: str) -> None:
    """Count the rows whose `answers` most likely are not meant as all that count as right."""
    rows = [(example.answer, example.accepted) for example in examples if example.accepted]
    if not rows:
        return
    scores = METRICS[metric]([own for own, _ in rows], [accepted for _, accepted in rows])
    split.unrewarded = sum(score == 0 for score in scores)
    if metric == "choice":
        split.ambiguous = sum(
            not all(METRICS[metric](accepted, [accepted[:1]] * len(accepted)))
            for _, accepted in rows
        )


def _notes(split: Split, max_length: int | None, positions: int) -> Iterator[str]:
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
    long = sum(length > positions for length in split.lengths) if max_length is None else 0
    if long:
        yield f"{long} rows are longer than the base's {positions} positions; set max_length"


def _spread(count: int, most: int) -> Sequence[int]:
    """At most `most` positions out of `count`, evenly spread."""
    return range(count) if count <= most else [count * n // most for n in range(most)]


def _question(example: Example) -> str:
    """What identifies a question: its texts and images, without the answer."""
    return replace(example, messages=example.messages[:-1], unlearned=()).digest()


def _floor(task: GeneralTask, examples: Sequence[Example]) -> tuple[str, float]:
    """The commonest answer, and what a model that always gives it would score."""
    accepted = [example.accepted or [example.answer] for example in examples]
    commonest = Counter(answers[0] for answers in accepted).most_common(1)[0][0]
    scores = METRICS[task.metric]([commonest] * len(accepted), accepted)
    return commonest, sum(scores) / len(scores)


def _tokens(example: Example, processor: Any, task: GeneralTask) -> list[Token]:
    """The tokens of an encoded example as text, neighbours of one kind joined."""
    inputs, _ = fitted(example, processor, task.max_length)
    tokenizer = tokenizer_of(processor)
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(inputs["input_ids"][0], inputs["labels"][0], strict=True):
        supervised = int(label) != IGNORED
        if not runs or runs[-1][1] != supervised:
            runs.append(([], supervised))
        runs[-1][0].append(int(token))
    return [(tokenizer.decode(ids), supervised) for ids, supervised in runs]
