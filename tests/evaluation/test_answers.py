"""Greedy answers do not depend on how examples are batched; what was trained scores one."""

from dataclasses import replace

import pytest
import torch
from tiny_families import BUILDERS
from transformers import AddedToken

from mm_piece.data import IGNORE_INDEX, Example, encode_truncated, pad_token_of, read, tokenizer_of
from mm_piece.evaluation.answers import (
    evaluate,
    generate_batch,
    mean_score,
    relabel_examples,
    scores_by_kind,
)
from mm_piece.metrics.answers import ANSWER_METRICS
from mm_piece.models.base import load_base


def test_answers_do_not_depend_on_the_batch(base):
    model, processor = load_base(base)
    examples = [*read("scenes:charts/test[:5]"), *read("scenes:digits/test[:3]")]
    together = generate_batch(model, processor, examples, 4)
    alone = [generate_batch(model, processor, [example], 4)[0] for example in examples]
    assert together == alone


def test_evaluate_scores_every_row(base):
    model, processor = load_base(base)
    examples = read("scenes:base/test[:7]")
    answers = evaluate(model, processor, examples, max_new_tokens=2)
    assert [answer["row"] for answer in answers] == list(range(7))
    for answer in answers:
        assert (
            answer["score"]
            == ANSWER_METRICS["exact"]([answer["prediction"]], [[answer["answer"]]])[0]
        )
    kinds = scores_by_kind(answers)
    assert set(kinds) == {example.kind for example in examples}
    assert mean_score(answers) == sum(answer["score"] for answer in answers) / 7


class Parrot(torch.nn.Module):
    """A model that says just what it was taught: the tokens that are supervised, then padding."""

    def __init__(self, model, processor, examples):
        super().__init__()
        self.model, self.pad = model, pad_token_of(tokenizer_of(processor))
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.generation_config = model.generation_config
        rows = [encode_truncated(example, processor, None)[0] for example in examples]
        self.taught = [row["input_ids"][row["labels"] != IGNORE_INDEX] for row in rows]

    def generate(self, input_ids, **_):
        said = self.taught[: len(input_ids)]
        del self.taught[: len(input_ids)]
        most = max(map(len, said)) + 2
        rows = [[*tokens.tolist(), *[self.pad] * (most - len(tokens))] for tokens in said]
        return torch.cat([input_ids, torch.tensor(rows)], 1)


SPECIAL = ("<|box_start|>", "<|box_end|>", "<loc_0012>", "<loc_0340>")
ANSWERS = [
    *("<|box_start|>(1,2),(30,40)<|box_end|>", "<loc_0012><loc_0340> cat", "<loc_0012>"),
    *("a cat <loc_0012> and a dog <loc_0340>", "the <obj> there", "cat", "B. cat <loc_0012>"),
    *("He said , do n't .", "x  y", "  cat ", "Größe, 日本 🐟", "Gro\u0308ße", "</think> 3"),
]


@pytest.mark.slow
@pytest.mark.parametrize("family", BUILDERS)
def test_what_was_trained_scores_one_special_tokens_included(family, family_base):
    model, processor = load_base(family_base(family))
    tokenizer = tokenizer_of(processor)
    tokenizer.add_tokens([AddedToken(token) for token in SPECIAL], special_tokens=True)
    tokenizer.add_tokens([AddedToken("<obj>", lstrip=True, rstrip=True)], special_tokens=True)
    tokenizer.clean_up_tokenization_spaces = True  # as Llama 3's published configuration has it
    asked = {"role": "user", "content": [{"type": "text", "text": "Where is it?"}]}
    # Qwen3's template takes the tag for the end of thoughts, and leaves them out.
    answered = [text for text in ANSWERS if family != "qwen3" or "</think>" not in text]
    examples = [
        Example(
            row,
            [asked, {"role": "assistant", "content": [{"type": "text", "text": text}]}],
            [],
            "x",
        )
        for row, text in enumerate(answered)
    ]
    for metric in ("exact", "vqa", "choice", "edit", "rouge-l", "bleu"):
        parrot = Parrot(model, processor, examples)
        answers = evaluate(parrot, processor, examples, metric, batch_size=5, max_new_tokens=9)
        assert [answer["score"] for answer in answers] == [1] * len(answered), metric
    assert answers[0]["prediction"] == ANSWERS[0]
    wrong = [replace(e, accepted=["<loc_0340>"]) for e in examples[2:3]]
    assert (
        evaluate(Parrot(model, processor, wrong), processor, wrong, max_new_tokens=9)[0]["score"]
        == 0
    )


def test_own_answers_that_would_be_read_as_images_are_left_out(base):
    model, processor = load_base(base)
    turns = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    said = [
        {"role": "assistant", "content": [{"type": "text", "text": t}]} for t in ("a", "b", "c")
    ]
    examples = [Example(row, [*turns, answer], [], "x") for row, answer in enumerate(said)]
    parrot = Parrot(model, processor, examples)
    image = tokenizer_of(processor).convert_tokens_to_ids("<image>")
    parrot.taught[1][0] = image
    own = relabel_examples(parrot, processor, examples, max_new_tokens=9)
    assert [example.answer for example in own] == ["a", "c"]
