"""What sparse training costs on many processes: memory, traffic and time, from sizes alone.

sent(model, engine, processes)              bytes that a process sends in a training step
seconds(model, engine, processes, speed)    time of a training step: computing, and sending
held(model, engine, processes)              bytes that a process holds, by what they are for
importance(model, engine, processes, …)     time of scoring all weights

Formulas only: `prediction` fits a `Speed` to measurements, `eval/scale.md` shows them.
"""

from dataclasses import dataclass
from math import ceil

ENGINES = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")
LIVE = 10**9  # weights that ZeRO-3 keeps gathered at once: DeepSpeed's own limit


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model and of what a process trains on in a step."""

    name: str
    weights: int
    looked_up: int  # of them in embeddings, which multiply nothing
    active: int  # of the others, those that a token passes
    layers: int
    hidden: int
    modules: int  # with weights of their own: each is gathered by itself
    largest: int  # weights of the largest of them
    width: int = 2  # bytes of a weight
    tokens: int = 1024  # of a process in a step
    k: int = 0  # entries that are trained


@dataclass(frozen=True)
class ProcessSpeed:
    """What a process does in a second."""

    flops: float
    bandwidth: float  # bytes sent
    latency: float = 0.0  # seconds of a module's gathering beside its bytes
    call: float = 0.0  # seconds of a module, whatever its size, in both passes


def predict_sent_bytes(model: ModelSizes, engine: str, processes: int) -> float:
    """Bytes that each process sends in a step; every collective as a ring.

    A sum over all processes takes two rounds of the ring (each sends (P - 1) / P of the bytes in
    each), a gathering or a divided sum takes one. ZeRO-3 gathers weights for the forward and for
    the backward pass, embeddings for the forward pass alone.
    """
    ring_share = (processes - 1) / processes
    values = 4 * model.k  # fp32, and so are their gradients
    if engine == "DDP":
        return 2 * ring_share * values
    if engine in ("ZeRO-1", "ZeRO-2"):
        return 3 * ring_share * values  # gradients summed, new values gathered
    # values gathered twice with their layer and once to be written, gradients summed in parts
    return ring_share * (count_gathered_bytes(model) + 4 * values)


def count_gathered_bytes(model: ModelSizes) -> int:
    """Bytes of weights that ZeRO-3 gathers for one forward and backward pass."""
    return model.width * (2 * model.weights - model.looked_up)


def count_step_flops(model: ModelSizes) -> float:
    """Floating-point operations of a step: forward, and backward to the inputs of the layers."""
    return 4.0 * model.active * model.tokens


def count_gatherings(model: ModelSizes, engine: str) -> int:
    """How often a step waits for a module's weights."""
    return 2 * model.modules if engine == "ZeRO-3" else 0


def predict_step_seconds(
    model: ModelSizes, engine: str, processes: int, speed: ProcessSpeed
) -> tuple[float, float]:
    """Time of a step: of computing, and of sending. Between the larger one and their sum."""
    waits = speed.latency * count_gatherings(model, engine) if processes > 1 else 0.0
    sending = predict_sent_bytes(model, engine, processes) / speed.bandwidth + waits
    return count_step_flops(model) / speed.flops + speed.call * model.modules, sending


def predict_memory(
    model: ModelSizes, engine: str, processes: int, accumulators: float = 0
) -> dict[str, float]:
    """Bytes that a process holds in training with gradient checkpointing, one layer's inputs each.

    `entries`: indices and values before on every process; values, gradients and Adam's two moments
    whole or in parts, as the engine divides them.
    """
    stage = ENGINES.index(engine)
    k, fraction = model.k, 1 / processes
    moments, gradients, values = (fraction if stage >= n else 1.0 for n in (1, 2, 3))
    entries = k * (4 + model.width + 4 * values + 4 * gradients + 8 * moments)
    entries += 4 * k * fraction if stage else 0  # the optimizer's own copy of its part
    live = max(model.largest, min(model.weights, LIVE)) * model.width if stage == 3 else 0
    return {
        "weights": model.width * model.weights * (fraction if stage == 3 else 1),
        "gathered": live if processes > 1 else 0.0,
        "entries": entries,
        "activations": model.width * model.tokens * model.hidden * (model.layers + 32),
        "accumulators": accumulators,
    }


def predict_scoring_seconds(
    model: ModelSizes, engine: str, processes: int, speed: ProcessSpeed, batches: int, passes: int
) -> tuple[float, float]:
    """Time of scoring all weights on batches as large as a step's: computing, and sending.

    All processes see all batches, each for its own rows of every weight: what one process adds up
    is what one process alone would, bit for bit, and nothing but ZeRO-3's weights is sent. The
    gradients of single examples are divided, the passes that lead to them are not.
    """
    operations = (4 * passes + 2 / processes) * model.active * model.tokens
    ring_share = (processes - 1) / processes if engine == "ZeRO-3" else 0.0
    weights = ring_share * count_gathered_bytes(model)
    waits = speed.latency * count_gatherings(model, engine) if processes > 1 else 0.0
    computing = operations / speed.flops + passes * speed.call * model.modules
    sending = passes * (weights / speed.bandwidth + waits)
    return batches * computing, batches * sending


def count_passes(model: ModelSizes, processes: int, sums: int, accumulators: float) -> int:
    """Passes over the data; `sums` fp32 numbers a weight: 1 for PIECE-F, 2 for PIECE-S."""
    return ceil(4 * sums * model.weights / processes / accumulators)


def fits_memory(
    model: ModelSizes, engine: str, processes: int, memory: float, accumulators: float
) -> bool:
    """Whether a process's memory holds what training and importance hold."""
    return sum(predict_memory(model, engine, processes, accumulators).values()) <= memory
