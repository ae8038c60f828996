"""Labels of options in a text: "B", "(B)", "b.", "A and C", "A) B) C)", and what is said of them.

A letter is a label where it stands alone and what follows fits: the end, a mark, a reason, a
verdict. So there is none in "A cat is sitting", "I think", "A-frame", "e.g." and "A.M.".
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from mm_piece.metrics import choice_cues as cues

# What a whole word does not touch: letters and digits of scripts that are written with spaces.
_WORD = r"[0-9A-Za-z_\u00aa-\u02af\u0370-\u052f\u0590-\u0dff]"


def any_of(words: str, bare: str = "") -> str:
    """Return a pattern of one of some words: whole ones, or bare ones, which may touch others."""
    whole_words = rf"(?<!{_WORD})(?:{_join_alternatives(words)})(?!{_WORD})"
    return rf"(?:{whole_words}|{_join_alternatives(bare)})" if bare else rf"(?:{whole_words})"


def _join_alternatives(words: str) -> str:
    longest_first = sorted(words.split(), key=len, reverse=True)
    return "|".join(re.escape(word).replace("_", "[ ]") for word in longest_first)


_NO_WORD = rf"(?!{_WORD}|'{_WORD}|-{_WORD}|\.{_WORD}|[#°%]|\+(?! ?[A-Z]\b))"
_LABEL = re.compile(
    rf"[ \n]*(?:[(\[{{<] ?([A-Za-z]) ?[.:]? ?[)\]}}>]+[.:]?"  # in brackets
    rf"|[(\[{{<]?([A-Za-z])( ?[)\]}}>]+[.:]?|[.:、。](?!{_WORD}))?{_NO_WORD})"  # marked or bare
)
_DOUBT = any_of(cues.DOUBTS, cues.DOUBTS_BARE)
_JOINT = re.compile(
    rf"[ \n]*[.,;&+/|、。?!…]{{0,4}}[ \n]*(?P<word>{_DOUBT}|{any_of(cues.JOINS, cues.JOINS_BARE)})?"
    rf"[ \n,]*(?:{any_of(cues.HEDGES)}[ \n,]+)?"
)
_IN_DOUBT = re.compile(rf"[ \n]*{_DOUBT}")

_ITEM = "(?:(?:选?项|選?項)(?!目))"  # "B项" is an option, "B项目" a project
_PRAISE = (
    rf"[ ]*{_ITEM}?[ ]*(?:{any_of(cues.COPULAS)}[ ]+(?:{any_of(cues.ARTICLES)}[ ]+){{0,3}}"
    rf"{any_of(cues.PRAISES)}|{_join_alternatives(cues.PRAISES_BARE)}"
    rf"|(?<![Ii][ ])(?:{any_of(cues.FITS)}|{any_of(cues.MODALS)}[ ]+{any_of(cues.FIT)}"
    rf"|{any_of(cues.REMAINS)}(?=[ ]*(?:$|[.,;!\n]))))"
)
_POSSIBLE = rf"[ ]+{any_of(cues.COPULAS)}[ ]+(?:{any_of(cues.TOO)}[ ]+)?{any_of('possible')}"
_LEFT_OUT = rf"[ ]+{any_of(cues.AUXILIARIES)}(?=[ ]*(?:$|[.;!\n]))"
_BLAME = (
    rf"[ ]*{_ITEM}?[ ]*(?:{any_of(cues.COPULAS)}[ ]+(?:{any_of(cues.ADVERBS)}[ ]+){{0,3}}"
    rf"{any_of(cues.BLAMES)}|{any_of(cues.DENIALS)}|{_join_alternatives(cues.BLAMES_BARE)})"
)
_PRAISED, _BLAMED = re.compile(_PRAISE, re.IGNORECASE), re.compile(_BLAME, re.IGNORECASE)
_SHORTENED = re.compile(_LEFT_OUT, re.IGNORECASE)
_CLAUSE = re.compile(
    rf"(?:^|[.,;:!?\n]|{any_of(cues.TURNS)}|{any_of('and only')})[ ]*$",
    re.IGNORECASE,
)
_CLOSED = re.compile(
    rf"[ \n]*(?:$|\n|[)\]}}.,;:!?…/|&+→(、。]|[-–—]+(?:[ \n]|$)|=>|=[ ]|->"
    rf"|=(?=[^\W\d_]{{2}}|[\u3400-\u9fff])|{_ITEM}|{any_of(cues.REASONS, cues.REASONS_BARE)})"
    rf"|{_PRAISE}|{_BLAME}|{_LEFT_OUT}|{_POSSIBLE}",
    re.IGNORECASE,
)
_LOOSE = re.compile(r"[B-HJ-Z]")
_DENIED = re.compile(
    rf"(?:{any_of(cues.NOTS, cues.NOTS_BARE)}(?:[ ]+{any_of('option choice the')})?"
    rf"|{any_of(cues.SUPPOSED, cues.SUPPOSED_BARE)}(?:[ ]+[^\s.,;:]+){{0,3}})[ \n(\[]*$",
    re.IGNORECASE,
)

_ALONE = rf"(?<!{_WORD})(?<!['.&+/-])"
_CAPITAL = re.compile(rf"[(\[{{<] ?[A-Z]{_NO_WORD}|{_ALONE}[A-Z]{_NO_WORD}")
_BRACKETED = re.compile(
    rf"[(\[{{<] ?(?:option )?([A-Z]) ?[)\]}}>]"
    rf"|(?i:{any_of(cues.OPTIONS, cues.OPTIONS_BARE)})[ ]?[(\[{{<]? ?([A-Z]){_NO_WORD}"
)
_ENTRY = re.compile(
    rf"(?:(\n)|[ ,;|/])(?:[(\[{{<] ?([A-Za-z]) ?[)\]}}>]|([A-Za-z])(?: ?\)|[.:](?!{_WORD}))"
    rf"|([A-Z])(?= ?=))"
)


@dataclass(frozen=True)
class OptionLabels:
    """Labels that stand together, and where; in doubt if they are joined as in "A or B"."""

    letters: frozenset[str]
    start: int
    end: int
    doubt: bool = False

    @property
    def chosen_letters(self) -> frozenset[str]:
        """Return the letters that are named together, none of several that are in doubt."""
        return frozenset() if self.doubt and len(self.letters) > 1 else self.letters


def find_labels(text: str, start: int, loose: bool = False) -> OptionLabels | None:
    """Return the labels that stand at a place of a text, white space aside.

    With `loose` a capital is one whatever follows, A and I aside. The last of several is one only
    if what follows it fits, too: "B, A dog" and "B. A is wrong" name B.
    """
    found: list[re.Match[str]] = []
    words = [""]  # what leads to each of them, "and" or "or"
    label = _LABEL.match(text, start)
    while label:
        found.append(label)
        joint = _JOINT.match(text, label.end())
        assert joint is not None  # it may be empty
        words.append(joint["word"] or ("and" if "、" in joint[0] else ""))
        label = _match_next_label(text, label, joint.end())
    while found and not _is_valid_label(text, found, words[len(found) - 1], loose):
        found.pop()
    if not found:
        return None
    letters = frozenset((label[1] or label[2]).upper() for label in found)
    doubt = any(_IN_DOUBT.match(word) for word in words[: len(found)])
    return OptionLabels(letters, start, found[-1].end(), doubt)


def _match_next_label(text: str, label: re.Match[str], start: int) -> re.Match[str] | None:
    """The next label of several; one without a mark behind one with a point begins a sentence."""
    found = _LABEL.match(text, start)
    ended = (label[3] or "").strip().startswith(".")
    alike = found and (found[1] or found[3] or found.end() == len(text))
    return None if ended and not alike else found


def _is_valid_label(text: str, found: list[re.Match[str]], word: str, loose: bool) -> bool:
    """Whether what follows the last of some letters lets it be a label with the others."""
    bracketed, letter, mark = found[-1].groups()
    end, is_single = found[-1].end(), len(found) == 1
    if _IN_DOUBT.match(text, end):
        return False  # "A or something else"
    verdicts = (_PRAISED, _BLAMED, _SHORTENED)
    if not (is_single or word) and any(one.match(text, end) for one in verdicts):
        return False  # "B, A is wrong"
    if bracketed or mark:
        return True
    if letter in "Ii" and text.startswith(",", end):
        return False  # "I, for one, …"
    return bool(_CLOSED.match(text, end) or (is_single and loose and _LOOSE.match(letter)))


def iter_praised_labels(text: str) -> Iterator[OptionLabels]:
    """Yield the capitals, or several together, behind which stands "is correct" or the like.

    Behind another that is denied, a bare "is" is enough: "B isn't right; C is".
    """
    label, denied = _CAPITAL.search(text), False
    while label:
        labels = find_labels(text, label.start())
        if labels and (
            _PRAISED.match(text, labels.end) or (denied and _is_whole_clause(text, labels))
        ):
            yield labels
        denied = denied or bool(labels and is_denied(text, labels))
        label = _CAPITAL.search(text, labels.end if labels else label.end())


def _is_whole_clause(text: str, labels: OptionLabels) -> bool:
    """Whether labels and a verb are all of a clause: "C is"."""
    before = text[max(0, labels.start - 40) : labels.start]
    return bool(_SHORTENED.match(text, labels.end) and _CLAUSE.search(before))


def iter_bracketed_labels(text: str) -> Iterator[OptionLabels]:
    """Yield the capitals in brackets, and those behind the word "option"."""
    for label in _BRACKETED.finditer(text):
        yield OptionLabels(frozenset(label[1] or label[2]), label.start(), label.end())


def find_listed_letters(text: str, first: str) -> frozenset[str]:
    """Return the letters of the options that a text lists behind the option `first`, and that.

    Those are labels at the start of lines, and labels in the order of the alphabet; letters before
    "=" if the first one is such.
    """
    found, equated = [first], text.lstrip().startswith("=")
    for label in _ENTRY.finditer(text):
        if label[4] and not equated:
            continue
        letter = (label[2] or label[3] or label[4]).upper()
        if label[1] or ord(letter) == ord(found[-1]) + 1:
            found.append(letter)
    return frozenset(found)


def is_denied(text: str, labels: OptionLabels) -> bool:
    """Whether "not" or "if" stands before labels, or "is wrong" behind them."""
    before = text[max(0, labels.start - 40) : labels.start]
    return bool(_DENIED.search(before) or _BLAMED.match(text, labels.end))
