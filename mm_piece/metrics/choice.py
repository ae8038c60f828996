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
    OptionLabels,
    any_of,
    find_labels,
    find_listed_letters,
    is_denied,
    iter_bracketed_labels,
    iter_praised_labels,
)
from mm_piece.metrics.overlap import score_best_match
from mm_piece.metrics.words import normalise_text


def score_choice(predictions: Sequence[str], accepted: Sequence[Sequence[str]]) -> list[float]:
    """1 where prediction and an accepted answer name the same option, else 0.

    Both are read alike. Where both have letters, these decide, else the normalised texts beside
    them: `B. cat` and `cat` are the same option, `B` and `cat` cannot be told. An accepted answer
    of several letters (`A, C`) asks for just these.
    """
    return score_best_match(_is_same_option, predictions, accepted)


def _is_same_option(prediction: str, answer: str) -> bool:
    normalised = normalise_text(answer)
    if prediction.split() == answer.split() or (
        " " in normalised and normalised == normalise_text(prediction)
    ):
        return True  # also where a hedge is what was asked for
    first, second = parse_option(prediction), parse_option(answer)
    if " " in second.text and normalise_text(prediction) == second.text:
        return True  # the text of the option, whatever letters that holds
    if first.letters and second.letters:
        return first.letters == second.letters
    return first.text == second.text != ""


@dataclass(frozen=True)
class Option:
    """The letters that a text names, none if it names none or hedges, and the text beside them."""

    letters: frozenset[str]
    text: str


def parse_option(text: str) -> Option:
    """Read which letters a text names, and the normalised text beside them."""
    plain = _strip_markup(text)
    finals = [
        _find_named_option(final, _ALL_FINDERS) or _make_text_option(final)
        for final in _find_boxed_answers(plain)
    ]
    if finals:
        agree = all(found.letters == finals[0].letters for found in finals)
        return finals[0] if agree else _make_text_option(plain)
    if _is_hedged(plain):
        return _make_text_option(plain)
    for patterns, finders in ((_RETRACTION, _ALL_FINDERS), (_TURN, _CLEAR_FINDERS)):
        for correction in [*patterns.finditer(plain)][: -_MAX_CORRECTIONS - 1 : -1]:
            if found := _find_named_option(plain[correction.end() :].lstrip(), finders):
                return found
    return _find_named_option(plain, _ALL_FINDERS) or _make_text_option(plain)


def _is_hedged(text: str) -> bool:
    """Whether one option is named and another is held possible, and nothing is settled after it."""
    for turn in [*_CONCESSION.finditer(text)][: -_MAX_CORRECTIONS - 1 : -1]:
        labels = find_labels(text, turn.end())
        if not (labels and _UPPER.match(text, turn.end())) or is_denied(text, labels):
            continue
        before = _find_named_option(text[: turn.start()], _ALL_FINDERS)
        other = before and before.letters and before.letters != labels.letters
        possible = turn["possibly"] or _TOO.match(text, labels.end)
        if (
            other
            and possible
            and not _find_named_option(text[labels.end :].lstrip(), _CLEAR_FINDERS)
        ):
            return True
    return False


LabelFinder = Callable[[str], Iterable[OptionLabels | None]]


def _find_named_option(text: str, finders: Sequence[LabelFinder]) -> Option | None:
    """What a text names, by the first kind of place that names something; None if none does."""
    for finder in finders:
        found = [labels for labels in finder(text) if labels and not is_denied(text, labels)]
        if found:
            chosen = {labels.chosen_letters for labels in found}
            hedged = len(chosen) > 1 or not found[0].chosen_letters
            return (
                _make_text_option(text)
                if hedged
                else Option(found[0].chosen_letters, _extract_option_text(text, found[0]))
            )
    return None


def _make_text_option(text: str) -> Option:
    """No letter: all is text, or what stands behind "the answer is"."""
    cue = _STATED.search(text)
    return Option(frozenset(), normalise_text(text[cue.end() :] if cue else text))


def _extract_option_text(text: str, labels: OptionLabels) -> str:
    """The text behind labels, to the end of its line; where there is none, that before them."""
    behind = text[labels.end :].lstrip(" .:)-–—,").partition("\n")[0]
    return normalise_text(behind) or normalise_text(text[: labels.start])


def _iter_sole_labels(text: str) -> Iterator[OptionLabels]:
    """The text, if it is nothing but labels; "ACD", too, in the order of the alphabet."""
    labels = find_labels(text, _find_label_start(text))
    if labels and not text[labels.end :].strip(" \n.,;:!?…。)"):
        yield labels
    elif _LETTERS.fullmatch(text) and [*text] == sorted({*text}):
        yield OptionLabels(frozenset(text), 0, len(text))


