"""What one YAML recipe may say, and how it is read."""

from mm_piece.recipe.base_options import require_options
from mm_piece.recipe.reading import as_recipe, load_recipe, parse_recipe
from mm_piece.recipe.schema import GeneralTask, MetricName, Recipe, Task
from mm_piece.recipe.select import SelectionSettings
from mm_piece.sizes import parse_bytes

__all__ = [
    "GeneralTask",
    "MetricName",
    "Recipe",
    "SelectionSettings",
    "Task",
    "as_recipe",
    "load_recipe",
    "parse_bytes",
    "parse_recipe",
    "require_options",
]
