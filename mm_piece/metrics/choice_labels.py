"""Labels of options in a text: "B", "(B)", "b.", "A and C", "A) B) C)", and verdicts on them.

A letter is a label where it stands alone and what follows fits: the end, a mark, a reason, a
verdict. So there is none in "A cat is sitting", "I think", "A-frame", "e.g." and "A.M.".
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from mm_piece.metrics import choice_cues as cues

# Letters and digits of scripts that are written with spaces; whole words do not touch them.
_WORD = r"[0-9A-Za-z_\u00aa-\u02af\u0370-\u052f\u0590-\u0dff]"


def any_of(words: str, bare: str = "") -> str:
    """Return a pattern of one of some words: whole ones, or bare ones, which may touch others."""
    alternatives = _join_alternatives(words)
    whole_words = rf"(?<!{_WORD})(?:{alternatives})(?!{_WORD})"
    if not bare:
        return rf"(?:{whole_words})"

    bare_words = _join_alternatives(bare)
    return rf"(?:{whole_words}|{bare_words})"


def _join_alternatives(words: str) -> str:
    # longest first, since a pattern takes the first alternative that matches
    longest_first = sorted(words.split(), key=len, reverse=True)
    escaped = [re.escape(word) for word in longest_first]
    return "|".join(word.replace("_", "[ ]") for word in escaped)


# A letter is no label before the rest of a word or a number, nor in C#, B° or A%.
_NO_WORD = rf"(?!{_WORD}|'{_WORD}|-{_WORD}|\.{_WORD}|[#°%]|\+(?! ?[A-Z]\b))"
_LABEL = re.compile(
    rf"[ \n]*(?:[(\[{{<] ?([A-Za-z]) ?[.:]? ?[)\]}}>]+[.:]?"  # in brackets
    rf"|[(\[{{<]?([A-Za-z])( ?[)\]}}>]+[.:]?|[.:、。](?!{_WORD}))?{_NO_WORD})"  # marked or bare
)
_DOUBT = any_of(cues.DOUBTS, cues.DOUBTS_BARE)
# What joins labels: a mark, a word or both, such as ", and maybe".
_JOINT = re.compile(
    rf"[ \n]*[.,;&+/|、。?!…]{{0,4}}[ \n]*(?P<word>{_DOUBT}|{any_of(cues.JOINS, cues.JOINS_BARE)})?"
    rf"[ \n,]*(?:{any_of(cues.HEDGES)}[ \n,]+)?"
)
_IN_DOUBT = re.compile(rf"[ \n]*{_DOUBT}")

_ITEM = "(?:(?:选?项|選?項)(?!目))"  # "B项" is an option, "B项目" a project
# Verdicts: what makes an answer of the labels before, and what denies them.
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
_PRAISED = re.compile(_PRAISE, re.IGNORECASE)
_BLAMED = re.compile(_BLAME, re.IGNORECASE)
_SHORTENED = re.compile(_LEFT_OUT, re.IGNORECASE)
# The start of a clause, at the end of the text before labels.
_CLAUSE = re.compile(
    rf"(?:^|[.,;:!?\n]|{any_of(cues.TURNS)}|{any_of('and only')})[ ]*$",
    re.IGNORECASE,
)
# What may follow a bare letter: the end, a mark, a reason or a verdict.
_CLOSED = re.compile(
    rf"[ \n]*(?:$|\n|[)\]}}.,;:!?…/|&+→(、。]|[-–—]+(?:[ \n]|$)|=>|=[ ]|->"
    rf"|=(?=[^\W\d_]{{2}}|[\u3400-\u9fff])|{_ITEM}|{any_of(cues.REASONS, cues.REASONS_BARE)})"
    rf"|{_PRAISE}|{_BLAME}|{_LEFT_OUT}|{_POSSIBLE}",
    re.IGNORECASE,
)
_LOOSE = re.compile(r"[B-HJ-Z]")  # A and I are words, too
# "not" or "if", at the end of the text before labels.
_DENIED = re.compile(
    rf"(?:{any_of(cues.NOTS, cues.NOTS_BARE)}(?:[ ]+{any_of('option choice the')})?"
    rf"|{any_of(cues.SUPPOSED, cues.SUPPOSED_BARE)}(?:[ ]+[^\s.,;:]+){{0,3}})[ \n(\[]*$",
    re.IGNORECASE,
)

_MAX_CHARS_BEFORE = 40  # characters before labels that are searched for "not" and "if"

_ALONE = rf"(?<!{_WORD})(?<!['.&+/-])"
_CAPITAL = re.compile(rf"[(\[{{<] ?[A-Z]{_NO_WORD}|{_ALONE}[A-Z]{_NO_WORD}")
_BRACKETED = re.compile(
    rf"[(\[{{<] ?(?:option )?([A-Z]) ?[)\]}}>]"
    rf"|(?i:{any_of(cues.OPTIONS, cues.OPTIONS_BARE)})[ ]?[(\[{{<]? ?([A-Z]){_NO_WORD}"
)
# An option in a list, such as "A) cat B) dog" or "A = cat, B = dog".
_ENTRY = re.compile(
    rf"(?:(\n)|[ ,;|/])(?:[(\[{{<] ?([A-Za-z]) ?[)\]}}>]|([A-Za-z])(?: ?\)|[.:](?!{_WORD}))"
    rf"|([A-Z])(?= ?=))"
)


@dataclass(frozen=True)
class OptionLabels:
    """Labels that stand together, and their place; in doubt if they are joined as in "A or B"."""

    letters: frozenset[str]
    start: int
    end: int
    doubt: bool = False

    @property
    def chosen_letters(self) -> frozenset[str]:
        """Letters that are named together, none of several that are in doubt."""
        if self.doubt and len(self.letters) > 1:
            return frozenset()
        return self.letters


def find_labels(
    text: str,
    start: int,
    loose: bool = False,
) -> OptionLabels | None:
    """Return the labels that stand at a place of a text, white space aside.

    With `loose` a capital other than A and I is a label whatever follows. The last of several
    letters is a label only if what follows it fits, too: "B, A dog" and "B. A is wrong" name B.
    """
    found: list[re.Match[str]] = []
    words = [""]  # what leads to each of them, "and" or "or"
    label = _LABEL.match(text, start)
    while label:
        found.append(label)
        joint = _JOINT.match(text, label.end())
        assert joint is not None  # it may be empty
        word = joint["word"]
        if not word:
            word = "and" if "、" in joint[0] else ""  # a comma of lists in Chinese and Japanese
        words.append(word)
        label = _match_next_label(text, label, joint.end())

    # from the last one back, until what follows fits
    while found and not _is_valid_label(text, found, words[len(found) - 1], loose):
        found.pop()
    if not found:
        return None

    letters = frozenset((label[1] or label[2]).upper() for label in found)
    doubt = any(_IN_DOUBT.match(word) for word in words[: len(found)])
    return OptionLabels(
        letters=letters,
        start=start,
        end=found[-1].end(),
        doubt=doubt,
    )


def _match_next_label(
    text: str,
    label: re.Match[str],
    start: int,
) -> re.Match[str] | None:
    """Return the next label of several; None where a sentence begins instead.

    A letter without a mark behind one with a point begins a sentence: "B. A cat is there".
    """
    found = _LABEL.match(text, start)
    mark = label[3] or ""
    has_point = mark.strip().startswith(".")
    if not found or not has_point:
        return found

    is_marked = found[1] or found[3]
    if is_marked or found.end() == len(text):
        return found
    return None


def _is_valid_label(
    text: str,
    found: list[re.Match[str]],
    word: str,
    loose: bool,
) -> bool:
    """Return whether what follows the last of some letters lets it be a label with the others."""
    bracketed, letter, mark = found[-1].groups()
    end = found[-1].end()
    is_single = len(found) == 1
    if _IN_DOUBT.match(text, end):
        return False  # "A or something else"

    verdicts = (_PRAISED, _BLAMED, _SHORTENED)
    is_subject = any(verdict.match(text, end) for verdict in verdicts)
    if is_subject and not (is_single or word):
        return False  # "B, A is wrong"
    if bracketed or mark:
        return True
    if letter in "Ii" and text.startswith(",", end):
        return False  # "I, for one, …"

    if _CLOSED.match(text, end):
        return True
    return bool(is_single and loose and _LOOSE.match(letter))


def iter_praised_labels(text: str) -> Iterator[OptionLabels]:
    """Yield the capitals, or several together, that "is correct" or the like follows.

    Behind another label that is denied, a bare "is" is enough: "B isn't right; C is".
    """
    denied = False
    label = _CAPITAL.search(text)
    while label:
        next_start = label.end()
        labels = find_labels(text, label.start())
        if labels:
            next_start = labels.end
            is_praised = _PRAISED.match(text, labels.end)
            if is_praised or (denied and _is_whole_clause(text, labels)):
                yield labels
            denied = denied or is_denied(text, labels)
        label = _CAPITAL.search(text, next_start)


def _is_whole_clause(text: str, labels: OptionLabels) -> bool:
    """Return whether labels and a verb are all of a clause: "C is"."""
    if not _SHORTENED.match(text, labels.end):
        return False
    return bool(_CLAUSE.search(_text_before(text, labels)))


def iter_bracketed_labels(text: str) -> Iterator[OptionLabels]:
    """Yield the capitals in brackets, and those behind the word "option"."""
    for label in _BRACKETED.finditer(text):
        letter = label[1] or label[2]
        yield OptionLabels(
            letters=frozenset(letter),
            start=label.start(),
            end=label.end(),
        )


def find_listed_letters(text: str, first: str) -> frozenset[str]:
    """Return the letters of the options that a text lists behind the option `first`, and `first`.

    A list consists of labels at the start of lines, and labels in the order of the alphabet;
    letters before "=" count if `first` stands before one.
    """
    found = [first]
    is_equated = text.lstrip().startswith("=")
    for entry in _ENTRY.finditer(text):
        newline, bracketed, marked, equated = entry.groups()
        if equated and not is_equated:
            continue

        letter = (bracketed or marked or equated).upper()
        is_next = ord(letter) == ord(found[-1]) + 1
        if newline or is_next:
            found.append(letter)
    return frozenset(found)


def is_denied(text: str, labels: OptionLabels) -> bool:
    """Return whether "not" or "if" stands before labels, or "is wrong" behind them."""
    if _DENIED.search(_text_before(text, labels)):
        return True
    return bool(_BLAMED.match(text, labels.end))


def _text_before(text: str, labels: OptionLabels) -> str:
    """Return the last words before labels: a search to the end in all of it would be quadratic."""
    first = max(0, labels.start - _MAX_CHARS_BEFORE)
    return text[first : labels.start]
