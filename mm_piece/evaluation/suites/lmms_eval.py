"""lmms-eval on a model in memory, for tasks with images."""

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
from mm_piece.data.processor import Processor
from mm_piece.distributed.progress import progress_bar
from mm_piece.errors import DataError, RecipeError
from mm_piece.evaluation.answers import generate_batch
from mm_piece.evaluation.suites.schema import HarnessConfig
from mm_piece.evaluation.suites.scores import Scores, parse_harness_results
from mm_piece.evaluation.suites.task_index import find_tasks

logger.disable("lmms_eval")  # a line for every file that defines no task
_evaluate: Any = evaluator.simple_evaluate  # decorators hide the parameters from type checkers
_IMAGE_MARK = "<image>"
_DEFAULT_MAX_TOKENS = 1024  # of an answer, where a task does not say


class Harness:
    """Tasks that a suite names for lmms-eval, ready to be measured."""

    def __init__(self, config: HarnessConfig) -> None:
        """Find the tasks; raises RecipeError for one that is not known."""
        self.config = config
        self.tasks = find_tasks(TaskManager, config)
        known = self.tasks.all_tasks
        config.require_known_tasks(known, "lmms-eval", "lmms-eval tasks list")

    def measure_scores(
        self,
        model: nn.Module,
        processor: Processor,
    ) -> Scores:
        """Return every metric of every task and group."""
        wrapped = InMemoryModel(model, processor, self.config.batch_size)
        found = _evaluate(
            wrapped,
            tasks=[*self.config.tasks],
            task_manager=self.tasks,
            limit=self.config.limit,
            log_samples=False,
            bootstrap_iters=0,
        )
        return parse_harness_results(found["results"])


class InMemoryModel(lmms):
    """Model and processor behind the interface of lmms-eval; all decoding is greedy."""

    def __init__(
        self,
        model: nn.Module,
        processor: Processor,
        batch_size: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        self.batch_size = batch_size

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generate answers in the order of the requests, each up to an end that its task names."""
        answers: list[str] = []
        # only neighbours are grouped: the order stays
        groups = groupby(
            requests,
            key=lambda request: _max_tokens_of(_settings_of(request)),
        )
        for max_new_tokens, group in groups:
            group_requests = [*group]
            batches = [*iter_batches(group_requests, self.batch_size)]
            for batch in progress_bar(batches, "lmms-eval", "batch"):
                examples = [self._make_example(request) for request in batch]
                texts = generate_batch(
                    self.model,
                    self.processor,
                    examples,
                    max_new_tokens,
                    skip_special_tokens=True,  # as lmms-eval's own models do
                )
                for text, request in zip(texts, batch, strict=True):
                    settings = _settings_of(request)
                    answers.append(_truncate_at_ends(text, settings))
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Raise RecipeError: lmms-eval 0.7.3 makes texts of the pairs that it asks for here."""
        raise _make_unfit_error(requests[0], "for likelihoods")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raise RecipeError: every question is asked by itself."""
        raise _make_unfit_error(requests[0], "in rounds")

    def _make_example(self, request: Instance) -> Example:
        """Build an example of a question; images go where the text has marks, or before it."""
        text, _, find_images, number, task, split = _unpack_request(request)

        images = []
        if find_images:
            rows = self.task_dict[task][split]
            found = find_images(rows[number])
            images += found or []
        for image in images:
            if not isinstance(image, ImageSource):  # a video or a sound
                raise DataError(f"lmms-eval task {task!r} row {number}: only images can be shown")

        if text.count(_IMAGE_MARK) != len(images):
            text = _IMAGE_MARK * len(images) + text
        pieces = text.split(_IMAGE_MARK)

        # an image stands between each two pieces of text
        content: list[dict[str, str]] = []
        for index, piece in enumerate(pieces):
            if index > 0:
                content.append({"type": "image"})
            if piece:
                content.append({"type": "text", "text": piece})

        turns = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": []},
        ]
        return Example(number, turns, images, task)


def _unpack_request(request: Instance) -> tuple[Any, ...]:
    """Return a question's text, settings, function that finds its images, row, task and split."""
    return tuple(request.args)


def _settings_of(request: Instance) -> dict[str, Any]:
    _, settings, *_ = _unpack_request(request)
    return settings


def _make_unfit_error(request: Instance, how: str) -> RecipeError:
    """Build the error for a task that asks for something else than generated answers."""
    name = request.task_name
    return RecipeError(f"lmms-eval task {name!r} asks {how}; choose one that generates")


def _max_tokens_of(settings: dict[str, Any]) -> int:
    limit = settings.get("max_new_tokens", _DEFAULT_MAX_TOKENS)
    return int(limit)


def _truncate_at_ends(
    text: str,
    settings: dict[str, Any],
) -> str:
    """Return a text up to the first of the ends that its task names."""
    ends = settings.get("until") or []  # one text, or a list of several
    if isinstance(ends, str):
        ends = [ends]

    for end in ends:
        if end:
            text, *_ = text.split(end)
    return text.strip()
