"""What a delta costs: bytes, time and memory, beside its rivals, in one run on one core.

Run:   OMP_NUM_THREADS=1 python eval/bench/delta.py [--quick] [--out FILE.json] [--only SECTION]
Needs: peft (its SHiRA is a rival), zstandard if it is to be a rival too; 6 GB of memory, 15 GB of
       disk in the folder for temporary files. --quick: half a minute, sizes too small to judge by.
Out:   tables, the goals last; --out: all numbers, versions, commit, goals and whether they are met
"""

import importlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from timing import Bench, provenance

WIDTH = 132  # of the tables, wherever they are printed
SECTIONS = {"size": "sizes", "apply": "applies", "load": "loads", "export": "exports"}


@click.command()
@click.option("--quick", is_flag=True, help="Small sizes and few rounds: does it run?")
@click.option("--out", type=click.Path(path_type=Path), help="Write all numbers to this file.")
@click.option("--only", type=click.Choice(list(SECTIONS)), multiple=True, help="Only this section.")
@click.option("--seed", default=0, show_default=True)
def main(quick: bool, out: Path | None, only: tuple[str, ...], seed: int) -> None:
    """Measure what deltas cost."""
    import torch

    torch.set_num_threads(1)
    started = time.monotonic()
    sections: dict[str, Any] = {}
    tables: list[Table] = []
    for name in only or SECTIONS:
        module = importlib.import_module(SECTIONS[name])
        with tempfile.TemporaryDirectory() as folder:
            sections[name] = module.measure(Bench(Path(folder), quick, seed, name))
        tables += module.tables(sections[name])
    goals = [{"section": key, **goal} for key in sections for goal in sections[key].pop("goals")]
    result = {
        **{"bench": "delta", "quick": quick, "seed": seed, **provenance()},
        **{"seconds": round(time.monotonic() - started, 1), "goals": goals, "sections": sections},
    }
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for table in [*tables, _goal_table(goals, quick)]:
        Console(width=WIDTH).print(table)


def _goal_table(goals: list[dict[str, Any]], quick: bool) -> Table:
    title = "Goals (--quick: sizes too small to judge by)" if quick else "Goals"
    table = Table("section", "goal", "limit", "found", "", title=title, title_justify="left")
    for goal in goals:
        limit = f"{'≤' if goal['sense'] == 'at most' else '≥'} {goal['limit']:g}"
        met = "[green]met[/]" if goal["met"] else "[red]missed[/]"
        table.add_row(goal["section"], goal["what"], limit, f"{goal['found']:.4g}", met)
    return table


if __name__ == "__main__":
    main()
