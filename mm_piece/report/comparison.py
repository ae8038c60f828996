"""What a page about several stores says, as plain data: runs beside each other, and their means."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mm_piece.metrics import continual
from mm_piece.recipe import parse_recipe
from mm_piece.report.summary import Curve
from mm_piece.sparse.change_report import find_change_rows
from mm_piece.store.delta_store import DeltaStore

_TIMED_STAGES = {"select", "train"}


@dataclass(frozen=True)
class RunSummary:
    """One store: how it was made, what it reached, what a task cost."""

    name: str
    seed: int
    tasks: tuple[str, ...]
    settings: dict[str, Any]  # dotted recipe key -> value, less `seed` and `store`
    values: dict[str, float | None]  # scores, and what a task cost: entries, bytes, seconds
    seen: Curve  # mean score of the tasks seen so far, from position 1 on
    ability: Curve | None
    groups: dict[str, int]  # changed entries by group, over all deltas


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in their seeds alone."""

    title: str
    runs: list[RunSummary]

    def values_of(self, key: str) -> list[float]:
        """A value of every run; none if one lacks it."""
        found = [run.values[key] for run in self.runs]
        known = [value for value in found if value is not None]
        return known if len(known) == len(found) else []


@dataclass(frozen=True)
class Comparison:
    """The content of one page."""

    configurations: list[Configuration]
    bases: list[str]  # fingerprints; scores of different bases do not compare
    orders: list[tuple[str, ...]]  # of tasks

    @property
    def runs(self) -> list[RunSummary]:
        """All runs, way by way."""
        return [run for configuration in self.configurations for run in configuration.runs]


def compare_stores(stores: Sequence[DeltaStore]) -> Comparison:
    """Read some stores once: runs that differ in their seeds alone become one way."""
    names = [Path(store.path).resolve().name for store in stores]
    is_ambiguous = len(set(names)) < len(names)  # of stores that are called alike, the paths
    runs = [
        _summarise_run(s, str(s.path) if is_ambiguous else n)
        for s, n in zip(stores, names, strict=True)
    ]
    groups: list[list[RunSummary]] = []
    for run in runs:
        matching = (found for found in groups if found[0].settings == run.settings)
        group = next(matching, None)
        group.append(run) if group else groups.append([run])
    settings = [group[0].settings for group in groups]
    configurations = [
        Configuration(
            _format_title(group[0], _find_differing_keys(group[0].settings, settings)), group
        )
        for group in groups
    ]
    return Comparison(
        configurations=sorted(
            configurations, key=lambda way: _mean_or_none(way.values_of("op")) or 0.0, reverse=True
        ),
        bases=sorted({store.base["fingerprint"] for store in stores}),
        orders=sorted({run.tasks for run in runs}),
    )


def _summarise_run(store: DeltaStore, title: str) -> RunSummary:
    recipe = parse_recipe(store.recipe, f"{store.path}/recipe.yaml")
    results = store.results()
    matrix, ability = results.get("matrix", []), results.get("base_ability", [])
    found = continual.summarise_matrix(matrix)
    timings = results.get("seconds", {})
    seconds = [
        timings[e.task] for e in store.entries if timings.get(e.task, {}).keys() >= _TIMED_STAGES
    ]
    seen = [fmean(row[:at]) for at, row in enumerate(matrix) if at]
    return RunSummary(
        name=title,
        seed=recipe.seed,
        tasks=tuple(task.name for task in recipe.tasks),
        settings=dict(_flatten_settings(recipe.model_dump(mode="json", exclude={"seed", "store"}))),
        values={
            **{key: found[key] for key in ("learned", "op", "bwt")},
            "base_before": ability[0] if ability else None,
            "base_retained": ability[-1] if ability else None,
            "entries": _mean_or_none(entry.entries for entry in store.entries),
            "bytes": _mean_or_none(entry.bytes for entry in store.entries),
            "select": _mean_or_none(taken["select"] for taken in seconds),
            "train": _mean_or_none(taken["train"] for taken in seconds),
        },
        seen=Curve(title, seen),
        ability=Curve(title, ability) if ability else None,
        groups=_count_by_group(store),
    )


def _count_by_group(store: DeltaStore) -> dict[str, int]:
    """Changed entries by group, over all deltas that say."""
    found: dict[str, int] = {}
    for entry in store.entries:
        for group, counts in find_change_rows(store.delta(entry.position).info).items():
            found[group] = found.get(group, 0) + int(counts["changed"])
    return found


def _flatten_settings(content: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """Every value of nested mappings under its dotted key."""
    if not isinstance(content, dict):
        yield path, content
        return
    for key, value in content.items():
        yield from _flatten_settings(value, f"{path}.{key}" if path else key)


def _find_differing_keys(own: dict[str, Any], settings: Sequence[dict[str, Any]]) -> list[str]:
    """The keys in which ways of the same method differ, in the order of the recipe."""
    same_method = [found for found in settings if found["select.method"] == own["select.method"]]
    keys = dict.fromkeys(key for found in same_method for key in found)
    return [key for key in keys if any(found.get(key) != own.get(key) for found in same_method)]


def _format_title(run: RunSummary, differing: Sequence[str]) -> str:
    """The method, what is trained beside or against it, and in what a way differs from others."""
    labels = [str(run.settings["select.method"])]
    extra_keys = [key for key in ("rehearsal", "penalty") if run.settings.get(key)]
    for key in dict.fromkeys([*differing, *extra_keys]):
        if key == "tasks":
            labels.append(" → ".join(run.tasks))
        elif run.settings.get(key) is not None:
            labels.append(f"{key.rpartition('.')[2]} {run.settings[key]}")
    return ", ".join(labels)


def _mean_or_none(values: Iterable[float]) -> float | None:
    known = list(values)
    return fmean(known) if known else None
