"""Fields that a row has and nothing reads: harmless, unless what they name belongs to the task."""

from collections.abc import Mapping
from mimetypes import guess_type
from typing import Any

from mm_piece.errors import DataError, short


def require_no_file(unread: Mapping[str, Any], where: str) -> None:
    """Raise DataError for an image, video or sound that the row names in one of these fields."""
    for name, value in unread.items():
        kind = kind_of(value)
        if kind == "image":
            raise DataError(
                f"{where}: nothing reads {name!r}, which names the image {short(_first(value))}; "
                f"say `columns: {{image: {name}}}` in the recipe"
            )
        if kind:
            raise DataError(
                f"{where}: videos and audio are not supported: {name!r} names "
                f"{short(_first(value))}; allowed: text and images"
            )


def kind_of(value: Any) -> str | None:
    """`image`, `video` or `audio` for the name of such a file, or a list of them; else None."""
    value = _first(value)
    if not isinstance(value, str) or len(value) > 4096 or any(c.isspace() for c in value):
        return None
    kind, _, _ = (guess_type(value, strict=False)[0] or "").partition("/")
    return kind if kind in ("image", "video", "audio") else None


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value
