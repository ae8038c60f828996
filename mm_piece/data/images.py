"""Images as rows give them: files, bytes or pictures; checked early, decoded when needed."""

import base64
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from mm_piece.data.arrow_features import Unsupported
from mm_piece.data.fields import Fields, is_filled
from mm_piece.errors import DataError, short

Picture = Path | bytes | Image.Image
# A small file may claim any size, and is decoded to all of it. From here on Pillow itself warns.
MOST_PIXELS = 89_478_485  # in RGB a quarter of a GiB
SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
_HOLDERS = ("ICO", "ICNS")  # the picture that they hold is decoded when they are opened
# Deeper pixels (I, F) would be clipped to white without a word; others have no way to RGB.
_MODES = frozenset(
    ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"),
)


def opened(picture: Picture, where: str) -> Image.Image:
    """The picture in RGB, turned as its EXIF data say, on white where it is transparent.

    Of an animation, the first frame. Raises DataError, which begins with `where`, for one that is
    missing, cannot be decoded, is too large, or has more than 8 bits a channel.
    """
    with _reading(picture, where) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return _on_white(image)


def require(picture: Picture, where: str) -> None:
    """Raise DataError as `opened` does, without decoding, for all that a header and an end tell."""
    with _reading(picture, where) as image:
        if image.format not in ("JPEG", "MPO"):
            image.verify()  # PNG: the checksums of the whole file; others: nothing
        elif not isinstance(picture, Image.Image) and not _ends_as_jpeg(picture):
            image.load()  # cut short, or with something behind it: only decoding tells


def content(picture: Picture, where: str) -> bytes:
    """What identifies a picture: its file's bytes; of one in memory mode, size and pixels."""
    if isinstance(picture, Image.Image):
        if picture.mode == "P" or picture.has_transparency_data:  # colours stand beside the pixels
            picture = picture.convert("RGBA")
        return f"{picture.mode} {picture.size} ".encode() + picture.tobytes()
    try:
        return picture if isinstance(picture, bytes) else picture.read_bytes()
    except OSError as error:
        raise DataError(f"{where} cannot be read: {_reason(error)}") from error


@contextmanager
def _reading(picture: Picture, where: str) -> Iterator[Image.Image]:
    """The picture, opened and fit to be used; every failure until the end is a DataError."""
    try:
        with _whole_files(), warnings.catch_warnings():
            # What is decoded may be larger than what the file's header says.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with _found(picture, where) as image:
                _require_fit(image, where)
                yield image
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        number = re.search(r"\d+", str(error))  # Pillow tells it in its message alone
        raise _too_large(where, f"{int(number[0]):,}" if number else "far more") from error
    except FileNotFoundError as error:
        raise DataError(f"{where} does not exist") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{where} cannot be read: it is no image of a known format") from error
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise DataError(f"{where} cannot be read: {_reason(error)}") from error


@contextmanager
def _whole_files() -> Iterator[None]:
    """Context in which a file that is cut short is an error, though a library has let them pass.

    Pillow has one switch for the whole process, and would fill up with grey.
    """
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _found(picture: Picture, where: str) -> Image.Image:
    if isinstance(picture, Image.Image):
        _require_fit(picture, where)  # it may not be decoded yet
        return picture.copy()
    if not (len(picture) if isinstance(picture, bytes) else picture.stat().st_size):
        raise DataError(f"{where} is empty: it has no bytes")
    try:
        return Image.open(_source(picture))
    except Image.DecompressionBombWarning as warning:
        return _oversized(picture, warning)


def _oversized(picture: Path | bytes, warning: Warning) -> Image.Image:
    """A picture that Pillow warns of, opened so that its width and height can be told."""
    plain = [form for form in Image.ID if form not in _HOLDERS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(_source(picture), formats=plain)
        except UnidentifiedImageError:
            raise warning from None


def _source(picture: Path | bytes) -> Path | BytesIO:
    return BytesIO(picture) if isinstance(picture, bytes) else picture


def _require_fit(image: Image.Image, where: str) -> None:
    if 0 in image.size:
        raise DataError(f"{where} has no pixels: its size is {image.width} x {image.height}")
    if (number := image.width * image.height) > MOST_PIXELS:
        raise _too_large(where, f"{image.width} x {image.height} = {number:,}")
    if image.mode not in _MODES:
        raise DataError(f"{where} has mode {image.mode}; convert it to 8 bits a channel, RGB")


def _too_large(where: str, pixels: str) -> DataError:
    return DataError(f"{where} is too large: {pixels} pixels; allowed: at most {MOST_PIXELS:,}")


def _ends_as_jpeg(picture: Path | bytes) -> bool:
    if isinstance(picture, bytes):
        return picture.endswith(b"\xff\xd9")
    with picture.open("rb") as file:
        file.seek(-2, 2)
        return file.read() == b"\xff\xd9"


def _on_white(image: Image.Image) -> Image.Image:
    """What lies under transparent pixels is arbitrary, often black: white is what people see."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return short(error, 150) or type(error).__name__


# --- where a row says an image is: a path, bytes, a `data:` or `file:` address, or an object


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
