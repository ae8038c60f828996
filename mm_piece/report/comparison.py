"""The content of a page about several stores, as plain data: runs side by side, and their means."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mm_piece.metrics import continual
from mm_piece.report.summary import Curve
from mm_piece.sparse.change_report import find_change_rows
from mm_piece.store.delta_store import DeltaStore
from mm_piece.store.results import Results

Settings = Mapping[str, object]  # dotted recipe key -> value
# A task's cost is the time of both: one of them alone would make it look cheap.
_TIMED_STAGES = {"select", "train"}

_MOST_TASK_KEYS = 3  # in which tasks differ, that are named one by one
_MOST_LABELS = 3  # settings in a title; the page lists all that differ


@dataclass(frozen=True)
class RunSummary:
    """One store: its settings, its scores, the cost of a task."""

    name: str
    seed: int
    tasks: tuple[str, ...]
    num_measured: int  # tasks that were learned and measured; fewer where a run was stopped
    settings: Settings  # less `seed` and `store`
    all_settings: Settings  # less `store`, and with the settings of each task
    values: dict[str, float | None]  # scores, and the cost of a task: entries, bytes, seconds
    seen: Curve  # mean score of the tasks seen so far, from position 1 on
    ability: Curve | None
    groups: dict[str, int]  # changed entries by group, over all deltas

    @property
    def is_unfinished(self) -> bool:
        """Whether its scores are over some of its tasks alone."""
        return self.num_measured < len(self.tasks)

    @property
    def learning_rate(self) -> object:
        """The learning rate; None where a recipe leaves it to transformers."""
        return self.settings.get("train.learning_rate")


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in their seeds alone, all of them finished or none."""

    title: str
    runs: list[RunSummary]

    @property
    def is_unfinished(self) -> bool:
        """Whether its runs have learned some of their tasks alone."""
        return self.runs[0].is_unfinished

    def values_of(self, key: str) -> list[float]:
        """Return a value of every run; none at all if a run lacks it."""
        found = [run.values[key] for run in self.runs]
        known = [value for value in found if value is not None]
        # a mean over some of the runs would not compare with one over all of them
        if len(known) < len(found):
            return []
        return known


@dataclass(frozen=True)
class Comparison:
    """The content of one page."""

    configurations: list[Configuration]
    bases: list[str]  # fingerprints; scores of different bases do not compare
    orders: list[tuple[str, ...]]  # of tasks
    differing: list[str]  # keys of the recipes whose values are not the same in all of them

    @property
    def runs(self) -> list[RunSummary]:
        """All runs, configuration by configuration."""
        runs = []
        for configuration in self.configurations:
            runs += configuration.runs
        return runs


def compare_stores(stores: Sequence[DeltaStore]) -> Comparison:
    """Read some stores once; group the runs that differ in their seeds alone."""
    folders = [Path(store.path).resolve() for store in stores]
    titles = [folder.name for folder in folders]
    # the same name twice tells nothing: then all stores go by their paths
    names = set(titles)
    if len(names) < len(titles):
        titles = [str(store.path) for store in stores]

    runs = []
    for store, title in zip(stores, titles, strict=True):
        run = _summarise_run(store, title)
        runs.append(run)

    configurations = _group_runs(runs)
    # finished ones first, of these the best; equal ones stay in the order of the stores
    configurations.sort(key=_rank_configuration, reverse=True)
    bases = {store.base.fingerprint for store in stores}
    orders = {run.tasks for run in runs}
    return Comparison(
        configurations=configurations,
        bases=sorted(bases),
        orders=sorted(orders),
        differing=_list_differing_keys(runs),
    )


def _list_differing_keys(runs: Sequence[RunSummary]) -> list[str]:
    """Return the keys in which any two recipes differ, in a recipe's order."""
    first = runs[0].all_settings
    keys: dict[str, bool] = {}  # in the recipes' order: whether a recipe differs from the first
    for run in runs:
        own = run.all_settings
        for key in (*first, *own):
            is_different = own.get(key) != first.get(key)
            keys[key] = keys.get(key, False) or is_different
    differing = [key for key, differs in keys.items() if differs]
    return _name_other_tasks(differing)


def _name_other_tasks(keys: Sequence[str]) -> list[str]:
    """Return keys with one word in place of many keys of tasks: the tasks are others."""
    within_tasks = []
    for key in keys:
        if key.startswith("tasks."):
            within_tasks.append(key)
    if len(within_tasks) <= _MOST_TASK_KEYS:
        return list(keys)

    named = []
    for key in keys:
        name = "tasks" if key in within_tasks else key
        if name not in named:
            named.append(name)
    return named


def _group_runs(runs: Sequence[RunSummary]) -> list[Configuration]:
    """Group comparable runs; title each group after what sets its settings apart."""
    groups: list[list[RunSummary]] = []
    for run in runs:
        for group in groups:
            if _are_comparable(group[0], run):
                group.append(run)
                break
        else:
            groups.append([run])

    settings = [group[0].settings for group in groups]
    configurations = []
    for group in groups:
        first = group[0]
        differing = _find_differing_keys(first.settings, settings)
        title = _format_title(first, differing)
        configuration = Configuration(title, group)
        configurations.append(configuration)
    return configurations


def _are_comparable(one: RunSummary, other: RunSummary) -> bool:
    """Whether a mean over two runs says something: same settings, and none stopped on its way."""
    return one.settings == other.settings and one.is_unfinished == other.is_unfinished


def _rank_configuration(configuration: Configuration) -> tuple[bool, float]:
    """Return whether a configuration's runs are finished, and their mean overall performance.

    The mean is 0 if it is not known.
    """
    scores = configuration.values_of("op")
    return not configuration.is_unfinished, _mean_or_none(scores) or 0.0


