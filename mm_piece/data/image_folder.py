"""Folders of images: a subfolder for each class, or a table `metadata` that names the files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_piece.data.fields import is_filled
from mm_piece.data.images import IMAGE_SUFFIXES
from mm_piece.errors import DataError

# The columns of `datasets`' image folders, and the fields that rows of other formats have for them.
_FIELD_OF_COLUMN = {
    "file_name": "image",
    "file_names": "images",
}

_MAX_FOLDERS = 3  # that a message names


class ClassFolderRows:
    """The images of `folder/CLASS/*`, by name; each answer is the name of the class."""

    def __init__(self, folder: Path) -> None:
        """List the images; DataError if one has no class or lies in a subfolder of its class."""
        self.names: list[str] = []
        images = []
        for file in folder.rglob("*"):
            path = file.relative_to(folder)
            if _is_image_file(path):
                images.append(path)
        images.sort()

        for path in images:
            if len(path.parts) != 2:
                suggestion = _suggest_folder(folder, images)
                raise DataError(
                    f"image {folder / path} is not in {folder}/CLASS: {suggestion}, "
                    "or add metadata.csv with file_name and answer"
                )
            self.names.append(str(path))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)

    def __getitem__(self, position: int) -> dict[str, str]:
        """Return the image and its class at a position."""
        name = self.names[position]
        class_name = Path(name).parts[0]
        return {"image": name, "answer": class_name}


class MetadataRows:
    """Rows of a metadata table: `file_name` is the image, `file_names` are the images."""

    def __init__(self, rows: Any) -> None:
        """Take the rows of the table, without reading one."""
        self.rows = rows

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, position: int) -> Any:
        """Return the row at a position, with images in the fields of other formats."""
        row = self.rows[position]
        if not isinstance(row, dict):  # the caller reports it
            return row

        images = {}
        for column, field in _FIELD_OF_COLUMN.items():
            value = row.get(column)
            if not is_filled(value):
                continue
            if is_filled(row.get(field)):
                raise DataError(f"metadata row {position} has both file_name(s) and {field!r}")
            images[field] = value

        others = {key: value for key, value in row.items() if key not in _FIELD_OF_COLUMN}
        return {**others, **images}


def _suggest_folder(
    folder: Path,
    images: Sequence[Path],
) -> str:
    """Return what to name in place of a folder some of whose images have no class."""
    # folders of class folders, if all images are that deep
    parents = set()
    for path in images:
        if len(path.parts) != 3:
            return "name the folder whose subfolders are the classes"
        parents.add(str(folder / path.parts[0]))

    names = sorted(parents)
    shown = ", ".join(names[:_MAX_FOLDERS])
    if len(names) > _MAX_FOLDERS:
        shown += ", …"
    return f"its class folders are one level deeper, name {shown}"


def _is_image_file(path: Path) -> bool:
    # hidden files are no rows: macOS puts one beside each file of a foreign disk
    if any(component.startswith(".") for component in path.parts):
        return False
    return path.suffix.lower() in IMAGE_SUFFIXES
