"""Adapters of PEFT: a fresh one for every task, merged before the next."""

from typing import Any

from peft import PeftConfig, get_peft_model
from transformers import TrainingArguments

from eval.baselines.baseline import Baseline

_ATTENTION = "q_proj|k_proj|v_proj|o_proj|out_proj"
_MLP = "fc1|fc2|linear_1|linear_2|gate_proj|up_proj|down_proj"
# linear layers of the language model, the vision encoder and the projector
_LINEAR = rf".*\.({_ATTENTION}|{_MLP})"


class AdapterBaseline(Baseline):
    """Baseline that trains an adapter on every linear layer, one for each task."""

    def make_config(self, linear: str) -> PeftConfig:
        """Return the adapter's configuration for the layers that a regular expression names."""
        raise NotImplementedError

    def add_adapter(self) -> Any:
        """Return the model with a fresh adapter."""
        return get_peft_model(self.model, self.make_config(_LINEAR))

    @property
    def num_entries(self) -> int:
        """Number of entries of an adapter."""
        adapted = self.add_adapter()
        trainable, _ = adapted.get_nb_trainable_parameters()
        self.model = adapted.unload()
        return trainable

    def learn_task(self, number: int, args: TrainingArguments) -> None:
        """Train an adapter on the task and merge it."""
        adapted = self.add_adapter()
        self.train(adapted, self.tasks[number], args)
        self.remember_adapter(adapted)
        self.model = adapted.merge_and_unload().eval()

    def remember_adapter(self, adapted: Any) -> None:
        """Store what later tasks need of a trained adapter: nothing, unless overridden."""
