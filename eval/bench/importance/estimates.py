"""Time of per-example importance for one batch.

Candidates: a batched forward + backward with all gradients; ours from the batch and example by
example; the loop of single examples with dense gradients and dense sums; per-example gradients of
whole layers at once (einsum); the square of the batch's gradient, which is another quantity.
"""

from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from eval.bench.harness.models import linear_weights, make_batch, make_stack
from eval.bench.harness.timing import BenchContext, make_goal, time_interleaved
from mm_piece.distributed import EntryRange
from mm_piece.families import weights
from mm_piece.importance.accumulators import GradientSums, split_into_blocks
from mm_piece.importance.backward import frozen_model, iter_examples
from mm_piece.importance.per_example import PerExampleGradients

SHAPES = ((8, 32), (4, 128), (2, 512))  # examples and tokens


def measure_section(bench: BenchContext) -> dict[str, Any]:
    """Measure every candidate at every shape of batch."""
    layers = 1 if bench.quick else 2
    rounds = 2 if bench.quick else 5
    shapes = SHAPES[:1] if bench.quick else SHAPES
    rows = []
    for examples, tokens in shapes:
        bench.show_progress(f"{examples} examples of {tokens} tokens")
        inputs = make_batch(tokens, examples)
        model = make_stack(layers, quick=bench.quick)
        work = {name: make(model, inputs) for name, make in CANDIDATES.items()}
        # one untimed run of each
        for run in work.values():
            run()
        times = time_interleaved(work, rounds)
        rows.append({"examples": examples, "tokens": tokens, "times": times})

    goals = []
    for row in rows:
        ours = row["times"]["ours, PIECE-F"]["cpu_s"]
        batched = row["times"]["forward + backward"]["cpu_s"]
        title = f"PIECE-F, {row['examples']} x {row['tokens']} tokens / forward + backward"
        goals.append(make_goal(title, ours / batched, 1.15))
    return {
        "layers": layers,
        "rows": rows,
        "goals": goals,
        "differs": _difference_from_loop(bench),
    }


def _batched_backward(model: Any, inputs: dict[str, Tensor]) -> Callable[[], None]:
    def run_backward() -> None:
        model.requires_grad_(True)
        model(**inputs).loss.backward()
        model.zero_grad()

    return run_backward


def _piece_estimator(
    kinds: tuple[str, ...], batched: bool
) -> Callable[..., Callable[[], GradientSums]]:
    """Return a candidate of this library, from the whole batch or example by example."""

    def make_estimate(model: Any, inputs: dict[str, Tensor]) -> Callable[[], GradientSums]:
        sums = _make_sums(model, kinds)
        gradients = PerExampleGradients(model, sums, ())

        def run_estimate() -> GradientSums:
            batches = [inputs] if batched else list(iter_examples(inputs))
            with frozen_model(model):
                for batch in batches:
                    gradients.add_batch(batch)
            return sums

        return run_estimate

    return make_estimate


def _loop_examples(model: Any, inputs: dict[str, Tensor]) -> Callable[[], GradientSums]:
    """Add squares of single examples' dense gradients to dense sums."""
    sums = _make_sums(model, ("square",))
    named = linear_weights(model)

    def run_loop() -> GradientSums:
        model.requires_grad_(True)
        for example in iter_examples(inputs):
            model(**example).loss.backward()
            for name in named:
                gradient = model.get_parameter(name).grad.view(-1)
                sums.square_sums[name].addcmul_(gradient, gradient)
            model.zero_grad()
        return sums

    return run_loop


