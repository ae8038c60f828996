"""What an experiment may say: ways of learning one sequence, the rates of each, seeds.

recipe   the recipe that all share: tasks, training, what is measured; a path from where the command
         runs
base     another base than the recipe's
order    the tasks in another order, or some of them
seeds    of the runs on the test split
tune     the seed and the number of validation rows that rates are chosen with
methods  by name: `select` of the recipe, or a `baseline` and its `options`; `set`, more keys of the
         recipe; `rates`, of which one is chosen; `also`, others to measure beside it; `seeds` of
         its own
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
from mm_piece.recipe.parsing import format_problem, parse_mapping, read_text
from mm_piece.recipe.select import StrictModel

_TEST_SPLIT = re.compile(
    r"((?:hf|scenes):.+/)test(\[.*\])?"
)  # a source that may have validation rows
_METHOD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # it becomes part of a file's
# What a run's own seed, folder and rate stand in.
_RUN_KEYS = {"seed", "store", "train", "train.learning_rate"}
_SUCH_AS = "such as eval.baselines.full.Full"
_SPARSE_ONLY_KEYS = {"penalty", "rehearsal"}  # what no baseline looks at


def _require_distinct(values: tuple[float, ...]) -> tuple[float, ...]:
    # As results are named: rates to six digits, seeds in full.
    names = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{doubled[0]} stands twice")
    return values


LearningRate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LearningRates = Annotated[tuple[LearningRate, ...], AfterValidator(_require_distinct)]
Seed = Annotated[int, Field(ge=0, lt=2**31, strict=True)]  # as the recipe's
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_require_distinct)]


class Method(StrictModel):
    """One way of learning the sequence."""

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
    """What rates are chosen with."""

    seed: Seed
    rows: int = Field(ge=1)


class Experiment(StrictModel):
    """A comparison, as its file has it."""

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
    """Read an experiment and look at each of its methods; RecipeError in one line."""
    content = parse_mapping(read_text(file, "experiment"), str(file), "recipe, seeds, methods")
    try:
        experiment = Experiment.model_validate(content)
    except ValidationError as error:
        problem = format_problem(error, Experiment, {"methods": Method, "tune": TuningSettings})
        raise RecipeError(f"{file}: {problem}") from error
    for name, method in experiment.methods.items():
        try:
            recipe = make_recipe(experiment, method, method.rates[0], 0, Path("store"))
            if len(method.rates) > 1:
                with_validation_split(recipe, experiment.tune.rows)
            if method.baseline:
                baseline_class_of(method)
        except PieceError as error:
            raise RecipeError(f"{file}: methods.{name}: {error}") from error
    return experiment


def make_recipe(
    experiment: Experiment, method: Method, learning_rate: float, seed: int, store_path: Path
) -> Recipe:
    """The experiment's recipe as a method has it, on its base, with its tasks in its order."""
    changed = {"store": str(store_path), "seed": seed}
    changed |= {} if experiment.base is None else {"base": experiment.base}
    changed |= {"train.learning_rate": learning_rate, "train.disable_tqdm": True}
    changed |= {f"select.{key}": value for key, value in (method.select or {}).items()}
    changed |= method.set
    written = [f"{key}={json.dumps(value)}" for key, value in changed.items()]
    recipe = load_recipe(experiment.recipe, written)
    tasks = {task.name: task for task in recipe.tasks}
    order = experiment.order or tuple(tasks)
    for position, name in enumerate(order):
        if name not in tasks:
            raise RecipeError(f"order: unknown task {name!r}; allowed: {', '.join(tasks)}")
        if name in order[:position]:
            raise RecipeError(f"order: {name!r} stands twice")
    return recipe.model_copy(update={"tasks": tuple(tasks[name] for name in order)})


def with_validation_split(recipe: Recipe, rows: int) -> Recipe:
    """The same recipe, measured on the validation split of every task and of the base."""

    def to_validation(task: GeneralTask) -> GeneralTask:
        if not (parts := _TEST_SPLIT.fullmatch(task.test)):
            raise RecipeError(
                f"no validation split beside {task.test!r} of {task.name!r}: "
                "where rates are to be chosen, sources are hf:…/test or scenes:…/test"
            )
        return task.model_copy(update={"test": f"{parts[1]}validation[:{rows}]"})

    tasks, general = (tuple(map(to_validation, group)) for group in (recipe.tasks, recipe.general))
    return recipe.model_copy(update={"tasks": tasks, "general": general})


def baseline_class_of(method: Method) -> Any:
    """The class of a method's baseline; RecipeError unless it is there and takes the options."""
    module, _, name = str(method.baseline).rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(
            f"unknown baseline {method.baseline!r} ({error}); a dotted path to a class {_SUCH_AS}"
        ) from error
    if not isinstance(kind, type):
        raise RecipeError(f"baseline {method.baseline!r} is no class {_SUCH_AS}")
    try:
        signature(kind).bind("model", "tasks", "pad", **method.options)
    except TypeError as error:
        raise RecipeError(f"options of {method.baseline}: {error}") from error
    allowed = get_annotations(kind.__init__)
    for name, value in method.options.items():
        try:
            TypeAdapter(allowed.get(name, Any)).validate_python(value, strict=True)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise RecipeError(f"options of {method.baseline}: {name}: {message}") from error
    return kind
