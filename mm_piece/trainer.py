"""`SparseTrainer`: transformers' Trainer over the compact values of a sparse tuning."""

import json
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME

from mm_piece import sharding
from mm_piece.errors import RecipeError
from mm_piece.names import weights
from mm_piece.sparse import sparse_tuning
from mm_piece.tasks import collate

_VALUES = "values.safetensors"
_TAKEN = {
    *("resume_from_checkpoint", "push_to_hub", "load_best_model_at_end"),
    *("eval_strategy", "do_eval", "eval_steps", "metric_for_best_model"),
}
_COUNTS = {
    *("per_device_train_batch_size", "per_device_eval_batch_size"),
    "gradient_accumulation_steps",
}


class SparseTrainer(Trainer):
    """A Trainer whose only trainable parameters are a tuning's values.

    Checkpoints hold the values, the optimizer and the random state; the model's weights are never
    copied.
    """

    def __init__(
        self,
        tuning: sparse_tuning,
        args: TrainingArguments,
        examples: Sequence[dict[str, Tensor]],
        pad: int,
    ) -> None:
        """`examples` are encoded ones, batch dimension 1 each; `pad` is the padding token."""
        self.tuning = tuning
        super().__init__(
            model=tuning.model,  # type: ignore[arg-type]
            args=args,
            train_dataset=examples,  # type: ignore[arg-type]
            data_collator=lambda batch: collate(batch, pad),
            callbacks=[_WriteBack(tuning)],
        )
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(_Progress())

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.tuning.values(), folder / _VALUES)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self.tuning.restore(load_file(Path(resume_from_checkpoint) / _VALUES))


class _WriteBack(TrainerCallback):
    """Writes the values into the model after each optimizer step."""

    def __init__(self, tuning: sparse_tuning) -> None:
        self.tuning = tuning

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.tuning.write_back()


class _Progress(TrainerCallback):
    """One progress bar with rate, ETA and the last loss."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="train",
            unit="step",
            disable=None if state.is_world_process_zero else True,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar.close()


def arguments(settings: dict[str, Any], folder: Path, seed: int) -> TrainingArguments:
    """TrainingArguments from a recipe's `train:` as it stands; RecipeError for what they refuse."""
    known = [field.name for field in fields(TrainingArguments)]
    if unknown := [key for key in settings if key not in known]:
        close = get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see transformers.TrainingArguments"
        raise RecipeError(f"train: unknown key {unknown[0]!r}; {hint}")
    ours = {"output_dir": str(folder), "seed": seed, "remove_unused_columns": False}
    if taken := sorted((ours.keys() | _TAKEN) & settings.keys()):
        raise RecipeError(
            f"train: {taken[0]!r} is not a setting here; a run has its `store` and `seed`, goes on "
            "where it stopped, and measures every position (`test`, `general`)"
        )
    _require_numbers(settings)
    if settings.get("save_strategy") == "best":
        raise RecipeError("train: save_strategy must be no, steps or epoch; none is the best here")
    defaults: dict[str, Any] = {"report_to": "none", "save_total_limit": 2, "logging_steps": 10}
    defaults["dataloader_pin_memory"] = torch.accelerator.is_available()
    # Without it every process on a CPU would train on the same rows, and nothing would say so.
    defaults["use_cpu"] = not torch.accelerator.is_available()
    try:
        found = TrainingArguments(**{**defaults, **settings, **ours})
    except (TypeError, ValueError, ImportError) as error:
        message = " ".join(str(error).removeprefix("TrainingArguments.__init__() ").split())
        raise RecipeError(f"train: {message}") from error
    if found.max_steps <= 0 and found.num_train_epochs <= 0:
        raise RecipeError("train: num_train_epochs and max_steps leave no step to train")
    return found


def _require_numbers(settings: dict[str, Any]) -> None:
    """Raise RecipeError for what should be a number and is none, or counts less than one."""
    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    for key, value in settings.items():
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        number = type(defaults[key]) in (int, float) and value is not None
        if number and not plain:
            raise RecipeError(f"train: {key} must be a number, not {value!r}")
        if key in _COUNTS and not (isinstance(value, int) and value > 0):
            raise RecipeError(f"train: {key} must be a whole number of at least 1, not {value!r}")


def rehearse(
    model: nn.Module, examples: Sequence[dict[str, Tensor]], settings: dict[str, Any], pad: int
) -> None:
    """One training step that leaves no trace; RecipeError for settings that Trainer trips over."""
    name, weight = next(reversed(weights(model).items()))
    before = weight.detach().clone()
    settings = {**settings, "disable_tqdm": True, "save_strategy": "no"}
    try:
        with TemporaryDirectory() as folder:
            args = arguments(settings, Path(folder), seed=0)
            with sparse_tuning(model, {name: torch.zeros(1, dtype=torch.int64)}) as tuning:
                trainer = SparseTrainer(tuning, args, examples, pad)
                trainer.add_callback(_OneStep())
                _require_a_step(trainer.train().global_step, len(examples))
    except (TypeError, ValueError, RuntimeError, ArithmeticError, ImportError) as error:
        raise RecipeError(f"train: {' '.join(str(error).split())}") from error
    finally:
        weight.detach().copy_(before)


def _require_a_step(steps: int, examples: int) -> None:
    if steps == 0:
        raise RecipeError(f"train: these settings train no step on {examples} examples")


class _OneStep(TrainerCallback):
    """Stops after the first step."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        control.should_training_stop = True


def fit(
    tuning: sparse_tuning,
    examples: Sequence[dict[str, Tensor]],
    pad: int,
    args: TrainingArguments,
    logs: Path,
) -> dict[str, float]:
    """Train the values on encoded examples, from the last checkpoint if any; Trainer's metrics.

    Loss, learning rate and gradient norm go to TensorBoard files in `logs`.
    """
    trainer = SparseTrainer(tuning, args, examples, pad)
    if sharding.is_main():
        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(logs))))
    done = trainer.train(resume_from_checkpoint=last_checkpoint(Path(str(args.output_dir))))
    _require_a_step(done.global_step, len(examples))
    if not all(values.isfinite().all() for values in tuning.values().values()):
        raise RecipeError("train: the values are no longer finite; a lower learning_rate may help")
    return done.metrics


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of a folder: one with the state, which Trainer writes last."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    for checkpoint in reversed(found):
        try:
            json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # killed while it was written
            continue
        return str(checkpoint)
    return None
