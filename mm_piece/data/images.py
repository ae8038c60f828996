"""Images as rows give them: files, bytes or decoded images; checked early, decoded when needed."""

import base64
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from mm_piece.data.arrow_features import UnsupportedValue
from mm_piece.data.fields import TrackedFields, is_filled
from mm_piece.errors import DataError, format_value

ImageSource = Path | bytes | Image.Image
# A small file may claim any size, and is decoded to all of it. From here on Pillow itself warns.
MAX_PIXELS = 89_478_485  # in RGB a quarter of a GiB
IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
_CONTAINER_FORMATS = ("ICO", "ICNS")  # Pillow decodes the image in them when it opens them
# Deeper pixels (I, F) would be clipped to white without a word; others have no way to RGB.
_ALLOWED_MODES = frozenset(
    ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"),
)
_MAX_PATH_LENGTH = 300  # of a path in a message
_JPEG_END = b"\xff\xd9"  # the marker EOI, ITU T.81, table B.1


def open_image(image_source: ImageSource, location: str) -> Image.Image:
    """Return an image in RGB, turned as its EXIF data say, on white where it is transparent.

    Of an animation, the first frame counts. Raises DataError, which begins with `location`, for an
    image that is missing, cannot be decoded, is too large, or has more than 8 bits a channel.
    """
    with _opening_image(image_source, location) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return _flatten_on_white(image)


def require_image(image_source: ImageSource, location: str) -> None:
    """Raise the DataError of `open_image`, as far as an image's header and end show its cause.

    Only a JPEG file without its end marker is decoded.
    """
    with _opening_image(image_source, location) as image:
        if image.format not in ("JPEG", "MPO"):
            image.verify()  # PNG: the checksums of the whole file; others: nothing
        elif not isinstance(image_source, Image.Image) and not _ends_as_jpeg(image_source):
            image.load()  # truncated, or with other data at its end: only decoding shows which


def read_image_bytes(image_source: ImageSource, location: str) -> bytes:
    """Return what identifies an image: its file's bytes; in memory its mode, size and pixels."""
    if isinstance(image_source, bytes):
        return image_source

    if isinstance(image_source, Image.Image):
        # a palette and a transparent colour stand beside the pixels: RGBA has them in the pixels
        if image_source.mode == "P" or image_source.has_transparency_data:
            image_source = image_source.convert("RGBA")
        header = f"{image_source.mode} {image_source.size} "
        return header.encode() + image_source.tobytes()

    try:
        return image_source.read_bytes()
    except OSError as error:
        raise DataError(f"{location} cannot be read: {_format_reason(error)}") from error


@contextmanager
def _opening_image(image_source: ImageSource, location: str) -> Iterator[Image.Image]:
    """Keep an image open while the block runs; every failure within is a DataError.

    The image is checked, but not decoded.
    """
    try:
        with _rejecting_truncated(), warnings.catch_warnings():
            # Decoding may yield more pixels than the file's header says.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with _open_source(image_source, location) as image:
                _require_fit(image, location)
                yield image
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow writes the number of pixels into its message alone
        number = re.search(r"\d+", str(error))
        pixels = f"{int(number[0]):,}" if number else "far more"
        raise _make_size_error(location, pixels) from error
    except FileNotFoundError as error:
        raise DataError(f"{location} does not exist{_format_tried(image_source)}") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{location} cannot be read: it is no image of a known format") from error
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise DataError(f"{location} cannot be read: {_format_reason(error)}") from error


@contextmanager
def _rejecting_truncated() -> Iterator[None]:
    """Keep truncated files an error while the block runs, whatever other libraries have set.

    Pillow has one switch for the whole process, and would fill what is missing with grey.
    """
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _open_source(image_source: ImageSource, location: str) -> Image.Image:
    if isinstance(image_source, Image.Image):
        _require_fit(image_source, location)  # first: a copy decodes it
        return image_source.copy()

    if isinstance(image_source, bytes):
        num_bytes = len(image_source)
    else:
        num_bytes = image_source.stat().st_size
    if not num_bytes:
        raise DataError(f"{location} is empty: it has no bytes")

    try:
        return Image.open(_as_pillow_input(image_source))
    except Image.DecompressionBombWarning as warning:
        return _open_oversized(image_source, warning)


