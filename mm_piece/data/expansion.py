"""Where the tokens of a text are, once a processor has put images in.

A processor writes many tokens for one placeholder: those of the image, and in some families marks
around it or between its lines. The text before, between and after images stays as it is, but for
tokens that touch an image: its marks may merge with them.
"""

from collections.abc import Callable, Sequence

_MOST_MERGED = 2  # tokens of a text that the marks of a neighbouring image may change
Ids = Sequence[int]
Decode = Callable[[list[int]], str]


def find_text_positions(
    plain: Ids,
    expanded: Ids,
    placeholder: int,
    decode: Decode,
) -> dict[int, int] | None:
    """Return the position among the expanded tokens of each token of a text.

    Placeholders have none, and neither have tokens that merged with an image's marks: their text
    must still be there, which `decode` tells. Returns None where the two do not agree: then more
    than images was changed.
    """
    texts = _split_at(plain, placeholder)
    found: dict[int, int] = {}
    end = 0  # of what is found already, among the expanded tokens
    merged_before: Ids = ()  # the last tokens of the text before
    for number, (start, stop) in enumerate(texts):
        is_first = number == 0
        is_last = number == len(texts) - 1
        text = plain[start:stop]
        place = _locate(text, expanded, end, is_first, is_last)
        if place is None:
            return None

        skipped, kept, at = place
        image = list(expanded[end:at])
        if not _has_texts(image, merged_before, text[:skipped], decode):
            return None

        for offset in range(kept):
            found[start + skipped + offset] = at + offset
        end = at + kept
        merged_before = text[skipped + kept :]
    return found


def _has_texts(
    image: list[int],
    before: Ids,
    after: Ids,
    decode: Decode,
) -> bool:
    """Whether an image's tokens begin and end with the texts of tokens that merged with them."""
    if not before and not after:
        return True

    written = decode(image)
    start = decode(list(before))
    end = decode(list(after))
    return written.startswith(start) and written.endswith(end)


def _split_at(ids: Ids, placeholder: int) -> list[tuple[int, int]]:
    """Return start and end of each run of tokens between placeholders, empty ones too."""
    runs = []
    start = 0
    for index, token in enumerate(ids):
        if token == placeholder:
            runs.append((start, index))
            start = index + 1
    runs.append((start, len(ids)))
    return runs


def _locate(
    text: Ids,
    expanded: Ids,
    begin: int,
    is_first: bool,
    is_last: bool,
) -> tuple[int, int, int] | None:
    """Return how many tokens of a text to skip, how many follow as they are, and where.

    `begin` is where the text before ends. A text after an image may lose its first tokens to the
    image's marks, one before an image its last.
    """
    most_skipped = 0 if is_first else _MOST_MERGED
    most_cut = 0 if is_last else _MOST_MERGED
    for merged in range(most_skipped + most_cut + 1):
        for skipped in range(min(merged, most_skipped) + 1):
            cut = merged - skipped
            kept = len(text) - merged
            if cut > most_cut or kept < 0:
                continue

            core = text[skipped : skipped + kept]
            at = _find_run(core, expanded, begin, is_first, is_last)
            if at is not None:
                return skipped, kept, at
    return None


def _find_run(
    core: Ids,
    expanded: Ids,
    begin: int,
    is_first: bool,
    is_last: bool,
) -> int | None:
    """Return where some tokens stand among others: at the start, at the end, or at the earliest.

    An image is at least one token, so that no text begins where the one before it ends.
    """
    last = len(expanded) - len(core)
    first = 0 if is_first else begin + 1
    if is_first and is_last:
        places = [0] if last == 0 else []
    elif is_first:
        places = [0]
    elif is_last:
        places = [last] if last >= first else []
    else:
        places = list(range(first, last + 1))

    for at in places:
        if list(expanded[at : at + len(core)]) == list(core):
            return at
    return None
