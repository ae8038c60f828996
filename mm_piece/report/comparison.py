"""What a page about several stores says, as plain data: runs beside each other, and their means."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mm_piece.metrics import continual
from mm_piece.recipe import parse_recipe
from mm_piece.report.summary import Curve
from mm_piece.sparse.change_report import change_rows
from mm_piece.store.delta_store import DeltaStore

_ARE_TIMED = {"select", "train"}


@dataclass(frozen=True)
class Run:
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
class Way:
    """Runs that differ in their seeds alone."""

    title: str
    runs: list[Run]

    def values(self, key: str) -> list[float]:
        """A value of every run; none if one lacks it."""
        found = [run.values[key] for run in self.runs]
        known = [value for value in found if value is not None]
        return known if len(known) == len(found) else []


@dataclass(frozen=True)
class Comparison:
    """The content of one page."""

    ways: list[Way]
    bases: list[str]  # fingerprints; scores of different bases do not compare
    orders: list[tuple[str, ...]]  # of tasks

    @property
    def runs(self) -> list[Run]:
        """All runs, way by way."""
        return [run for way in self.ways for run in way.runs]


def compare(stores: Sequence[DeltaStore]) -> Comparison:
    """Read some stores once: runs that differ in their seeds alone become one way."""
    names = [Path(store.path).resolve().name for store in stores]
    whole = len(set(names)) < len(names)  # of stores that are called alike, the paths
    runs = [_run(s, str(s.path) if whole else n) for s, n in zip(stores, names, strict=True)]
    together: list[list[Run]] = []
    for run in runs:
        alike = (found for found in together if found[0].settings == run.settings)
        group = next(alike, None)
        group.append(run) if group else together.append([run])
    settings = [group[0].settings for group in together]
    ways = [
        Way(_title(group[0], _differing(group[0].settings, settings)), group) for group in together
    ]
    return Comparison(
        ways=sorted(ways, key=lambda way: _mean(way.values("op")) or 0.0, reverse=True),
        bases=sorted({store.base["fingerprint"] for store in stores}),
        orders=sorted({run.tasks for run in runs}),
    )


def _run(store: DeltaStore, title: str) -> Run:
    recipe = parse_recipe(store.recipe, f"{store.path}/recipe.yaml")
    results = store.results()
    matrix, ability = results.get("matrix", []), results.get("base_ability", [])
    found = continual.summary(matrix)
    told = results.get("seconds", {})
    seconds = [told[e.task] for e in store.entries if told.get(e.task, {}).keys() >= _ARE_TIMED]
    seen = [fmean(row[:at]) for at, row in enumerate(matrix) if at]
    return Run(
        name=title,
        seed=recipe.seed,
        tasks=tuple(task.name for task in recipe.tasks),
        settings=dict(_flat(recipe.model_dump(mode="json", exclude={"seed", "store"}))),
        values={
            **{key: found[key] for key in ("learned", "op", "bwt")},
            "base_before": ability[0] if ability else None,
            "base_kept": ability[-1] if ability else None,
            "entries": _mean(entry.entries for entry in store.entries),
            "bytes": _mean(entry.bytes for entry in store.entries),
            "select": _mean(part["select"] for part in seconds),
            "train": _mean(part["train"] for part in seconds),
        },
        seen=Curve(title, seen),
        ability=Curve(title, ability) if ability else None,
        groups=_groups(store),
    )


def _groups(store: DeltaStore) -> dict[str, int]:
    """Changed entries by group, over all deltas that say."""
    found: dict[str, int] = {}
    for entry in store.entries:
        for group, row in change_rows(store.delta(entry.position).info).items():
            found[group] = found.get(group, 0) + int(row["changed"])
    return found


def _flat(content: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """Every value of nested mappings under its dotted key."""
    if not isinstance(content, dict):
        yield path, content
        return
    for key, value in content.items():
        yield from _flat(value, f"{path}.{key}" if path else key)


def _differing(own: dict[str, Any], settings: Sequence[dict[str, Any]]) -> list[str]:
    """The keys in which ways of the same method differ, in the order of the recipe."""
    alike = [found for found in settings if found["select.method"] == own["select.method"]]
    keys = dict.fromkeys(key for found in alike for key in found)
    return [key for key in keys if any(found.get(key) != own.get(key) for found in alike)]


def _title(run: Run, differing: Sequence[str]) -> str:
    """The method, what is trained beside or against it, and in what a way differs from others."""
    parts = [str(run.settings["select.method"])]
    beside = [key for key in ("own_answers", "penalty") if run.settings.get(key)]
    for key in dict.fromkeys([*differing, *beside]):
        if key == "tasks":
            parts.append(" → ".join(run.tasks))
        elif run.settings.get(key) is not None:
            parts.append(f"{key.rpartition('.')[2]} {run.settings[key]}")
    return ", ".join(parts)


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return fmean(known) if known else None
