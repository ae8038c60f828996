"""Scoring rules: predictions and accepted answers of a whole task → one fraction per example.

A rule sees the whole task because CIDEr counts words over all references; the others score each
example by itself. Every score lies in 0…1, and a task's score is the mean over its examples.
Libraries are imported when a rule first runs: scoring an empty task tells at once what is missing.
"""

import re
from collections.abc import Callable, Sequence
from unicodedata import category, normalize

from mm_piece.errors import RecipeError

# (predictions, the accepted answers of each: at least one) → a score per prediction
Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]

# Full-width forms, as in Chinese text, become ASCII; so does the minus sign.
_WIDTHS = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x2212: ord("-")}
# Scripts without spaces, where each character is a word: kana, Chinese characters.
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_THOUSANDS = re.compile(r"(?<!\d)(?<!\d[.,])\d{1,3}(?:,\d{3})+(?!,?\d)")
_BARE_POINT = re.compile(r"(?<![\w.])\.(?=\d)")
_SIGN_OR_POINT = re.compile(r"(?<![^\W_])-(?=\d)|(?<=\d)\.(?=\d)")
_ARTICLE = re.compile(r"(?<!\w)(?:an?|the)\s+(?=\S?\w)")


def normalise(text: str) -> str:
    """Lower case; no punctuation, symbols or articles; single spaces.

    Numbers keep sign and point and lose the commas between thousands: `1,000` is `1000`, `.5` is
    `0.5`, `-5` is not `5`. An article is one only before another word, so the answer `A` stays. A
    text of punctuation alone, such as `<`, stays as it is.
    """
    text = _folded(text)
    numbers = _BARE_POINT.sub("0.", _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text))
    bare = _ARTICLE.sub("", numbers)
    inside = {match.start() for match in _SIGN_OR_POINT.finditer(bare)}
    kept = (char if _in_word(char) or i in inside else " " for i, char in enumerate(bare))
    return " ".join("".join(kept).split()) or " ".join(text.split())


def words(text: str) -> list[str]:
    """Lower-case words of any script, each Chinese or Japanese character one; no punctuation.

    A text of punctuation alone gives its characters. On ASCII these are the words of ROUGE's own
    tokenizer (`rouge-score`), which would drop every letter that is not in a–z.
    """
    text = _folded(text)
    kept = "".join(char if _in_word(char) else " " for char in text)
    return _spaced(kept).split() or list("".join(text.split()))


def _folded(text: str) -> str:
    return normalize("NFC", text.translate(_WIDTHS).lower())


def _in_word(char: str) -> bool:
    return category(char)[0] in "LMN"  # letters, their marks, numbers


def _spaced(text: str) -> str:
    return _CJK.sub(r" \g<0> ", text)


def _best(
    similarity: Callable[[str, str], float],
    predictions: Sequence[str],
    accepted: Sequence[Sequence[str]],
) -> list[float]:
    """For each prediction, its similarity to the accepted answer that is most like it."""
    pairs = zip(predictions, accepted, strict=True)
    return [float(max(similarity(said, answer) for answer in answers)) for said, answers in pairs]


def exact(predictions: Sequence[str], accepted: Sequence[Sequence[str]]) -> list[float]:
    """1 where the normalised prediction equals a normalised accepted answer, else 0."""
    return _best(lambda said, answer: normalise(said) == normalise(answer), predictions, accepted)


_ARTICLES = ("a", "an", "the")
_VQA_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_VQA_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"}
_VQA_NUMBERS |= {"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
# Contractions that annotators also write without the apostrophe, by their ending. Those that would
# be another word (it's, we're, I'll) are not among them.
_VQA_ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were "
    "wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it there they where who you",
    "'ll": "how it they what who why you",
    "'re": "there they what why you",
    "'s": "he how that there what when where who why",
}
_VQA_CONTRACTIONS = {
    stem + ending.replace("'", ""): stem + ending
    for ending, stems in _VQA_ENDINGS.items()
    for stem in stems.split()
}


def vqa(predictions: Sequence[str], accepted: Sequence[Sequence[str]]) -> list[float]:
    """Soft accuracy of VQA v2: every annotator is left out in turn, the rest vote, min(1, votes/3).

    Three of ten who agree make 0.9, four make 1. Fewer than four answers are no panel of annotators
    (nothing could reach 1) but a list of right answers: one that agrees is enough. Source: Antol et
    al. 2015, and the evaluation code published with the data set, which leaves answers unprocessed
    where all annotators agree to the letter; here all are processed.
    """
    return [_soft(said, answers) for said, answers in zip(predictions, accepted, strict=True)]


def _soft(said: str, answers: Sequence[str]) -> float:
    num = len(answers)
    agreeing = [vqa_normalise(answer) for answer in answers].count(vqa_normalise(said))
    if num < 4:
        return float(agreeing > 0)
    votes = agreeing * min(3, agreeing - 1) + (num - agreeing) * min(3, agreeing)
    return votes / (3 * num)


def vqa_normalise(text: str) -> str:
    """An answer as the published evaluation of VQA v2 processes it; if nothing is left, unchanged.

    Punctuation goes: without a gap where it stands beside a space anywhere in the text or the text
    has a digit-comma-digit, else for a space. Points stay before digits only. Number words to ten
    become digits, articles go, contractions get their apostrophes (doubled and rare ones of the
    published table aside).
    """
    text = bare = " ".join(text.lower().split())
    glued = re.search(r"\d,\d", text)
    for mark in _VQA_MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if glued or beside_space else " ")
    tokens = [token for token in re.sub(r"\.(?!\d)", "", bare).split() if token not in _ARTICLES]
    numbers = [_VQA_NUMBERS.get(token, token) for token in tokens]
    return " ".join(_VQA_CONTRACTIONS.get(token, token) for token in numbers) or text


