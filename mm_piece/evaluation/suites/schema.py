"""What a suite may say: a YAML file, or one of those that have a name here."""

from collections.abc import Container
from pathlib import Path

from pydantic import Field, ValidationError

from mm_piece.errors import RecipeError
from mm_piece.recipe.parsing import Sections, format_problem, parse_mapping, read_text
from mm_piece.recipe.select import StrictModel


class HarnessConfig(StrictModel):
    """What one harness measures."""

    tasks: tuple[str, ...] = Field(min_length=1)  # tasks and groups that it knows by name
    include: str | None = None  # a folder with the files of further tasks
    limit: int | None = Field(default=None, ge=1)  # rows of a task
    batch_size: int = Field(default=8, ge=1)

    def require_known_tasks(self, known: Container[str], harness: str, listing: str) -> None:
        """Raise RecipeError for a task that a harness does not know; `listing` prints those."""
        if unknown := [name for name in self.tasks if name not in known]:
            raise RecipeError(
                f"{harness} has no task {unknown[0]!r}; `{listing}` lists them, and "
                "`include` names a folder of your own"
            )


class TextHarnessConfig(HarnessConfig):
    """What lm-eval measures."""

    fewshot: int | None = Field(default=None, ge=0)  # as each task says
    chat: bool = False  # questions are put in the base's chat template


class Suite(StrictModel):
    """What is measured of a model beside the tasks of its store."""

    kl: bool = True  # how far the store's general tasks went from the base, or all its tasks
    texts: TextHarnessConfig | None = Field(default=None, alias="lm-eval")
    images: HarnessConfig | None = Field(default=None, alias="lmms-eval")

    def harness_configs(self) -> dict[str, HarnessConfig]:
        """What each harness is asked for."""
        asked = {"lm-eval": self.texts, "lmms-eval": self.images}
        return {name: config for name, config in asked.items() if config}


_SECTIONS: Sections = {"lm-eval": TextHarnessConfig, "lmms-eval": HarnessConfig}

SUITES: dict[str, Suite] = {
    "general": Suite.model_validate(
        {
            "lm-eval": {"tasks": ("mmlu", "gsm8k", "bbh", "humaneval")},
            "lmms-eval": {"tasks": ("pope", "mme", "coco2017_cap_val")},
        }
    )
}


def load_suite(name: str) -> Suite:
    """The suite of a name, or in a file; RecipeError in one line for what is neither."""
    if name in SUITES:
        return SUITES[name]
    if not Path(name).is_file():
        raise RecipeError(f"unknown suite {name!r}; allowed: {', '.join(SUITES)}, or a YAML file")
    content = parse_mapping(read_text(name, "suite"), name, "kl, lm-eval, lmms-eval")
    try:
        return Suite.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{name}: {format_problem(error, Suite, _SECTIONS)}") from error
