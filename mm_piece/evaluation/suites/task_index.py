"""The tasks that a suite may name: of its own folder, and where needed the harness's own."""

from collections.abc import Callable
from typing import Any

from mm_piece.evaluation.suites.schema import HarnessConfig


def find_tasks(
    task_manager: Callable[..., Any],
    config: HarnessConfig,
) -> Any:
    """Return a harness's `TaskManager` of the tasks that a suite may name.

    A harness reads thousands of files to know its own tasks, for up to half a minute: they are left
    out where the suite's folder has all that it names. Members of groups and tags may be anywhere.
    """
    if config.include:
        own = task_manager(
            include_path=config.include,
            include_defaults=False,
        )
        found = set(own.all_subtasks)
        if found.issuperset(config.tasks):
            return own

    return task_manager(include_path=config.include)
