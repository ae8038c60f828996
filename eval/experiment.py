"""The file of an experiment: methods of learning one sequence, their learning rates, seeds.

recipe   the recipe that all methods share: tasks, training, evaluation; a path from where the
         command runs
base     another base than the recipe's
order    the tasks in another order, or some of them
seeds    seeds of the runs on the test split
tune     the seed and the number of validation rows for choosing a learning rate
methods  by name: `select` of the recipe, or a `baseline` and its `options`; `set`, more keys of the
         recipe; `rates`, candidates for the learning rate; `also`, others to measure beside the
         chosen one; `seeds` of its own
"""

import json
import re
from importlib import import_module
from inspect import get_annotations, signature
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator

from mm_piece.errors import PieceError, RecipeError
from mm_piece.recipe import GeneralTask, Recipe, load_recipe
from mm_piece.recipe.parsing import parse_mapping, read_text
from mm_piece.recipe.problems import describe_problem, format_problem
from mm_piece.recipe.select import StrictModel

# a source that may have validation rows
_TEST_SPLIT = re.compile(r"((?:hf|scenes):.+/)test(\[.*\])?")
# a method's name becomes part of a file's
_METHOD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# keys of the recipe that hold a run's own seed, folder and learning rate
_RUN_KEYS = {
    "seed",
    "store",
    "train",
    "train.learning_rate",
}
# keys of the recipe that no baseline uses
_SPARSE_ONLY_KEYS = {"penalty", "rehearsal"}
_SUCH_AS = "such as eval.baselines.full.Full"


def _require_distinct(values: tuple[float, ...]) -> tuple[float, ...]:
    """Raise ValueError if two values would name the same result file."""
    # as in file names: rates to six digits, seeds in full
    names = []
    for value in values:
        is_rate = isinstance(value, float)
        names.append(f"{value:g}" if is_rate else str(value))

    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} stands twice")
    return values


LearningRate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LearningRates = Annotated[tuple[LearningRate, ...], AfterValidator(_require_distinct)]
Seed = Annotated[int, Field(ge=0, lt=2**31, strict=True)]  # as the recipe's
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_require_distinct)]


class Method(StrictModel):
    """One method of learning the sequence."""

    select: dict[str, Any] | None = None
    baseline: str | None = None  # a dotted path to a class such as those of baselines/
    options: dict[str, Any] = {}  # of the baseline
    set: dict[str, Any] = {}
    rates: LearningRates = Field(min_length=1)
    also: LearningRates = ()
    seeds: Seeds | None = None  # the experiment's

    @model_validator(mode="after")
    def _require_one_kind(self) -> "Method":
        if (self.select is None) == (self.baseline is None):
            raise ValueError("a method has either `select` or `baseline`")
        if self.options and self.baseline is None:
            raise ValueError("`options` are a baseline's")
        return self

    @model_validator(mode="after")
    def _require_free_keys(self) -> "Method":
        for key in self.set:
            if key in _RUN_KEYS:
                raise ValueError(f"set: {key!r} is the run's own; a method has `rates` and `seeds`")
            if self.baseline and key in _SPARSE_ONLY_KEYS:
                raise ValueError(f"set: no baseline looks at {key!r}")
        return self


class TuningSettings(StrictModel):
    """Seed and validation rows of the runs that choose a learning rate."""

    seed: Seed
    rows: int = Field(ge=1)


class Experiment(StrictModel):
    """Content of an experiment's file."""

    recipe: str
    base: str | None = None
    order: tuple[str, ...] | None = Field(default=None, min_length=1)
    seeds: Seeds
    tune: TuningSettings
    methods: dict[str, Method] = Field(min_length=1)

    @model_validator(mode="after")
    def _require_file_names(self) -> "Experiment":
        for name in self.methods:
            if not _METHOD_NAME.fullmatch(name):
                raise ValueError(f"methods: {name!r} is no name of letters, digits, '.', '_', '-'")
        return self


