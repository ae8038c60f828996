"""How much of an accepted answer a prediction has: all of it, or a part."""

from collections.abc import Callable, Sequence

from mm_piece.errors import RecipeError
from mm_piece.metrics.words import normalise_text, space_cjk, split_words

AcceptedAnswers = Sequence[Sequence[str]]  # for each prediction, one answer at least
Scores = list[float]  # of each prediction


def score_best_match(
    similarity: Callable[[str, str], float],
    predictions: Sequence[str],
    accepted: AcceptedAnswers,
) -> Scores:
    """Return, for each prediction, its similarity to the most similar accepted answer."""
    scores: Scores = []
    pairs = zip(predictions, accepted, strict=True)
    for prediction, answers in pairs:
        best = max(similarity(prediction, answer) for answer in answers)
        scores.append(float(best))
    return scores


def score_exact(
    predictions: Sequence[str],
    accepted: AcceptedAnswers,
) -> Scores:
    """Return 1 where the normalised prediction equals a normalised accepted answer, else 0."""

    def is_equal(prediction: str, answer: str) -> bool:
        normalised = normalise_text(prediction)
        return normalised == normalise_text(answer)

    return score_best_match(is_equal, predictions, accepted)


def score_rouge_l(
    predictions: Sequence[str],
    accepted: AcceptedAnswers,
) -> Scores:
    """Return ROUGE-L: F1 of the longest common subsequence of words, best of the accepted answers.

    With L words in common out of m and n that is 2L / (m + n), the normalised indel similarity of
    the two lists. Source: Lin 2004, with β = 1; no stemming.
    """
    from rapidfuzz.distance import Indel

    def rouge_l(prediction: str, answer: str) -> float:
        predicted_words = split_words(prediction)
        answer_words = split_words(answer)
        return Indel.normalized_similarity(predicted_words, answer_words)

    return score_best_match(rouge_l, predictions, accepted)


def score_edit(
    predictions: Sequence[str],
    accepted: AcceptedAnswers,
) -> Scores:
    """Return the edit similarity: 2L / (m + n) of the characters, best of the accepted answers.

    L characters in common (longest common subsequence) out of m and n, outer white space aside,
    case and punctuation included: the `fuzz.ratio` by which Py150 is scored in CodeXGLUE and TRACE,
    not rounded. It is not 1 − Levenshtein / longer length: a replaced character costs two edits.
    """
    from rapidfuzz.distance import Indel

    def edit_similarity(prediction: str, answer: str) -> float:
        return Indel.normalized_similarity(
            prediction.strip(),
            answer.strip(),
        )

    return score_best_match(edit_similarity, predictions, accepted)


def score_bleu(
    predictions: Sequence[str],
    accepted: AcceptedAnswers,
) -> Scores:
    """Return sentence BLEU by sacrebleu: all accepted answers as references, 13a tokens, cased.

    Exponential smoothing, and only the n-gram orders that a short sentence has. A task's score is
    the mean of these and not the corpus BLEU of the same sentences. Chinese and Japanese characters
    are tokens of their own.

    Raises RecipeError where that library is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        message = "metric 'bleu' needs sacrebleu: pip install 'mm-piece[bleu]'"
        raise RecipeError(message) from error

    scorer = BLEU(effective_order=True)

    def score_sentence(prediction: str, answers: Sequence[str]) -> float:
        stripped_answers = {answer.strip() for answer in answers}
        # also where both are empty, which sacrebleu scores 0
        if prediction.strip() in stripped_answers:
            return 1.0

        result = scorer.sentence_score(
            space_cjk(prediction),
            [space_cjk(answer) for answer in answers],
        )
        return min(1.0, result.score / 100)  # rounding reaches 100.00000000000004

    scores: Scores = []
    pairs = zip(predictions, accepted, strict=True)
    for prediction, answers in pairs:
        scores.append(score_sentence(prediction, answers))
    return scores


def score_cider(
    predictions: Sequence[str],
    accepted: AcceptedAnswers,
) -> Scores:
    """Return CIDEr-D / 10 over words, so that 1 is the most; the 120 of papers is 0.12 here.

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

    # the library pairs texts by key, and splits them at white space
    hypotheses: dict[int, list[str]] = {}
    references: dict[int, list[str]] = {}
    pairs = zip(predictions, accepted, strict=True)
    for number, (prediction, answers) in enumerate(pairs):
        hypotheses[number] = [_tokenise_caption(prediction)]
        references[number] = [_tokenise_caption(answer) for answer in answers]

    # without a single word in all references the library fails
    has_words = any(any(texts) for texts in references.values())
    if not has_words:
        return [0.0] * len(hypotheses)

    scorer = Cider()
    _, scores = scorer.compute_score(references, hypotheses)
    fractions: Scores = []
    for score in scores:
        fraction = float(score) / 10
        fractions.append(min(1.0, fraction))
    return fractions


def _tokenise_caption(text: str) -> str:
    return " ".join(split_words(text))
