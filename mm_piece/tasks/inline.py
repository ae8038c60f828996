"""Where a row says an image is: a path, bytes, a `data:` or `file:` address, or an object."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from mm_piece.errors import DataError, short
from mm_piece.tasks.features import Unsupported
from mm_piece.tasks.fields import Fields, is_filled
from mm_piece.tasks.pictures import Picture

# Objects: `{bytes, path}` of `datasets`, content parts of OpenAI's and Hugging Face's style.
KEYS = ("bytes", "image", "image_url", "url", "path", "base64")


def image_of(given: Any, folder: Path, where: str, within: Fields, name: str) -> Picture | None:
    """The image that the value of the field `name` names; None for what is empty.

    A path is relative to `folder`. Raises DataError for a value that names no image, and for an
    address on the network.
    """
    if isinstance(given, bytes | Image.Image):
        return given
    if not is_filled(given):
        return None
    if isinstance(given, str):
        return _addressed(given, folder, where)
    if isinstance(given, Mapping):
        return image_in(within.inside(given, name), folder, where)
    kind = given if isinstance(given, Unsupported) else type(given).__name__
    raise DataError(
        f"{where}: an image must be a path, bytes or an object with one of them, not {kind}"
    )


def image_in(fields: Fields, folder: Path, where: str) -> Picture | None:
    """The image that an object names."""
    key = fields.choose(*KEYS)
    if key is None:
        raise DataError(f"{where}: an image object needs one of {', '.join(KEYS)}")
    value = fields.given[key]
    if key == "bytes":
        fields.take("path")  # what the file with these bytes was called
    if key == "base64" and is_filled(value):
        value = f"data:,{value}"
    return image_of(value, folder, where, fields, key)


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
