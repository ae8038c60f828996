"""Multiple choice: which options a text names, and whether two texts name the same.

`parse_option` goes by the first of these that names something:
1. a boxed text, or one that is tagged as the answer
2. the text behind a correction ("wait, no: B")
3. the whole text as labels: "B", "(B)", "A and C"
4. "the final answer is B", then "the answer is B", "答案是B", then "B is correct"
5. a label at the start: "B. cat", "B, because …"
6. a last sentence that is a label
7. "so B", "I choose B", "it is B"
8. labels in brackets
Labels that are denied ("not A", "A is wrong") name nothing. Where two options are named in the same
way ("A or B", "A) cat B) dog", "A, but possibly B"), that is no answer.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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


def score_choice(
    predictions: Sequence[str],
    accepted: Sequence[Sequence[str]],
) -> list[float]:
    """Return 1 where prediction and an accepted answer name the same option, else 0.

    Both are read by the same rules. Where both have letters, these decide, else the normalised
    texts beside them: `B. cat` and `cat` are the same option, `B` and `cat` cannot be compared. An
    accepted answer of several letters (`A, C`) asks for just these.
    """
    return score_best_match(_is_same_option, predictions, accepted)


def _is_same_option(prediction: str, answer: str) -> bool:
    """Return whether prediction and accepted answer name the same option."""
    normalised = normalise_text(answer)
    has_words = " " in normalised
    # before any reading: also where a hedge is the accepted answer
    if prediction.split() == answer.split():
        return True
    if has_words and normalised == normalise_text(prediction):
        return True

    predicted = parse_option(prediction)
    expected = parse_option(answer)
    # the text of the option, whatever letters that holds
    if " " in expected.text and normalise_text(prediction) == expected.text:
        return True
    if predicted.letters and expected.letters:
        return predicted.letters == expected.letters
    return predicted.text == expected.text != ""


@dataclass(frozen=True)
class Option:
    """The letters that a text names, none if it names none or hedges, and the text beside them."""

    letters: frozenset[str]
    text: str


def parse_option(text: str) -> Option:
    """Read which letters a text names, and the normalised text beside them."""
    plain = _strip_markup(text)
    boxed = [_read_boxed_option(answer) for answer in _find_boxed_answers(plain)]
    if boxed:
        is_agreed = all(option.letters == boxed[0].letters for option in boxed)
        return boxed[0] if is_agreed else _make_text_option(plain)
    if _is_hedged(plain):
        return _make_text_option(plain)

    corrected = _find_corrected_option(plain)
    if corrected:
        return corrected
    return _find_named_option(plain, _ALL_FINDERS) or _make_text_option(plain)


def _read_boxed_option(answer: str) -> Option:
    return _find_named_option(answer, _ALL_FINDERS) or _make_text_option(answer)


def _find_corrected_option(text: str) -> Option | None:
    """Return the option behind a correction, that of the last one; None if there is none.

    Any kind of place counts behind a retraction ("wait, no: B"), only a clear one behind "but".
    """
    kinds = (
        (_RETRACTION, _ALL_FINDERS),
        (_TURN, _CLEAR_FINDERS),
    )
    for pattern, finders in kinds:
        for correction in _find_last_matches(pattern, text):
            rest = text[correction.end() :].lstrip()
            found = _find_named_option(rest, finders)
            if found:
                return found
    return None


def _find_last_matches(
    pattern: re.Pattern[str],
    text: str,
) -> list[re.Match[str]]:
    """Return the last matches of a pattern, the last one first.

    Each of them costs a search of all that follows, so there is a bound.
    """
    matches = [*pattern.finditer(text)]
    return matches[: -_MAX_CORRECTIONS - 1 : -1]


def _is_hedged(text: str) -> bool:
    """Return whether one option is named and another called possible, with no decision after it."""
    return any(_leaves_open(text, turn) for turn in _find_last_matches(_CONCESSION, text))


def _leaves_open(text: str, turn: re.Match[str]) -> bool:
    """Return whether a second option behind a "but" is called possible and left at that."""
    labels = find_labels(text, turn.end())
    if not labels or not _UPPER.match(text, turn.end()):
        return False
    if is_denied(text, labels):
        return False

    before = _find_named_option(text[: turn.start()], _ALL_FINDERS)
    if not before or not before.letters or before.letters == labels.letters:
        return False
    if not turn["possibly"] and not _TOO.match(text, labels.end):
        return False

    rest = text[labels.end :].lstrip()
    return not _find_named_option(rest, _CLEAR_FINDERS)


LabelFinder = Callable[[str], Iterable[OptionLabels | None]]


def _find_named_option(
    text: str,
    finders: Sequence[LabelFinder],
) -> Option | None:
    """Return the option that the first kind of place with labels names; None if there are none."""
    for finder in finders:
        found: list[OptionLabels] = []
        for labels in finder(text):
            if labels and not is_denied(text, labels):
                found.append(labels)
        if not found:
            continue

        first = found[0]
        chosen = {labels.chosen_letters for labels in found}
        if len(chosen) > 1 or not first.chosen_letters:
            return _make_text_option(text)  # hedged
        return Option(
            letters=first.chosen_letters,
            text=_extract_option_text(text, first),
        )
    return None


def _make_text_option(text: str) -> Option:
    """Return an option without letters: all of the text, or what follows "the answer is"."""
    cue = _STATED.search(text)
    stated = text[cue.end() :] if cue else text
    return Option(letters=frozenset(), text=normalise_text(stated))


def _extract_option_text(text: str, labels: OptionLabels) -> str:
    """Return the text behind labels, to the end of its line; where there is none, that before."""
    rest = text[labels.end :].lstrip(" .:)-–—,")
    line = rest.partition("\n")[0]
    return normalise_text(line) or normalise_text(text[: labels.start])


def _iter_sole_labels(text: str) -> Iterator[OptionLabels]:
    """Yield the text, if it is nothing but labels; "ACD", too, in the order of the alphabet."""
    labels = find_labels(text, _find_label_start(text))
    if labels and not text[labels.end :].strip(" \n.,;:!?…。)"):
        yield labels
    # ascending, so that a word such as "BAD" is none
    elif _LETTERS.fullmatch(text) and [*text] == sorted({*text}):
        yield OptionLabels(
            letters=frozenset(text),
            start=0,
            end=len(text),
        )


def _iter_final_labels(text: str) -> Iterator[OptionLabels | None]:
    """Yield the labels behind "the final answer is"."""
    for cue in _FINAL.finditer(text):
        yield find_labels(text, cue.end(), loose=True)


def _iter_stated_labels(text: str) -> Iterator[OptionLabels | None]:
    """Yield the labels behind "the answer is"."""
    for cue in _STATED.finditer(text):
        labels = find_labels(text, cue.end(), loose=True)
        # from the cue on: only a word before it can deny the labels, as in "if the answer is A"
        yield labels and replace(labels, start=cue.start())


def _iter_leading_labels(text: str) -> Iterator[OptionLabels]:
    """Yield the labels at the start, with those of the options that are listed behind them."""
    labels = find_labels(text, _find_label_start(text))
    if not labels:
        return

    # a reason may name other options
    described = _REASON.split(text[labels.end :], maxsplit=1)[0]
    listed = find_listed_letters(described, max(labels.letters))
    letters = labels.letters | listed
    yield OptionLabels(
        letters=letters,
        start=labels.start,
        end=labels.end,
        doubt=labels.doubt or letters != labels.letters,
    )


def _iter_closing_labels(text: str) -> Iterator[OptionLabels]:
    """Yield the last of several sentences, if it is nothing but capital labels."""
    stripped = (sentence.strip() for sentence in _SENTENCE.split(text))
    sentences = [sentence for sentence in stripped if sentence]
    if len(sentences) < 2 or not _UPPER.match(sentences[-1]):
        return

    start = text.rindex(sentences[-1])
    for labels in _iter_sole_labels(sentences[-1]):
        yield replace(labels, start=start, end=len(text))


def _iter_concluded_labels(text: str) -> Iterator[OptionLabels | None]:
    """Yield the capital labels behind "so", "I choose" or "it is"."""
    for cue in _CONCLUDED.finditer(text):
        labels = find_labels(text, cue.end())
        if labels and _UPPER.match(text, cue.end()):
            yield replace(labels, start=cue.start())


def _find_label_start(text: str) -> int:
    """Return where labels may start, behind words such as "Yes, option"."""
    opened = _OPENED.match(text)
    return opened.end() if opened else 0


def _strip_markup(text: str) -> str:
    """Return a text without thoughts, emphasis, quotes, symbols, LaTeX and bullets.

    Its brackets are ASCII ones.
    """
    text = normalize("NFKC", text)
    text = text.rpartition("</think>")[2]  # all of it where there are no thoughts
    text = text.translate(_BRACKETS)
    # format characters and symbols; the degree sign has a meaning: "A°" is no label
    text = "".join(char for char in text if category(char) not in ("Cf", "So") or char == "°")

    text = _EMPHASIS.sub("", text)
    text = _LATEX.sub(r"\1", text)
    text = re.sub(r"[^\S\n]+", " ", text)
    text = _BULLET.sub("\n", text)
    text = _QUOTED.sub(r"\1", text)
    return re.sub(r" ?\n[ \n]*", "\n", text).strip()


def _find_boxed_answers(text: str) -> list[str]:
    """Return the content of every box and answer tag."""
    answers: list[str] = []
    for found in _BOXED_ANSWER.finditer(text):
        contents = filter(None, found.groups())  # one group for each notation
        answers.append(next(contents, ""))
    return answers


_BRACKETS = str.maketrans(
    "【「『〈《〔】」』〉》〕’‘",
    "(((((())))))''",
)
_EMPHASIS = re.compile(r"[*`\"“”„«»$]|\\[()\[\]]|(?<![^\W_])_+|_+(?![^\W_])")
_LATEX = re.compile(r"\\(?:text|mathrm|mathbf|textbf|textit|mathit|rm|bf)\{([^{}]{0,200})\}")
_BULLET = re.compile(r"<br ?/?>|^ ?(?:(?:[#>•·→✓-]+|=>|->) )+", re.MULTILINE)
_QUOTED = re.compile(r"(?<!\w)'([A-Za-z])'(?!\w)")
_BOXED_ANSWER = re.compile(
    r"\\f?boxed ?\{([^{}]{0,300})\}|<answer>([^<]{0,300})</answer>"
    r"|<\|begin_of_box\|>([^<]{0,300})<\|end_of_box\|>",
    re.IGNORECASE,
)
_MAX_CORRECTIONS = 3  # corrections that are read, from the last one back

_COPULA = any_of(cues.COPULAS, cues.COPULAS_BARE)
_FILLER = any_of(
    f"{cues.COPULAS} {cues.FILLERS}",
    f"{cues.COPULAS_BARE} {cues.FILLERS_BARE}",
)
_ANSWER = any_of(cues.ANSWERS, cues.ANSWERS_BARE)
_OPTION = any_of(cues.OPTIONS, cues.OPTIONS_BARE)
# Repetitions of words are bounded, here and below, so that hostile text cannot take long.
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
# "Wait, no:" takes back what stands before; a mark must follow, as in "no, B".
_RETRACTION = re.compile(
    rf"{any_of(cues.CORRECTIONS)}[ ,:]*|(?:{any_of(cues.RETRACTIONS)}[ ]*)+[,.;:!–—…-]+",
    re.IGNORECASE,
)
# "but B", though not in "anything but" and "all but".
_TURN = re.compile(rf"(?<!anything )(?<!all ){any_of(cues.TURNS, cues.TURNS_BARE)}", re.IGNORECASE)
_CONCESSION = re.compile(
    rf"{any_of(cues.CONCESSIONS)}[ ,]*(?P<possibly>{any_of(cues.POSSIBLY)})?[ ,]*",
    re.IGNORECASE,
)
# " is possible, too" behind labels.
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
# The kinds of places for labels, strongest first; clear ones count behind a "but" as well.
_CLEAR_FINDERS: tuple[LabelFinder, ...] = (
    _iter_sole_labels,
    _iter_final_labels,
    _iter_stated_labels,
    iter_praised_labels,
    _iter_closing_labels,
    _iter_concluded_labels,
)
_ALL_FINDERS: tuple[LabelFinder, ...] = (
    _iter_sole_labels,
    _iter_final_labels,
    _iter_stated_labels,
    iter_praised_labels,
    _iter_leading_labels,
    _iter_closing_labels,
    _iter_concluded_labels,
    iter_bracketed_labels,
)