def _summarise_run(store: DeltaStore, title: str) -> RunSummary:
    """Read one store: settings from its recipe, scores from its results, costs from both."""
    recipe = store.load_recipe()
    tasks = tuple(task.name for task in recipe.tasks)
    # two runs of one configuration differ in these two keys
    content = recipe.model_dump(
        mode="json",
        exclude={"seed", "store"},
    )
    results = store.results()
    matrix = results.get("matrix", [])
    ability = results.get("base_ability", [])

    # row t has the scores after task t; its first t columns are the tasks seen by then
    seen = []
    for position, row in enumerate(matrix):
        if position:
            scores = row[:position]
            seen.append(fmean(scores))

    return RunSummary(
        name=title,
        seed=recipe.seed,
        tasks=tasks,
        num_measured=len(seen),
        settings=dict(_flatten_settings(content)),
        all_settings=_describe_settings(content, recipe.seed),
        values=_summarise_values(store, results),
        seen=Curve(title, seen),
        ability=Curve(title, ability) if ability else None,
        groups=_count_by_group(store),
    )


def _summarise_values(
    store: DeltaStore,
    results: Results,
) -> dict[str, float | None]:
    """Return a store's scores and the mean cost of a task; None where nothing was measured."""
    matrix = results.get("matrix", [])
    ability = results.get("base_ability", [])
    metrics = continual.summarise_matrix(matrix)

    timings = results.get("seconds", {})
    select_seconds = []
    train_seconds = []
    for entry in store.entries:
        taken = timings.get(entry.task, {})
        if taken.keys() >= _TIMED_STAGES:
            select_seconds.append(taken["select"])
            train_seconds.append(taken["train"])

    num_entries = [entry.entries for entry in store.entries]
    num_bytes = [entry.bytes for entry in store.entries]
    return {
        "learned": metrics["learned"],
        "op": metrics["op"],
        "bwt": metrics["bwt"],
        "base_before": ability[0] if ability else None,
        "base_retained": ability[-1] if ability else None,
        "entries": _mean_or_none(num_entries),
        "bytes": _mean_or_none(num_bytes),
        "select": _mean_or_none(select_seconds),
        "train": _mean_or_none(train_seconds),
    }


def _count_by_group(store: DeltaStore) -> dict[str, int]:
    """Count changed entries by group, over all deltas with a change report."""
    found: dict[str, int] = {}
    for entry in store.entries:
        delta = store.delta_arrays(entry.position)
        rows = find_change_rows(delta.info)
        for group, counts in rows.items():
            changed = int(counts["changed"])
            found[group] = found.get(group, 0) + changed
    return found


def _flatten_settings(
    content: object,
    path: str = "",
) -> Iterable[tuple[str, object]]:
    """Yield every value of nested mappings with its dotted key."""
    if not isinstance(content, dict):
        yield path, content
        return

    for key, value in content.items():
        dotted = f"{path}.{key}" if path else key
        yield from _flatten_settings(value, dotted)


def _describe_settings(
    content: dict[str, Any],
    seed: int,
) -> Settings:
    """Return the settings of a recipe one by one: the tasks in their order, then those of each."""
    plain = dict(content)
    described: dict[str, object] = {}
    for section in ("tasks", "general"):
        names = []
        for task in plain.pop(section):
            name = task["name"]
            names.append(name)
            settings = _flatten_settings(task, f"{section}.{name}")
            described.update(settings)
        described[section] = " → ".join(names)

    settings = _flatten_settings(plain)
    return {
        **dict(settings),
        **described,
        "seed": seed,
    }


def _find_differing_keys(
    own: Settings,
    settings: Sequence[Settings],
) -> list[str]:
    """Return the keys in which configurations of one method differ, in the recipe's order."""
    # other methods have other keys: the method itself is what sets them apart
    method = own["select.method"]
    same_method = []
    keys: dict[str, None] = {}  # a set that keeps the recipe's order
    for found in settings:
        if found["select.method"] == method:
            same_method.append(found)
            keys.update(dict.fromkeys(found))

    differing = []
    for key in keys:
        value = own.get(key)
        others = [found.get(key) for found in same_method]
        if any(other != value for other in others):
            differing.append(key)
    return differing


def _format_title(
    run: RunSummary,
    differing: Sequence[str],
) -> str:
    """Return a title: the method, the settings that set it apart, rehearsal and penalty."""
    method = run.settings["select.method"]
    labels = [str(method)]
    # what protects comes first: a title that is cut must not lose it
    keys: dict[str, None] = {}
    for key in ("rehearsal", "penalty"):
        if run.settings.get(key):
            keys[key] = None
    keys.update(dict.fromkeys(differing))

    for key in keys:
        value = run.settings.get(key)
        if key == "tasks":
            labels.append(" → ".join(run.tasks))
        elif isinstance(value, list | tuple | dict):
            # whole tasks or texts are no title; the page lists settings
            _, _, label = key.rpartition(".")
            labels.append(f"own {label}")
        elif value is not None:
            # the last part of a dotted key tells enough
            _, _, label = key.rpartition(".")
            labels.append(f"{label} {value}")

    shown = labels[: _MOST_LABELS + 1]
    num_others = len(labels) - len(shown)
    if num_others:
        plural = "" if num_others == 1 else "s"
        shown.append(f"{num_others} more setting{plural}")
    return ", ".join(shown)


def _mean_or_none(values: Iterable[float]) -> float | None:
    known = list(values)
    return fmean(known) if known else None
