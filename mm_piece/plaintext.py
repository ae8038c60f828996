"""Text of others as a terminal may show it: a file, a store or a model never speaks to it."""

from unicodedata import category


def make_printable(text: str, lines: bool = False) -> str:
    r"""Return text in which every character that is not printable stands as an escape, `\x1b`.

    Those are the controls and formats, marks of direction and of no width among them, surrogates
    and what Unicode has not assigned: all that Python's `str.isprintable` excludes but spaces. With
    `lines`, line breaks and tabs stay as well.
    """
    if text.isprintable():
        return text
    return "".join(char if _is_shown(char, lines) else repr(char)[1:-1] for char in text)


def _is_shown(char: str, lines: bool) -> bool:
    return char.isprintable() or category(char) == "Zs" or (lines and char in "\n\t")
