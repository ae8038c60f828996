"""`SparseTrainer`: transformers' Trainer over the compact values of a sparse tuning."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME

from mm_piece import distributed
from mm_piece.errors import RecipeError
from mm_piece.sparse.tuning import sparse_tuning
from mm_piece.training.batches import DistributedBatchSampler, PaddedDataset
from mm_piece.training.callbacks import ProgressBar
from mm_piece.training.loss import make_loss_function
from mm_piece.training.optimizer_state import restore_order, save_order
from mm_piece.training.penalty import register_penalty
from mm_piece.training.stopping import GracefulStop, ignore_stop_signals
from mm_piece.training.write_errors import translate_write_errors

_VALUES_FILE = "values.safetensors"


class SparseTrainer(Trainer):
    """A Trainer whose only trainable parameters are a tuning's values.

    Checkpoints hold the values, the optimizer and the random state; the model's weights are never
    copied. The loss of a step is the mean over its answers' tokens, on however many processes and
    in however many batches they come.
    """

    def __init__(
        self,
        tuning: sparse_tuning,
        args: TrainingArguments,
        examples: Sequence[dict[str, Tensor]],
        pad: int,
        penalty_strengths: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`examples` are encoded ones, batch dimension 1 each; `pad` is the padding token.

        `pulls` has a number for each entry of the mask: how hard it is pulled back (`hold`).
        """
        self.tuning, self.padded_dataset, self.penalty_strengths = (
            tuning,
            PaddedDataset(examples, pad),
            penalty_strengths,
        )
        super().__init__(
            model=tuning.model,  # type: ignore[arg-type]
            args=args,
            train_dataset=self.padded_dataset,  # type: ignore[arg-type]
            data_collator=self.padded_dataset.collate,
        )
        if args.label_smoothing_factor or not self.model_accepts_loss_kwargs:
            self.compute_loss_func = make_loss_function(args.label_smoothing_factor)
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(ProgressBar())

    def get_train_dataloader(self) -> DataLoader:
        """This process's part of the examples."""
        args = self.args
        sampler = DistributedBatchSampler(
            len(self.padded_dataset),
            args.per_device_train_batch_size,
            args.seed if args.data_seed is None else args.data_seed,
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the values; all processes call it, one writes."""
        values, folder = self.tuning.detach_values(), Path(output_dir or str(self.args.output_dir))
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(values, folder / _VALUES_FILE)

    def _save_checkpoint(self, *arguments: Any) -> None:
        with translate_write_errors(Path(str(self.args.output_dir))):
            super()._save_checkpoint(*arguments)

    def close(self) -> None:
        """Let go of the model."""
        if distributed.has_engine(self.accelerator):
            distributed.destroy_engine(self.model_wrapped)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer; on every engine the same values decay."""
        optimizer = super().create_optimizer(model)
        if not distributed.has_engine(self.accelerator):
            return optimizer

        named = {name: p for name, p in self.tuning.model.named_parameters() if p.requires_grad}
        decaying = set(self.get_decay_parameter_names(self.tuning.model))  # type: ignore[arg-type]
        distributed.divide_decay(optimizer, named, decaying)
        return optimizer

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Nothing: `fit` has put the values in place, before an engine copied them."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> Any:
        # With checkpointing, Trainer has just had the embeddings ask for gradients: every backward
        # pass would run through all layers, also those below the lowest trained entry.
        self.tuning.model.disable_input_require_grads()  # type: ignore[operator]
        engine = distributed.has_engine(self.accelerator)
        resumed = None if engine else resume_from_checkpoint
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resumed)
        if engine and resume_from_checkpoint is not None:
            state = (self.model_wrapped, self.tuning.named_values(), self.lr_scheduler)
            distributed.load_state(*state, Path(resume_from_checkpoint))
        if self.penalty_strengths is not None:
            self._register_penalty(self.penalty_strengths, engine)
        return prepared

    def _register_penalty(self, penalty_strengths: Mapping[str, Tensor], engine: bool) -> None:
        named, wrapped = self.tuning.named_values(), self.model_wrapped
        starts = {name: patch.entries_before.float() for name, patch in self.tuning.patches.items()}
        penalized: dict[Tensor, tuple[Tensor, Tensor]]
        if engine:
            flat_strengths = distributed.to_optimizer_layout(wrapped, named, penalty_strengths)
            flat_starts = distributed.to_optimizer_layout(wrapped, named, starts)
            penalized = {flat: (start, flat_strengths[flat]) for flat, start in flat_starts.items()}
        else:
            penalized = {
                one: (starts[name], penalty_strengths[name].to(one)) for name, one in named.items()
            }
        owner: Any = wrapped if engine else self
        register_penalty(owner.optimizer.optimizer, penalized)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder, named = Path(output_dir), self.tuning.named_values()
        if distributed.has_engine(self.accelerator):
            state = (self.model_wrapped, named, self.lr_scheduler)
            distributed.save_state(*state, folder, self.args.should_save)
            return

        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_order(self.optimizer, named, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            restore_order(self.optimizer, self.tuning.named_values(), Path(checkpoint))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        distributed.barrier()  # the state that makes a checkpoint whole is written after this


class _EpochDataLoader(DataLoader):
    """A DataLoader that hands the number of the epoch on."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def require_any_step(steps: int, examples: int) -> None:
    """Raise RecipeError for a training that was over before its first step."""
    if steps == 0:
        raise RecipeError(f"train: these settings train no step on {examples} examples")


def fit(
    tuning: sparse_tuning,
    examples: Sequence[dict[str, Tensor]],
    pad: int,
    args: TrainingArguments,
    logs: Path,
    penalty_strengths: Mapping[str, Tensor] | None = None,
    stop: GracefulStop | None = None,
) -> dict[str, float]:
    """Train the values on encoded examples, from the last checkpoint if any; Trainer's metrics.

    `pulls`: those of SparseTrainer. Loss, learning rate and gradient norm go to TensorBoard files
    in `logs`. Where a `stop` is asked for: a checkpoint and SystemExit.
    """
    checkpoint = distributed.broadcast(find_last_checkpoint(Path(str(args.output_dir))))
    if checkpoint is not None:
        tuning.restore_values(load_file(Path(checkpoint) / _VALUES_FILE))
    trainer = SparseTrainer(tuning, args, examples, pad, penalty_strengths)
    if distributed.is_main():
        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(logs))))
    stop = stop or GracefulStop()
    trainer.add_callback(stop)
    done = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.close()
    if stop.has_checkpoint:
        stop.exit_run(f" at step {done.global_step}")
    require_any_step(done.global_step, len(examples))
    if not all(values.isfinite().all() for values in tuning.detach_values().values()):
        raise RecipeError("train: the values are no longer finite; a lower learning_rate may help")
    return done.metrics


def find_last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of a folder: one with the state, which Trainer writes last."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    for checkpoint in reversed(found):
        try:
            json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # killed while it was written
            continue
        return str(checkpoint)
    return None
