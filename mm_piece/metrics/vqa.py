"""Soft accuracy of VQA v2, and answers as its published evaluation processes them."""

import re
from collections.abc import Iterator, Sequence

_ARTICLES = ("a", "an", "the")
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}

# The table of contractions that the evaluation code publishes, by endings. An answer is lower case
# when it is looked up, so that the table's own capitals (Im, Ive, Id've) match nothing, there or
# here.
_ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were "
    "wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "'all": "y",
    "'am": "ma",
    "'clock": "o",
}
# With two apostrophes, one of which may be missing: couldnt've and couldn'tve, yall'll and y'allll.
_DOUBLED = {
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who you",
    "'all'll": "y",
}
_IRREGULAR = {
    "twas": "'twas",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
    "somebody'd": "somebodyd",  # the other way round, as published
}


def score_vqa(
    predictions: Sequence[str],
    accepted: Sequence[Sequence[str]],
) -> list[float]:
    """Return the soft accuracy of VQA v2: the mean over annotators of min(1, votes / 3).

    Every annotator is left out in turn, and the others vote. Three of ten who agree make 0.9, four
    make 1. Fewer than four answers are no panel of annotators (nothing could reach 1) but a list of
    right answers: one that agrees is enough. Source: Antol et al. 2015, and the evaluation code
    published with the data set, which leaves answers unprocessed where all annotators agree to the
    letter; here all are processed.
    """
    scores: list[float] = []
    for prediction, answers in zip(predictions, accepted, strict=True):
        scores.append(_score_soft_accuracy(prediction, answers))
    return scores


def _score_soft_accuracy(
    prediction: str,
    answers: Sequence[str],
) -> float:
    num_answers = len(answers)
    normalised = [normalise_vqa_answer(answer) for answer in answers]
    num_agreeing = normalised.count(normalise_vqa_answer(prediction))
    if num_answers < 4:
        return float(num_agreeing > 0)

    # without one who agrees, one vote less is left; without one of the others, all votes are
    num_others = num_answers - num_agreeing
    votes = num_agreeing * min(3, num_agreeing - 1)
    votes += num_others * min(3, num_agreeing)
    return votes / (3 * num_answers)


def normalise_vqa_answer(text: str) -> str:
    """Return an answer as the published evaluation of VQA v2 processes it.

    Punctuation goes: without a gap where it stands beside a space anywhere in the text or the text
    has a digit-comma-digit, else for a space. Points stay before digits only. Number words to ten
    become digits, articles go, contractions get their apostrophes. An answer of which nothing would
    be left is returned with its punctuation.
    """
    text = " ".join(text.lower().split())
    has_digit_commas = re.search(r"\d,\d", text)
    bare = text
    for mark in _MARKS:
        # looked up in the text as it was, as in the published code
        beside_space = f"{mark} " in text or f" {mark}" in text
        replacement = "" if has_digit_commas or beside_space else " "
        bare = bare.replace(mark, replacement)
    bare = re.sub(r"\.(?!\d)", "", bare)

    tokens: list[str] = []
    for word in bare.split():
        token = _NUMBERS.get(word, word)
        if token not in _ARTICLES:
            tokens.append(CONTRACTIONS.get(token, token))
    return " ".join(tokens) or text


def _iter_contractions() -> Iterator[tuple[str, str]]:
    """Yield contractions with an apostrophe missing, each with the right form."""
    for ending, stems in _ENDINGS.items():
        without = ending.replace("'", "")
        for stem in stems.split():
            yield stem + without, stem + ending

    for ending, stems in _DOUBLED.items():
        for stem in stems.split():
            contraction = stem + ending
            first = contraction.index("'")
            second = contraction.rindex("'")
            yield _drop_character(contraction, first), contraction
            yield _drop_character(contraction, second), contraction

    yield from _IRREGULAR.items()


def _drop_character(text: str, position: int) -> str:
    return text[:position] + text[position + 1 :]


CONTRACTIONS = dict(_iter_contractions())
