"""Sequential LoRA (PEFT): one adapter per task on every linear layer, merged before the next."""

from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from mm_piece.tasks import collate

_ATTENTION = "q_proj|k_proj|v_proj|o_proj|out_proj"
_MLP = "fc1|fc2|linear_1|linear_2|gate_proj|up_proj|down_proj"
_LINEAR = rf".*\.({_ATTENTION}|{_MLP})"


def _adapted(model: Any, rank: int) -> Any:
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_LINEAR)
    return get_peft_model(model, config)


def learn(model: Any, examples: list[Any], args: TrainingArguments, pad: int, rank: int) -> Any:
    """Train a fresh adapter on one task and merge it; the plain model that goes on to the next."""
    adapted = _adapted(model, rank)
    Trainer(adapted, args, lambda batch: collate(batch, pad), examples).train()  # type: ignore[arg-type]
    return adapted.merge_and_unload().eval()


def trainable(model: Any, rank: int) -> int:
    """Entries that may change: those of the adapter."""
    adapted = _adapted(model, rank)
    entries = adapted.get_nb_trainable_parameters()[0]
    adapted.unload()
    return entries
