"""Soft accuracy of VQA v2, and answers as its published evaluation processes them."""

import re
from collections.abc import Iterator, Sequence

_ARTICLES = ("a", "an", "the")
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"}
_NUMBERS |= {"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}

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


def score_vqa(predictions: Sequence[str], accepted: Sequence[Sequence[str]]) -> list[float]:
    """Soft accuracy of VQA v2: every annotator is left out in turn, the rest vote, min(1, votes/3).

    Three of ten who agree make 0.9, four make 1. Fewer than four answers are no panel of annotators
    (nothing could reach 1) but a list of right answers: one that agrees is enough. Source: Antol et
    al. 2015, and the evaluation code published with the data set, which leaves answers unprocessed
    where all annotators agree to the letter; here all are processed.
    """
    return [
        _score_soft_accuracy(prediction, answers)
        for prediction, answers in zip(predictions, accepted, strict=True)
    ]


def _score_soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    num_answers = len(answers)
    agreeing = [normalise_vqa_answer(answer) for answer in answers].count(
        normalise_vqa_answer(prediction)
    )
    if num_answers < 4:
        return float(agreeing > 0)
    votes = agreeing * min(3, agreeing - 1) + (num_answers - agreeing) * min(3, agreeing)
    return votes / (3 * num_answers)


def normalise_vqa_answer(text: str) -> str:
    """An answer as the published evaluation of VQA v2 processes it; if nothing is left, unchanged.

    Punctuation goes: without a gap where it stands beside a space anywhere in the text or the text
    has a digit-comma-digit, else for a space. Points stay before digits only. Number words to ten
    become digits, articles go, contractions get their apostrophes.
    """
    text = bare = " ".join(text.lower().split())
    glued = re.search(r"\d,\d", text)
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if glued or beside_space else " ")
    numbers = [_NUMBERS.get(token, token) for token in re.sub(r"\.(?!\d)", "", bare).split()]
    tokens = [token for token in numbers if token not in _ARTICLES]
    return " ".join(CONTRACTIONS.get(token, token) for token in tokens) or text


def _iter_contractions() -> Iterator[tuple[str, str]]:
    for ending, stems in _ENDINGS.items():
        for stem in stems.split():
            yield stem + ending.replace("'", ""), stem + ending
    for ending, stems in _DOUBLED.items():
        for stem in stems.split():
            contraction = stem + ending
            first, second = contraction.index("'"), contraction.rindex("'")
            yield contraction[:first] + contraction[first + 1 :], contraction
            yield contraction[:second] + contraction[second + 1 :], contraction
    yield from _IRREGULAR.items()


CONTRACTIONS = dict(_iter_contractions())
