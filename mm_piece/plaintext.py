"""Text of others as a terminal may show it: a file, a store or a model cannot control it."""

from shutil import get_terminal_size
from textwrap import fill
from unicodedata import category


def make_printable(text: str, lines: bool = False) -> str:
    r"""Return text in which every character that is not printable stands as an escape, `\x1b`.

    Those are the controls and formats, marks of direction and of no width among them, surrogates
    and what Unicode has not assigned: all that Python's `str.isprintable` excludes but spaces. With
    `lines`, line breaks and tabs stay as well.
    """
    if text.isprintable():
        return text

    shown = []
    for char in text:
        if _is_shown(char, lines):
            shown.append(char)
        else:
            shown.append(repr(char)[1:-1])  # the escape without its quotes
    return "".join(shown)


def wrap_words(line: str) -> str:
    """Return a line with breaks between words, as a terminal's width asks for."""
    width = get_terminal_size().columns
    return fill(
        line,
        width,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _is_shown(char: str, lines: bool) -> bool:
    # "Zs": isprintable excludes all spaces but the ASCII one
    if char.isprintable() or category(char) == "Zs":
        return True
    return lines and char in "\n\t"
