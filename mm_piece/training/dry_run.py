"""A training step that is tried before anything is written, and leaves no trace."""

from collections.abc import Collection, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import SaveStrategy

from mm_piece import distributed
from mm_piece.data import has_image
from mm_piece.errors import PieceError, RecipeError, format_error
from mm_piece.families import GROUPS, group_of, weights
from mm_piece.sparse.tuning import sparse_tuning
from mm_piece.training.arguments import arguments
from mm_piece.training.callbacks import StopAfterOneStep
from mm_piece.training.trainer import SparseTrainer, require_any_step

_IMAGE_GROUPS = ("vision", "projector")  # groups that a step without images does not reach


def dry_run_step(
    model: nn.Module,
    examples: Sequence[dict[str, Tensor]],
    settings: dict[str, Any],
    pad: int,
    trained_names: Collection[str] | None = None,
) -> None:
    """One training step that leaves no trace; RecipeError for settings that Trainer trips over.

    Its backward pass runs through all layers that the training will run it through: down to the
    first of the `trained` weights (default: all) that the examples reach.
    """
    named = weights(model)
    first = _find_first_trained(
        named if trained_names is None else trained_names, has_image(examples[0]), named
    )
    # The last weight is reached in any case: a step of which nothing is reached has no gradient.
    entry = torch.zeros(1, dtype=torch.int64)
    mask = dict.fromkeys((first, next(reversed(named))), entry)
    before = [(named[name], entry, distributed.gather_entries(named[name], entry)) for name in mask]
    try:
        with TemporaryDirectory() as folder, distributed.translate_errors():
            args = arguments(settings, Path(folder), seed=0)
            args.disable_tqdm, args.save_strategy = True, SaveStrategy.NO
            with sparse_tuning(model, mask) as tuning:
                trainer = SparseTrainer(tuning, args, examples, pad)
                trainer.add_callback(StopAfterOneStep())
                require_any_step(trainer.train().global_step, len(examples))
                trainer.close()
    except PieceError:
        raise
    except Exception as error:  # Trainer, optimizer and model raise whatever they trip over
        raise RecipeError(f"train: {format_error(error)}") from error
    finally:
        distributed.scatter_entries(before)


def _find_first_trained(
    trained_names: Collection[str], with_image: bool, named: Collection[str]
) -> str:
    """The weight next to the inputs among the trained ones that a step reaches.

    Layers before embeddings: theirs reaches no deeper, and has the gradient of a whole weight.
    """
    order = [group for group in GROUPS if group != "embedding"] + ["embedding"]
    groups_with_gradient = [group for group in order if with_image or group not in _IMAGE_GROUPS]
    for group in groups_with_gradient:
        for name in named:
            if name in trained_names and group_of(name) == group:
                return name
    return [*named][-1]
