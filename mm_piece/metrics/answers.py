"""Scoring rules: predictions and accepted answers of a whole task → one fraction per example.

A rule gets the whole task because CIDEr counts words over all references; the others score each
example by itself. Every score lies in 0…1, and a task's score is the mean over its examples.
Libraries are imported when a rule runs, so a rule on an empty task fails where one is missing.
"""

from collections.abc import Callable, Sequence

from mm_piece.metrics.choice import score_choice
from mm_piece.metrics.overlap import score_bleu, score_cider, score_edit, score_exact, score_rouge_l
from mm_piece.metrics.vqa import normalise_vqa_answer, score_vqa
from mm_piece.metrics.words import normalise_text, split_words

__all__ = [
    "ANSWER_METRICS",
    "AnswerMetric",
    "normalise_text",
    "normalise_vqa_answer",
    "split_words",
]

# (predictions, the accepted answers of each: at least one) → a score per prediction
AnswerMetric = Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]

ANSWER_METRICS: dict[str, AnswerMetric] = {
    "exact": score_exact,
    "vqa": score_vqa,
    "choice": score_choice,
    "rouge-l": score_rouge_l,
    "bleu": score_bleu,
    "edit": score_edit,
    "cider": score_cider,
}
