"""Greedy answers of a model to examples, and their scores."""

from collections.abc import Collection, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm_piece import distributed
from mm_piece.data import Example, collate, encode_truncated, iter_batches
from mm_piece.data import images as pictures
from mm_piece.data.answers import extract_answer
from mm_piece.data.processor import Processor, Tokenizer, pad_token_of, tokenizer_of
from mm_piece.data.prompts import turn_end_tokens_of
from mm_piece.data.special_tokens import find_visual_token, remove_special_tokens
from mm_piece.distributed.progress import progress_bar
from mm_piece.errors import DataError, ModelError, PieceError, format_error, format_value
from mm_piece.metrics.answers import ANSWER_METRICS
from mm_piece.models.generation import greedy_decoding
from mm_piece.store.results import AnswerRecord


class ScoredAnswer(AnswerRecord):
    """The model's prediction for one example, and its score from 0 to 1."""

    kind: str  # of question


def answer_question(
    model: nn.Module,
    processor: Processor,
    image: Path,
    question: str,
    max_new_tokens: int = 32,
) -> str:
    """Return the model's greedy answer to one question about one image file."""
    pictures.require_image(image, f"image {image}")

    content = [
        {"type": "image"},
        {"type": "text", "text": question},
    ]
    turns = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": []},
    ]
    example = Example(0, turns, [image], "ask")
    (answer,) = generate_batch(model, processor, [example], max_new_tokens)
    return answer


def move_to_accelerator(model: Any) -> Any:
    """Move the model to the accelerator if there is one, and return it."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return model
    return model.to(device)


@torch.no_grad()  # in inference mode, weights gathered from shards could never train again
def generate_batch(
    model: Any,
    processor: Processor,
    batch: Sequence[Example],
    max_new_tokens: int,
    max_length: int | None = None,
    synced_gpus: bool = False,
    skip_special_tokens: bool = False,
) -> list[str]:
    """Generate greedy answers to one batch; prompts have at most `max_length` tokens.

    An answer stops before its end token. Special tokens in it, such as those of a place in the
    image, are part of it, unless `skip_special_tokens`. With `synced_gpus` every process goes on
    until all have their answers, which a partitioned model needs.

    An answer depends on the weights and the prompt alone: `greedy_decoding` sets aside the base's
    own generation configuration. Raises ModelError if the model cannot answer.
    """
    tokenizer = tokenizer_of(processor)
    ends = end_tokens_of(model, processor)
    pad = pad_token_of(tokenizer)

    prompts = []
    for example in batch:
        prompt, _ = encode_truncated(example, processor, max_length, generation=True)
        prompts.append(prompt)
    # padded on the left: a model continues each row at its end
    inputs = _move_inputs(collate(prompts, pad, left=True), model)

    try:
        with (
            distributed.translate_errors(),
            greedy_decoding(
                model,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                eos_token_id=ends,
            ) as settings,
        ):
            ids = model.generate(
                **inputs,
                generation_config=settings,
                synced_gpus=synced_gpus,
            )
    except PieceError:
        raise
    except Exception as error:  # a model raises whatever it trips over
        location = f"{batch[0].source} row {batch[0].row}"
        raise ModelError(f"the base cannot answer {location}: {format_error(error)}") from error

    prompt_length = inputs["input_ids"].shape[1]
    new_ids = ids[:, prompt_length:].tolist()  # (batch, new tokens)
    texts = _decode_texts(new_ids, batch, processor, ends)
    if skip_special_tokens:
        texts = [remove_special_tokens(text, tokenizer) for text in texts]
    return texts


def _decode_texts(
    new_ids: Sequence[Sequence[int]],
    batch: Sequence[Example],
    processor: Processor,
    ends: Collection[int],
) -> list[str]:
    """Return the answers in what a model generated, each up to its first end token."""
    tokenizer = tokenizer_of(processor)

    texts = []
    for row, example in zip(new_ids, batch, strict=True):
        answer_ids = [*takewhile(lambda token: token not in ends, row)]
        text = decode_answer(answer_ids, tokenizer)
        text = extract_answer(text, example, processor)
        texts.append(text.strip())
    return texts


def _move_inputs(inputs: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Return inputs on a model's device; floating-point ones, such as pixels, in its dtype."""
    moved = {}
    for key, value in inputs.items():
        moved[key] = value.to(model.device)
        if value.is_floating_point():
            moved[key] = moved[key].to(model.dtype)
    return moved


