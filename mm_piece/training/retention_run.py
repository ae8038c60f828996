"""Retention importance in a run: estimated once for each learned task, and read by later ones.

`retention` estimates it of a model and examples; here is where it lies and when it is needed.
"""

from collections.abc import Callable

from torch import Tensor

from mm_piece import distributed
from mm_piece.data import EncodedDataset
from mm_piece.importance.factored import RetentionImportance
from mm_piece.importance.rules import rule_of
from mm_piece.recipe import Recipe, SelectionSettings, Task
from mm_piece.selection import Mask
from mm_piece.training.retention import (
    estimate_sensitivity,
    make_retention_importance,
    read_sensitivity,
    write_sensitivity,
)
from mm_piece.training.run_setup import Run

PenaltyStrengths = dict[str, Tensor]  # λ K of each entry of a mask, by the weight's name


def needs_retention(recipe: Recipe) -> bool:
    """Return whether later tasks need the importance of the earlier ones' examples."""
    return recipe.penalty > 0 or rule_of(recipe.select.method).uses_retention


def has_retention(run: Run, position: int) -> bool:
    """Return whether the importance of a learned task is there; all processes agree on it."""
    file = run.store.retention_file(position)
    delta = run.store.entries[position - 1].sha256
    return distributed.broadcast(read_sensitivity(file, delta) is not None)


def estimate_retention(
    run: Run,
    encoded: EncodedDataset,
    select: SelectionSettings,
    seed: int,
) -> RetentionImportance:
    """Return the importance K for what the model should retain while it learns its next task."""
    positions = range(1, len(run.store) + 1)
    earlier = [
        read_sensitivity(run.store.retention_file(position), entry.sha256)
        for position, entry in zip(positions, run.store.entries, strict=True)
    ]
    return make_retention_importance(
        run.model,
        encoded,
        select,
        seed,
        earlier,
    )


def save_retention(
    run: Run,
    encoded: EncodedDataset,
    task: Task,
    position: int,
) -> None:
    """Estimate the importance of a learned task's examples, once; the model stands behind it."""
    if has_retention(run, position):
        return

    select = run.recipe.select_of(task)
    with run.zero.engine_context(run.model):
        sample = encoded.sample(select.samples, run.recipe.seed)
        sensitivity = estimate_sensitivity(run.model, sample, select)
    if distributed.is_main():
        file = run.store.retention_file(position)
        delta = run.store.entries[position - 1].sha256
        write_sensitivity(file, sensitivity, delta)
    distributed.barrier()


def make_penalty_strengths(
    recipe: Recipe,
    mask: Mask,
    make_retention: Callable[[], RetentionImportance],
) -> PenaltyStrengths | None:
    """Return λ K of each selected entry, how strongly it is penalised; None without a penalty."""
    if recipe.penalty == 0:
        return None

    importances = make_retention()
    return {
        name: recipe.penalty * importances.scores_at(name, index) for name, index in mask.items()
    }
