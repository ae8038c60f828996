"""What one YAML recipe may say: strict, frozen, every default spelled out in the store."""

from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from mm_piece.metrics.answers import ANSWER_METRICS
from mm_piece.recipe.base_options import require_options
from mm_piece.recipe.parsing import YAML
from mm_piece.recipe.select import (
    Density,
    PathText,
    SelectionSettings,
    StrictModel,
    require_density,
)
from mm_piece.sizes import parse_bytes

if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = Literal[tuple(ANSWER_METRICS)]
ColumnName = Literal[
    "prompt",
    "answer",
    "answers",
    "image",
    "images",
    "messages",
    "conversations",
]


class GeneralTask(StrictModel):
    """Something measured at every position and never trained on."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$", max_length=100)
    test: PathText
    images: PathText | None = None
    columns: dict[ColumnName, str] = {}  # what a row's field is called in the source
    prompt: str | None = None  # for rows without one, such as labelled images
    metric: MetricName = "exact"
    max_new_tokens: int = Field(default=32, ge=1)
    max_length: int | None = Field(default=None, ge=16)  # tokens, images included


class Task(GeneralTask):
    """A named train set and test set, one step of the sequence."""

    train: PathText
    density: Density | None = None  # of this task, in place of the one in `select`
    train_settings: dict[str, Any] = {}  # of this task, in place of those in the recipe's `train`

    @field_validator("train", mode="before")
    @classmethod
    def _train_is_source(cls, train: YAML) -> YAML:
        if isinstance(train, dict):
            raise ValueError(
                "is the source of a task's rows; settings of its training go to `train_settings`"
            )
        return train

    @field_validator("density", mode="before")
    @classmethod
    def _density_in_range(cls, density: YAML) -> YAML:
        if density is None:
            return None
        return require_density(density)


class Recipe(StrictModel):
    """One run: a base, an ordered list of tasks, how to select and how to train."""

    base: PathText
    revision: str | None = None
    model: dict[str, Any] = {}
    store: PathText = Field(min_length=1)
    tasks: tuple[Task, ...] = Field(min_length=1)
    general: tuple[GeneralTask, ...] = ()
    select: SelectionSettings = SelectionSettings()
    train: dict[str, Any] = {}
    # Self-generated examples that are trained beside a task, as a share of the task's own.
    rehearsal: float = Field(
        default=0.0,
        ge=0,
        le=1,
    )
    # Strength of the quadratic penalty on moving important parameters.
    penalty: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
    )
    cache: str | int = "20GiB"  # disk for the encoded examples of a task while it is learned
    seed: int = Field(
        default=42,
        ge=0,
        lt=2**31,
    )

    @field_validator("model")
    @classmethod
    def _options_known(cls, model: dict[str, Any]) -> dict[str, Any]:
        return require_options(model)

    @field_validator("cache")
    @classmethod
    def _cache_readable(cls, cache: str | int) -> str | int:
        parse_bytes(cache)
        return cache

    @model_validator(mode="after")
    def _names_are_unique(self) -> "Recipe":
        tasks = (*self.tasks, *self.general)
        names = [task.name for task in tasks]
        for name in sorted(names):
            if names.count(name) > 1:
                raise ValueError(f"task name {name!r} is used twice")
        return self

    @model_validator(mode="after")
    def _densities_fit(self) -> "Recipe":
        for task in self.tasks:
            self.select_of(task)
        return self

    def select_of(self, task: Task) -> SelectionSettings:
        """Return the selection of one task, with its own density where it has one."""
        if task.density is None:
            return self.select

        settings = self.select.model_dump()
        settings["density"] = task.density
        return SelectionSettings.model_validate(settings)

    def train_of(self, task: Task) -> dict[str, Any]:
        """Return the training settings of one task: its own, then the recipe's."""
        shared = dict(self.train)
        # a number of steps would win over epochs, and those of the task would do nothing
        if "num_train_epochs" in task.train_settings:
            shared.pop("max_steps", None)
        return {**shared, **task.train_settings}

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML, every default spelled out."""
        content = self.model_dump(mode="json")
        return yaml.safe_dump(
            content,
            sort_keys=False,
            allow_unicode=True,
        )
