"""From examples to model inputs: chat template, image tokens, labels on answers alone, batches."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from mm_piece.errors import DataError, ModelError
from mm_piece.tasks.formats import Example, Message, text_of

IGNORED = -100  # the label of a token that is not supervised


def encode(example: Example, processor: Any) -> dict[str, Tensor]:
    """Model inputs of one example, batch dimension 1, with labels on the answers' tokens alone.

    Image tokens are expanded by the processor. Raises DataError where text and images disagree,
    ModelError where the chat template breaks the law that a prompt's tokens begin the tokens of
    prompt and answer.
    """
    inputs = _process(processor, _render(processor, example.messages), example)
    inputs["labels"] = _labels(example, processor, inputs["input_ids"])
    return inputs


def encode_prompt(example: Example, processor: Any) -> dict[str, Tensor]:
    """Model inputs of an example's last question, ready for generation."""
    return _process(processor, _render(processor, example.messages[:-1], prompt=True), example)


def collate(batch: Sequence[dict[str, Tensor]], pad: int, left: bool = False) -> dict[str, Tensor]:
    """One batch of encoded examples: token rows padded (left for generation), the rest stacked."""
    fill = {"input_ids": pad, "labels": IGNORED}
    length = max(example["input_ids"].shape[1] for example in batch)
    joined: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for example in batch for key in example):
        parts = [example[key] for example in batch if key in example]
        if parts[0].shape[:2] == batch[0]["input_ids"].shape[:2] or key in (
            "attention_mask",
            *fill,
        ):
            parts = [_pad(part, length, fill.get(key, 0), left) for part in parts]
        joined[key] = torch.cat(parts)
    return joined


def digest_of(encoded: Sequence[dict[str, Tensor]]) -> str:
    """SHA-256 of everything that the task's training examples feed to the model."""
    sha = hashlib.sha256()
    for example in encoded:
        for key in sorted(example):
            sha.update(example[key].numpy().tobytes())
    return sha.hexdigest()


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor; a text model's processor is its tokenizer."""
    return getattr(processor, "tokenizer", processor)


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Runs of at most `size` items, in order."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _pad(part: Tensor, length: int, fill: int, left: bool) -> Tensor:
    missing = length - part.shape[1]
    return torch.nn.functional.pad(part, (missing, 0) if left else (0, missing), value=fill)


def _labels(example: Example, processor: Any, expanded: Tensor) -> Tensor:
    """Labels for the expanded ids; expansion adds image tokens only, so spans count the others."""
    plain, spans = _answer_spans(example, processor)
    image = _image_token(processor)
    others = (expanded[0] != image).nonzero().view(-1)
    kept = [token for token in plain if token != image]
    if expanded[0][others].tolist() != kept:
        raise ModelError(
            f"{example.source} row {example.row}: the processor changed more than image tokens"
        )
    labels = torch.full_like(expanded, IGNORED)
    for start, stop in spans:
        low, high = (sum(token != image for token in plain[:edge]) for edge in (start, stop))
        labels[0, others[low:high]] = expanded[0, others[low:high]]
    return labels


def _answer_spans(example: Example, processor: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of the whole conversation before image expansion, and the token span of each answer."""
    whole = _ids(processor, _render(processor, example.messages))
    spans = []
    for turn, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        before = _ids(processor, _render(processor, example.messages[:turn], prompt=True))
        after = _ids(processor, _render(processor, example.messages[: turn + 1]))
        if whole[: len(after)] != after or after[: len(before)] != before:
            raise ModelError(
                f"{example.source} row {example.row}: "
                "the chat template's prompt is not a prefix of prompt + answer"
            )
        spans.append((len(before), len(after)))
    return whole, spans


def _render(processor: Any, messages: list[Message], prompt: bool = False) -> str:
    if processor is tokenizer_of(processor):  # templates of text models take plain strings
        messages = [{**message, "content": text_of(message)} for message in messages]
    try:
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except (ValueError, AttributeError, TypeError, TemplateError) as error:
        raise ModelError(f"the base has no usable chat template: {error}") from error


def _ids(processor: Any, text: str) -> list[int]:
    return tokenizer_of(processor)(text, add_special_tokens=False)["input_ids"]


def _process(processor: Any, text: str, example: Example) -> dict[str, Tensor]:
    options: dict[str, Any] = {"return_tensors": "pt", "add_special_tokens": False}
    try:
        if processor is tokenizer_of(processor):
            return dict(processor(text, **options))
        return dict(processor(text=[text], images=example.pictures() or None, **options))
    except (ValueError, IndexError) as error:
        raise DataError(
            f"{example.source} row {example.row}: {' '.join(str(error).split())}"
        ) from error


def _image_token(processor: Any) -> int | None:
    return None if processor is tokenizer_of(processor) else processor.image_token_id
