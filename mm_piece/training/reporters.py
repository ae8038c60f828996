"""The reporters of `train: {report_to: …}`, such as wandb.

Each is made once before a run, so that a missing package or login is found then and not later.
"""

import os

from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from mm_piece.errors import RecipeError, format_value
from mm_piece.store.board import has_tensorboard

_WITHOUT_LOGIN = ("offline", "disabled", "dryrun")


def require_reporters(args: TrainingArguments) -> None:
    """Raise RecipeError for a reporter that is unknown, not installed or not logged in.

    Takes TensorBoard out of `report_to`: where it is installed, its files are always written, into
    the store's `logs`.
    """
    if "tensorboard" in (args.report_to or ()) and not has_tensorboard():
        raise RecipeError(
            "train: report_to: tensorboard is not installed: pip install 'mm-piece[tensorboard]'"
        )
    named = [name for name in args.report_to or () if name != "tensorboard"]
    args.report_to = named

    for name in named:
        try:
            (callback,) = get_reporting_integration_callbacks([name])
            callback()  # it imports its package
            if name == "wandb":
                _log_in()
        except Exception as error:  # a reporter may raise anything
            raise RecipeError(f"train: report_to: {name}: {format_value(error, 200)}") from error


def _log_in() -> None:
    """Log in to wandb, unless its mode needs no account."""
    if os.environ.get("WANDB_MODE") in _WITHOUT_LOGIN:
        return

    import wandb

    wandb.login()