def _iter_final_labels(text: str) -> Iterator[OptionLabels | None]:
    return (find_labels(text, cue.end(), loose=True) for cue in _FINAL.finditer(text))


def _iter_stated_labels(text: str) -> Iterator[OptionLabels | None]:
    for cue in _STATED.finditer(text):
        labels = find_labels(text, cue.end(), loose=True)
        # Only what stands before the lead can deny it: "if the answer is A".
        yield labels and OptionLabels(labels.letters, cue.start(), labels.end, labels.doubt)


def _iter_leading_labels(text: str) -> Iterator[OptionLabels]:
    """Labels at the start, with those of the options that are listed behind them."""
    labels = find_labels(text, _find_label_start(text))
    if labels:
        described = _REASON.split(text[labels.end :], maxsplit=1)[0]
        letters = labels.letters | find_listed_letters(described, max(labels.letters))
        doubt = labels.doubt or letters != labels.letters
        yield OptionLabels(letters, labels.start, labels.end, doubt)


def _iter_closing_labels(text: str) -> Iterator[OptionLabels]:
    sentences = [sentence.strip() for sentence in _SENTENCE.split(text) if sentence.strip()]
    if len(sentences) > 1:
        found = [*_iter_sole_labels(sentences[-1])] if _UPPER.match(sentences[-1]) else []
        at = text.rindex(sentences[-1])
        yield from (OptionLabels(labels.letters, at, len(text), labels.doubt) for labels in found)


def _iter_concluded_labels(text: str) -> Iterator[OptionLabels | None]:
    for cue in _CONCLUDED.finditer(text):
        labels = find_labels(text, cue.end())
        if labels and _UPPER.match(text, cue.end()):
            yield OptionLabels(labels.letters, cue.start(), labels.end, labels.doubt)


def _find_label_start(text: str) -> int:
    opened = _OPENED.match(text)
    return opened.end() if opened else 0


def _strip_markup(text: str) -> str:
    """A text without thoughts, emphasis, quotes, symbols, LaTeX and bullets; ASCII brackets."""
    text = normalize("NFKC", text).rpartition("</think>")[2].translate(_BRACKETS)
    text = "".join(char for char in text if category(char) not in ("Cf", "So") or char == "°")
    text = _LATEX.sub(r"\1", _EMPHASIS.sub("", text))
    text = _BULLET.sub("\n", re.sub(r"[^\S\n]+", " ", text))
    text = _QUOTED.sub(r"\1", text)
    return re.sub(r" ?\n[ \n]*", "\n", text).strip()


def _find_boxed_answers(text: str) -> list[str]:
    return [next(filter(None, found.groups()), "") for found in _BOXED_ANSWER.finditer(text)]


_BRACKETS = {ord(char): "(" for char in "【「『〈《〔"} | {
    ord(char): ")" for char in "】」』〉》〕"
}
_BRACKETS |= {ord("’"): "'", ord("‘"): "'"}
_EMPHASIS = re.compile(r"[*`\"“”„«»$]|\\[()\[\]]|(?<![^\W_])_+|_+(?![^\W_])")
_LATEX = re.compile(r"\\(?:text|mathrm|mathbf|textbf|textit|mathit|rm|bf)\{([^{}]{0,200})\}")
_BULLET = re.compile(r"<br ?/?>|^ ?(?:(?:[#>•·→✓-]+|=>|->) )+", re.MULTILINE)
_QUOTED = re.compile(r"(?<!\w)'([A-Za-z])'(?!\w)")
_BOXED_ANSWER = re.compile(
    r"\\f?boxed ?\{([^{}]{0,300})\}|<answer>([^<]{0,300})</answer>"
    r"|<\|begin_of_box\|>([^<]{0,300})<\|end_of_box\|>",
    re.IGNORECASE,
)
_MAX_CORRECTIONS = 3  # corrections that are looked behind, from the last

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
    rf"{any_of(cues.CONCLUSIONS, cues.CONCLUSIONS_BARE)}[ ,:]*{_FILLED}[ \n]*",
    re.IGNORECASE,
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
_CLEAR_FINDERS: tuple[LabelFinder, ...] = (
    _iter_sole_labels,
    _iter_final_labels,
    _iter_stated_labels,
    iter_praised_labels,
    _iter_closing_labels,
    _iter_concluded_labels,
)
_ALL_FINDERS: tuple[LabelFinder, ...] = (
    *(
        _iter_sole_labels,
        _iter_final_labels,
        _iter_stated_labels,
        iter_praised_labels,
        _iter_leading_labels,
        _iter_closing_labels,
        _iter_concluded_labels,
        iter_bracketed_labels,
    ),
)
