"""Scoring rules: predictions and accepted answers of a whole task → one fraction per example.

A rule sees the whole task because CIDEr counts words over all references; the others score each
example by itself. Every score lies in 0…1, and a task's score is the mean over its examples.
Libraries are imported when a rule first runs: scoring an empty task tells at once what is missing.

words     what is compared where case, marks and articles say nothing
overlap   exact, rouge-l, edit, bleu, cider
vqa       the soft accuracy of VQA v2
choice    the option that an answer names, by the words of `cues`
"""

from collections.abc import Callable, Sequence

from mm_piece.metrics.choice import choice
from mm_piece.metrics.overlap import bleu, cider, edit, exact, rouge_l
from mm_piece.metrics.vqa import vqa, vqa_normalise
from mm_piece.metrics.words import normalise, words

__all__ = ["METRICS", "Metric", "normalise", "vqa_normalise", "words"]

# (predictions, the accepted answers of each: at least one) → a score per prediction
Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]

METRICS: dict[str, Metric] = {
    "exact": exact,
    "vqa": vqa,
    "choice": choice,
    "rouge-l": rouge_l,
    "bleu": bleu,
    "edit": edit,
    "cider": cider,
}
