"""lm-eval (EleutherAI's harness) on a model in memory: tasks of text alone."""

import logging
import os
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing

from mm_piece.data import tokenizer_of
from mm_piece.data.answers import question_of
from mm_piece.data.example import text_of
from mm_piece.data.prompts import message_of
from mm_piece.distributed.progress import say
from mm_piece.errors import DataError
from mm_piece.evaluation.answers import ends_of, pad_of
from mm_piece.evaluation.suites.schema import Part, Texts
from mm_piece.evaluation.suites.scores import Scores, readable
from mm_piece.models.generation import greedy

logging.getLogger("lm_eval").setLevel(logging.ERROR)
# Decorators hide from type checkers what these take.
_evaluate: Any = lm_eval.simple_evaluate
_Model: Any = HFLM
_RESAMPLES = 1000  # for the standard error of a metric that has no formula for it


class Harness:
    """The tasks that a part names, and the scores of a model on them."""

    def __init__(self, part: Part) -> None:
        """Raises RecipeError for a task that is not known."""
        assert isinstance(part, Texts)
        self.part, self.tasks = part, TaskManager(include_path=part.include)
        known = self.tasks.task_index
        part.require_known(known, "lm-eval", "lm-eval ls tasks")
        runs = [name for name in part.tasks if (known[name].cfg or {}).get("unsafe_code")]
        self.trusted = os.environ.get("HF_ALLOW_CODE_EVAL") == "1"
        self.left_out = [] if self.trusted else runs

    def scores(self, model: Any, processor: Any) -> Scores:
        """Every metric of every task and group."""
        for name in self.left_out:
            say(f"{name}: left out, it runs what the model writes (HF_ALLOW_CODE_EVAL=1 allows it)")
        names = [name for name in self.part.tasks if name not in self.left_out]
        if not names:
            return {}
        ends, pad = ends_of(model, processor), pad_of(tokenizer_of(processor))
        # But for what a task itself says.
        with greedy(model, eos_token_id=ends, pad_token_id=pad):
            wrapped = _Model(
                pretrained=model,
                tokenizer=_unended(tokenizer_of(processor)),
                backend="causal",
                batch_size=self.part.batch_size,
                max_length=model.config.get_text_config().max_position_embeddings,
            )
            wrapped.apply_chat_template = partial(_asked, processor)
            found = _evaluate(
                wrapped,
                tasks=names,
                task_manager=self.tasks,
                num_fewshot=self.part.fewshot,
                limit=self.part.limit,
                apply_chat_template=self.part.chat,
                log_samples=False,
                bootstrap_iters=_RESAMPLES,
                confirm_run_unsafe_code=self.trusted,
            )
        return readable(found["results"])


def _asked(
    processor: Any, turns: Sequence[dict[str, str]], add_generation_prompt: bool = True
) -> str:
    """A question as this library asks it, in the base's chat template.

    lm-eval asks a tokenizer, with strings, which templates that take typed content leave out. It
    goes on in the last message where `add_generation_prompt` is false.
    """
    messages = [message_of(turn["role"], turn["content"]) for turn in turns]
    begun = "" if add_generation_prompt else text_of(messages.pop())
    try:
        return question_of(messages, processor) + begun
    except DataError:
        if messages[0]["role"] != "system":
            raise
    system, first, *others = messages  # the template takes no system message
    first = message_of("user", f"{text_of(system)}\n\n{text_of(first)}")
    return question_of([first, *others], processor) + begun


def _unended(tokenizer: Any) -> Any:
    """The tokenizer, or a copy that does not end texts: lm-eval lets a model go on after them."""
    if tokenizer("a")["input_ids"][-1] != tokenizer.eos_token_id:
        return tokenizer
    begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    first = [(tokenizer.bos_token, tokenizer.bos_token_id)] if begins else []
    tokenizer = deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*(token for token, _ in first), "$A"], special_tokens=first
    )
    return tokenizer
