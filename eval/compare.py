"""Compare methods on a sequence of tasks: same base, data, steps, evaluation; own learning rate.

Run:   python -m eval.compare eval/experiments/tiny.yaml [--jobs 2] [--only NAME]...
Out:   one JSON per run under eval/results/EXPERIMENT/, never run twice; eval/tables.py reads them

Learning rates are chosen on the validation split with one seed. The test split is used once per
seed, at the chosen rate and at those that `also` names. A method with one rate is not tuned.
`experiment.py` lists the keys of an experiment.
"""

import json
import platform
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Collection
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
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

Job = dict[str, Any]  # one run: its method, rate, seed and split
Row = tuple[list[float], float]  # scores of the tasks, and the base ability

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
    out = HERE / "results" / experiment.stem
    try:
        plan = load_experiment(experiment)
        _compare_methods(plan, out, jobs, only)
    except PieceError as error:
        raise click.ClickException(str(error)) from error


def _compare_methods(plan: Experiment, out: Path, jobs: int, only: tuple[str, ...]) -> None:
    unknown = set(only) - set(plan.methods)
    if unknown:
        first = sorted(unknown)[0]
        raise click.BadParameter(f"{first!r} is none of {', '.join(plan.methods)}")

    methods = {name: m for name, m in plan.methods.items() if not only or name in only}
    out.mkdir(parents=True, exist_ok=True)

    tuning = []
    for name, method in methods.items():
        tuning += tuning_runs(plan, name, method)
    _run_all(plan, tuning, out, jobs)

    final = []
    for name, method in methods.items():
        chosen = choose_learning_rate(plan, out, name)
        # without doubles: `also` may name the chosen rate
        learning_rates = dict.fromkeys([chosen, *method.also])
        for seed in method.seeds or plan.seeds:
            for learning_rate in learning_rates:
                final.append(_make_job(name, learning_rate, seed, "test"))
    # by seed, so that an interrupted comparison has all methods on some seeds
    final.sort(key=itemgetter("seed"))
    _run_all(plan, final, out, jobs)
    click.echo(f"results: {out}")


def _make_job(method: str, learning_rate: float, seed: int, split: str) -> Job:
    return {
        "method": method,
        "rate": learning_rate,
        "seed": seed,
        "split": split,
    }


def tuning_runs(plan: Experiment, name: str, method: Method) -> list[dict[str, Any]]:
    """Return the runs that choose a method's learning rate: none where there is only one."""
    if len(method.rates) == 1:
        return []
    seed = plan.tune.seed
    return [_make_job(name, rate, seed, "validation") for rate in method.rates]


def choose_learning_rate(plan: Experiment, out: Path, name: str) -> float:
    """Return the rate that ends highest on validation, by the mean over all tasks and the base.

    The base is one of them: were it to count as much as all tasks together, learning nothing
    would win.
    """
    method = plan.methods[name]
    runs = []
    for job in tuning_runs(plan, name, method):
        text = _result_file(out, job).read_text()
        runs.append(json.loads(text))
    if not runs:
        return method.rates[0]

    def final_mean(run: dict[str, Any]) -> float:
        last_row = run["matrix"][-1]
        return fmean([*last_row, run["base_kept"]])

    best = max(runs, key=final_mean)
    return best["rate"]


