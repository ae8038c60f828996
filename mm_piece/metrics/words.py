"""A text as words, for scoring rules that ignore case, punctuation and articles."""

import re
from unicodedata import category, normalize

# Full-width forms, as in Chinese text, become ASCII; so does the minus sign.
_FULL_WIDTH = range(0xFF01, 0xFF5F)
_WIDTHS = {code: code - 0xFEE0 for code in _FULL_WIDTH}
_WIDTHS[0x2212] = ord("-")
# Scripts without spaces, where each character is a word.
_CJK = re.compile(
    "["
    "\u3040-\u30ff"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff"  # Chinese characters
    "\uf900-\ufaff"  # their compatibility forms
    "\U00020000-\U0003ffff"  # and rare ones
    "]"
)
_THOUSANDS = re.compile(r"(?<!\d)(?<!\d[.,])\d{1,3}(?:,\d{3})+(?!,?\d)")  # 1,000 but not 1,0001
_BARE_POINT = re.compile(r"(?<![\w.])\.(?=\d)")  # .5
_SIGN_OR_POINT = re.compile(r"(?<![^\W_])-(?=\d)|(?<=\d)\.(?=\d)")  # -5, 0.5
_ARTICLE = re.compile(r"(?<!\w)(?:an?|the)\s+(?=\S?\w)")


def normalise_text(text: str) -> str:
    """Return lower-case text without punctuation, symbols and articles, with single spaces.

    Numbers keep sign and point and lose the commas between thousands: `1,000` is `1000`, `.5` is
    `0.5`, `-5` is not `5`. An article is one only before another word, so the answer `A` stays. A
    text of punctuation alone, such as `<`, stays as it is.
    """
    folded = _fold_text(text)
    joined_text = _THOUSANDS.sub(_drop_commas, folded)
    numbers = _BARE_POINT.sub("0.", joined_text)
    bare = _ARTICLE.sub("", numbers)

    # signs and points of numbers are the only punctuation that stays
    in_numbers = {match.start() for match in _SIGN_OR_POINT.finditer(bare)}
    characters: list[str] = []
    for position, char in enumerate(bare):
        if _is_word_character(char) or position in in_numbers:
            characters.append(char)
        else:
            characters.append(" ")

    words = "".join(characters).split()
    if not words:
        words = folded.split()
    return " ".join(words)


def split_words(text: str) -> list[str]:
    """Return the lower-case words of any script, each Chinese or Japanese character one.

    Punctuation is left out; a text of punctuation alone gives its characters. On ASCII these are
    the words of ROUGE's own tokenizer (`rouge-score`), which would drop every letter that is not in
    a–z.
    """
    folded = _fold_text(text)
    characters: list[str] = []
    for char in folded:
        if _is_word_character(char):
            characters.append(char)
        else:
            characters.append(" ")

    spaced = space_cjk("".join(characters))
    words = spaced.split()
    if not words:
        words = list("".join(folded.split()))
    return words


def space_cjk(text: str) -> str:
    """Return text with spaces around each Chinese and Japanese character, a word of its own."""
    return _CJK.sub(r" \g<0> ", text)


def _drop_commas(match: re.Match[str]) -> str:
    return match[0].replace(",", "")


def _fold_text(text: str) -> str:
    """Return lower-case text in which one character has one form: ASCII width, NFC."""
    lower = text.translate(_WIDTHS).lower()
    return normalize("NFC", lower)


def _is_word_character(char: str) -> bool:
    major_class = category(char)[0]
    return major_class in "LMN"  # letters, their marks, numbers
