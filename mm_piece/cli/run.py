"""Commands that run a model: train, eval, ask."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mm_piece.cli.options import (
    AT,
    BASE,
    JSON,
    PATH,
    STORE,
    announce_loading,
    echo,
    echo_lines,
    show_table,
)
from mm_piece.cli.training_summary import print_summary
from mm_piece.errors import DataError

if TYPE_CHECKING:
    from mm_piece.evaluation.suites.scores import Scores


@click.command()
@click.argument("recipe", type=PATH)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key."
)
def train(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Learn the tasks of RECIPE, one after another.

    Run it again and it goes on where it stopped, Ctrl-C and a hang-up included.
    """
    from mm_piece.recipe import load_recipe

    # before torch and transformers, which take seconds to load
    loaded = load_recipe(recipe, overrides)
    if os.environ.get("RANK", "0") == "0":  # of several processes, one says so
        echo("loading torch and transformers")

    from mm_piece.distributed import is_main
    from mm_piece.training.loop import train as run

    store = run(loaded)
    if is_main():
        print_summary(store)


@click.command(name="eval")
@STORE
@AT
@BASE
@click.option(
    "--task", "names", multiple=True, help="Only these tasks of the store's recipe. [all]"
)
@click.option(
    "--kl", is_flag=True, help="How far its answers are from the base's, in nats a token."
)
@click.option(
    "--suite", default=None, help="What others measure general ability by: general, or a YAML file."
)
@JSON
def evaluate(
    store: Path,
    *,
    at: int | None,
    base: str | None,
    names: tuple[str, ...],
    kl: bool,
    suite: str | None,
    as_json: bool,
) -> None:
    """Measure the model at a position of STORE.

    On the test sets of its recipe, or on those of the named tasks.
    """
    if suite is not None and (kl or names):
        raise click.UsageError("--suite says what is measured: leave out --kl and --task")

    # before torch and transformers, which take seconds to load
    from mm_piece.evaluation.chosen_tasks import choose_tasks

    _, opened, _ = choose_tasks(store, names)
    opened.position(at)
    announce_loading()

    from mm_piece.distributed import is_main
    from mm_piece.evaluation.matrix import measure_divergences_at, measure_scores_at

    if suite is not None:
        _print_suite(suite, store, at, base, as_json=as_json)
        return

    if kl:
        scores = measure_divergences_at(store, at, base, names)
        title = "KL from the base"
        rows = [(name, f"{nats:.4f}") for name, nats in scores.items()]
    else:
        scores = measure_scores_at(store, at, base, names)
        title = "score"
        rows = [(name, f"{score:.1%}") for name, score in scores.items()]

    if is_main():  # all processes have the same scores
        show_table(scores, ("task", title), rows, as_json)


def _print_suite(
    name: str,
    store: Path,
    at: int | None,
    base: str | None,
    *,
    as_json: bool,
) -> None:
    """Run a suite and print its scores.

    A table shows the tasks and groups that the suite names, JSON the tasks of groups too.
    """
    from mm_piece.evaluation.suites import load_suite, run_suite

    suite = load_suite(name)
    named: set[str] = set()
    for config in suite.harness_configs().values():
        named.update(config.tasks)

    found: dict[str, Scores] = {}
    try:
        found.update(run_suite(store, suite, at, base))
    finally:
        # a harness may take hours: what was found before another one failed is printed
        if found:
            header = ("", "task", "metric", "value", "")
            show_table(found, header, _format_scores(found, named), as_json)


def _format_scores(
    found: "dict[str, Scores]",
    named: set[str],
) -> list[tuple[str, ...]]:
    """Return the table rows of the named tasks; of all tasks for a harness without any of them."""
    rows = []
    for harness, scores in found.items():
        # `kl` has the store's own tasks, which no suite names
        shown = named & scores.keys() or scores.keys()
        for task, metrics in scores.items():
            if task not in shown:
                continue
            for metric, score in metrics.items():
                value = f"{score['value']:.4f}"
                stderr = _format_stderr(score["stderr"])
                rows.append((harness, task, metric, value, stderr))
    return rows


def _format_stderr(error: float | None) -> str:
    if error is None:
        return ""
    return f"± {error:.4f}"


@click.command()
@click.argument("image")
@click.argument("question")
@click.option(
    "--store",
    type=PATH,
    default=None,
    help="Delta store.",
)
@click.option(
    "--delta",
    type=PATH,
    default=None,
    help="A single delta file.",
)
@AT
@BASE
@click.option(
    "--max-new-tokens",
    default=32,
    show_default=True,
    type=click.IntRange(min=1),
)
def ask(
    image: str,
    question: str,
    *,
    store: Path | None,
    delta: Path | None,
    at: int | None,
    base: str | None,
    max_new_tokens: int,
) -> None:
    """Ask a QUESTION about an IMAGE."""
    from mm_piece.data.images import require_image
    from mm_piece.store.inspection import as_store

    if "://" in image:  # as a path it would lose a slash
        raise DataError(f"image {image} is a URL; images must be files here: download it first")
    file = Path(image)
    # before a model is loaded, which may take minutes
    require_image(file, f"image {image}")
    if store is not None:
        as_store(store).position(at)

    announce_loading()

    from mm_piece.evaluation.answers import answer_question as answer
    from mm_piece.evaluation.answers import move_to_accelerator
    from mm_piece.store.loading import load

    model, processor = load(base=base, store=store, at=at, delta=delta)
    model = move_to_accelerator(model)
    echo_lines(answer(model, processor, file, question, max_new_tokens))


COMMANDS = (train, evaluate, ask)