# A letter that is an option's label: "B", "(B)", "**B**", "B.", "B) cat", "Option B: cat", "B\n…",
# "B is correct". In "A cat", "A+", "e.g." and "A.M." there is none.
_OPEN, _CLOSE = r"[\s*_`\"'“(\[]*", r"[\s*_`\"'”)\].。!]*"
_LABEL = re.compile(
    rf"{_OPEN}(?:option\s{_OPEN})?([a-z])"
    rf"(?:\s*(?:[)\]:、。]|\.(?![a-z]))|{_CLOSE}(?:\n|$)"
    r"|(?=\s+is\s+(?:the\s+)?(?:answer|best|correct|right)\b))",
    re.IGNORECASE,
)
_SAID = re.compile(
    r"(?:\b(?:answer|option|choice)[\s*_]*(?:is|:)|答案\s*[是为:])[\s:]*", re.IGNORECASE
)
_CAPITAL = re.compile(rf"{_OPEN}([A-Z])(?![A-Za-z0-9'’+-])")


def choice(predictions: Sequence[str], accepted: Sequence[Sequence[str]]) -> list[float]:
    """1 where prediction and an accepted answer name the same option, else 0.

    Both are read alike, by the first rule that fits: a label at the start (`B`, `(B)`, `B. cat`); a
    label or capital letter after "answer is", "Answer:", "答案是" and the like; else there is no
    letter and all is text. Where both have a letter, the letters decide, else the normalised texts
    after it: `B. cat` and `cat` are the same option, `B` and `cat` cannot be told.
    """
    return _best(_same_option, predictions, accepted)


def _same_option(said: str, answer: str) -> bool:
    letter, text = _option(said)
    right_letter, right_text = _option(answer)
    if letter and right_letter:
        return letter == right_letter
    return text == right_text and (text != "" or letter == right_letter)


def _option(text: str) -> tuple[str, str]:
    """The letter that a text names, or none, and the normalised text beside it."""
    text = text.translate(_WIDTHS)
    label = _LABEL.match(text)
    if not label and (lead := _SAID.search(text)):
        text = text[lead.end() :]
        label = _LABEL.match(text) or _CAPITAL.match(text)
    return (label[1].upper(), normalise(text[label.end() :])) if label else ("", normalise(text))


def rouge_l(predictions: Sequence[str], accepted: Sequence[Sequence[str]]) -> list[float]:
    """ROUGE-L: F1 of the longest common subsequence of `words`, best over the accepted answers.

    With L words in common out of m and n that is 2L / (m + n), the normalised indel similarity of
    the two lists. Source: Lin 2004, with β = 1; no stemming.
    """
    from rapidfuzz.distance import Indel

    return _best(
        lambda said, answer: Indel.normalized_similarity(words(said), words(answer)),
        predictions,
        accepted,
    )


def edit(predictions: Sequence[str], accepted: Sequence[Sequence[str]]) -> list[float]:
    """Edit similarity: 2L / (m + n) of the characters, best over the accepted answers.

    L characters in common (longest common subsequence) out of m and n, outer white space aside,
    case and punctuation included: the `fuzz.ratio` by which Py150 is scored in CodeXGLUE and TRACE,
    not rounded. It is not 1 − Levenshtein / longer length: a replaced character costs two edits.
    """
    from rapidfuzz.distance import Indel

    return _best(
        lambda said, answer: Indel.normalized_similarity(said.strip(), answer.strip()),
        predictions,
        accepted,
    )


def bleu(predictions: Sequence[str], accepted: Sequence[Sequence[str]]) -> list[float]:
    """Sentence BLEU of sacrebleu: all accepted answers as references, 13a tokens, case counts.

    Exponential smoothing, and only the orders that a short sentence has. A task's score is the mean
    of these and not the corpus BLEU of the same sentences. Chinese and Japanese characters are
    tokens of their own.
    """
    from sacrebleu.metrics.bleu import BLEU

    scorer = BLEU(effective_order=True)

    def one(said: str, answers: Sequence[str]) -> float:
        if said.strip() in {answer.strip() for answer in answers}:
            return 1.0  # also where both are empty
        found = scorer.sentence_score(_spaced(said), [_spaced(answer) for answer in answers])
        return min(1.0, found.score / 100)  # rounding reaches 100.00000000000004

    return [one(said, answers) for said, answers in zip(predictions, accepted, strict=True)]


def cider(predictions: Sequence[str], accepted: Sequence[Sequence[str]]) -> list[float]:
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
    said = {i: [" ".join(words(text))] for i, (text, _) in enumerate(pairs)}
    references = {i: [" ".join(words(t)) for t in texts] for i, (_, texts) in enumerate(pairs)}
    if not any(any(texts) for texts in references.values()):
        return [0.0] * len(said)  # the library asks for one word at least
    _, scores = Cider().compute_score(references, said)
    return [min(1.0, float(score) / 10) for score in scores]


METRICS: dict[str, Metric] = {
    "exact": exact,
    "vqa": vqa,
    "choice": choice,
    "rouge-l": rouge_l,
    "bleu": bleu,
    "edit": edit,
    "cider": cider,
}
