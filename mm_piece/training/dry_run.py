"""The dry run: one training step that is tried before anything is written, and leaves no trace."""

from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import SaveStrategy

from mm_piece import distributed
from mm_piece.data import EncodedExamples, has_image
from mm_piece.errors import ModelError, PieceError, RecipeError, format_error
from mm_piece.families import GROUPS, group_of, weights
from mm_piece.sparse.tuning import sparse_tuning
from mm_piece.training.arguments import arguments
from mm_piece.training.callbacks import StopAfterOneStep
from mm_piece.training.trainer import SparseTrainer, require_any_step

_IMAGE_GROUPS = ("vision", "projector")  # without images they receive no gradient


def dry_run_step(
    model: nn.Module,
    examples: EncodedExamples,
    settings: dict[str, Any],
    trained_names: Collection[str] | None = None,
) -> None:
    """Train one step and undo it.

    The backward pass runs through all layers that the training will run it through: down to the
    first of the `trained_names` (default: all weights) that receives a gradient from the examples.
    Raises RecipeError for settings that Trainer, the optimizer or the model trips over, and
    ModelError for a model that changes more than weights while it trains.
    """
    named = weights(model)
    if trained_names is None:
        trained_names = named
    first = _find_first_trained(trained_names, has_image(examples[0]), named)

    # The last weight always receives a gradient, without which a step could not be taken.
    last = next(reversed(named))
    entry = torch.zeros(1, dtype=torch.int64)
    mask = dict.fromkeys((first, last), entry)

    before = []
    for name in mask:
        values = distributed.gather_entries(named[name], entry)
        before.append((named[name], entry, values))

    buffers = _copy_buffers(model)
    try:
        _train_one_step(model, examples, settings, mask)
        _require_same_buffers(model, buffers)
    except PieceError:
        raise
    except Exception as error:  # Trainer, optimizer and model raise whatever they trip over
        raise RecipeError(f"train: {format_error(error)}") from error
    finally:
        distributed.scatter_entries(before)


def _train_one_step(
    model: nn.Module,
    examples: EncodedExamples,
    settings: dict[str, Any],
    mask: dict[str, Tensor],
) -> None:
    """Train the entries of a mask for one step that writes no checkpoint and shows no bar."""
    with TemporaryDirectory() as folder, distributed.translate_errors():
        args = arguments(settings, Path(folder), seed=0)
        args.disable_tqdm = True
        args.save_strategy = SaveStrategy.NO

        with sparse_tuning(model, mask) as tuning:
            trainer = SparseTrainer(tuning, args, examples)
            trainer.add_callback(StopAfterOneStep())
            done = trainer.train()
            require_any_step(done.global_step, len(examples))
            trainer.close()


def _copy_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of what a checkpoint of the model has besides weights."""
    saved = model.state_dict().keys()
    copies = {}
    for name, buffer in model.named_buffers():
        if name in saved:
            copies[name] = buffer.clone()
    return copies


def _require_same_buffers(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Put the buffers back; raise ModelError if a step has changed one.

    A delta holds weights alone: the model after a task could not be made again.
    """
    changed = []
    for name, buffer in model.named_buffers():
        if name in before and not torch.equal(buffer, before[name]):
            buffer.copy_(before[name])
            changed.append(name)

    if changed:
        raise ModelError(
            f"training changes {changed[0]}, which is no weight but counts what passes, as a batch "
            "normalisation does: deltas could not bring it back, so such models cannot be trained"
        )


def _find_first_trained(
    trained_names: Collection[str],
    with_image: bool,
    named: Collection[str],
) -> str:
    """Return the trained weight next to the inputs that receives a gradient; else the last weight.

    An embedding is chosen only if no other group has such a weight.
    """
    groups = list(GROUPS)
    # An embedding's backward pass runs no deeper than that of the first layer, and costs the
    # gradient of the gathered weight.
    groups.remove("embedding")
    groups.append("embedding")

    for group in groups:
        if group in _IMAGE_GROUPS and not with_image:
            continue
        for name in named:
            if name in trained_names and group_of(name) == group:
                return name
    return [*named][-1]
