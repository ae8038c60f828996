"""Reporters that a recipe's `train: {report_to: …}` names: set up, or refused before a run."""

import os

from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from mm_piece.errors import RecipeError, format_value

_WITHOUT_LOGIN = ("offline", "disabled", "dryrun")


def require_reporters(args: TrainingArguments) -> None:
    """Raise RecipeError for a reporter that is unknown, not installed or not logged in.

    TensorBoard's is taken out: its files are always written, into the store's `logs`.
    """
    named = [name for name in args.report_to or () if name != "tensorboard"]
    args.report_to = named
    for name in named:
        try:
            (callback,) = get_reporting_integration_callbacks([name])
            callback()
            if name == "wandb":
                _log_in()
        except Exception as error:  # a reporter may raise anything
            raise RecipeError(f"train: report_to: {name}: {format_value(error, 200)}") from error


def _log_in() -> None:
    if os.environ.get("WANDB_MODE") not in _WITHOUT_LOGIN:
        import wandb

        wandb.login()