def _einsum_layers(model: Any, inputs: dict[str, Tensor]) -> Callable[[], GradientSums]:
    """Compute each layer's gradients of all examples at once, then square and add them."""
    sums = _make_sums(model, ("square",))
    modules = {}
    for name in linear_weights(model):
        modules[name] = model.get_submodule(name.removesuffix(".weight"))

    def make_hook(name: str) -> Callable[..., None]:
        def forward_hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            x = given[0].detach()  # (examples, tokens, in)

            def add_squares(gradient: Tensor) -> None:
                each = torch.einsum("bto,bti->boi", gradient, x)  # (examples, out, in)
                # the batch's loss is a mean over equally long examples
                squares = each.mul_(len(x)).square_()
                sums.square_sums[name].add_(squares.sum(0).view(-1))

            output.register_hook(add_squares)

        return forward_hook

    def run_einsum() -> GradientSums:
        model.requires_grad_(False)
        handles = []
        for name, module in modules.items():
            handles.append(module.register_forward_hook(make_hook(name)))

        # frozen weights have no gradients: let one flow back to the embeddings' output
        embeddings = model.get_input_embeddings()
        handles.append(embeddings.register_forward_hook(lambda *given: given[2].requires_grad_()))
        model(**inputs).loss.backward()
        for handle in handles:
            handle.remove()
        return sums

    return run_einsum


def _batch_square(model: Any, inputs: dict[str, Tensor]) -> Callable[[], GradientSums]:
    """Square the gradient of the batch's loss: another quantity, and the cheapest one."""
    sums = _make_sums(model, ("square",))

    def run_batch() -> GradientSums:
        model.requires_grad_(True)
        model(**inputs).loss.backward()
        for name in linear_weights(model):
            gradient = model.get_parameter(name).grad.view(-1)
            sums.square_sums[name].addcmul_(gradient, gradient)
        model.zero_grad()
        return sums

    return run_batch


def _make_sums(model: Any, kinds: tuple[str, ...]) -> GradientSums:
    shares = {}
    for name, weight in linear_weights(model).items():
        size = weight.numel()
        shares[name] = EntryRange(0, size, size)

    # a budget that one block never exceeds
    (block,) = split_into_blocks(shares, 2**40, len(kinds))
    named = weights(model)
    devices = {name: named[name].device for name in shares}
    return GradientSums(block, kinds, devices)


def _difference_from_loop(bench: BenchContext) -> dict[str, float]:
    """Return each candidate's distance from the loop: largest differences over largest squares."""
    model = make_stack(1, quick=True)
    inputs = make_batch(16, 4)
    exact = _loop_examples(model, inputs)().square_sums
    scale = sum(row.max().item() for row in exact.values())

    found = {}
    for name, make in CANDIDATES.items():
        sums = make(model, inputs)()
        # without sums, or another quantity
        if not sums or name == "square of the batch":
            continue
        differences = [(sums.square_sums[n] - row).abs().max() for n, row in exact.items()]
        found[name] = float(sum(differences)) / scale
    return found


CANDIDATES: dict[str, Callable[[Any, dict[str, Tensor]], Callable[[], Any]]] = {
    "forward + backward": _batched_backward,
    "ours, PIECE-F": _piece_estimator(("square",), batched=True),
    "ours, PIECE-S": _piece_estimator(("mean", "square"), batched=True),
    "ours, one by one": _piece_estimator(("square",), batched=False),
    "loop, dense gradients": _loop_examples,
    "whole layers (einsum)": _einsum_layers,
    "square of the batch": _batch_square,
}


def make_tables(result: dict[str, Any]) -> list[Table]:
    """Return the table of this section."""
    title = f"Squared gradients of a batch over forward + backward ({result['layers']} layers)"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for row in result["rows"]:
        table.add_column(f"{row['examples']} x {row['tokens']} tokens", justify="right")
    table.add_column("off the loop", justify="right")

    differs = result["differs"]
    for name in CANDIDATES:
        cells = []
        for row in result["rows"]:
            times = row["times"]
            ratio = times[name]["cpu_s"] / times["forward + backward"]["cpu_s"]
            cells.append(f"{ratio:.3f}")
        off = f"{differs[name]:.1e}" if name in differs else ""
        table.add_row(name, *cells, off)
    return [table]