def load_experiment(file: Path) -> Experiment:
    """Read an experiment and validate its methods; raise RecipeError of one line."""
    text = read_text(file, "experiment")
    content = parse_mapping(text, str(file), "recipe, seeds, methods")
    try:
        experiment = Experiment.model_validate(content)
    except ValidationError as error:
        parts = {"methods": Method, "tune": TuningSettings}
        problem = format_problem(error, Experiment, parts)
        raise RecipeError(f"{file}: {problem}") from error

    # a mistake in the last method must not wait for the runs of the others
    for name, method in experiment.methods.items():
        try:
            _require_runnable(experiment, method)
        except PieceError as error:
            raise RecipeError(f"{file}: methods.{name}: {error}") from error
    return experiment


def _require_runnable(experiment: Experiment, method: Method) -> None:
    """Raise PieceError unless a method's recipe, splits and baseline are valid."""
    recipe = make_recipe(experiment, method, method.rates[0], 0, Path("store"))
    if len(method.rates) > 1:
        with_validation_split(recipe, experiment.tune.rows)
    if method.baseline:
        baseline_class_of(method)


def make_recipe(
    experiment: Experiment, method: Method, learning_rate: float, seed: int, store_path: Path
) -> Recipe:
    """Return the experiment's recipe with a method's settings, and its base and order of tasks."""
    changed: dict[str, Any] = {"store": str(store_path), "seed": seed}
    if experiment.base is not None:
        changed["base"] = experiment.base
    changed["train.learning_rate"] = learning_rate
    changed["train.disable_tqdm"] = True
    for key, value in (method.select or {}).items():
        changed[f"select.{key}"] = value
    # last: a method's own keys override all others
    changed |= method.set

    # the recipe takes changes as the command line has them
    written = [f"{key}={json.dumps(value)}" for key, value in changed.items()]
    recipe = load_recipe(experiment.recipe, written)
    tasks = _order_tasks(recipe, experiment.order)
    return recipe.model_copy(update={"tasks": tasks})


def _order_tasks(recipe: Recipe, order: tuple[str, ...] | None) -> tuple[Any, ...]:
    """Return the recipe's tasks in an order, or in their own."""
    tasks = {task.name: task for task in recipe.tasks}
    names = order or tuple(tasks)
    for position, name in enumerate(names):
        if name not in tasks:
            allowed = ", ".join(tasks)
            raise RecipeError(f"order: unknown task {name!r}; allowed: {allowed}")
        if name in names[:position]:
            raise RecipeError(f"order: {name!r} stands twice")
    return tuple(tasks[name] for name in names)


def with_validation_split(recipe: Recipe, rows: int) -> Recipe:
    """Return the same recipe, measured on the validation split of every task and of the base."""

    def to_validation(task: GeneralTask) -> GeneralTask:
        parts = _TEST_SPLIT.fullmatch(task.test)
        if parts is None:
            raise RecipeError(
                f"no validation split beside {task.test!r} of {task.name!r}: "
                "where rates are to be chosen, sources are hf:…/test or scenes:…/test"
            )
        source = f"{parts[1]}validation[:{rows}]"
        return task.model_copy(update={"test": source})

    tasks = tuple(map(to_validation, recipe.tasks))
    general = tuple(map(to_validation, recipe.general))
    return recipe.model_copy(update={"tasks": tasks, "general": general})


def baseline_class_of(method: Method) -> Any:
    """Return the class of a method's baseline; raise RecipeError unless it takes the options."""
    kind = _import_baseline(str(method.baseline))
    if not isinstance(kind, type):
        raise RecipeError(f"baseline {method.baseline!r} is no class {_SUCH_AS}")

    # first the names of the options, then their types
    try:
        signature(kind).bind("model", "tasks", "pad", **method.options)
    except TypeError as error:
        raise RecipeError(f"options of {method.baseline}: {error}") from error

    annotations = get_annotations(kind.__init__)
    for name, value in method.options.items():
        adapter = TypeAdapter(annotations.get(name, Any))
        try:
            adapter.validate_python(value, strict=True)
        except ValidationError as error:
            message = describe_problem(error.errors()[0])
            raise RecipeError(f"options of {method.baseline}: {name}: {message}") from error
    return kind


def _import_baseline(path: str) -> Any:
    """Return the object at a dotted path; raise RecipeError unless there is one."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(
            f"unknown baseline {path!r} ({error}); a dotted path to a class {_SUCH_AS}"
        ) from error
