"""The tasks of a store that are asked for by name. Without torch: a wrong name shows at once."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from mm_piece.errors import RecipeError
from mm_piece.recipe import GeneralTask, Recipe
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.inspection import as_store


def choose_tasks(
    store: str | Path,
    names: Sequence[str],
) -> tuple[Recipe, DeltaStore, list[GeneralTask]]:
    """Return a store's recipe, the store, and its tasks of these names (of no names: all).

    Raises RecipeError for a name that no task has.
    """
    # a store brings its own recipe: no file of the user is read
    opened = as_store(store)
    recipe = opened.load_recipe()
    all_tasks = (*recipe.tasks, *recipe.general)
    tasks = {task.name: task for task in all_tasks}
    unknown = set(names) - set(tasks)
    if unknown:
        name = min(unknown)
        hint = f"it has {', '.join(tasks)}"
        if close := get_close_matches(name, tasks, n=1):
            hint = f"did you mean {close[0]!r}? {hint}"
        raise RecipeError(f"{opened.path}: unknown task {name!r}; {hint}")

    chosen = [tasks[name] for name in names or tasks]
    return recipe, opened, chosen
