"""What sparse training costs on many processes: memory, traffic and time, from sizes alone.

predict_sent_bytes        bytes that a process sends in a training step
predict_step_seconds      time of a training step: computing, and sending
predict_memory            bytes of a process by their use
predict_scoring_seconds   time of scoring all weights

Formulas only: `prediction` fits a `ProcessSpeed` to measurements, `docs/results/scaling.md`
shows them.
"""

from dataclasses import dataclass
from math import ceil

ENGINES = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")
LIVE = 10**9  # weights that are gathered at once in ZeRO-3: DeepSpeed's own limit


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model, and of a process's share of a step."""

    name: str
    weights: int
    looked_up: int  # of them in embeddings, which multiply nothing
    active: int  # of the others, those that take part in a token's pass
    layers: int
    hidden: int
    modules: int  # those with weights of their own, each gathered by itself
    largest: int  # weights of the largest of them
    width: int = 2  # bytes of a weight
    tokens: int = 1024  # of a process in a step
    k: int = 0  # entries that are trained


@dataclass(frozen=True)
class ProcessSpeed:
    """Speed of a process: its work in a second, and its delays."""

    flops: float
    bandwidth: float  # bytes sent
    latency: float = 0.0  # seconds of a module's gathering beside its bytes
    call: float = 0.0  # seconds of a module, whatever its size, in both passes


def predict_sent_bytes(model: ModelSizes, engine: str, processes: int) -> float:
    """Return the bytes that each process sends in a step; every collective is a ring.

    An all-reduce takes two rounds of the ring, and each process sends (P - 1) / P of the bytes in
    each round. An all-gather or a reduce-scatter takes one round. ZeRO-3 gathers weights for the
    forward and for the backward pass, embeddings for the forward pass alone.
    """
    ring_share = (processes - 1) / processes
    values = 4 * model.k  # fp32, and so are their gradients
    if engine == "DDP":
        return 2 * ring_share * values
    if engine in ("ZeRO-1", "ZeRO-2"):
        return 3 * ring_share * values  # gradients summed, new values gathered
    # values gathered twice with their layer and once to be written, gradients summed in shards
    gathered_bytes = count_gathered_bytes(model)
    return ring_share * (gathered_bytes + 4 * values)


def count_gathered_bytes(model: ModelSizes) -> int:
    """Return the bytes of weights that ZeRO-3 gathers for one forward and backward pass."""
    return model.width * (2 * model.weights - model.looked_up)


def count_step_flops(model: ModelSizes) -> float:
    """Return the operations of a step: forward, and backward to the inputs of the layers."""
    # two for each weight and token in either pass; the weights' own gradients are not computed
    return 4.0 * model.active * model.tokens


def count_gatherings(model: ModelSizes, engine: str) -> int:
    """Return how often a step waits for a module's weights."""
    if engine != "ZeRO-3":
        return 0
    return 2 * model.modules


def predict_step_seconds(
    model: ModelSizes, engine: str, processes: int, speed: ProcessSpeed
) -> tuple[float, float]:
    """Return the times of computing and of sending in a step.

    The step takes between the larger one and their sum, as far as one hides the other.
    """
    waits = _predict_waits(model, engine, processes, speed)
    sending = predict_sent_bytes(model, engine, processes) / speed.bandwidth + waits
    computing = count_step_flops(model) / speed.flops + speed.call * model.modules
    return computing, sending


def _predict_waits(
    model: ModelSizes,
    engine: str,
    processes: int,
    speed: ProcessSpeed,
) -> float:
    """Return the seconds of all gatherings of one pair of passes, beside their bytes."""
    if processes == 1:
        return 0.0
    return speed.latency * count_gatherings(model, engine)


def predict_memory(
    model: ModelSizes, engine: str, processes: int, accumulators: float = 0
) -> dict[str, float]:
    """Return the bytes of a process in training, with gradient checkpointing of each layer.

    `entries`: indices and previous values on every process; values, gradients and Adam's two
    moments complete or partitioned, as the engine divides them.
    """
    stage = ENGINES.index(engine)
    k = model.k
    fraction = 1 / processes
    # ZeRO (arXiv 1910.02054): stage 1 divides moments, 2 gradients too, 3 values too
    moments = fraction if stage >= 1 else 1.0
    gradients = fraction if stage >= 2 else 1.0
    values = fraction if stage >= 3 else 1.0
    entries = k * (4 + model.width + 4 * values + 4 * gradients + 8 * moments)
    if stage:
        # the optimizer's own copy of its shard
        entries += 4 * k * fraction

    weights = model.width * model.weights
    gathered_bytes = 0.0
    if stage == 3:
        weights = weights * fraction
        if processes > 1:
            # one module is gathered in any case
            live = max(model.largest, min(model.weights, LIVE))
            gathered_bytes = live * model.width
    return {
        "weights": weights,
        "gathered": gathered_bytes,
        "entries": entries,
        "activations": model.width * model.tokens * model.hidden * (model.layers + 32),
        "accumulators": accumulators,
    }


def predict_scoring_seconds(
    model: ModelSizes, engine: str, processes: int, speed: ProcessSpeed, batches: int, passes: int
) -> tuple[float, float]:
    """Return the times of computing and of sending for scores on batches as large as a step's.

    All processes see all batches, each for its own output rows of every weight. Each process's sums
    are bit for bit those of a single process, and only ZeRO-3 sends anything: weights. The
    gradients of single examples are divided, the passes that lead to them are not.
    """
    operations = (4 * passes + 2 / processes) * model.active * model.tokens
    ring_share = 0.0
    if engine == "ZeRO-3":
        ring_share = (processes - 1) / processes
    weights = ring_share * count_gathered_bytes(model)
    waits = _predict_waits(model, engine, processes, speed)
    computing = operations / speed.flops + passes * speed.call * model.modules
    sending = passes * (weights / speed.bandwidth + waits)
    return batches * computing, batches * sending


def count_passes(model: ModelSizes, processes: int, sums: int, accumulators: float) -> int:
    """Return the passes over the data; `sums` fp32 numbers a weight: 1 for PIECE-F, 2 for PIECE-S.

    Each pass scores as many weights as `accumulators`, the bytes for sums, hold.
    """
    return ceil(4 * sums * model.weights / processes / accumulators)


def fits_memory(
    model: ModelSizes, engine: str, processes: int, memory: float, accumulators: float
) -> bool:
    """Whether training and importance fit into a process's memory."""
    sizes = predict_memory(model, engine, processes, accumulators)
    return sum(sizes.values()) <= memory
