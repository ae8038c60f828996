"""Answers and scores of a model on tasks: one row of the accuracy matrix."""

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from mm_piece import distributed
from mm_piece.data import Example, collate, encode_truncated, iter_batches, tokenizer_of
from mm_piece.data import images as pictures
from mm_piece.data.answers import extract_answer
from mm_piece.data.prompts import turn_end_tokens_of
from mm_piece.data.special_tokens import find_visual_token, remove_special_tokens
from mm_piece.distributed.progress import progress_bar
from mm_piece.errors import DataError, ModelError, PieceError, format_error, format_value
from mm_piece.metrics.answers import ANSWER_METRICS
from mm_piece.models.generation import greedy_decoding


class ScoredAnswer(TypedDict):
    """What the model said to one row, and its score from 0 to 1."""

    row: int
    kind: str
    prompt: str
    answer: str
    prediction: str
    score: float


def answer_question(
    model: nn.Module, processor: Any, image: Path, question: str, max_new_tokens: int = 32
) -> str:
    """The model's greedy answer to one question about one image file."""
    pictures.require_image(image, f"image {image}")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": []}]
    return generate_batch(model, processor, [Example(0, turns, [image], "ask")], max_new_tokens)[0]


def move_to_accelerator(model: Any) -> Any:
    """The model, moved to the accelerator if there is one."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return model if device is None else model.to(device)


@torch.no_grad()  # in inference mode, weights gathered from parts could never train again
def generate_batch(
    model: Any,
    processor: Any,
    batch: Sequence[Example],
    max_new_tokens: int,
    max_length: int | None = None,
    synced_gpus: bool = False,
    skip_special_tokens: bool = False,
) -> list[str]:
    """Greedy answers to one batch, padded on the left; prompts of at most `max_length` tokens.

    An answer ends before the token that ends it; special tokens in it, such as those of a place in
    the image, are part of it unless they are to be skipped.
    With `synced_gpus` every process goes on until all have their answers, as a model that lies
    in parts on them needs it.
    Whatever a base's own generation configuration asks for is left aside (`greedy`): an answer
    depends on the weights and the prompt alone.
    """
    tokenizer, ends = tokenizer_of(processor), end_tokens_of(model, processor)
    encoded = [
        encode_truncated(example, processor, max_length, generation=True)[0] for example in batch
    ]
    inputs = collate(encoded, pad_token_of(tokenizer), left=True)
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    limits = {"pad_token_id": pad_token_of(tokenizer), "eos_token_id": ends}
    try:
        with (
            distributed.translate_errors(),
            greedy_decoding(model, max_new_tokens=max_new_tokens, **limits) as settings,
        ):
            ids = model.generate(**inputs, generation_config=settings, synced_gpus=synced_gpus)
    except PieceError:
        raise
    except Exception as error:  # a model raises whatever it trips over
        location = f"{batch[0].source} row {batch[0].row}"
        raise ModelError(f"the base cannot answer {location}: {format_error(error)}") from error

    new = ids[:, inputs["input_ids"].shape[1] :].tolist()
    answers = [[*takewhile(lambda token: token not in ends, row)] for row in new]
    texts = [
        extract_answer(decode_answer(row, tokenizer), example, processor).strip()
        for row, example in zip(answers, batch, strict=True)
    ]
    return (
        [remove_special_tokens(text, tokenizer) for text in texts] if skip_special_tokens else texts
    )


def decode_answer(ids: Sequence[int], tokenizer: Any) -> str:
    """The text of an answer's tokens, as they are: nothing about it is tidied up."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()


def end_tokens_of(model: Any, processor: Any) -> list[int]:
    """The tokens that end an answer: the model's own, and what its chat template ends turns with.

    The two differ in bases that were never tuned to chat.
    """
    tokenizer, model_ends = tokenizer_of(processor), model.generation_config.eos_token_id
    ends = {*(model_ends if isinstance(model_ends, list) else [model_ends]), tokenizer.eos_token_id}
    ends.update(tokenizer.convert_tokens_to_ids(sorted(turn_end_tokens_of(processor))))
    return sorted(ends - {None})


