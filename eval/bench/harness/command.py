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

    Such a module has `measure(Bench)`, whose result holds `goals`, and `tables(result)`.
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
        started, origin = time.monotonic(), read_provenance()
        found: dict[str, Any] = {}
        tables: list[Table] = []
        for section in only or sections:
            module = importlib.import_module(sections[section])
            with tempfile.TemporaryDirectory() as folder:
                found[section] = module.measure_section(
                    BenchContext(Path(folder), quick, seed, section)
                )
            tables += module.make_tables(found[section])
        goals = [{"section": key, **goal} for key in found for goal in found[key].pop("goals")]
        result = {
            **{"bench": name, "quick": quick, "seed": seed, **origin},
            **{"seconds": round(time.monotonic() - started, 1), "goals": goals, "sections": found},
        }
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        for table in [*tables, *([_goal_table(goals, quick)] if goals else [])]:
            Console(width=WIDTH).print(table)

    return main


def _goal_table(goals: list[dict[str, Any]], quick: bool) -> Table:
    title = "Goals (--quick: sizes too small to judge by)" if quick else "Goals"
    table = Table("section", "goal", "limit", "found", "", title=title, title_justify="left")
    for goal in goals:
        limit = f"{'≤' if goal['sense'] == 'at most' else '≥'} {goal['limit']:g}"
        met = "[green]met[/]" if goal["met"] else "[red]missed[/]"
        table.add_row(goal["section"], goal["what"], limit, f"{goal['found']:.4g}", met)
    return table
