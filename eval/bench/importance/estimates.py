"""Time of per-example importance for one batch.

Contestants: a batched forward + backward with all gradients; ours from the batch and example by
example; the loop of single examples with dense gradients and dense sums; per-example gradients of
whole layers at once (einsum); the square of the batch's gradient, which is another quantity.
"""

from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from eval.bench.harness.models import batch, linears, stack
from eval.bench.harness.timing import Bench, goal, interleaved
from mm_piece.distributed import Share
from mm_piece.families import weights
from mm_piece.importance.accumulators import Sums, blocks
from mm_piece.importance.backward import frozen, singles
from mm_piece.importance.per_example import Gradients

SHAPES = ((8, 32), (4, 128), (2, 512))  # examples and tokens


def measure(bench: Bench) -> dict[str, Any]:
    """Measure every way at every shape of batch."""
    layers = 1 if bench.quick else 2
    shapes = SHAPES[:1] if bench.quick else SHAPES
    rows = []
    for examples, tokens in shapes:
        bench.say(f"{examples} examples of {tokens} tokens")
        inputs = batch(tokens, examples)
        model = stack(layers, quick=bench.quick)
        work = {name: make(model, inputs) for name, make in WAYS.items()}
        for run in work.values():
            run()
        times = interleaved(work, 2 if bench.quick else 5)
        rows.append({"examples": examples, "tokens": tokens, "times": times})
    goals = [
        goal(
            f"PIECE-F, {row['examples']} x {row['tokens']} tokens / forward + backward",
            row["times"]["ours, PIECE-F"]["cpu_s"] / row["times"]["forward + backward"]["cpu_s"],
            1.15,
        )
        for row in rows
    ]
    return {"layers": layers, "rows": rows, "goals": goals, "differs": _difference(bench)}


def _all_gradients(model: Any, inputs: dict[str, Tensor]) -> Callable[[], None]:
    def run() -> None:
        model.requires_grad_(True)
        model(**inputs).loss.backward()
        model.zero_grad()

    return run


def _ours(kinds: tuple[str, ...], together: bool) -> Callable[..., Callable[[], Sums]]:
    def make(model: Any, inputs: dict[str, Tensor]) -> Callable[[], Sums]:
        sums = _sums(model, kinds)
        gradients = Gradients(model, sums, ())

        def run() -> Sums:
            with frozen(model):
                for part in [inputs] if together else list(singles(inputs)):
                    gradients.add(part)
            return sums

        return run

    return make


def _loop(model: Any, inputs: dict[str, Tensor]) -> Callable[[], Sums]:
    sums = _sums(model, ("square",))
    named = linears(model)

    def run() -> Sums:
        model.requires_grad_(True)
        for example in singles(inputs):
            model(**example).loss.backward()
            for name in named:
                gradient = model.get_parameter(name).grad.view(-1)
                sums.second[name].addcmul_(gradient, gradient)
            model.zero_grad()
        return sums

    return run


def _whole_layers(model: Any, inputs: dict[str, Tensor]) -> Callable[[], Sums]:
    """Each layer's gradients of all examples beside each other, then squared and summed."""
    sums = _sums(model, ("square",))
    found = {name: model.get_submodule(name.removesuffix(".weight")) for name in linears(model)}

    def watch(name: str) -> Callable[..., None]:
        def seen(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            x = given[0].detach()

            def square(gradient: Tensor) -> None:
                each = torch.einsum("bto,bti->boi", gradient, x)
                # The batch's loss is a mean over equally long examples.
                sums.second[name].add_(each.mul_(len(x)).square_().sum(0).view(-1))

            output.register_hook(square)

        return seen

    def run() -> Sums:
        model.requires_grad_(False)
        handles = [module.register_forward_hook(watch(name)) for name, module in found.items()]
        embeddings = model.get_input_embeddings()
        handles.append(embeddings.register_forward_hook(lambda *g: g[2].requires_grad_()))
        model(**inputs).loss.backward()
        for handle in handles:
            handle.remove()
        return sums

    return run


def _of_the_batch(model: Any, inputs: dict[str, Tensor]) -> Callable[[], Sums]:
    sums = _sums(model, ("square",))

    def run() -> Sums:
        model.requires_grad_(True)
        model(**inputs).loss.backward()
        for name in linears(model):
            gradient = model.get_parameter(name).grad.view(-1)
            sums.second[name].addcmul_(gradient, gradient)
        model.zero_grad()
        return sums

    return run


def _sums(model: Any, kinds: tuple[str, ...]) -> Sums:
    sizes = {name: weight.numel() for name, weight in linears(model).items()}
    shares = {name: Share(0, size, size) for name, size in sizes.items()}
    (block,) = blocks(shares, 2**40, len(kinds))
    return Sums(block, kinds, {name: weights(model)[name].device for name in sizes})


def _difference(bench: Bench) -> dict[str, float]:
    """How far each way's squares are from the loop's, largest over the largest of a layer."""
    model, inputs = stack(1, quick=True), batch(16, 4)
    exact = _loop(model, inputs)()
    scale = sum(exact.second[name].max().item() for name in exact.second)
    found = {}
    for name, make in WAYS.items():
        sums = make(model, inputs)()
        if sums and name != "square of the batch":  # which is another quantity
            apart = [(sums.second[n] - exact.second[n]).abs().max() for n in exact.second]
            found[name] = float(sum(apart)) / scale
    return found


WAYS: dict[str, Callable[[Any, dict[str, Tensor]], Callable[[], Any]]] = {
    "forward + backward": _all_gradients,
    "ours, PIECE-F": _ours(("square",), together=True),
    "ours, PIECE-S": _ours(("mean", "square"), together=True),
    "ours, one by one": _ours(("square",), together=False),
    "loop, dense gradients": _loop,
    "whole layers (einsum)": _whole_layers,
    "square of the batch": _of_the_batch,
}


def tables(result: dict[str, Any]) -> list[Table]:
    """Return what a terminal shows."""
    title = f"Squared gradients of a batch over forward + backward ({result['layers']} layers)"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for row in result["rows"]:
        table.add_column(f"{row['examples']} x {row['tokens']} tokens", justify="right")
    table.add_column("off the loop", justify="right")
    for name in WAYS:
        times = [row["times"] for row in result["rows"]]
        cells = [f"{t[name]['cpu_s'] / t['forward + backward']['cpu_s']:.3f}" for t in times]
        off = f"{result['differs'][name]:.1e}" if name in result["differs"] else ""
        table.add_row(name, *cells, off)
    return [table]
