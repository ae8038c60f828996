"""Fields that a row has and nothing reads: harmless, unless what they name belongs to the task."""

from collections.abc import Iterable, Mapping
from mimetypes import guess_type
from typing import Any

from PIL import Image

from mm_piece.errors import DataError, short
from mm_piece.tasks.features import Unsupported
from mm_piece.tasks.fields import is_filled


def require_no_file(unread: Iterable[tuple[str, Any]], where: str) -> None:
    """Raise DataError for an image, video or sound that the row names in one of these fields."""
    for name, value in unread:
        for found in _items(value):
            _require_none(found, name, where)


def kind_of(value: Any) -> str | None:
    """`image`, `video` or `audio` for such a file, its name, or a list with one; else None."""
    return next((kind for item in _items(value) if (kind := _kind(item))), None)


def _require_none(found: Any, name: str, where: str) -> None:
    kind, shown = _kind(found), short(found)
    if isinstance(found, Unsupported):
        raise DataError(
            f"{where}: nothing reads {name!r}, {found}, which is not supported; "
            "allowed: text and images"
        )
    if kind == "image":
        hint = f"say `columns: {{image: {name}}}` in the recipe"
        if "[]" in name:
            hint = "images stand in the row's `images` or in parts of type image"
        raise DataError(f"{where}: nothing reads {name!r}, which names the image {shown}; {hint}")
    if kind:
        raise DataError(
            f"{where}: videos and audio are not supported: {name!r} names {shown}; "
            "allowed: text and images"
        )


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _kind(value: Any) -> str | None:
    """What kind of file a value is or names; an image of `datasets` is `{bytes, path}`."""
    if isinstance(value, Image.Image):
        return "image"
    if isinstance(value, Mapping) and value.keys() == {"bytes", "path"} and is_filled(value):
        return _kind(value["path"]) or "image"
    if not isinstance(value, str) or len(value) > 4096 or any(c.isspace() for c in value):
        return None
    kind, _, _ = (guess_type(value, strict=False)[0] or "").partition("/")
    return kind if kind in ("image", "video", "audio") else None
