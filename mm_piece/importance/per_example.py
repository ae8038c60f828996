"""A block's gradients, example by example: from whole batches where it can be, else one by one.

How a weight's gradients are found is decided for each weight by itself, from the model and the
batch: they round the same whichever other weights are looked at.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mm_piece.families import weights
from mm_piece.importance.accumulators import Sums
from mm_piece.importance.backward import Batch, Objective, collecting, loss_of, singles
from mm_piece.importance.batched import Carriers, Replay, carriers, scales_of
from mm_piece.importance.hooks import BiasTap, Observation, Tap, Watcher, watching
from mm_piece.modules import Owner, owners_of

Twice = Collection[tuple[str, nn.Module]]  # weights, each with a module that runs twice


@dataclass(frozen=True)
class _Way:
    """How the gradients of some weights are found in one backward pass."""

    watchers: Sequence[Watcher]
    collected: Mapping[str, nn.Parameter]  # dense, from autograd

    def __bool__(self) -> bool:
        return bool(self.watchers or self.collected)


class Gradients:
    """The gradients of the weights of `sums`, none from a call of a module that runs `twice`."""

    def __init__(
        self, model: nn.Module, sums: Sums, twice: Twice, objective: Objective = loss_of
    ) -> None:
        self.model, self.sums, self.twice, self.objective = model, sums, twice, objective
        named, owners = weights(model), owners_of(model)
        self.named = {name: named[name] for name in sums.runs}
        owned = {name: owners[id(weight)] for name, weight in self.named.items()}
        self.owners = {name: found[0] for name, found in owned.items() if len(found) == 1}
        self.observation = Observation()
        self.alone = self._alone(self.named)
        self.ways: dict[tuple[object, ...], tuple[_Way, _Way]] = {}

    def add(self, batch: Batch) -> None:
        """The gradients of a batch's examples."""
        together, apart = self._ways(batch)
        if together:
            self._backward(batch, together.watchers, {}, scales_of(batch))
        for example in singles(batch):
            if apart:
                self._backward(example, apart.watchers, apart.collected, [1.0])
            self.sums.examples += 1

    def add_whole(self, batch: Batch) -> None:
        """The gradient of a batch's objective, as if it were one example's."""
        self._backward(batch, self.alone.watchers, self.alone.collected, [1.0])
        self.sums.examples += 1

    def _backward(
        self,
        batch: Batch,
        watchers: Sequence[Watcher],
        collected: Mapping[str, nn.Parameter],
        scales: list[float],
    ) -> None:
        for watcher in watchers:
            watcher.begin(scales)
        self.observation.outside.clear()
        with (
            watching(watchers, self.observation, self.owners),
            collecting(collected, self._take),
        ):
            loss = self.objective(self.model, batch)
            self.observation.require_inside()
            if loss.requires_grad:  # a text reaches no weight of a block that lies in the tower
                loss.backward()

    def _take(self, name: str, gradient: Tensor) -> None:
        self.sums.add(name, 0, gradient)

    def _ways(self, batch: Batch) -> tuple[_Way, _Way]:
        """How a batch is passed through as a whole, and how its examples one by one."""
        kind = _kind(batch)
        if kind is None:
            return _Way([], {}), self.alone
        if kind not in self.ways:
            carried = carriers(self.model, batch)
            together = self._together(carried)
            watched = {name for watcher in together for name in watcher.names}
            others = [name for name in self.named if name not in watched]
            self.ways[kind] = _Way(together, {}), self._alone(others)
        return self.ways[kind]

    def _alone(self, names: Iterable[str]) -> _Way:
        """Weights in a pass over one example: what no layer shows comes from autograd."""
        taps = [
            Tap(name, owner.module, self.sums)  # type: ignore[arg-type] - is_linear says so
            for name in names
            if (owner := self._tapped(name)) is not None
        ]
        tapped = {tap.name for tap in taps}
        return _Way(taps, {name: self.named[name] for name in names if name not in tapped})

    def _together(self, carried: Carriers) -> list[Watcher]:
        """A watcher for every weight with a module that keeps the examples of a batch apart."""
        found: list[Watcher] = []
        replayed: dict[nn.Module, dict[str, nn.Parameter]] = {}
        for name, owner in self.owners.items():
            carrier = self._carrier(name, owner, carried)
            if carrier is None:
                continue
            if self._tapped(name):
                found.append(Tap(name, carrier, self.sums))  # type: ignore[arg-type] - as above
            elif carrier is owner.module and owner.is_linear("bias"):
                found.append(BiasTap(name, carrier, self.sums))
            else:
                replayed.setdefault(carrier, {})[name] = self.named[name]
        for module, named in replayed.items():
            found.append(Replay(module, carried[module], named, self.sums, self.observation))
        return found

    def _carrier(self, name: str, owner: Owner, carried: Carriers) -> nn.Module | None:
        """The module whose calls tell of a weight's gradients in a batch: the innermost there is.

        Of a linear layer its own alone: others would make a gradient of the layer's size.
        """
        line = owner.line[:1] if self._tapped(name) else owner.line
        return next((m for m in line if m in carried and (name, m) not in self.twice), None)

    def _tapped(self, name: str) -> Owner | None:
        """The owner of a linear layer's weight that no other layer shares and that runs once."""
        owner = self.owners.get(name)
        if owner is None or not owner.is_linear("weight") or (name, owner.module) in self.twice:
            return None
        return owner


def _kind(batch: Batch) -> tuple[object, ...] | None:
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