def pad_token_of(tokenizer: Any) -> int:
    """The padding token, or the end token where a tokenizer has none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def evaluate(
    model: nn.Module,
    processor: Any,
    examples: Sequence[Example],
    metric: str = "exact",
    **options: Any,
) -> list[ScoredAnswer]:
    """Answer and score every example; options: those of `said`.

    Raises DataError for an unknown metric and for what are no examples, ModelError for what is no
    model and no processor.
    """
    if metric not in ANSWER_METRICS:
        raise DataError(
            f"unknown metric {format_value(metric)}; known: {', '.join(ANSWER_METRICS)}"
        )
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model must be a torch module, not {format_value(model)}")
    if not callable(processor):
        raise ModelError(f"the processor must be what `load` gives, not {format_value(processor)}")
    if not isinstance(examples, Sequence) or not all(isinstance(e, Example) for e in examples):
        raise DataError(
            f"examples must be a list of what `read` gives, not {format_value(examples)}"
        )

    rule, predictions = (
        ANSWER_METRICS[metric],
        generate_answers(model, processor, examples, **options),
    )
    tokenizer = tokenizer_of(processor)
    accepted = [
        [_as_decoded(answer, tokenizer) for answer in example.accepted or [example.answer]]
        for example in examples
    ]
    scores = rule(predictions, accepted)
    return [
        _make_scored_answer(example, text, score)
        for example, text, score in zip(examples, predictions, scores, strict=True)
    ]


def _as_decoded(answer: str, tokenizer: Any) -> str:
    """An answer as it reads when its tokens are said: not every tokenizer gives every text back."""
    return decode_answer(tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer)


def generate_answers(
    model: nn.Module,
    processor: Any,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    title: str = "evaluate",
    **options: Any,
) -> list[str]:
    """The model's greedy answer to every example; options: those of `generate`.

    Of several processes each answers some of the batches; all get all answers. Where the model
    lies in parts on them, they go through the same layers at any time.
    """
    all_batches = list(iter_batches(examples, batch_size))
    is_partitioned = any(map(distributed.is_partitioned, model.parameters()))
    schedule = distributed.schedule_items(
        [any(e.images for e in batch) for batch in all_batches], in_lockstep=is_partitioned
    )
    answered = [
        generate_batch(model, processor, all_batches[number], synced_gpus=is_partitioned, **options)
        for number, _ in progress_bar(schedule, title, "batch")
    ]
    own_numbers = [number for number, first in schedule if first]
    own_texts = [texts for texts, (_, first) in zip(answered, schedule, strict=True) if first]
    return [
        text
        for texts in distributed.all_gather_items(own_texts, own_numbers, len(all_batches))
        for text in texts
    ]


def relabel_examples(
    model: nn.Module, processor: Any, examples: Sequence[Example], **options: Any
) -> list[Example]:
    """The examples with what the model says in place of their answers; options: those of `said`.

    Left out is where it says nothing, or a token that it would read as an image.
    """
    generated = generate_answers(model, processor, examples, **options)
    return [
        example.with_answer(text)
        for example, text in zip(examples, generated, strict=True)
        if text and not find_visual_token(text, processor)
    ]


def mean_score(answers: Sequence[ScoredAnswer]) -> float:
    """Mean score, a fraction from 0 to 1."""
    return sum(answer["score"] for answer in answers) / len(answers)


def scores_by_kind(answers: Sequence[ScoredAnswer]) -> dict[str, float]:
    """Mean score for each kind of question, where rows say what kind they are."""
    kinds = sorted({answer["kind"] for answer in answers} - {""})
    return {kind: mean_score([a for a in answers if a["kind"] == kind]) for kind in kinds}


def _make_scored_answer(example: Example, prediction: str, score: float) -> ScoredAnswer:
    return {
        "row": example.row,
        "kind": example.kind,
        "prompt": example.prompt,
        "answer": example.answer,
        "prediction": prediction,
        "score": score,
    }
