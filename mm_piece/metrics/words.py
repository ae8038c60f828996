"""A text as words: what scoring rules compare where case, marks and articles say nothing."""

import re
from unicodedata import category, normalize

# Full-width forms, as in Chinese text, become ASCII; so does the minus sign.
_WIDTHS = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x2212: ord("-")}
# Scripts without spaces, where each character is a word: kana, Chinese characters.
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_THOUSANDS = re.compile(r"(?<!\d)(?<!\d[.,])\d{1,3}(?:,\d{3})+(?!,?\d)")
_BARE_POINT = re.compile(r"(?<![\w.])\.(?=\d)")
_SIGN_OR_POINT = re.compile(r"(?<![^\W_])-(?=\d)|(?<=\d)\.(?=\d)")
_ARTICLE = re.compile(r"(?<!\w)(?:an?|the)\s+(?=\S?\w)")


def normalise_text(text: str) -> str:
    """Lower case; no punctuation, symbols or articles; single spaces.

    Numbers keep sign and point and lose the commas between thousands: `1,000` is `1000`, `.5` is
    `0.5`, `-5` is not `5`. An article is one only before another word, so the answer `A` stays. A
    text of punctuation alone, such as `<`, stays as it is.
    """
    text = _fold_text(text)
    numbers = _BARE_POINT.sub("0.", _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text))
    bare = _ARTICLE.sub("", numbers)
    inside = {match.start() for match in _SIGN_OR_POINT.finditer(bare)}
    characters = (
        char if _is_word_character(char) or i in inside else " " for i, char in enumerate(bare)
    )
    return " ".join("".join(characters).split()) or " ".join(text.split())


def split_words(text: str) -> list[str]:
    """Lower-case words of any script, each Chinese or Japanese character one; no punctuation.

    A text of punctuation alone gives its characters. On ASCII these are the words of ROUGE's own
    tokenizer (`rouge-score`), which would drop every letter that is not in a–z.
    """
    text = _fold_text(text)
    spaced = "".join(char if _is_word_character(char) else " " for char in text)
    return space_cjk(spaced).split() or list("".join(text.split()))


def space_cjk(text: str) -> str:
    """Set Chinese and Japanese characters apart, as words of their own."""
    return _CJK.sub(r" \g<0> ", text)


def _fold_text(text: str) -> str:
    return normalize("NFC", text.translate(_WIDTHS).lower())


def _is_word_character(char: str) -> bool:
    return category(char)[0] in "LMN"  # letters, their marks, numbers