def decode_answer(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the text of an answer's tokens, in which no spaces are tidied up."""
    # tidied up, "a , b" would read "a, b"
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text.strip()


def end_tokens_of(model: Any, processor: Processor) -> list[int]:
    """Return the tokens that end an answer: the model's own and those of its chat template.

    The two differ in bases that were never tuned to chat.
    """
    tokenizer = tokenizer_of(processor)
    model_ends = model.generation_config.eos_token_id  # one, a list of several, or None
    # transformers allows all three
    if not isinstance(model_ends, list):
        model_ends = [model_ends]

    turn_ends = sorted(turn_end_tokens_of(processor))
    ends = {*model_ends, tokenizer.eos_token_id}
    ends.update(tokenizer.convert_tokens_to_ids(turn_ends))
    # a tokenizer may have no end token
    return sorted(ends - {None})


def evaluate(
    model: nn.Module,
    processor: Processor,
    examples: Sequence[Example],
    metric: str = "exact",
    *,
    max_new_tokens: int = 32,
    max_length: int | None = None,
    batch_size: int = 8,
    title: str = "evaluate",
) -> list[ScoredAnswer]:
    """Answer every example and score the answers, from 0 to 1, by a metric of ANSWER_METRICS.

    Answers have at most `max_new_tokens` tokens, and prompts `max_length`. `title` names the
    progress bar. Raises DataError for an unknown metric or something else than examples, and
    ModelError for something else than a model or a processor.
    """
    _require_evaluable(model, processor, examples, metric)
    predictions = generate_answers(
        model,
        processor,
        examples,
        batch_size=batch_size,
        title=title,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
    )
    return score_predictions(processor, examples, predictions, metric)


def score_predictions(
    processor: Processor,
    examples: Sequence[Example],
    predictions: Sequence[str],
    metric: str,
) -> list[ScoredAnswer]:
    """Score a prediction for each example."""
    tokenizer = tokenizer_of(processor)
    accepted = []
    for example in examples:
        answers = example.accepted or [example.answer]
        accepted.append([_as_decoded(answer, tokenizer) for answer in answers])

    score_answers = ANSWER_METRICS[metric]
    scores = score_answers(predictions, accepted)
    return [
        _make_scored_answer(example, text, score)
        for example, text, score in zip(examples, predictions, scores, strict=True)
    ]


def _require_evaluable(
    model: nn.Module,
    processor: Processor,
    examples: Sequence[Example],
    metric: str,
) -> None:
    """Raise DataError or ModelError unless the arguments of `evaluate` are what it takes."""
    if metric not in ANSWER_METRICS:
        known = ", ".join(ANSWER_METRICS)
        raise DataError(f"unknown metric {format_value(metric)}; known: {known}")

    if not isinstance(model, nn.Module):
        raise ModelError(f"the model must be a torch module, not {format_value(model)}")
    if not callable(processor):
        raise ModelError(f"the processor must be what `load` gives, not {format_value(processor)}")

    # a list, or a dataset that reads its rows on demand
    is_list = isinstance(examples, Sequence)
    if not is_list or not all(isinstance(one, Example) for one in examples):
        given = format_value(examples)
        raise DataError(f"examples must be a list of what `read` gives, not {given}")


def _as_decoded(answer: str, tokenizer: Tokenizer) -> str:
    """Return an answer after encoding and decoding, which not every tokenizer does exactly.

    A model that generates the very tokens of an answer must score 1.
    """
    encoded = tokenizer(answer, add_special_tokens=False)
    return decode_answer(encoded["input_ids"], tokenizer)


def generate_answers(
    model: nn.Module,
    processor: Processor,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    title: str = "evaluate",
    **options: Any,
) -> list[str]:
    """Generate the model's greedy answer to every example, in their order.

    `options` are those of `generate_batch`. Each of several processes answers some of the batches,
    and all return all answers. The processes of a partitioned model go through its layers together.
    """
    all_batches = list(iter_batches(examples, batch_size))
    is_partitioned = any(map(distributed.is_partitioned, model.parameters()))
    # in lockstep, batches with and without images must not meet: they use other layers
    have_images = [any(example.images for example in batch) for batch in all_batches]
    schedule = distributed.schedule_items(have_images, in_lockstep=is_partitioned)

    own_numbers = []
    own_texts = []
    for number, is_own in progress_bar(schedule, title, "batch"):
        texts = generate_batch(
            model,
            processor,
            all_batches[number],
            synced_gpus=is_partitioned,
            **options,
        )
        if is_own:  # else it only keeps this process in step with the others
            own_numbers.append(number)
            own_texts.append(texts)

    all_texts = distributed.all_gather_items(own_texts, own_numbers, len(all_batches))
    return [text for texts in all_texts for text in texts]


def relabel_examples(
    model: nn.Module,
    processor: Processor,
    examples: Sequence[Example],
    **options: Any,
) -> list[Example]:
    """Return the examples with the model's own answers in place of theirs.

    `options` are those of `generate_answers`. Leaves out examples to which the model answers
    nothing, or with a token that it would read as an image.
    """
    generated = generate_answers(model, processor, examples, **options)

    relabelled = []
    for example, text in zip(examples, generated, strict=True):
        # such a token would stand for an image that is not there
        if text and not find_visual_token(text, processor):
            relabelled.append(example.with_answer(text))
    return relabelled


def mean_score(answers: Sequence[ScoredAnswer]) -> float:
    """Return the mean score, a fraction from 0 to 1."""
    total = sum(answer["score"] for answer in answers)
    return total / len(answers)


def scores_by_kind(answers: Sequence[ScoredAnswer]) -> dict[str, float]:
    """Return the mean score for each kind of question, over the rows that have a kind."""
    kinds = {answer["kind"] for answer in answers} - {""}

    scores = {}
    for kind in sorted(kinds):
        of_kind = [answer for answer in answers if answer["kind"] == kind]
        scores[kind] = mean_score(of_kind)
    return scores


def _make_scored_answer(
    example: Example,
    prediction: str,
    score: float,
) -> ScoredAnswer:
    return {
        "row": example.row,
        "kind": example.kind,
        "prompt": example.prompt,
        "answer": example.answer,
        "prediction": prediction,
        "score": score,
    }
