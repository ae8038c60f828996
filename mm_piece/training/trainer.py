"""`SparseTrainer`: transformers' Trainer over the compact values of a sparse tuning."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME

from mm_piece import distributed
from mm_piece.data import EncodedExamples
from mm_piece.distributed.progress import print_line
from mm_piece.errors import RecipeError
from mm_piece.sparse.tuning import sparse_tuning
from mm_piece.store.board import open_board
from mm_piece.training.batches import DistributedBatchSampler, PaddedDataset
from mm_piece.training.callbacks import ProgressBar
from mm_piece.training.loss import make_loss_function
from mm_piece.training.optimizer_state import restore_order, save_order
from mm_piece.training.penalty import register_penalty
from mm_piece.training.run_progress import RunProgress
from mm_piece.training.step_losses import StepLosses
from mm_piece.training.stopping import GracefulStop, ignore_stop_signals
from mm_piece.training.write_errors import translate_write_errors

_VALUES_FILE = "values.safetensors"


class SparseTrainer(Trainer):
    """Trainer whose only trainable parameters are a tuning's values.

    Checkpoints hold the values, the optimizer and the random state; the model's weights are never
    copied. The loss of a step is the mean over the answer tokens of all its batches on all
    processes.
    """

    def __init__(
        self,
        tuning: sparse_tuning,
        args: TrainingArguments,
        examples: EncodedExamples,
        penalty_strengths: Mapping[str, Tensor] | None = None,
        progress: RunProgress | None = None,
    ) -> None:
        """Take encoded examples.

        `penalty_strengths` has a strength for each entry of the mask, by the weight's name (see
        `register_penalty`); `progress` is that of the run which this training is part of.
        """
        self.tuning = tuning
        self.padded_dataset = PaddedDataset(examples)
        self.penalty_strengths = penalty_strengths
        self.step_losses = StepLosses()
        super().__init__(
            model=tuning.model,  # type: ignore[arg-type]
            args=args,
            train_dataset=self.padded_dataset,  # type: ignore[arg-type]
            data_collator=self.padded_dataset.collate,
        )

        smoothing = args.label_smoothing_factor
        if smoothing or not self.model_accepts_loss_kwargs:
            self.compute_loss_func = make_loss_function(smoothing)

        # Trainer has put in one of the two already
        if args.disable_tqdm:
            self.remove_callback(PrinterCallback)
        else:
            self.remove_callback(ProgressCallback)
            self.add_callback(ProgressBar(progress or RunProgress(1, {})))

    def get_train_dataloader(self) -> DataLoader:
        """Build the loader of this process's batches."""
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler = DistributedBatchSampler(
            len(self.padded_dataset),
            args.per_device_train_batch_size,
            seed,
            args.dataloader_drop_last,
        )
        return _EpochDataLoader(
            self.padded_dataset,  # type: ignore[arg-type]
            batch_sampler=sampler,  # type: ignore[arg-type]
            collate_fn=self.padded_dataset.collate,
            worker_init_fn=ignore_stop_signals,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            # Or each start of workers, once or every epoch, would draw from the model's numbers.
            generator=torch.Generator(),
        )

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on one batch, and note its loss."""
        loss = super().training_step(*args, **kwargs)
        self.step_losses.add(self.state.global_step, loss)
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the values and the losses so far; all processes call it, one writes."""
        # before the guard: values that are partitioned need every process to be gathered
        values = self.tuning.detach_values()
        self.step_losses.collect()
        if not self.args.should_save:
            return

        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(values, folder / _VALUES_FILE)
        self.step_losses.save(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir))
        with translate_write_errors(folder):
            super()._save_checkpoint(model, trial)

    def close(self) -> None:
        """Free the engine that holds the model, if there is one."""
        if distributed.has_engine(self.accelerator):
            distributed.destroy_engine(self.model_wrapped)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer, in which the same values decay on every engine."""
        optimizer = super().create_optimizer(model)
        if not distributed.has_engine(self.accelerator):
            return optimizer

        # for an optimizer of DeepSpeed's, Trainer makes one group, in which biases decay too
        tuned = self.tuning.model
        named = {
            name: parameter
            for name, parameter in tuned.named_parameters()
            if parameter.requires_grad
        }
        decaying = self.get_decay_parameter_names(tuned)  # type: ignore[arg-type]
        distributed.divide_decay(optimizer, named, set(decaying))
        return optimizer

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Do nothing: `fit` has restored the values, before an engine copied them."""

    def _prepare_for_training(
        self,
        max_steps: int,
        train_dataloader: DataLoader,
        resume_from_checkpoint: str | None,
    ) -> Any:
        # With checkpointing, Trainer has just had the embeddings ask for gradients: every backward
        # pass would run through all layers, also those below the lowest trained entry.
        self.tuning.model.disable_input_require_grads()  # type: ignore[operator]

        # an engine's state is loaded below, by names: Trainer would read it in DeepSpeed's format
        engine = distributed.has_engine(self.accelerator)
        resumed = None if engine else resume_from_checkpoint
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resumed)
        if engine and resume_from_checkpoint is not None:
            distributed.load_state(
                self.model_wrapped,
                self.tuning.named_values(),
                self.lr_scheduler,
                Path(resume_from_checkpoint),
            )

        if self.penalty_strengths is not None:
            self._register_penalty(self.penalty_strengths, engine)
        return prepared

    def _register_penalty(self, penalty_strengths: Mapping[str, Tensor], engine: bool) -> None:
        """Pull the values back to those before the task, in the layout that is stepped."""
        named = self.tuning.named_values()
        patches = self.tuning.patches
        starts = {name: patch.entries_before.float() for name, patch in patches.items()}

        penalized: dict[Tensor, tuple[Tensor, Tensor]] = {}
        if engine:
            # DeepSpeed steps flat fp32 tensors of its own in place of the parameters
            wrapped = self.model_wrapped
            flat_strengths = distributed.to_optimizer_layout(wrapped, named, penalty_strengths)
            flat_starts = distributed.to_optimizer_layout(wrapped, named, starts)
            for flat, start in flat_starts.items():
                penalized[flat] = (start, flat_strengths[flat])
        else:
            for name, values in named.items():
                strength = penalty_strengths[name].to(values)
                penalized[values] = (starts[name], strength)

        # inside accelerate's or DeepSpeed's wrapper: the optimizer whose step runs hooks
        owner: Any = self.model_wrapped if engine else self
        register_penalty(owner.optimizer.optimizer, penalized)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        named = self.tuning.named_values()
        if distributed.has_engine(self.accelerator):
            distributed.save_state(
                self.model_wrapped,
                named,
                self.lr_scheduler,
                folder,
                self.args.should_save,
            )
            return

        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_order(self.optimizer, named, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return

        named = self.tuning.named_values()
        restore_order(self.optimizer, named, Path(checkpoint))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        distributed.barrier()  # Trainer's state, which makes a checkpoint whole, is written next


class _EpochDataLoader(DataLoader):
    """DataLoader that passes the number of the epoch to its sampler."""

    def set_epoch(self, epoch: int) -> None:
        """Have the sampler draw the order of an epoch."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def require_any_step(steps: int, examples: int) -> None:
    """Raise RecipeError for a training that was over before its first step."""
    if steps == 0:
        raise RecipeError(f"train: these settings train no step on {examples} examples")


def fit(
    tuning: sparse_tuning,
    examples: EncodedExamples,
    args: TrainingArguments,
    logs: Path,
    penalty_strengths: Mapping[str, Tensor] | None = None,
    stop: GracefulStop | None = None,
    progress: RunProgress | None = None,
) -> list[float]:
    """Train the values on encoded examples, from the last checkpoint if any.

    `penalty_strengths` and `progress`: those of SparseTrainer. Loss, learning rate and gradient
    norm go to TensorBoard files in `logs`, where it is installed. Returns the loss of every step.

    A signal that `stop` receives leaves a checkpoint and raises SystemExit. Raises RecipeError for
    settings that train no step, and for values that are not finite at the end.
    """
    # all processes must go on from the same one: a slow shared disk may show some an older one
    newest = find_last_checkpoint(Path(str(args.output_dir)))
    checkpoint = distributed.broadcast(newest)
    if checkpoint is not None:
        values_file = Path(checkpoint) / _VALUES_FILE
        tuning.restore_values(load_file(values_file))
        print_line(f"resuming at step {_step_of_checkpoint(checkpoint)}")

    trainer = SparseTrainer(tuning, args, examples, penalty_strengths, progress)
    if checkpoint is not None:
        trainer.step_losses.restore(Path(checkpoint))
    if distributed.is_main():
        board = open_board(logs)
        if board is not None:
            trainer.add_callback(TensorBoardCallback(board))
    stop = stop or GracefulStop()
    trainer.add_callback(stop)

    done = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.close()
    if stop.has_checkpoint:
        stop.exit_run(f" at step {done.global_step}")
    require_any_step(done.global_step, len(examples))

    trained = tuning.detach_values()
    if not all(values.isfinite().all() for values in trained.values()):
        raise RecipeError("train: the values are no longer finite; a lower learning_rate may help")
    return trainer.step_losses.collect()


def _step_of_checkpoint(checkpoint: str | Path) -> int:
    """Return the step that a checkpoint's folder is named by."""
    return int(str(checkpoint).rpartition("-")[2])


def find_last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint of a folder, None without any."""

    found = sorted(folder.glob("checkpoint-*"), key=_step_of_checkpoint)
    for checkpoint in reversed(found):
        state_file = checkpoint / TRAINER_STATE_NAME
        try:
            # Trainer writes its state last: one that can be read has everything else beside it
            json.loads(state_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # killed while it was written
            continue
        return str(checkpoint)
    return None
