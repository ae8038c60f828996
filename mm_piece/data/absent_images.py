"""Images that are missing from a whole source: its folder is most likely another one.

One wrong folder is one error, not one for each row.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from mm_piece.data.example import Example
from mm_piece.errors import DataError

_MAX_SUBFOLDERS = 200  # that are looked at for a hint


def find_absent_images(
    source: str,
    examples: Iterable[Example],
    folder: Path,
    images: str | None,
) -> DataError | None:
    """Return the error of a source of which no row's images are there; None if one's are.

    Image paths are relative to `folder`, which the recipe's `images` may name. A single row with
    missing images counts only where the folder itself is missing.
    """
    first: Path | None = None
    num_rows = 0
    for example in examples:
        for image in example.images:
            # an image in the row itself is there
            if not isinstance(image, Path) or _exists(image):
                return None
            first = first or image
        if example.images:
            num_rows += 1

    if first is None or (num_rows == 1 and folder.is_dir()):
        return None

    start = f"{source}: none of the images of its {num_rows:,} rows is there"
    return DataError(f"{start}; {_explain_absence(first, folder, images)}")


def _explain_absence(first: Path, folder: Path, images: str | None) -> str:
    """Return where the first image was looked for, and where it lies if that is close by."""
    tried = first.absolute()
    if not first.is_relative_to(folder):  # an absolute path in the row
        return f"the first is {tried}"

    if images is None:
        explained = f"the first was looked for as {tried}, as there is no `images`"
    elif folder.is_dir():
        explained = f"the first was looked for as {tried} ('images: {images}')"
    else:
        state = "is a file" if folder.exists() else "does not exist"
        explained = f"'images: {images}' was looked for as {folder.absolute()}, which {state}"

    nearby = _find_nearby_folder(first.relative_to(folder), folder)
    if nearby is None:
        return explained
    return f"{explained}; it is there with 'images: {nearby}'"


def _find_nearby_folder(image: Path, folder: Path) -> Path | None:
    """Return the folder close to another that holds an image, by the path that a row has."""
    for parent in (folder, folder.parent):
        for candidate in (parent, *_iter_subfolders(parent)):
            if _exists(candidate / image):
                return candidate
    return None


def _iter_subfolders(folder: Path) -> Iterator[Path]:
    """Yield the first folders inside a folder; none if it cannot be read."""
    try:
        children = sorted(islice(folder.iterdir(), _MAX_SUBFOLDERS))
        yield from filter(Path.is_dir, children)
    except OSError:
        return


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or with a null
        return False
