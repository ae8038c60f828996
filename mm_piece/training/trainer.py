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
from mm_piece.training.batches import Company, Feed
from mm_piece.training.callbacks import Progress
from mm_piece.training.loss import loss_of
from mm_piece.training.optimizer_state import restore_order, save_order
from mm_piece.training.penalty import hold
from mm_piece.training.stopping import Stop, leave_signals_to_the_main_process
from mm_piece.training.write_errors import reported_writes

_VALUES = "values.safetensors"


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
        pulls: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`examples` are encoded ones, batch dimension 1 each; `pad` is the padding token.

        `pulls` has a number for each entry of the mask: how hard it is pulled back (`hold`).
        """
        self.tuning, self.company, self.pulls = tuning, Company(examples, pad), pulls
        super().__init__(
            model=tuning.model,  # type: ignore[arg-type]
            args=args,
            train_dataset=self.company,  # type: ignore[arg-type]
            data_collator=self.company.collate,
        )
        if args.label_smoothing_factor or not self.model_accepts_loss_kwargs:
            self.compute_loss_func = loss_of(args.label_smoothing_factor)
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(Progress())

    def get_train_dataloader(self) -> DataLoader:
        """This process's part of the examples."""
        args = self.args
        feed = Feed(
            len(self.company),
            args.per_device_train_batch_size,
            args.seed if args.data_seed is None else args.data_seed,
            args.dataloader_drop_last,
        )
        return _Loader(
            self.company,  # type: ignore[arg-type]
            batch_sampler=feed,  # type: ignore[arg-type]
            collate_fn=self.company.collate,
            worker_init_fn=leave_signals_to_the_main_process,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            # Or each start of workers, once or every epoch, would draw from the model's numbers.
            generator=torch.Generator(),
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the values; all processes call it, one writes."""
        values, folder = self.tuning.values(), Path(output_dir or str(self.args.output_dir))
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(values, folder / _VALUES)

    def _save_checkpoint(self, *arguments: Any) -> None:
        with reported_writes(Path(str(self.args.output_dir))):
            super()._save_checkpoint(*arguments)

    def close(self) -> None:
        """Let go of the model."""
        if distributed.has_engine(self.accelerator):
            distributed.leave(self.model_wrapped)

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
            state = (self.model_wrapped, self.tuning.named(), self.lr_scheduler)
            distributed.load_state(*state, Path(resume_from_checkpoint))
        if self.pulls is not None:
            self._hold(self.pulls, engine)
        return prepared

    def _hold(self, pulls: Mapping[str, Tensor], engine: bool) -> None:
        named, wrapped = self.tuning.named(), self.model_wrapped
        starts = {name: patch.before.float() for name, patch in self.tuning.patches.items()}
        held: dict[Tensor, tuple[Tensor, Tensor]]
        if engine:
            pulled = distributed.laid_out(wrapped, named, pulls)
            laid = distributed.laid_out(wrapped, named, starts)
            held = {flat: (start, pulled[flat]) for flat, start in laid.items()}
        else:
            held = {one: (starts[name], pulls[name].to(one)) for name, one in named.items()}
        owner: Any = wrapped if engine else self
        hold(owner.optimizer.optimizer, held)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder, named = Path(output_dir), self.tuning.named()
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
            restore_order(self.optimizer, self.tuning.named(), Path(checkpoint))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        distributed.wait()  # the state that makes a checkpoint whole is written after this


class _Loader(DataLoader):
    """A DataLoader that hands the number of the epoch on."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def require_a_step(steps: int, examples: int) -> None:
    """Raise RecipeError for a training that was over before its first step."""
    if steps == 0:
        raise RecipeError(f"train: these settings train no step on {examples} examples")


def fit(
    tuning: sparse_tuning,
    examples: Sequence[dict[str, Tensor]],
    pad: int,
    args: TrainingArguments,
    logs: Path,
    pulls: Mapping[str, Tensor] | None = None,
    stop: Stop | None = None,
) -> dict[str, float]:
    """Train the values on encoded examples, from the last checkpoint if any; Trainer's metrics.

    `pulls`: those of SparseTrainer. Loss, learning rate and gradient norm go to TensorBoard files
    in `logs`. Where a `stop` is asked for: a checkpoint and SystemExit.
    """
    checkpoint = distributed.told(last_checkpoint(Path(str(args.output_dir))))
    if checkpoint is not None:
        tuning.restore(load_file(Path(checkpoint) / _VALUES))
    trainer = SparseTrainer(tuning, args, examples, pad, pulls)
    if distributed.is_main():
        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(logs))))
    stop = stop or Stop()
    trainer.add_callback(stop)
    done = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.close()
    if stop.saved:
        stop.leave(f" at step {done.global_step}")
    require_a_step(done.global_step, len(examples))
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
