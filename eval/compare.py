"""Compare ways of learning a sequence: same base, data, steps and evaluation; own tuned rate.

Run:   python -m eval.compare eval/experiments/tiny.yaml [--jobs 2] [--only NAME]...
Out:   one JSON per run under eval/results/EXPERIMENT/, never run twice; eval/tables.py reads them

Rates are chosen on the validation split with one seed; the test split is used once per seed, at
the chosen rate and at those that `also` names. A method with one rate is not tuned. What an
experiment may say: `experiment.py`.
"""

import json
import platform
import resource
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import click

from eval.experiment import (
    Experiment,
    Method,
    baseline_class_of,
    load_experiment,
    make_recipe,
    with_validation_split,
)
from mm_piece.errors import PieceError

HERE = Path(__file__).parent


@click.command()
@click.argument("experiment", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Runs at a time, one thread each.",
)
@click.option("--only", multiple=True, help="Only these methods.")
def main(experiment: Path, jobs: int, only: tuple[str, ...]) -> None:
    """Run what EXPERIMENT lists and has no result yet."""
    try:
        _compare_methods(
            load_experiment(experiment), HERE / "results" / experiment.stem, jobs, only
        )
    except PieceError as error:
        raise click.ClickException(str(error)) from error


def _compare_methods(plan: Experiment, out: Path, jobs: int, only: tuple[str, ...]) -> None:
    if unknown := set(only) - set(plan.methods):
        raise click.BadParameter(f"{sorted(unknown)[0]!r} is none of {', '.join(plan.methods)}")
    methods = {name: m for name, m in plan.methods.items() if not only or name in only}
    out.mkdir(parents=True, exist_ok=True)
    tuning = [run for name, method in methods.items() for run in tuning_runs(plan, name, method)]
    _run_all(plan, tuning, out, jobs)
    chosen = {name: choose_learning_rate(plan, out, name) for name in methods}
    final = [
        {"method": name, "rate": learning_rate, "seed": seed, "split": "test"}
        for name, method in methods.items()
        for seed in method.seeds or plan.seeds
        for learning_rate in dict.fromkeys([chosen[name], *method.also])
    ]
    final.sort(key=itemgetter("seed"))  # what is broken off has all methods on some seeds
    _run_all(plan, final, out, jobs)
    click.echo(f"results: {out}")


def tuning_runs(plan: Experiment, name: str, method: Method) -> list[dict[str, Any]]:
    """The runs that a method's rate is chosen by: none where there is only one."""
    learning_rates = method.rates if len(method.rates) > 1 else ()
    seed = plan.tune.seed
    return [
        {"method": name, "rate": r, "seed": seed, "split": "validation"} for r in learning_rates
    ]


def choose_learning_rate(plan: Experiment, out: Path, name: str) -> float:
    """The rate that ends highest on the validation split, by the mean over all tasks and the base.

    The base is one of them: were it to count as much as all tasks together, learning nothing
    would win.
    """
    method = plan.methods[name]
    runs = [json.loads(_result_file(out, r).read_text()) for r in tuning_runs(plan, name, method)]
    if not runs:
        return method.rates[0]
    return max(runs, key=lambda run: fmean([*run["matrix"][-1], run["base_kept"]]))["rate"]


