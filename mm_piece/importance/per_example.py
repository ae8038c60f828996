"""A block's gradients, example by example: from whole batches where it can be, else one by one.

How a weight's gradients are found is decided for each weight by itself, from the model and the
batch: they round the same whichever other weights are looked at.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mm_piece.families import weights
from mm_piece.importance.accumulators import GradientSums
from mm_piece.importance.backward import (
    Batch,
    Objective,
    collecting_gradients,
    iter_examples,
    loss_of,
)
from mm_piece.importance.batched import (
    Recompute,
    SeparableModules,
    find_separable_modules,
    scales_of,
)
from mm_piece.importance.hooks import (
    BiasGradientHook,
    GradientHook,
    ModuleObserver,
    Observation,
    observing_modules,
)
from mm_piece.modules import WeightOwner, owners_of

ReusedModules = Collection[tuple[str, nn.Module]]  # weights, each with a module that runs twice


@dataclass(frozen=True)
class _GradientPass:
    """How the gradients of some weights are found in one backward pass."""

    observers: Sequence[ModuleObserver]
    collected: Mapping[str, nn.Parameter]  # dense, from autograd

    def __bool__(self) -> bool:
        return bool(self.observers or self.collected)


class PerExampleGradients:
    """The gradients of the weights of `sums`, none from a call of a module that runs `twice`."""

    def __init__(
        self,
        model: nn.Module,
        sums: GradientSums,
        reused: ReusedModules,
        objective: Objective = loss_of,
    ) -> None:
        self.model, self.sums, self.reused, self.objective = model, sums, reused, objective
        named, owners = weights(model), owners_of(model)
        self.named = {name: named[name] for name in sums.ranges}
        owned = {name: owners[id(weight)] for name, weight in self.named.items()}
        self.owners = {name: found[0] for name, found in owned.items() if len(found) == 1}
        self.observation = Observation()
        self.per_example_pass = self._plan_example_pass(self.named)
        self.passes_by_kind: dict[tuple[object, ...], tuple[_GradientPass, _GradientPass]] = {}

    def add_batch(self, batch: Batch) -> None:
        """The gradients of a batch's examples."""
        batched, per_example = self._plan_passes(batch)
        if batched:
            self._run_backward(batch, batched.observers, {}, scales_of(batch))
        for example in iter_examples(batch):
            if per_example:
                self._run_backward(example, per_example.observers, per_example.collected, [1.0])
            self.sums.examples += 1

    def add_batch_as_one(self, batch: Batch) -> None:
        """The gradient of a batch's objective, as if it were one example's."""
        self._run_backward(
            batch, self.per_example_pass.observers, self.per_example_pass.collected, [1.0]
        )
        self.sums.examples += 1

    def _run_backward(
        self,
        batch: Batch,
        observers: Sequence[ModuleObserver],
        collected: Mapping[str, nn.Parameter],
        scales: list[float],
    ) -> None:
        for observer in observers:
            observer.begin_batch(scales)
        self.observation.outside_reads.clear()
        with (
            observing_modules(observers, self.observation, self.owners),
            collecting_gradients(collected, self._add_dense_gradient),
        ):
            loss = self.objective(self.model, batch)
            self.observation.require_no_outside_reads()
            if loss.requires_grad:  # a text reaches no weight of a block that lies in the tower
                loss.backward()

    def _add_dense_gradient(self, name: str, gradient: Tensor) -> None:
        self.sums.add_gradient(name, 0, gradient)

    def _plan_passes(self, batch: Batch) -> tuple[_GradientPass, _GradientPass]:
        """How a batch is passed through as a whole, and how its examples one by one."""
        kind = _batch_kind_of(batch)
        if kind is None:
            return _GradientPass([], {}), self.per_example_pass
        if kind not in self.passes_by_kind:
            separable = find_separable_modules(self.model, batch)
            batched = self._make_batch_observers(separable)
            observed = {name for observer in batched for name in observer.names}
            others = [name for name in self.named if name not in observed]
            self.passes_by_kind[kind] = _GradientPass(batched, {}), self._plan_example_pass(others)
        return self.passes_by_kind[kind]

    def _plan_example_pass(self, names: Iterable[str]) -> _GradientPass:
        """Weights in a pass over one example: what no layer shows comes from autograd."""
        gradient_hooks = [
            GradientHook(name, owner.module, self.sums)  # type: ignore[arg-type] - is_linear says so
            for name in names
            if (owner := self._find_hooked_owner(name)) is not None
        ]
        hooked = {gradient_hook.name for gradient_hook in gradient_hooks}
        return _GradientPass(
            gradient_hooks, {name: self.named[name] for name in names if name not in hooked}
        )

    def _make_batch_observers(self, separable: SeparableModules) -> list[ModuleObserver]:
        """A watcher for every weight with a module that keeps the examples of a batch apart."""
        found: list[ModuleObserver] = []
        recomputed: dict[nn.Module, dict[str, nn.Parameter]] = {}
        for name, owner in self.owners.items():
            separable_module = self._find_separable_module(name, owner, separable)
            if separable_module is None:
                continue
            if self._find_hooked_owner(name):
                found.append(GradientHook(name, separable_module, self.sums))  # type: ignore[arg-type] - as above
            elif separable_module is owner.module and owner.is_linear("bias"):
                found.append(BiasGradientHook(name, separable_module, self.sums))
            else:
                recomputed.setdefault(separable_module, {})[name] = self.named[name]
        for module, named in recomputed.items():
            found.append(Recompute(module, separable[module], named, self.sums, self.observation))
        return found

    def _find_separable_module(
        self, name: str, owner: WeightOwner, separable: SeparableModules
    ) -> nn.Module | None:
        """The module whose calls tell of a weight's gradients in a batch: the innermost there is.

        Of a linear layer its own alone: others would make a gradient of the layer's size.
        """
        module_chain = (
            owner.module_chain[:1] if self._find_hooked_owner(name) else owner.module_chain
        )
        return next(
            (m for m in module_chain if m in separable and (name, m) not in self.reused), None
        )

    def _find_hooked_owner(self, name: str) -> WeightOwner | None:
        """The owner of a linear layer's weight that no other layer shares and that runs once."""
        owner = self.owners.get(name)
        if owner is None or not owner.is_linear("weight") or (name, owner.module) in self.reused:
            return None
        return owner


def _batch_kind_of(batch: Batch) -> tuple[object, ...] | None:
    """What batches have in common that can be cut alike; None for one that is taken apart.

    Every tensor has a row for each example, and what is neither a token nor a number (the sizes of
    images) is the same for all of them.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or len(labels) == 1:
        return None
    kind: list[object] = []
    for key, value in sorted(batch.items()):
        if not isinstance(value, Tensor) or len(value) != len(labels):
            return None
        if value.shape == labels.shape:
            kind.append(key)
            continue
        if not value.is_floating_point() and bool((value != value[:1]).any()):
            return None
        kind.append((key, value.shape[1:]))
    return tuple(kind)
