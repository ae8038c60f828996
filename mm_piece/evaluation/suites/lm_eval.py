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
from mm_piece.data.answers import render_question
from mm_piece.data.example import text_of
from mm_piece.data.prompts import make_message
from mm_piece.distributed.progress import print_line
from mm_piece.errors import DataError
from mm_piece.evaluation.answers import end_tokens_of, pad_token_of
from mm_piece.evaluation.suites.schema import HarnessConfig, TextHarnessConfig
from mm_piece.evaluation.suites.scores import Scores, parse_harness_results
from mm_piece.models.generation import greedy_decoding

logging.getLogger("lm_eval").setLevel(logging.ERROR)
# Decorators hide from type checkers what these take.
_evaluate: Any = lm_eval.simple_evaluate
_Model: Any = HFLM
_BOOTSTRAP_SAMPLES = 1000  # for the standard error of a metric that has no formula for it


class Harness:
    """The tasks that a part names, and the scores of a model on them."""

    def __init__(self, config: HarnessConfig) -> None:
        """Raises RecipeError for a task that is not known."""
        assert isinstance(config, TextHarnessConfig)
        self.config, self.tasks = config, TaskManager(include_path=config.include)
        known = self.tasks.task_index
        config.require_known_tasks(known, "lm-eval", "lm-eval ls tasks")
        code_tasks = [name for name in config.tasks if (known[name].cfg or {}).get("unsafe_code")]
        self.allows_code = os.environ.get("HF_ALLOW_CODE_EVAL") == "1"
        self.skipped_tasks = [] if self.allows_code else code_tasks

    def measure_scores(self, model: Any, processor: Any) -> Scores:
        """Every metric of every task and group."""
        for name in self.skipped_tasks:
            print_line(
                f"{name}: left out, it runs what the model writes (HF_ALLOW_CODE_EVAL=1 allows it)"
            )
        names = [name for name in self.config.tasks if name not in self.skipped_tasks]
        if not names:
            return {}
        ends, pad = end_tokens_of(model, processor), pad_token_of(tokenizer_of(processor))
        # But for what a task itself says.
        with greedy_decoding(model, eos_token_id=ends, pad_token_id=pad):
            wrapped = _Model(
                pretrained=model,
                tokenizer=_strip_end_token(tokenizer_of(processor)),
                backend="causal",
                batch_size=self.config.batch_size,
                max_length=model.config.get_text_config().max_position_embeddings,
            )
            wrapped.apply_chat_template = partial(_format_question, processor)
            found = _evaluate(
                wrapped,
                tasks=names,
                task_manager=self.tasks,
                num_fewshot=self.config.fewshot,
                limit=self.config.limit,
                apply_chat_template=self.config.chat,
                log_samples=False,
                bootstrap_iters=_BOOTSTRAP_SAMPLES,
                confirm_run_unsafe_code=self.allows_code,
            )
        return parse_harness_results(found["results"])


def _format_question(
    processor: Any, turns: Sequence[dict[str, str]], add_generation_prompt: bool = True
) -> str:
    """A question as this library asks it, in the base's chat template.

    lm-eval asks a tokenizer, with strings, which templates that take typed content leave out. It
    goes on in the last message where `add_generation_prompt` is false.
    """
    messages = [make_message(turn["role"], turn["content"]) for turn in turns]
    prefix = "" if add_generation_prompt else text_of(messages.pop())
    try:
        return render_question(messages, processor) + prefix
    except DataError:
        if messages[0]["role"] != "system":
            raise
    system, first, *others = messages  # the template takes no system message
    first = make_message("user", f"{text_of(system)}\n\n{text_of(first)}")
    return render_question([first, *others], processor) + prefix


def _strip_end_token(tokenizer: Any) -> Any:
    """The tokenizer, or a copy that does not end texts: lm-eval lets a model go on after them."""
    if tokenizer("a")["input_ids"][-1] != tokenizer.eos_token_id:
        return tokenizer
    has_start_token = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    first = [(tokenizer.bos_token, tokenizer.bos_token_id)] if has_start_token else []
    tokenizer = deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*(token for token, _ in first), "$A"], special_tokens=first
    )
    return tokenizer