def _run_all(plan: Experiment, jobs: list[dict[str, Any]], out: Path, workers: int) -> None:
    waiting = [job for job in jobs if not _result_file(out, job).exists()]
    with ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(_run_in_process, plan, job): job for job in waiting}
        try:
            for number, done in enumerate(as_completed(running), start=1):
                _write_result(_result_file(out, running[done]), done.result())
                click.echo(
                    f"{number}/{len(waiting)} {_format_result(running[done], done.result())}"
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(run.done() for run in running):  # one may only now be starting
                for run in active_children():
                    run.terminate()
                time.sleep(0.1)
            raise


def _run_in_process(plan: Experiment, job: dict[str, Any]) -> dict[str, Any]:
    """A run in a process of its own: its peak of memory is that of no other run."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_run_job, plan, job).result()


def _write_result(file: Path, result: dict[str, Any]) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(file)  # never half-written


def _format_result(job: dict[str, Any], result: dict[str, Any]) -> str:
    numbers = {key: round(result[key], 3) for key in ("learned", "op", "bwt", "base_kept")}
    return f"{job} {numbers} {result['seconds']:.0f} s"


def _result_file(out: Path, job: dict[str, Any]) -> Path:
    return out / f"{job['method']}-{job['rate']:g}-{job['seed']}-{job['split']}.json"


def _run_job(plan: Experiment, job: dict[str, Any]) -> dict[str, Any]:
    import torch

    from mm_piece.metrics.continual import summarise_matrix

    torch.set_num_threads(1)
    method = plan.methods[job["method"]]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(plan, method, job["rate"], job["seed"], Path(folder) / "store")
        if job["split"] == "validation":
            recipe = with_validation_split(recipe, plan.tune.rows)
        learner = _train_baseline if method.baseline else _train_sparse
        result = learner(recipe, method, Path(folder))
    metrics = summarise_matrix(result["matrix"])
    ability = result["base_ability"]
    return {
        **job,
        "learned": metrics["learned"],
        "op": metrics["op"],
        "bwt": metrics["bwt"],
        "base_before": ability[0],
        "base_kept": ability[-1],
        **result,
        "seconds": time.monotonic() - started,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "settings": method.model_dump(mode="json", exclude_unset=True),
        "recipe": recipe.model_dump(mode="json", exclude={"store"}),
        **_read_provenance(),
    }


def _train_sparse(recipe: Any, method: Method, folder: Path) -> dict[str, Any]:
    import mm_piece

    store = mm_piece.train(recipe)
    results, deltas = store.results(), [store.delta(t) for t in range(1, len(store) + 1)]
    masks = [{n: index.numpy() for n, index in delta.indices.items()} for delta in deltas]
    return {
        "matrix": results["matrix"],
        "base_ability": results["base_ability"],
        "trainable": deltas[0].info["k"],
        "bytes": [entry.bytes for entry in store.entries],
        "groups": [delta.info["groups"] for delta in deltas],
        **_describe_masks(masks, {n: s for delta in deltas for n, s in delta.shapes.items()}),
    }


def _train_baseline(recipe: Any, method: Method, folder: Path) -> dict[str, Any]:
    import torch

    from mm_piece import load
    from mm_piece.data import EncodedDataset, read, tokenizer_of
    from mm_piece.evaluation.answers import move_to_accelerator, pad_token_of
    from mm_piece.models.base import tensors
    from mm_piece.training import arguments

    torch.manual_seed(recipe.seed)  # adapters are drawn before a Trainer sets its own
    model, processor = load(recipe.base, **recipe.model)
    model = move_to_accelerator(model)
    tasks = [
        [
            *EncodedDataset(
                read(task.train, task.images), processor, folder, task.max_length, max_bytes=0
            )
        ]
        for task in recipe.tasks
    ]
    pad = pad_token_of(tokenizer_of(processor))
    baseline = baseline_class_of(method)(model, tasks, pad, **method.options)
    num_entries, rows, masks = (
        baseline.num_entries,
        [_measure_row(recipe, baseline.model, processor)],
        [],
    )
    for number, task in enumerate(recipe.tasks):
        settings = {**recipe.train, "save_strategy": "no"}
        before = {name: weight.clone() for name, weight in tensors(baseline.model).items()}
        baseline.learn_task(number, arguments(settings, folder / task.name, recipe.seed + number))
        rows.append(_measure_row(recipe, baseline.model, processor))
        masks.append(_select_most_moved(before, tensors(baseline.model), recipe.select))
    return {
        "matrix": [tasks for tasks, _ in rows],
        "base_ability": [ability for _, ability in rows],
        "trainable": num_entries,
        "bytes": [4 * num_entries] * len(recipe.tasks),
        **_describe_masks(
            masks, {name: tuple(w.shape) for name, w in tensors(baseline.model).items()}
        ),
    }


def _select_most_moved(
    before: dict[str, Any], after: dict[str, Any], select: Any
) -> dict[str, Any]:
    """The entries that a task moved farthest, as many as a mask has: flat indices by weight."""
    from mm_piece.families import group_of
    from mm_piece.selection import select as choose

    moved = {
        name: (after[name] - weight).abs()
        for name, weight in before.items()
        if group_of(name) not in select.exclude
    }
    if not any(bool(change.any()) for change in moved.values()):
        return {}
    return {name: index.numpy() for name, index in choose(moved, select.density).items()}


def _describe_masks(
    masks: list[dict[str, Any]], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Where masks lie: density by group, layer and module; and what each two of them share."""
    from mm_piece.report.weight_maps import build_weight_map, measure_overlap

    densities = [
        {
            f"{grid.group} {'-' if layer is None else layer} {module}": round(cell.density, 4)
            for grid in build_weight_map("", mask, shapes).grids
            for (module, layer), cell in grid.cells.items()
        }
        for mask in masks
    ]
    shared = [[round(measure_overlap(a, b, 1).jaccard, 4) for b in masks] for a in masks]
    return {"places": densities, "overlaps": shared}


def _measure_row(recipe: Any, model: Any, processor: Any) -> tuple[list[float], float]:
    from mm_piece.data import read
    from mm_piece.evaluation.answers import mean_score
    from mm_piece.evaluation.matrix import answer_task

    scores = {
        task.name: mean_score(
            answer_task(model, processor, read(task.test, task.images), recipe, task)
        )
        for task in (*recipe.tasks, *recipe.general)
    }
    general = [scores[task.name] for task in recipe.general]
    return [scores[task.name] for task in recipe.tasks], sum(general) / len(general)


def _read_provenance() -> dict[str, Any]:
    import torch
    import transformers

    git = ["git", "-C", str(HERE)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    status = subprocess.run(
        [*git, "status", "--porcelain", "mm_piece", "checkpoints/tiny/base"],
        capture_output=True,
        text=True,
    ).stdout
    return {
        "commit": commit.strip(),
        "dirty": bool(status.strip()),
        "device": _describe_device(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _describe_device() -> str:
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return f"cpu, 1 thread, {platform.machine()}"
    return f"{found.type}, {torch.get_device_module(found).get_device_name()}"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the runs too, as Ctrl-C does
    main()