def _run_all(plan: Experiment, jobs: list[dict[str, Any]], out: Path, workers: int) -> None:
    """Run the jobs that have no result file yet, and write each result as soon as it is there."""
    waiting = [job for job in jobs if not _result_file(out, job).exists()]
    # threads wait for processes: each run has one of its own
    with ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(_run_in_process, plan, job): job for job in waiting}
        try:
            for number, done in enumerate(as_completed(running), start=1):
                job = running[done]
                result = done.result()
                _write_result(_result_file(out, job), result)
                click.echo(f"{number}/{len(waiting)} {_format_result(job, result)}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            _terminate_processes(running)
            raise


def _terminate_processes(running: Collection[Future]) -> None:
    """End the runs' processes, those included that only now start, until all futures are done."""
    while not all(run.done() for run in running):
        for process in active_children():
            process.terminate()
        time.sleep(0.1)


def _run_in_process(plan: Experiment, job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a process of its own, so that its peak of memory is that of no other run."""
    # spawned, not forked: this process has threads
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(_run_job, plan, job).result()


def _write_result(file: Path, result: dict[str, Any]) -> None:
    # renamed at the end: a result file is never half-written
    part = file.with_suffix(".part")
    text = json.dumps(result, indent=1)
    part.write_text(text + "\n")
    part.replace(file)


def _format_result(job: dict[str, Any], result: dict[str, Any]) -> str:
    keys = ("learned", "op", "bwt", "base_kept")
    numbers = {key: round(result[key], 3) for key in keys}
    return f"{job} {numbers} {result['seconds']:.0f} s"


def _result_file(out: Path, job: dict[str, Any]) -> Path:
    stem = f"{job['method']}-{job['rate']:g}-{job['seed']}-{job['split']}"
    return out / f"{stem}.json"


def _run_job(plan: Experiment, job: dict[str, Any]) -> dict[str, Any]:
    """Learn the sequence once, and return the content of the result file."""
    import torch

    from mm_piece.metrics.continual import summarise_matrix

    torch.set_num_threads(1)
    method = plan.methods[job["method"]]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = make_recipe(plan, method, job["rate"], job["seed"], folder / "store")
        if job["split"] == "validation":
            recipe = with_validation_split(recipe, plan.tune.rows)
        learner = _train_baseline if method.baseline else _train_sparse
        result = learner(recipe, method, folder)

    metrics = summarise_matrix(result["matrix"])
    ability = result["base_ability"]
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        **job,
        "learned": metrics["learned"],
        "op": metrics["op"],
        "bwt": metrics["bwt"],
        "base_before": ability[0],
        "base_kept": ability[-1],
        **result,
        "seconds": time.monotonic() - started,
        "peak_mib": peak_kib // 1024,
        "settings": method.model_dump(mode="json", exclude_unset=True),
        "recipe": recipe.model_dump(mode="json", exclude={"store"}),
        **_read_provenance(),
    }


def _train_sparse(recipe: Any, method: Method, folder: Path) -> dict[str, Any]:
    """Learn the sequence with this library, and return what the store records."""
    import mm_piece

    store = mm_piece.train(recipe)
    results = store.results()
    deltas = [store.delta(position) for position in range(1, len(store) + 1)]

    masks = []
    shapes = {}
    for delta in deltas:
        masks.append({name: index.numpy() for name, index in delta.indices.items()})
        shapes.update(delta.shapes)
    return {
        "matrix": results.get("matrix"),
        "base_ability": results.get("base_ability"),
        "trainable": deltas[0].info["k"],
        "bytes": [entry.bytes for entry in store.entries],
        "groups": [delta.info["groups"] for delta in deltas],
        **_describe_masks(masks, shapes),
    }


def _train_baseline(recipe: Any, method: Method, folder: Path) -> dict[str, Any]:
    """Learn the sequence with a baseline, measured after each task like a store."""
    import torch

    from mm_piece import load
    from mm_piece.data import pad_token_of, tokenizer_of
    from mm_piece.evaluation.answers import move_to_accelerator
    from mm_piece.models.base import tensors
    from mm_piece.training import arguments

    torch.manual_seed(recipe.seed)  # adapters are drawn before a Trainer sets its own
    model, processor = load(recipe.base, **recipe.model)
    model = move_to_accelerator(model)
    tasks = [_encode_task(task, processor, folder) for task in recipe.tasks]
    pad = pad_token_of(tokenizer_of(processor))
    baseline = baseline_class_of(method)(model, tasks, pad, **method.options)

    # counting an adapter's entries adds and removes it: before the model is measured
    num_entries = baseline.num_entries
    rows = [_measure_row(recipe, baseline.model, processor)]
    masks = []
    settings = {**recipe.train, "save_strategy": "no"}
    for number, task in enumerate(recipe.tasks):
        live = tensors(baseline.model)
        before = {name: weight.clone() for name, weight in live.items()}
        args = arguments(settings, folder / task.name, recipe.seed + number)
        baseline.learn_task(number, args)
        rows.append(_measure_row(recipe, baseline.model, processor))
        # read again: an adapter's merge may leave a model of other tensors
        after = tensors(baseline.model)
        masks.append(_select_most_moved(before, after, recipe.select))

    weights = tensors(baseline.model)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return {
        "matrix": [scores for scores, _ in rows],
        "base_ability": [ability for _, ability in rows],
        "trainable": num_entries,
        "bytes": [4 * num_entries] * len(recipe.tasks),  # fp32
        **_describe_masks(masks, shapes),
    }


def _encode_task(task: Any, processor: Any, folder: Path) -> list[Any]:
    """Return the encoded training examples of a task."""
    from mm_piece.data import EncodedDataset, read

    rows = read(task.train, task.images)
    encoded = EncodedDataset(rows, processor, folder, task.max_length, max_bytes=0)
    return list(encoded)


def _select_most_moved(
    before: dict[str, Any], after: dict[str, Any], select: Any
) -> dict[str, Any]:
    """Return the entries that moved farthest, as many as a mask has: flat indices by weight."""
    from mm_piece.families import group_of
    from mm_piece.selection import select as choose

    moved = {}
    for name, weight in before.items():
        if group_of(name) not in select.exclude:
            moved[name] = (after[name] - weight).abs()

    # the top-k of zeros would be arbitrary entries
    if not any(bool(change.any()) for change in moved.values()):
        return {}
    mask = choose(moved, select.density)
    return {name: index.numpy() for name, index in mask.items()}


def _describe_masks(
    masks: list[dict[str, Any]], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Return the masks' density by group, layer and module, and the overlap of each two of them."""
    from mm_piece.report.weight_maps import build_weight_map, measure_overlap

    places = []
    for mask in masks:
        densities = {}
        for grid in build_weight_map("", mask, shapes).grids:
            for (module, layer), cell in grid.cells.items():
                depth = "-" if layer is None else layer
                densities[f"{grid.group} {depth} {module}"] = round(cell.density, 4)
        places.append(densities)

    overlaps = []
    for one in masks:
        jaccards = [measure_overlap(one, other, 1).jaccard for other in masks]
        overlaps.append([round(jaccard, 4) for jaccard in jaccards])
    return {"places": places, "overlaps": overlaps}


def _measure_row(recipe: Any, model: Any, processor: Any) -> Row:
    """Return the model's score on each task, and the mean over the general tasks."""
    from mm_piece.data import read
    from mm_piece.evaluation.answers import mean_score
    from mm_piece.evaluation.matrix import answer_task

    scores = {}
    for task in (*recipe.tasks, *recipe.general):
        rows = read(task.test, task.images)
        answers = answer_task(model, processor, rows, recipe, task)
        scores[task.name] = mean_score(answers)

    learned = [scores[task.name] for task in recipe.tasks]
    general = [scores[task.name] for task in recipe.general]
    return learned, sum(general) / len(general)


def _read_provenance() -> dict[str, Any]:
    import torch
    import transformers

    # what decides a result: the library, and the base it starts from
    measured = ("mm_piece", "checkpoints/tiny/base")
    status = _run_git("status", "--porcelain", *measured)
    return {
        "commit": _run_git("rev-parse", "HEAD"),
        "dirty": bool(status),
        "device": _describe_device(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _run_git(*arguments: str) -> str:
    command = ["git", "-C", str(HERE), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip()


def _describe_device() -> str:
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return f"cpu, 1 thread, {platform.machine()}"
    module = torch.get_device_module(found)
    return f"{found.type}, {module.get_device_name()}"


if __name__ == "__main__":
    # a termination ends the runs too, as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
