"""Answers and scores of a model on tasks: one row of the accuracy matrix."""

import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn
from tqdm.auto import tqdm

from mm_piece.tasks import Example, batches, collate, encode_prompt, tokenizer_of

Metric = Callable[[str, Sequence[str]], float]


class Answer(TypedDict):
    """What the model said to one row, and its score from 0 to 1."""

    row: int
    kind: str
    prompt: str
    answer: str
    prediction: str
    score: float


def exact(prediction: str, accepted: Sequence[str]) -> float:
    """1 if the normalised prediction equals one of the accepted answers."""
    return float(normalise(prediction) in {normalise(answer) for answer in accepted})


def vqa(prediction: str, accepted: Sequence[str]) -> float:
    """Soft accuracy of VQA v2: min(1, agreeing annotators / 3); with one answer, exact match."""
    said = normalise(prediction)
    agreeing = sum(normalise(answer) == said for answer in accepted)
    return float(agreeing > 0) if len(accepted) == 1 else min(1.0, agreeing / 3)


def normalise(text: str) -> str:
    """Lower case, no punctuation but inside numbers, no articles, single spaces."""
    text = re.sub(r"(?<=\d)[.,](?=\d)", "\0", text.lower())
    text = "".join(" " if char in string.punctuation else char for char in text).replace("\0", ".")
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def ask(
    model: nn.Module, processor: Any, image: Path, question: str, max_new_tokens: int = 32
) -> str:
    """The model's greedy answer to one question about one image file."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": []}]
    return generate(model, processor, [Example(0, turns, [image], "ask")], max_new_tokens)[0]


@torch.inference_mode()
def generate(
    model: Any, processor: Any, batch: Sequence[Example], max_new_tokens: int
) -> list[str]:
    """Greedy answers to one batch, padded on the left."""
    tokenizer = tokenizer_of(processor)
    encoded = [encode_prompt(example, processor) for example in batch]
    inputs = collate(encoded, pad_of(tokenizer), left=True)
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    ids = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad_of(tokenizer)
    )
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def pad_of(tokenizer: Any) -> int:
    """The padding token, or the end token where a tokenizer has none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def evaluate(
    model: nn.Module,
    processor: Any,
    examples: Sequence[Example],
    metric: str = "exact",
    **options: Any,
) -> list[Answer]:
    """Answer and score every example; options: those of `generate`, and the bar's `title`."""
    rule, title = METRICS[metric], options.pop("title", "evaluate")
    results: list[Answer] = []
    with tqdm(total=len(examples), desc=title, unit="example", leave=False, disable=None) as bar:
        for batch in batches(examples, 50):
            said = generate(model, processor, batch, **options)
            results += [
                _scored(rule, example, text) for example, text in zip(batch, said, strict=True)
            ]
            bar.update(len(batch))
    return results


def mean_score(answers: Sequence[Answer]) -> float:
    """Mean score, a fraction from 0 to 1."""
    return sum(answer["score"] for answer in answers) / len(answers)


def by_kind(answers: Sequence[Answer]) -> dict[str, float]:
    """Mean score for each kind of question, where rows say what kind they are."""
    kinds = sorted({answer["kind"] for answer in answers} - {""})
    return {kind: mean_score([a for a in answers if a["kind"] == kind]) for kind in kinds}


def _scored(rule: Metric, example: Example, prediction: str) -> Answer:
    return {
        "row": example.row,
        "kind": example.kind,
        "prompt": example.prompt,
        "answer": example.answer,
        "prediction": prediction,
        "score": rule(prediction, example.accepted or [example.answer]),
    }


METRICS: dict[str, Metric] = {"exact": exact, "vqa": vqa}
