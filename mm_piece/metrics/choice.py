"""Multiple choice: which options a text names, and whether two texts name the same.

`read_option` goes by the first of these that names something:
1. what is boxed, or tagged as the answer
2. what stands behind a correction ("wait, no: B")
3. the whole text as labels: "B", "(B)", "A and C"
4. "the final answer is B", then "the answer is B", "答案是B", then "B is correct"
5. a label at the start: "B. cat", "B, because …"
6. a last sentence that is a label
7. "so B", "I choose B", "it is B"
8. labels in brackets
What is denied ("not A", "A is wrong") names nothing. Where two options are named alike ("A or B",
"A) cat B) dog", "A, but possibly B"), that is no answer.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from unicodedata import category, normalize

from mm_piece.metrics import choice_cues as cues
from mm_piece.metrics.choice_labels import (
    Labels,
    any_of,
    bracketed_in,
    is_denied,
    labels_at,
    listed_behind,
    praised_in,
)
from mm_piece.metrics.overlap import best
from mm_piece.metrics.words import normalise


def choice(predictions: Sequence[str], accepted: Sequence[Sequence[str]]) -> list[float]:
    """1 where prediction and an accepted answer name the same option, else 0.

    Both are read alike. Where both have letters, these decide, else the normalised texts beside
    them: `B. cat` and `cat` are the same option, `B` and `cat` cannot be told. An accepted answer
    of several letters (`A, C`) asks for just these.
    """
    return best(_is_same_option, predictions, accepted)


def _is_same_option(said: str, answer: str) -> bool:
    whole = normalise(answer)
    if said.split() == answer.split() or (" " in whole and whole == normalise(said)):
        return True  # also where a hedge is what was asked for
    first, second = read_option(said), read_option(answer)
    if " " in second.text and normalise(said) == second.text:
        return True  # the text of the option, whatever letters that holds
    if first.letters and second.letters:
        return first.letters == second.letters
    return first.text == second.text != ""


@dataclass(frozen=True)
class Option:
    """The letters that a text names, none if it names none or hedges, and the text beside them."""

    letters: frozenset[str]
    text: str


def read_option(text: str) -> Option:
    """Read which letters a text names, and the normalised text beside them."""
    plain = _plain(text)
    finals = [_named(final, _ALL) or _unnamed(final) for final in _finals(plain)]
    if finals:
        agree = all(found.letters == finals[0].letters for found in finals)
        return finals[0] if agree else _unnamed(plain)
    if _is_hedged(plain):
        return _unnamed(plain)
    for ends, places in ((_RETRACTION, _ALL), (_TURN, _CLEAR)):
        for end in [*ends.finditer(plain)][: -_MOST_ENDS - 1 : -1]:
            if found := _named(plain[end.end() :].lstrip(), places):
                return found
    return _named(plain, _ALL) or _unnamed(plain)


def _is_hedged(text: str) -> bool:
    """Whether one option is named and another is held possible, and nothing is settled after it."""
    for turn in [*_CONCESSION.finditer(text)][: -_MOST_ENDS - 1 : -1]:
        labels = labels_at(text, turn.end())
        if not (labels and _UPPER.match(text, turn.end())) or is_denied(text, labels):
            continue
        before = _named(text[: turn.start()], _ALL)
        other = before and before.letters and before.letters != labels.letters
        possible = turn["possibly"] or _TOO.match(text, labels.end)
        if other and possible and not _named(text[labels.end :].lstrip(), _CLEAR):
            return True
    return False


Places = Callable[[str], Iterable[Labels | None]]


def _named(text: str, places: Sequence[Places]) -> Option | None:
    """What a text names, by the first kind of place that names something; None if none does."""
    for kind in places:
        found = [labels for labels in kind(text) if labels and not is_denied(text, labels)]
        if found:
            chosen = {labels.chosen for labels in found}
            hedged = len(chosen) > 1 or not found[0].chosen
            return _unnamed(text) if hedged else Option(found[0].chosen, _beside(text, found[0]))
    return None


def _unnamed(text: str) -> Option:
    """No letter: all is text, or what stands behind "the answer is"."""
    lead = _STATED.search(text)
    return Option(frozenset(), normalise(text[lead.end() :] if lead else text))


def _beside(text: str, labels: Labels) -> str:
    """The text behind labels, to the end of its line; where there is none, that before them."""
    behind = text[labels.end :].lstrip(" .:)-–—,").partition("\n")[0]
    return normalise(behind) or normalise(text[: labels.start])


def _whole(text: str) -> Iterator[Labels]:
    """The text, if it is nothing but labels; "ACD", too, in the order of the alphabet."""
    labels = labels_at(text, _start(text))
    if labels and not text[labels.end :].strip(" \n.,;:!?…。)"):
        yield labels
    elif _LETTERS.fullmatch(text) and [*text] == sorted({*text}):
        yield Labels(frozenset(text), 0, len(text))


def _final(text: str) -> Iterator[Labels | None]:
    return (labels_at(text, lead.end(), loose=True) for lead in _FINAL.finditer(text))


def _stated(text: str) -> Iterator[Labels | None]:
    for lead in _STATED.finditer(text):
        labels = labels_at(text, lead.end(), loose=True)
        # Only what stands before the lead can deny it: "if the answer is A".
        yield labels and Labels(labels.letters, lead.start(), labels.end, labels.doubt)


def _leading(text: str) -> Iterator[Labels]:
    """Labels at the start, with those of the options that are listed behind them."""
    labels = labels_at(text, _start(text))
    if labels:
        described = _REASON.split(text[labels.end :], maxsplit=1)[0]
        letters = labels.letters | listed_behind(described, max(labels.letters))
        doubt = labels.doubt or letters != labels.letters
        yield Labels(letters, labels.start, labels.end, doubt)


def _closing(text: str) -> Iterator[Labels]:
    sentences = [part.strip() for part in _SENTENCE.split(text) if part.strip()]
    if len(sentences) > 1:
        found = [*_whole(sentences[-1])] if _UPPER.match(sentences[-1]) else []
        at = text.rindex(sentences[-1])
        yield from (Labels(labels.letters, at, len(text), labels.doubt) for labels in found)


def _concluded(text: str) -> Iterator[Labels | None]:
    for lead in _CONCLUDED.finditer(text):
        labels = labels_at(text, lead.end())
        if labels and _UPPER.match(text, lead.end()):
            yield Labels(labels.letters, lead.start(), labels.end, labels.doubt)


def _start(text: str) -> int:
    opened = _OPENED.match(text)
    return opened.end() if opened else 0


def _plain(text: str) -> str:
    """A text without thoughts, emphasis, quotes, symbols, LaTeX and bullets; ASCII brackets."""
    text = normalize("NFKC", text).rpartition("</think>")[2].translate(_BRACKETS)
    text = "".join(char for char in text if category(char) not in ("Cf", "So") or char == "°")
    text = _LATEX.sub(r"\1", _EMPHASIS.sub("", text))
    text = _BULLET.sub("\n", re.sub(r"[^\S\n]+", " ", text))
    text = _QUOTED.sub(r"\1", text)
    return re.sub(r" ?\n[ \n]*", "\n", text).strip()


def _finals(text: str) -> list[str]:
    return [next(filter(None, found.groups()), "") for found in _FINALS.finditer(text)]


_BRACKETS = {ord(char): "(" for char in "【「『〈《〔"} | {
    ord(char): ")" for char in "】」』〉》〕"
}
_BRACKETS |= {ord("’"): "'", ord("‘"): "'"}
_EMPHASIS = re.compile(r"[*`\"“”„«»$]|\\[()\[\]]|(?<![^\W_])_+|_+(?![^\W_])")
_LATEX = re.compile(r"\\(?:text|mathrm|mathbf|textbf|textit|mathit|rm|bf)\{([^{}]{0,200})\}")
_BULLET = re.compile(r"<br ?/?>|^ ?(?:(?:[#>•·→✓-]+|=>|->) )+", re.MULTILINE)
_QUOTED = re.compile(r"(?<!\w)'([A-Za-z])'(?!\w)")
_FINALS = re.compile(
    r"\\f?boxed ?\{([^{}]{0,300})\}|<answer>([^<]{0,300})</answer>"
    r"|<\|begin_of_box\|>([^<]{0,300})<\|end_of_box\|>",
    re.IGNORECASE,
)
_MOST_ENDS = 3  # corrections that are looked behind, from the last

_COPULA = any_of(cues.COPULAS, cues.COPULAS_BARE)
_FILLER = any_of(
    f"{cues.COPULAS} {cues.FILLERS}",
    f"{cues.COPULAS_BARE} {cues.FILLERS_BARE}",
)
_ANSWER = any_of(cues.ANSWERS, cues.ANSWERS_BARE)
_OPTION = any_of(cues.OPTIONS, cues.OPTIONS_BARE)
_FILLED = rf"(?:[ \n]*{_FILLER}){{0,8}}"
_STATED = re.compile(
    rf"(?:{_ANSWER}(?:\.(?=:))?|{_OPTION}[ \n]*{_COPULA}){_FILLED}[ \n:]*",
    re.IGNORECASE,
)
_FINAL = re.compile(
    rf"{any_of(cues.FINALS)}[ ]*(?:{_ANSWER}|{_OPTION}){_FILLED}[ \n:]*", re.IGNORECASE
)
_CONCLUDED = re.compile(
    rf"{any_of(cues.LEADS, cues.LEADS_BARE)}[ ,:]*{_FILLED}[ \n]*", re.IGNORECASE
)
_REASON = re.compile(any_of(cues.REASONS, cues.REASONS_BARE), re.IGNORECASE)
_RETRACTION = re.compile(
    rf"{any_of(cues.CORRECTIONS)}[ ,:]*|(?:{any_of(cues.RETRACTIONS)}[ ]*)+[,.;:!–—…-]+",
    re.IGNORECASE,
)
_TURN = re.compile(rf"(?<!anything )(?<!all ){any_of(cues.TURNS, cues.TURNS_BARE)}", re.IGNORECASE)
_CONCESSION = re.compile(
    rf"{any_of(cues.CONCESSIONS)}[ ,]*(?P<possibly>{any_of(cues.POSSIBLY)})?[ ,]*",
    re.IGNORECASE,
)
_TOO = re.compile(
    rf"[ ]*{any_of(f'{cues.COPULAS} {cues.MODALS}')}(?:[ ]+[^\s.,;:]+){{0,3}}?"
    rf"[ ]+{any_of(cues.TOO)}",
    re.IGNORECASE,
)
_OPENED = re.compile(
    rf"(?:{any_of(cues.OPENERS)}[,.!:][ \n]*)?"
    rf"(?:{any_of(f'{cues.OPTIONS} both either', cues.OPTIONS_BARE)}[ \n:]*)?",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"\n|[.;!?](?=\s)|。")
_LETTERS = re.compile(r"[A-H]{2,8}")
_UPPER = re.compile(r"[(\[{<]? ?[A-Z]|[(\[{<] ?[a-z]")
_CLEAR: tuple[Places, ...] = (_whole, _final, _stated, praised_in, _closing, _concluded)
_ALL: tuple[Places, ...] = (
    *(_whole, _final, _stated, praised_in, _leading, _closing, _concluded, bracketed_in),
)
