"""The format of suites: a YAML file, or one of the named suites here."""

from collections.abc import Container
from pathlib import Path

from pydantic import Field, ValidationError

from mm_piece.errors import RecipeError
from mm_piece.recipe.parsing import parse_mapping, read_text
from mm_piece.recipe.problems import Sections, format_problem
from mm_piece.recipe.select import StrictModel


class HarnessConfig(StrictModel):
    """Part of a suite that one harness measures."""

    tasks: tuple[str, ...] = Field(min_length=1)  # names of the harness's tasks and groups
    include: str | None = None  # a folder with the files of further tasks
    limit: int | None = Field(default=None, ge=1)  # rows of a task; all by default
    batch_size: int = Field(default=8, ge=1)

    def require_known_tasks(
        self,
        known: Container[str],
        harness: str,
        listing: str,
    ) -> None:
        """Raise RecipeError for a task that a harness does not have.

        `listing` is the command that prints those it has.
        """
        unknown = [name for name in self.tasks if name not in known]
        if unknown:
            raise RecipeError(
                f"{harness} has no task {unknown[0]!r}; `{listing}` lists them, and "
                "`include` names a folder of your own"
            )


class TextHarnessConfig(HarnessConfig):
    """Part of a suite that lm-eval measures."""

    fewshot: int | None = Field(default=None, ge=0)  # by default as each task says
    chat: bool = False  # whether questions are put in the base's chat template


class Suite(StrictModel):
    """Measurements of a model beside the tasks of its store."""

    # the divergence from the base on the store's general tasks, or on all tasks if it has none
    kl: bool = True
    texts: TextHarnessConfig | None = Field(default=None, alias="lm-eval")
    images: HarnessConfig | None = Field(default=None, alias="lmms-eval")

    def harness_configs(self) -> dict[str, HarnessConfig]:
        """Return the parts of the suite by harness, in the order in which they run."""
        parts = {
            "lm-eval": self.texts,
            "lmms-eval": self.images,
        }
        return {name: config for name, config in parts.items() if config}


_SECTIONS: Sections = {
    "lm-eval": TextHarnessConfig,
    "lmms-eval": HarnessConfig,
}
_GENERAL_TEXT_TASKS = (
    "mmlu",
    "gsm8k",
    "bbh",
    "humaneval",
)
_GENERAL_IMAGE_TASKS = (
    "pope",
    "mme",
    "coco2017_cap_val",
)
_GENERAL_SUITE = Suite.model_validate(
    {
        "lm-eval": {"tasks": _GENERAL_TEXT_TASKS},
        "lmms-eval": {"tasks": _GENERAL_IMAGE_TASKS},
    }
)
SUITES: dict[str, Suite] = {"general": _GENERAL_SUITE}


def load_suite(name: str) -> Suite:
    """Return the suite of this name, or read it from a YAML file.

    Raises RecipeError in one line for a name of neither, and for a file that is no suite.
    """
    if name in SUITES:
        return SUITES[name]

    if not Path(name).is_file():
        allowed = ", ".join(SUITES)
        raise RecipeError(f"unknown suite {name!r}; allowed: {allowed}, or a YAML file")

    text = read_text(name, "suite")
    content = parse_mapping(text, name, "kl, lm-eval, lmms-eval")
    try:
        return Suite.model_validate(content)
    except ValidationError as error:
        problem = format_problem(error, Suite, _SECTIONS)
        raise RecipeError(f"{name}: {problem}") from error
