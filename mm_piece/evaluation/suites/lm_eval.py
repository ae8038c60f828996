"""lm-eval (EleutherAI's harness) on a model in memory, for tasks of text alone."""

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

from mm_piece.data.answers import render_question
from mm_piece.data.example import text_of
from mm_piece.data.processor import Processor, pad_token_of, tokenizer_of
from mm_piece.data.prompts import make_message
from mm_piece.distributed.progress import print_line
from mm_piece.errors import DataError
from mm_piece.evaluation.answers import end_tokens_of
from mm_piece.evaluation.suites.schema import HarnessConfig, TextHarnessConfig
from mm_piece.evaluation.suites.scores import Scores, parse_harness_results
from mm_piece.evaluation.suites.task_index import find_tasks
from mm_piece.models.generation import greedy_decoding

logging.getLogger("lm_eval").setLevel(logging.ERROR)
# Their decorators hide the parameters from type checkers.
_evaluate: Any = lm_eval.simple_evaluate
_Model: Any = HFLM
_BOOTSTRAP_SAMPLES = 1000  # for the standard error of a metric that has no formula for it


class Harness:
    """Tasks that a suite names for lm-eval, ready to be measured."""

    def __init__(self, config: HarnessConfig) -> None:
        """Find the tasks; raises RecipeError for one that is not known."""
        assert isinstance(config, TextHarnessConfig)
        self.config = config
        self.tasks = find_tasks(TaskManager, config)
        self.allows_code = os.environ.get("HF_ALLOW_CODE_EVAL") == "1"

        known = self.tasks.task_index
        config.require_known_tasks(known, "lm-eval", "lm-eval ls tasks")

        self.skipped_tasks = []
        for name in config.tasks:
            # groups have none
            settings = known[name].cfg or {}
            if settings.get("unsafe_code") and not self.allows_code:
                self.skipped_tasks.append(name)

    def measure_scores(self, model: Any, processor: Processor) -> Scores:
        """Return every metric of every task and group."""
        for name in self.skipped_tasks:
            print_line(
                f"{name}: left out, it runs what the model writes (HF_ALLOW_CODE_EVAL=1 allows it)"
            )
        names = [name for name in self.config.tasks if name not in self.skipped_tasks]
        if not names:
            return {}

        tokenizer = tokenizer_of(processor)
        ends = end_tokens_of(model, processor)
        pad = pad_token_of(tokenizer)

        # a task's own generation settings still come before these
        with greedy_decoding(model, eos_token_id=ends, pad_token_id=pad):
            wrapped = _Model(
                pretrained=model,
                tokenizer=_strip_end_token(tokenizer),
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
    processor: Processor,
    turns: Sequence[dict[str, str]],
    add_generation_prompt: bool = True,
) -> str:
    """Render a question in the base's chat template, as this library does for its own tasks.

    lm-eval itself would pass strings to the tokenizer's template, and templates that take typed
    content leave strings out. Without `add_generation_prompt`, the last message is the beginning of
    the answer.
    """
    messages = [make_message(turn["role"], turn["content"]) for turn in turns]
    prefix = ""
    if not add_generation_prompt:
        prefix = text_of(messages.pop())

    try:
        return render_question(messages, processor) + prefix
    except DataError:
        if messages[0]["role"] != "system":
            raise

    # the template takes no system message: put its text before the first question
    system, first, *others = messages
    text = f"{text_of(system)}\n\n{text_of(first)}"
    first = make_message("user", text)
    return render_question([first, *others], processor) + prefix


def _strip_end_token(tokenizer: Any) -> Any:
    """Return the tokenizer, or a copy that does not end texts with the end token.

    lm-eval has a model continue a text, which would then begin after its end.
    """
    ids = tokenizer("a")["input_ids"]
    # any short text shows what the tokenizer adds to texts
    if ids[-1] != tokenizer.eos_token_id:
        return tokenizer

    start_tokens = []
    special_tokens = []
    if ids[0] == tokenizer.bos_token_id:
        start_tokens.append(tokenizer.bos_token)
        special_tokens.append((tokenizer.bos_token, tokenizer.bos_token_id))

    stripped = deepcopy(tokenizer)
    stripped.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*start_tokens, "$A"],  # $A: the text
        special_tokens=special_tokens,
    )
    return stripped
