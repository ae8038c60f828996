"""lmms-eval on a model in memory: tasks with images."""

from itertools import groupby
from typing import Any

from lmms_eval import evaluator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.tasks import TaskManager
from loguru import logger
from torch import nn

from mm_piece.data import Example, batches
from mm_piece.data.images import Picture
from mm_piece.distributed.progress import bar
from mm_piece.errors import DataError, RecipeError
from mm_piece.evaluation.answers import generate
from mm_piece.evaluation.suites.schema import Part
from mm_piece.evaluation.suites.scores import Scores, readable

logger.disable("lmms_eval")  # a line for every file that defines no task
_evaluate: Any = evaluator.simple_evaluate  # decorators hide from type checkers what it takes
_MARK = "<image>"
_TOKENS = 1024  # of an answer, where a task does not say


class Harness:
    """The tasks that a part names, and the scores of a model on them."""

    def __init__(self, part: Part) -> None:
        """Raises RecipeError for a task that is not known."""
        self.part, self.tasks = part, TaskManager(include_path=part.include)
        part.require_known(self.tasks.all_tasks, "lmms-eval", "lmms-eval tasks list")

    def scores(self, model: nn.Module, processor: Any) -> Scores:
        """Every metric of every task and group."""
        found = _evaluate(
            InMemory(model, processor, self.part.batch_size),
            tasks=[*self.part.tasks],
            task_manager=self.tasks,
            limit=self.part.limit,
            log_samples=False,
            bootstrap_iters=0,
        )
        return readable(found["results"])


class InMemory(lmms):
    """A model and its processor, as lmms-eval asks them: always greedy."""

    def __init__(self, model: nn.Module, processor: Any, batch_size: int) -> None:
        super().__init__()
        self.model, self.processor, self.batch_size = model, processor, batch_size

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers, cut before whatever a task lets them end with."""
        given: list[str] = []
        for most, group in groupby(requests, key=lambda request: _tokens(_settings(request))):
            for batch in bar([*batches([*group], self.batch_size)], "lmms-eval", "batch"):
                asked = [self._asked(request) for request in batch]
                said = generate(
                    self.model, self.processor, asked, most, skip_special_tokens=True
                )  # as this harness has it of every model
                given += [_until(text, _settings(r)) for text, r in zip(said, batch, strict=True)]
        return given

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered: lmms-eval makes texts of the pairs that it asks for here (0.7.3)."""
        raise _unfit(requests[0], "for likelihoods")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered: every question is asked by itself."""
        raise _unfit(requests[0], "in rounds")

    def _asked(self, request: Instance) -> Example:
        """The question as an example; images stand where the text has marks, or before it."""
        text, _, visuals, number, task, split = _parts(request)
        images = list(visuals(self.task_dict[task][split][number]) or []) if visuals else []
        if any(not isinstance(image, Picture) for image in images):
            raise DataError(f"lmms-eval task {task!r} row {number}: only images can be shown")
        marked = text if text.count(_MARK) == len(images) else _MARK * len(images) + text
        content = []
        for place, words in enumerate(marked.split(_MARK)):
            content += [{"type": "image"}] * (place > 0) + [{"type": "text", "text": words}]
        turns = [
            {"role": "user", "content": [part for part in content if part.get("text") != ""]},
            {"role": "assistant", "content": []},
        ]
        return Example(number, turns, images, task)


def _parts(request: Instance) -> tuple[Any, ...]:
    """Of a question: text, generation settings, what finds its images, row, task, split."""
    return tuple(request.args)


def _settings(request: Instance) -> dict[str, Any]:
    return _parts(request)[1]


def _unfit(request: Instance, how: str) -> RecipeError:
    name = request.task_name
    return RecipeError(f"lmms-eval task {name!r} asks {how}; choose one that generates")


def _tokens(settings: dict[str, Any]) -> int:
    return int(settings.get("max_new_tokens", _TOKENS))


def _until(text: str, settings: dict[str, Any]) -> str:
    ends = settings.get("until") or []
    for end in [ends] if isinstance(ends, str) else ends:
        text = text.split(end)[0] if end else text
    return text.strip()
