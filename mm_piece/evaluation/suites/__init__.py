"""Suites: what is measured of a model beside its tasks, by harnesses that others keep.

Each harness is a module of its own with a class `Harness`: made from a part of the suite, which it
checks, it gives the scores of a model in memory. A further one is one more line in `HARNESSES`.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mm_piece import distributed
from mm_piece.data import tokenizer_of
from mm_piece.distributed.progress import print_line
from mm_piece.errors import PieceError, RecipeError, format_value
from mm_piece.evaluation.answers import move_to_accelerator
from mm_piece.evaluation.matrix import choose_tasks, measure_divergences
from mm_piece.evaluation.suites.schema import SUITES, HarnessConfig, Suite, load_suite
from mm_piece.evaluation.suites.scores import Score, Scores
from mm_piece.store.loading import load

# A harness's name: its package, the module here that speaks with it, whether it shows images.
HARNESSES: dict[str, tuple[str, str, bool]] = {
    "lm-eval": ("lm_eval", "mm_piece.evaluation.suites.lm_eval", False),
    "lmms-eval": ("lmms_eval", "mm_piece.evaluation.suites.lmms_eval", True),
}

__all__ = ["HARNESSES", "SUITES", "HarnessConfig", "Scores", "Suite", "load_suite", "run_suite"]


def run_suite(
    store: str | Path, suite: Suite, at: int | None = None, base: str | None = None
) -> Iterator[tuple[str, Scores]]:
    """What a suite finds of the model at a position: harness and scores, one after another.

    `kl` comes first: by task, nats a token from the base. Everything that can be wrong with the
    suite is found before the model is loaded. Raises RecipeError, DataError, StoreError, and
    ModelError.
    """
    if distributed.world_size() > 1:
        raise RecipeError("a suite is measured by one process")
    recipe, opened, _ = choose_tasks(store, ())
    position = opened.position(at)
    harnesses = {
        name: _load_harness(name, config) for name, config in suite.harness_configs().items()
    }
    model, processor = load(base, opened, position)
    model = move_to_accelerator(model)
    if suite.kl:
        general = recipe.general or recipe.tasks
        found = measure_divergences(model, processor, recipe, general, position)
        scores_by_task = {task: Score(value=nats, stderr=None) for task, nats in found.items()}
        yield "kl", {task: {"nats a token": score} for task, score in scores_by_task.items()}
    for name, harness in harnesses.items():
        with _translating_suite_errors(name):
            if HARNESSES[name][2] and tokenizer_of(processor) is processor:
                print_line(f"{name}: left out, the base sees no images")
                continue
            scores = harness.measure_scores(model, processor)
        yield name, scores


def _load_harness(name: str, config: HarnessConfig) -> Any:
    """The harness of a part, once it is known to be there and to know the part's tasks."""
    package, module, _ = HARNESSES[name]
    if find_spec(package) is None:
        raise RecipeError(f"{name} is not installed: pip install 'mm-piece[suites]'")
    if config.include is not None and not Path(config.include).is_dir():
        raise RecipeError(f"{name}: include {config.include}: there is no such folder")
    with _translating_suite_errors(name):
        return import_module(module).Harness(config)


@contextmanager
def _translating_suite_errors(name: str) -> Iterator[None]:
    """Whatever a harness raises, in one line: it may be anything, from a task's own code."""
    try:
        with redirect_stdout(sys.stderr):  # where only what was found belongs
            yield
    except PieceError:
        raise
    except Exception as error:
        raise RecipeError(f"{name}: {format_value(error, 300) or type(error).__name__}") from error
