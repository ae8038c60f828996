"""The command line of every bench: options, sections in turn, a result file, tables, goals last."""

import importlib
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from eval.bench.harness.timing import BenchContext, read_provenance

WIDTH = 132  # of the tables, wherever they are printed


def make_bench_command(name: str, about: str, sections: Mapping[str, str]) -> click.Command:
    """Return the command of a bench; `sections` maps each section to the module that measures it.

    Such a module has `measure_section(BenchContext)`, whose result holds `goals`, and
    `make_tables(result)`.
    """

    @click.command(help=about)
    @click.option("--quick", is_flag=True, help="Small sizes and few rounds: does it run?")
    @click.option("--out", type=click.Path(path_type=Path), help="Write all numbers to this file.")
    @click.option(
        "--only", type=click.Choice(list(sections)), multiple=True, help="Only this section."
    )
    @click.option("--seed", default=0, show_default=True)
    def main(quick: bool, out: Path | None, only: tuple[str, ...], seed: int) -> None:
        import torch

        torch.set_num_threads(1)
        started = time.monotonic()
        # before anything is measured: the code may change while a bench runs
        origin = read_provenance()

        found: dict[str, Any] = {}
        tables: list[Table] = []
        for section in only or sections:
            module = importlib.import_module(sections[section])
            found[section] = _measure_section(module, quick, seed, section)
            tables += module.make_tables(found[section])

        goals = _collect_goals(found)
        result = {
            "bench": name,
            "quick": quick,
            "seed": seed,
            **origin,
            "seconds": round(time.monotonic() - started, 1),
            "goals": goals,
            "sections": found,
        }
        if out:
            _write_result(out, result)
        if goals:
            tables.append(_goal_table(goals, quick))
        for table in tables:
            Console(width=WIDTH).print(table)

    return main


def _measure_section(module: Any, quick: bool, seed: int, section: str) -> dict[str, Any]:
    """Return what a section's module measures, in a temporary folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        bench = BenchContext(Path(folder), quick, seed, section)
        return module.measure_section(bench)


def _collect_goals(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Move the goals out of the sections' results into one list."""
    goals = []
    for section, result in found.items():
        for goal in result.pop("goals"):
            goals.append({"section": section, **goal})
    return goals


def _write_result(file: Path, result: dict[str, Any]) -> None:
    text = json.dumps(result, indent=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n", encoding="utf-8")


def _goal_table(goals: list[dict[str, Any]], quick: bool) -> Table:
    title = "Goals (--quick: sizes too small to judge by)" if quick else "Goals"
    table = Table("section", "goal", "limit", "found", "", title=title, title_justify="left")
    for goal in goals:
        sign = "≤" if goal["sense"] == "at most" else "≥"
        limit = f"{sign} {goal['limit']:g}"
        met = "[green]met[/]" if goal["met"] else "[red]missed[/]"
        table.add_row(goal["section"], goal["what"], limit, f"{goal['found']:.4g}", met)
    return table
