"""A block's gradients, example by example: from whole batches where it can be, else one by one."""

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from mm_piece.importance.blocks import Sums
from mm_piece.importance.reach import Batch, Objective, collecting, loss_of, singles
from mm_piece.importance.taps import BiasTap, Tap, Watcher, watching
from mm_piece.importance.together import Carriers, Replay, carriers, scales_of
from mm_piece.names import weights
from mm_piece.owners import Owner, owners_of


class Gradients:
    """The gradients of the weights of `sums`; those in `twice` belong to layers that run twice."""

    def __init__(
        self, model: nn.Module, sums: Sums, twice: Collection[str], objective: Objective = loss_of
    ) -> None:
        self.model, self.sums, self.objective = model, sums, objective
        named = weights(model)
        self.named = {name: named[name] for name in sums.runs}
        self.owners = owners_of(model)
        self.taps = [
            Tap(name, owner.module, sums)  # type: ignore[arg-type] - is_linear says so
            for name, owner in self._sole_owners().items()
            if name not in twice and owner.is_linear("weight")
        ]
        tapped = {tap.name for tap in self.taps}
        self.rest = {name: weight for name, weight in self.named.items() if name not in tapped}
        self.watchers: dict[tuple[object, ...], list[Watcher] | None] = {}

    def add(self, batch: Batch) -> None:
        """The gradients of a batch's examples."""
        kind = _kind(batch)
        if kind is not None and kind not in self.watchers:
            self.watchers[kind] = self._watchers(carriers(self.model, batch))
        watchers = self.watchers[kind] if kind is not None else None
        if watchers is not None:
            self._backward(batch, watchers, {}, scales_of(batch))
            return
        for example in singles(batch):
            self.add_whole(example)

    def add_whole(self, batch: Batch) -> None:
        """The gradient of a batch's objective, as if it were one example's."""
        self._backward(batch, self.taps, self.rest, [1.0])

    def _backward(
        self,
        batch: Batch,
        watchers: Sequence[Watcher],
        rest: Mapping[str, nn.Parameter],
        scales: list[float],
    ) -> None:
        for watcher in watchers:
            watcher.begin(scales)
        with watching(watchers), collecting(rest, self._take):
            loss = self.objective(self.model, batch)
            if loss.requires_grad:  # a text reaches no weight of a block that lies in the tower
                loss.backward()
        self.sums.examples += len(scales)

    def _take(self, name: str, gradient: Tensor) -> None:
        self.sums.add(name, 0, gradient)

    def _watchers(self, carried: Carriers) -> list[Watcher] | None:
        """A watcher for every weight; None if one has no module that keeps the examples apart."""
        sole = self._sole_owners()
        if len(sole) < len(self.named) or any(tap.module not in carried for tap in self.taps):
            return None
        found: list[Watcher] = list(self.taps)
        replayed: dict[nn.Module, dict[str, nn.Parameter]] = {}
        for name, weight in self.rest.items():
            owner = sole[name]
            carrier = next((m for m in owner.line if m in carried), None)
            if carrier is None:
                return None
            if owner.is_linear("bias") and carrier is owner.module:
                found.append(BiasTap(name, owner.module, self.sums))
            else:
                replayed.setdefault(carrier, {})[name] = weight
        return found + [Replay(m, carried[m], named, self.sums) for m, named in replayed.items()]

    def _sole_owners(self) -> dict[str, Owner]:
        """The owner of each weight that has only one."""
        owned = {name: self.owners[id(weight)] for name, weight in self.named.items()}
        return {name: owners[0] for name, owners in owned.items() if len(owners) == 1}


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