def _open_oversized(image_source: Path | bytes, warning: Warning) -> Image.Image:
    """Open an image that Pillow warns of, so that an error can name its width and height.

    Raises the warning for a container, which Pillow would decode.
    """
    plain_formats = [form for form in Image.ID if form not in _CONTAINER_FORMATS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(_as_pillow_input(image_source), formats=plain_formats)
        except UnidentifiedImageError:
            raise warning from None


def _as_pillow_input(image_source: Path | bytes) -> Path | BytesIO:
    if isinstance(image_source, bytes):
        return BytesIO(image_source)
    return image_source


def _require_fit(image: Image.Image, location: str) -> None:
    """Raise DataError for an image of no or too many pixels, or of a mode without a way to RGB."""
    if 0 in image.size:
        raise DataError(f"{location} has no pixels: its size is {image.width} x {image.height}")

    number = image.width * image.height
    if number > MAX_PIXELS:
        raise _make_size_error(location, f"{image.width} x {image.height} = {number:,}")
    if image.mode not in _ALLOWED_MODES:
        raise DataError(f"{location} has mode {image.mode}; convert it to 8 bits a channel, RGB")


def _make_size_error(location: str, pixels: str) -> DataError:
    return DataError(f"{location} is too large: {pixels} pixels; allowed: at most {MAX_PIXELS:,}")


def _ends_as_jpeg(image_source: Path | bytes) -> bool:
    if isinstance(image_source, bytes):
        return image_source.endswith(_JPEG_END)

    with image_source.open("rb") as file:
        file.seek(-len(_JPEG_END), os.SEEK_END)
        return file.read() == _JPEG_END


def _flatten_on_white(image: Image.Image) -> Image.Image:
    """Return an image in RGB, with transparent pixels on white, as people see them.

    The colour under such pixels is arbitrary, often black.
    """
    if not image.has_transparency_data:
        return image.convert("RGB")

    layer = image.convert("RGBA")
    background = Image.new("RGBA", layer.size, "white")
    flattened = Image.alpha_composite(background, layer)
    return flattened.convert("RGB")


def _format_tried(image_source: ImageSource) -> str:
    """Return the absolute path that a relative one stands for, in brackets."""
    if not isinstance(image_source, Path) or image_source.is_absolute():
        return ""
    tried = str(image_source.absolute())
    return f" (looked for as {format_value(tried, _MAX_PATH_LENGTH)})"


def _format_reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return format_value(error, 150) or type(error).__name__


# --- where a row says an image is: a path, bytes, a `data:` or `file:` address, or an object


# Objects: `{bytes, path}` of `datasets`, content parts of OpenAI's and Hugging Face's style.
IMAGE_KEYS = ("bytes", "image", "image_url", "url", "path", "base64")


def parse_image(
    given: Any,
    folder: Path,
    location: str,
    parent_fields: TrackedFields,
    name: str,
) -> ImageSource | None:
    """Return the image that the value of the field `name` names; None for an empty value.

    A path is relative to `folder`. Raises DataError for a value that names no image, and for an
    address on the network.
    """
    if isinstance(given, bytes | Image.Image):
        return given
    if not is_filled(given):
        return None
    if isinstance(given, str):
        return _resolve_address(given, folder, location)
    if isinstance(given, Mapping):
        fields = parent_fields.add_nested_fields(given, name)
        return parse_image_object(fields, folder, location)

    kind = given if isinstance(given, UnsupportedValue) else type(given).__name__
    raise DataError(
        f"{location}: an image must be a path, bytes or an object with one of them, not {kind}"
    )


def parse_image_object(
    fields: TrackedFields,
    folder: Path,
    location: str,
) -> ImageSource | None:
    """Return the image that an object names; None if the object's value is empty."""
    key = fields.choose_field(*IMAGE_KEYS)
    if key is None:
        raise DataError(f"{location}: an image object needs one of {', '.join(IMAGE_KEYS)}")

    value = fields.raw_values[key]
    if key == "bytes":
        fields.read_value("path")  # the name of the file with these bytes: nothing to open
    if key == "base64" and is_filled(value):
        value = f"data:,{value}"
    return parse_image(value, folder, location, fields, key)


def _resolve_address(
    address: str,
    folder: Path,
    location: str,
) -> ImageSource:
    """Return the image of a path, a `data:` or a `file:` address."""
    if address.startswith("data:"):
        _, _, encoded = address.partition(",")
        digits = "".join(encoded.split())  # lines may be wrapped
        try:
            return base64.b64decode(digits, validate=True)
        except ValueError as error:
            raise DataError(f"{location}: an image's data: address is not base64") from error

    if address.startswith("file://"):
        quoted = urlsplit(address).path
        return Path(unquote(quoted))
    if "://" in address:
        raise DataError(
            f"{location}: image {format_value(address)} is a URL; images must be files here: "
            "download it first"
        )
    return folder / address
