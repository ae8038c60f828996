"""The optimizers that a task may be learned by, and the settings that each of them reads.

Of these it is known, by a test each, that a stopped training goes on bit for bit. Smaller states,
as of 8 bits, gain nothing here: there is one for the selected entries only.
"""

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from mm_piece.errors import RecipeError

# Name -> what it reads of `optim_args`.
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adamw_torch": (),
    "adamw_torch_fused": (),
    "adafactor": (),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
    "sgd": ("momentum", "dampening", "nesterov"),
}
_ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}


def require_optimizer(args: TrainingArguments) -> None:
    """Raise RecipeError for an optimizer that is not known here, or a setting that it ignores."""
    name = OptimizerNames(args.optim).value
    if name not in OPTIMIZERS:
        raise RecipeError(
            f"train: optim {name!r} is not known to go on bit for bit after a stop; "
            f"allowed: {', '.join(OPTIMIZERS)}"
        )
    for key in _options(args.optim_args):
        if key not in OPTIMIZERS[name]:
            allowed = ", ".join(OPTIMIZERS[name]) or "nothing"
            raise RecipeError(f"train: optim_args: {name} reads {allowed} there, not {key!r}")
    for key, default in _ADAM.items():
        if not name.startswith("adam") and vars(args)[key] != default:
            raise RecipeError(f"train: {key} does nothing with optim {name!r}; leave it out")


def _options(written: str | None) -> list[str]:
    pairs = [pair.partition("=") for pair in (written or "").replace(" ", "").split(",") if pair]
    if strange := [key for key, equals, value in pairs if not (equals and value)]:
        raise RecipeError(f"train: optim_args: {strange[0]!r} must be key=value, separated by ,")
    return [key for key, _, _ in pairs]
