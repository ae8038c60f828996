"""Candidates side by side: medians of interleaved runs, and the facts that make them repeatable.

    for name, seconds in time_interleaved({"ours": a, "theirs": b}, rounds=5).items(): ...

Runs go A B C A B C …, never A A A, so that other work of the machine falls on all of them. CPU time
of the measuring thread stands beside wall time; other processes disturb it less.
"""

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click

PACKAGES = (
    "torch",
    "numpy",
    "transformers",
    "peft",
    "safetensors",
    "zstandard",
    "mm-piece",
)
ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class BenchContext:
    """Surroundings of a section: a folder of its own, sizes, a seed."""

    folder: Path
    quick: bool
    seed: int
    section: str

    def show_progress(self, text: str) -> None:
        """Show what is being measured, in one line on a terminal."""
        line = f"{self.section}: {text}"
        if sys.stderr.isatty():
            click.echo(f"\r\033[K{line[:100]}", nl=False, err=True)
        else:
            click.echo(line, err=True)


def do_nothing() -> None:
    """Prepare nothing: the default of a candidate."""


@dataclass(frozen=True)
class Candidate:
    """Work to time, and untimed preparations before each run of it."""

    work: Callable[[], Any]
    before: Callable[[], Any] = do_nothing


def time_interleaved(
    candidates: Mapping[str, Candidate | Callable[[], Any]],
    rounds: int,
    between: Callable[[], Any] = do_nothing,
) -> dict[str, dict[str, float]]:
    """Return each candidate's median wall and CPU seconds; `between` runs right before each."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, entry in candidates.items():
            candidate = entry if isinstance(entry, Candidate) else Candidate(entry)
            candidate.before()
            between()
            seconds = _time_once(candidate.work)
            found[name].append(seconds)

    columns = ("wall_s", "cpu_s")
    return {name: column_medians(columns, runs) for name, runs in found.items()}


def column_medians(names: tuple[str, ...], runs: list[tuple[float, ...]]) -> dict[str, float]:
    """Return the median of each column, and the number of runs."""
    columns = zip(*runs, strict=True)
    found: dict[str, float] = {}
    for name, column in zip(names, columns, strict=True):
        found[name] = statistics.median(column)
    found["rounds"] = len(runs)
    return found


def _time_once(work: Callable[[], Any]) -> tuple[float, float]:
    wall = time.perf_counter()
    cpu = time.thread_time()
    work()
    return time.perf_counter() - wall, time.thread_time() - cpu


def make_goal(title: str, found: float, limit: float, sense: str = "at most") -> dict[str, Any]:
    """Return a goal with the value found, and whether that meets the limit."""
    met = found <= limit if sense == "at most" else found >= limit
    return {
        "what": title,
        "sense": sense,
        "limit": limit,
        "found": float(found),
        "met": bool(met),
    }


def read_provenance() -> dict[str, Any]:
    """Return versions, processor, commit, and whether the measured code differs from it."""
    changed = _run_git("status", "--porcelain", "--", "mm_piece", "eval/bench")
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = _find_version(package)
    return {
        "commit": _run_git("rev-parse", "HEAD"),
        "dirty": bool(changed),
        "cpu": _read_cpu_name(),
        "threads": 1,
        "versions": versions,
    }


def _run_git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip()


def _read_cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            _, name = line.split(":", 1)
            return name.strip()
    # not every architecture names its processor
    return platform.machine()


def _find_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
