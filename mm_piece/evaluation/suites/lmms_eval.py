"""lmms-eval on a model in memory: tasks with images."""

from itertools import groupby
from typing import Any

from lmms_eval import evaluator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.tasks import TaskManager
from loguru import logger
from torch import nn

from mm_piece.data import Example, iter_batches
from mm_piece.data.images import ImageSource
from mm_piece.distributed.progress import progress_bar
from mm_piece.errors import DataError, RecipeError
from mm_piece.evaluation.answers import generate_batch
from mm_piece.evaluation.suites.schema import HarnessConfig
from mm_piece.evaluation.suites.scores import Scores, parse_harness_results

logger.disable("lmms_eval")  # a line for every file that defines no task
_evaluate: Any = evaluator.simple_evaluate  # decorators hide from type checkers what it takes
_IMAGE_MARK = "<image>"
_DEFAULT_MAX_TOKENS = 1024  # of an answer, where a task does not say


class Harness:
    """The tasks that a part names, and the scores of a model on them."""

    def __init__(self, config: HarnessConfig) -> None:
        """Raises RecipeError for a task that is not known."""
        self.config, self.tasks = config, TaskManager(include_path=config.include)
        config.require_known_tasks(self.tasks.all_tasks, "lmms-eval", "lmms-eval tasks list")

    def measure_scores(self, model: nn.Module, processor: Any) -> Scores:
        """Every metric of every task and group."""
        found = _evaluate(
            InMemoryModel(model, processor, self.config.batch_size),
            tasks=[*self.config.tasks],
            task_manager=self.tasks,
            limit=self.config.limit,
            log_samples=False,
            bootstrap_iters=0,
        )
        return parse_harness_results(found["results"])


class InMemoryModel(lmms):
    """A model and its processor, as lmms-eval asks them: always greedy."""

    def __init__(self, model: nn.Module, processor: Any, batch_size: int) -> None:
        super().__init__()
        self.model, self.processor, self.batch_size = model, processor, batch_size

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers, cut before whatever a task lets them end with."""
        answers: list[str] = []
        for max_new_tokens, group in groupby(
            requests, key=lambda request: _max_tokens_of(_settings_of(request))
        ):
            for batch in progress_bar(
                [*iter_batches([*group], self.batch_size)], "lmms-eval", "batch"
            ):
                examples = [self._make_example(request) for request in batch]
                texts = generate_batch(
                    self.model, self.processor, examples, max_new_tokens, skip_special_tokens=True
                )  # as this harness has it of every model
                answers += [
                    _truncate_at_ends(text, _settings_of(r))
                    for text, r in zip(texts, batch, strict=True)
                ]
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered: lmms-eval makes texts of the pairs that it asks for here (0.7.3)."""
        raise _make_unfit_error(requests[0], "for likelihoods")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered: every question is asked by itself."""
        raise _make_unfit_error(requests[0], "in rounds")

    def _make_example(self, request: Instance) -> Example:
        """The question as an example; images stand where the text has marks, or before it."""
        text, _, find_images, number, task, split = _unpack_request(request)
        images = list(find_images(self.task_dict[task][split][number]) or []) if find_images else []
        if any(not isinstance(image, ImageSource) for image in images):
            raise DataError(f"lmms-eval task {task!r} row {number}: only images can be shown")
        marked = (
            text if text.count(_IMAGE_MARK) == len(images) else _IMAGE_MARK * len(images) + text
        )
        content = []
        for index, words in enumerate(marked.split(_IMAGE_MARK)):
            content += [{"type": "image"}] * (index > 0) + [{"type": "text", "text": words}]
        turns = [
            {"role": "user", "content": [item for item in content if item.get("text") != ""]},
            {"role": "assistant", "content": []},
        ]
        return Example(number, turns, images, task)


def _unpack_request(request: Instance) -> tuple[Any, ...]:
    """Of a question: text, generation settings, what finds its images, row, task, split."""
    return tuple(request.args)


def _settings_of(request: Instance) -> dict[str, Any]:
    return _unpack_request(request)[1]


def _make_unfit_error(request: Instance, how: str) -> RecipeError:
    name = request.task_name
    return RecipeError(f"lmms-eval task {name!r} asks {how}; choose one that generates")


def _max_tokens_of(settings: dict[str, Any]) -> int:
    return int(settings.get("max_new_tokens", _DEFAULT_MAX_TOKENS))


def _truncate_at_ends(text: str, settings: dict[str, Any]) -> str:
    ends = settings.get("until") or []
    for end in [ends] if isinstance(ends, str) else ends:
        text = text.split(end)[0] if end else text
    return text.strip()
