"""Where a row says an image is: a path, bytes, a `data:` or `file:` address, or an object."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from mm_piece.errors import DataError, short
from mm_piece.tasks.pictures import Picture

# Objects: `{bytes, path}` of `datasets`, content parts of OpenAI's and Hugging Face's style.
_KEYS = ("bytes", "image", "image_url", "url", "path", "base64")


def image_of(given: Any, folder: Path, where: str) -> Picture | None:
    """The image that a value names, relative to `folder`; None for None and the empty text.

    Raises DataError for a value that names no image, and for an address on the network.
    """
    if given is None or given == "":
        return None
    if isinstance(given, bytes | Image.Image):
        return given
    if isinstance(given, str):
        return _addressed(given, folder, where)
    if not isinstance(given, Mapping):
        raise DataError(
            f"{where}: an image must be a path, bytes or an object with one of them, "
            f"not {type(given).__name__}"
        )
    if not names_image(given):
        raise DataError(f"{where}: an image object needs one of {', '.join(_KEYS)}")
    key = next(key for key in _KEYS if given.get(key) is not None)
    value = f"data:,{given[key]}" if key == "base64" else given[key]
    return image_of(value, folder, where)


def names_image(given: Mapping[str, Any]) -> bool:
    """Whether an object names an image; a content part that does not takes the row's next one."""
    return any(given.get(key) is not None for key in _KEYS)


def _addressed(address: str, folder: Path, where: str) -> Picture:
    if address.startswith("data:"):
        try:
            return base64.b64decode("".join(address.partition(",")[2].split()), validate=True)
        except ValueError as error:
            raise DataError(f"{where}: an image's data: address is not base64") from error
    if address.startswith("file://"):
        return Path(unquote(urlsplit(address).path))
    if "://" in address:
        raise DataError(f"{where}: image {short(address)} lies on the network; download it first")
    return folder / address
