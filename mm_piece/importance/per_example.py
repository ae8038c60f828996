"""Each example's gradient of the weights of one block, added to running sums.

A block is entries of some weights whose sums fit the memory budget (`accumulators`); the data are
passed once for each block. What is summed are gradients and their squares: `rules` turns the sums
into scores.

A batch goes through the model in one pass where its examples can be told apart inside of it. For
the weights where they cannot, the examples of the batch follow one by one.
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

# The aim. Scores need sum_n g_n and sum_n g_n ** 2 over examples n, entry by entry, where
# g_n = dL_n/dw and L_n is the objective of example n, by default its loss: a mean over its answer
# tokens. Autograd alone gives one sum over the whole batch, whose square is not the sum of the
# squares. So every g_n is needed by itself. One backward pass for each example always gives it, but
# is slow. Ways 1 and 2 find all g_n of a batch in a single backward pass; way 3 does not.
#
# 1. A linear layer, y_t = W x_t + b for every token t. By the chain rule
#        dL_n/dW = sum over the tokens t of example n of (dL_n/dy_t) x_t^T = G_n^T X_n
#        dL_n/db = sum over the same tokens of dL_n/dy_t
#    with the layer's inputs X_n (tokens, in) and the gradient of its outputs G_n (tokens, out).
#    Both pass by during a pass over the batch: GradientHook and BiasGradientHook pick them up and
#    multiply the rows of each example alone.
#
# 2. Any other module with weights (a norm, a convolution, stacked experts, a bare parameter). No
#    formula is known here, so the module is recomputed: it runs again on the inputs of one example,
#    and autograd takes that example's rows of the output gradient back to the weights (Recompute).
#    Both ways ask that the module keeps the examples apart (it is *separable*). If it does not, a
#    module around it may.
#
# 3. Whatever is left: a backward pass for each example. Linear weights still take way 1 there (no
#    gradient of the weight's size is ever made), unless they are tied or reused; all others, biases
#    too, get autograd's own gradient.
#
# Scales. A batch's loss is the mean over all of its answer tokens, L = sum_n (T_n / T) L_n with T_n
# answer tokens in example n and T in all. The rows of the output gradient that belong to example n
# are therefore T_n / T times what L_n alone gives. The scale T / T_n makes up for it; it must come
# before squaring, so that an example counts the same in whatever batch it stands.
#
# Reuse. A module that runs twice for one example gives g_n = a + b, one term for each call. Neither
# call shows the sum, and a ** 2 + b ** 2 is not (a + b) ** 2. Three kinds of weights are used more
# than once:
#   a weight whose module runs twice;
#   a weight that is read while its module does not run, as by a functional layer;
#   a tied weight, which lies in several modules.
# For the first two, the module is excluded as a place to look at: a module around it, which runs
# once and contains all uses, may be recomputed. Otherwise, and always for a tied weight, way 3 is
# left. Autograd adds the terms there before anything is squared.

# Weights that are used more than once, each with the module that does not show it.
ReusedWeights = Collection[tuple[str, nn.Module]]


_SCALE_OF_ONE = (1.0,)  # one example: its loss is the whole loss


@dataclass(frozen=True)
class _GradientPass:
    """How one backward pass finds the gradients of some weights; false if there are none."""

    observers: Sequence[ModuleObserver]
    collected: Mapping[str, nn.Parameter]  # of which autograd gives the whole gradient

    def __bool__(self) -> bool:
        return bool(self.observers or self.collected)


class PerExampleGradients:
    """A source of each example's gradients, which it adds to `sums` for the weights of a block.

    The way to a weight's gradient depends on the model and the batch only, never on which other
    weights are scored: it rounds the same in every block, whatever the memory budget.
    """

    def __init__(
        self,
        model: nn.Module,
        sums: GradientSums,
        reused: ReusedWeights,
        objective: Objective = loss_of,
    ) -> None:
        """`reused`: known from an earlier attempt, which ended with ModuleReused."""
        self.model = model
        self.sums = sums
        self.reused = reused
        self.objective = objective

        model_weights = weights(model)
        self.block_weights = {name: model_weights[name] for name in sums.ranges}

        # Only weights that lie in one module: of a tied weight, each module shows a part.
        all_owners = owners_of(model)
        self.owners: dict[str, WeightOwner] = {}
        for name, weight in self.block_weights.items():
            weight_owners = all_owners[id(weight)]
            if len(weight_owners) == 1:
                self.owners[name] = weight_owners[0]

        self.observation = Observation()
        self.whole_block_pass = self._plan_example_pass(self.block_weights)
        self.passes_by_kind: dict[tuple[object, ...], tuple[_GradientPass, _GradientPass]] = {}

    def add_batch(self, batch: Batch) -> None:
        """Add the gradient of every example of a batch; call it inside of `frozen_model`.

        Raises ModuleReused if a weight turns out to be used twice: the sums are incomplete then,
        and the caller begins anew with these weights among `reused`.
        """
        batched_pass, remaining_pass = self._plan_passes(batch)

        if batched_pass:
            scales = scales_of(batch)
            self._run_backward(batch, batched_pass, scales)

        # divided in any case, to count the examples
        for example in iter_examples(batch):
            if remaining_pass:
                self._run_backward(example, remaining_pass, _SCALE_OF_ONE)
            self.sums.examples += 1

    def add_batch_as_one(self, batch: Batch) -> None:
        """Add the gradient of a batch's objective, as if the batch were one example."""
        self._run_backward(batch, self.whole_block_pass, _SCALE_OF_ONE)
        self.sums.examples += 1

    def _run_backward(
        self,
        batch: Batch,
        gradient_pass: _GradientPass,
        scales: Sequence[float],
    ) -> None:
        """Run one forward and one backward pass, during which all gradients are added.

        `scales`: one for each example of the batch.
        """
        for observer in gradient_pass.observers:
            observer.begin_batch(scales)
        self.observation.outside_reads.clear()

        with (
            observing_modules(gradient_pass.observers, self.observation, self.owners),
            collecting_gradients(gradient_pass.collected, self._add_whole_gradient),
        ):
            loss = self.objective(self.model, batch)
            self.observation.require_no_outside_reads()

            # Without an image no weight of the vision tower is used: if all weights of the block
            # lie there, the loss depends on none of them.
            if loss.requires_grad:
                loss.backward()

    def _add_whole_gradient(
        self,
        name: str,
        gradient: Tensor,
    ) -> None:
        first_entry = 0  # of the weight, in flat order
        self.sums.add_gradient(name, first_entry, gradient)

    def _plan_passes(self, batch: Batch) -> tuple[_GradientPass, _GradientPass]:
        """Return how to pass a batch as a whole, then each of its examples.

        Together they cover every weight once. The plan for a kind of batch is made from the first
        one of that kind.
        """
        kind = _batch_kind_of(batch)
        if kind is None:
            return _GradientPass([], {}), self.whole_block_pass

        if kind not in self.passes_by_kind:
            # a trial of one pass over the batch and one over each example, for each kind
            separable = find_separable_modules(self.model, batch)
            observers = self._make_batch_observers(separable)
            observed = {name for observer in observers for name in observer.names}
            others = [name for name in self.block_weights if name not in observed]

            batched_pass = _GradientPass(observers, {})
            remaining_pass = self._plan_example_pass(others)
            self.passes_by_kind[kind] = batched_pass, remaining_pass

        return self.passes_by_kind[kind]

    def _plan_example_pass(self, names: Iterable[str]) -> _GradientPass:
        """Return how a pass over one example finds the gradients of some weights."""
        gradient_hooks: list[ModuleObserver] = []
        collected: dict[str, nn.Parameter] = {}

        for name in names:
            owner = self._find_linear_owner(name)
            if owner is None:
                collected[name] = self.block_weights[name]
            else:
                linear = owner.module
                gradient_hooks.append(GradientHook(name, linear, self.sums))  # type: ignore[arg-type] - is_linear says so

        return _GradientPass(gradient_hooks, collected)

    def _make_batch_observers(self, separable: SeparableModules) -> list[ModuleObserver]:
        """Return observers for all weights whose gradients a batched pass can tell apart."""
        observers: list[ModuleObserver] = []
        recomputed: dict[nn.Module, dict[str, nn.Parameter]] = {}

        for name, owner in self.owners.items():
            module = self._find_separable_module(name, owner, separable)
            if module is None:
                continue
            if self._find_linear_owner(name):
                observers.append(GradientHook(name, module, self.sums))  # type: ignore[arg-type] - as above
            elif module is owner.module and owner.is_linear("bias"):
                observers.append(BiasGradientHook(name, module, self.sums))
            else:
                recomputed.setdefault(module, {})[name] = self.block_weights[name]

        # One run of a module serves all of its weights.
        for module, named in recomputed.items():
            split_flags = separable[module]
            observers.append(
                Recompute(
                    module,
                    split_flags,
                    named,
                    self.sums,
                    self.observation,
                )
            )
        return observers

    def _find_separable_module(
        self,
        name: str,
        owner: WeightOwner,
        separable: SeparableModules,
    ) -> nn.Module | None:
        """Return the innermost module that shows a weight's gradient for each example, if any.

        The innermost is the cheapest to recompute.
        """
        module_chain = owner.module_chain  # from the innermost outwards
        if self._find_linear_owner(name):
            # A linear layer alone: recomputing a module around it would make a gradient of the
            # weight's size for each example.
            # A bias is small: its whole gradient costs nothing.
            module_chain = module_chain[:1]

        for module in module_chain:
            if module in separable and (name, module) not in self.reused:
                return module
        return None

    def _find_linear_owner(self, name: str) -> WeightOwner | None:
        """Return the owner of a linear layer's weight; None for another, a tied or a reused one."""
        owner = self.owners.get(name)
        if owner is None or not owner.is_linear("weight"):
            return None
        if (name, owner.module) in self.reused:
            return None
        return owner


def _batch_kind_of(batch: Batch) -> tuple[object, ...] | None:
    """Return what a batch has in common with others that the same plan fits.

    None where no single pass serves: for one example, and for a batch with a tensor that has no row
    for each example: `iter_examples` then divides it, or refuses it. Integers that are not one for
    each token describe the other tensors (sizes of images). They must be the same for all examples,
    or the rows of the other tensors mean different things.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or len(labels) == 1:
        return None

    kind: list[object] = []
    for key, value in sorted(batch.items()):
        if not isinstance(value, Tensor) or len(value) != len(labels):
            return None

        # One number for each token: batches of all lengths are of one kind.
        if value.shape == labels.shape:
            kind.append(key)
            continue

        if not value.is_floating_point() and bool((value != value[:1]).any()):
            return None
        kind.append((key, value.shape[1:]))
    return tuple(kind)
