"""What a prediction and an accepted answer have in common: all of it, or a part."""

from collections.abc import Callable, Sequence

from mm_piece.errors import RecipeError
from mm_piece.metrics.words import normalise_text, space_cjk, split_words


def score_best_match(
    similarity: Callable[[str, str], float],
    predictions: Sequence[str],
    accepted: Sequence[Sequence[str]],
) -> list[float]:
    """For each prediction, its similarity to the accepted answer that is most like it."""
    pairs = zip(predictions, accepted, strict=True)
    return [
        float(max(similarity(prediction, answer) for answer in answers))
        for prediction, answers in pairs
    ]


def score_exact(predictions: Sequence[str], accepted: Sequence[Sequence[str]]) -> list[float]:
    """1 where the normalised prediction equals a normalised accepted answer, else 0."""
    return score_best_match(
        lambda said, answer: normalise_text(said) == normalise_text(answer), predictions, accepted
    )


def score_rouge_l(predictions: Sequence[str], accepted: Sequence[Sequence[str]]) -> list[float]:
    """ROUGE-L: F1 of the longest common subsequence of `words`, best over the accepted answers.

    With L words in common out of m and n that is 2L / (m + n), the normalised indel similarity of
    the two lists. Source: Lin 2004, with β = 1; no stemming.
    """
    from rapidfuzz.distance import Indel

    return score_best_match(
        lambda said, answer: Indel.normalized_similarity(split_words(said), split_words(answer)),
        predictions,
        accepted,
    )


def score_edit(predictions: Sequence[str], accepted: Sequence[Sequence[str]]) -> list[float]:
    """Edit similarity: 2L / (m + n) of the characters, best over the accepted answers.

    L characters in common (longest common subsequence) out of m and n, outer white space aside,
    case and punctuation included: the `fuzz.ratio` by which Py150 is scored in CodeXGLUE and TRACE,
    not rounded. It is not 1 − Levenshtein / longer length: a replaced character costs two edits.
    """
    from rapidfuzz.distance import Indel

    return score_best_match(
        lambda said, answer: Indel.normalized_similarity(said.strip(), answer.strip()),
        predictions,
        accepted,
    )


def score_bleu(predictions: Sequence[str], accepted: Sequence[Sequence[str]]) -> list[float]:
    """Sentence BLEU of sacrebleu: all accepted answers as references, 13a tokens, case counts.

    Exponential smoothing, and only the orders that a short sentence has. A task's score is the mean
    of these and not the corpus BLEU of the same sentences. Chinese and Japanese characters are
    tokens of their own.
    """
    from sacrebleu.metrics.bleu import BLEU

    scorer = BLEU(effective_order=True)

    def score_sentence(prediction: str, answers: Sequence[str]) -> float:
        if prediction.strip() in {answer.strip() for answer in answers}:
            return 1.0  # also where both are empty
        found = scorer.sentence_score(
            space_cjk(prediction), [space_cjk(answer) for answer in answers]
        )
        return min(1.0, found.score / 100)  # rounding reaches 100.00000000000004

    return [
        score_sentence(prediction, answers)
        for prediction, answers in zip(predictions, accepted, strict=True)
    ]


def score_cider(predictions: Sequence[str], accepted: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D / 10 over `words`, so that 1 is the most; what papers print as 120 is 0.12 here.

    An n-gram weighs the less, the more examples have it in a reference: nothing in a set of one
    example, or where all examples have the same references, and every score is 0. A caption of
    fewer than four words has no 4-grams and cannot reach 1. Source: Vedantam et al. 2015, by
    `pycocoevalcap`, whose tokenizer in Java is not used; hyphens split words here.

    Raises RecipeError where that library is not installed.
    """
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        message = "metric 'cider' needs pycocoevalcap: pip install 'mm-piece[captions]'"
        raise RecipeError(message) from error
    pairs = list(zip(predictions, accepted, strict=True))
    hypotheses = {i: [" ".join(split_words(text))] for i, (text, _) in enumerate(pairs)}
    references = {
        i: [" ".join(split_words(t)) for t in texts] for i, (_, texts) in enumerate(pairs)
    }
    if not any(any(texts) for texts in references.values()):
        return [0.0] * len(hypotheses)  # the library asks for one word at least
    _, scores = Cider().compute_score(references, hypotheses)
    return [min(1.0, float(score) / 10) for score in scores]
