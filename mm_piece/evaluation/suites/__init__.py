"""Suites: benchmarks of a model's general ability, run by the harnesses of others.

Each harness is adapted by a module with a class `Harness`. It is made from its part of a suite,
which it checks, and `measure_scores` runs it on a model in memory. A further harness is one more
entry in `HARNESSES`.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mm_piece import distributed
from mm_piece.data.processor import tokenizer_of
from mm_piece.distributed.progress import print_line
from mm_piece.errors import PieceError, RecipeError, format_value
from mm_piece.evaluation.answers import move_to_accelerator
from mm_piece.evaluation.chosen_tasks import choose_tasks
from mm_piece.evaluation.matrix import measure_divergences
from mm_piece.evaluation.suites.schema import SUITES, HarnessConfig, Suite, load_suite
from mm_piece.evaluation.suites.scores import Score, Scores
from mm_piece.store.loading import load

# Name of a harness -> its package, the module here that adapts it, whether its tasks have images.
HARNESSES: dict[str, tuple[str, str, bool]] = {
    "lm-eval": ("lm_eval", "mm_piece.evaluation.suites.lm_eval", False),
    "lmms-eval": ("lmms_eval", "mm_piece.evaluation.suites.lmms_eval", True),
}

__all__ = [
    "HARNESSES",
    "SUITES",
    "HarnessConfig",
    "Scores",
    "Suite",
    "load_suite",
    "run_suite",
]


def run_suite(
    store: str | Path,
    suite: Suite,
    at: int | None = None,
    base: str | None = None,
) -> Iterator[tuple[str, Scores]]:
    """Run a suite on the model at a position, and yield each harness's name and scores.

    `kl` comes first: the divergence from the base by task, in nats a token. Whatever is wrong with
    the suite is found before the model is loaded. Raises RecipeError, DataError, StoreError and
    ModelError.
    """
    if distributed.world_size() > 1:
        raise RecipeError("a suite is measured by one process")

    recipe, opened, _ = choose_tasks(store, ())
    position = opened.position(at)
    configs = suite.harness_configs()
    harnesses = {name: _load_harness(name, config) for name, config in configs.items()}

    model, processor = load(base, opened, position)
    model = move_to_accelerator(model)

    if suite.kl:
        tasks = recipe.general or recipe.tasks
        divergences = measure_divergences(model, processor, recipe, tasks, position)
        kl_scores: Scores = {}
        for task, nats in divergences.items():
            score = Score(value=nats, stderr=None)
            kl_scores[task] = {"nats a token": score}
        yield "kl", kl_scores

    # without a vision encoder, a base's processor is its tokenizer
    sees_images = tokenizer_of(processor) is not processor
    for name, harness in harnesses.items():
        _, _, has_images = HARNESSES[name]
        with _translating_suite_errors(name):
            if has_images and not sees_images:
                print_line(f"{name}: left out, the base sees no images")
                continue
            scores = harness.measure_scores(model, processor)
        # not inside the context: it must not translate the caller's errors
        yield name, scores


def _load_harness(name: str, config: HarnessConfig) -> Any:
    """Build a harness from its part of a suite.

    Raises RecipeError if it is not installed or lacks what the part asks for.
    """
    package, module, _ = HARNESSES[name]
    if find_spec(package) is None:
        raise RecipeError(f"{name} is not installed: pip install 'mm-piece[suites]'")

    folder = config.include
    if folder is not None and not Path(folder).is_dir():
        raise RecipeError(f"{name}: include {folder}: there is no such folder")

    with _translating_suite_errors(name):
        adapter = import_module(module)
        return adapter.Harness(config)


@contextmanager
def _translating_suite_errors(name: str) -> Iterator[None]:
    """Translate whatever a harness raises while the block runs into a RecipeError of one line."""
    try:
        # harnesses print, and stdout is for the scores alone (`--json`)
        with redirect_stdout(sys.stderr):
            yield
    except PieceError:
        raise
    except Exception as error:  # a task may run code of its own, which raises anything
        reason = format_value(error, 300) or type(error).__name__
        raise RecipeError(f"{name}: {reason}") from error
