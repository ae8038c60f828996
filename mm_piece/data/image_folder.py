"""Folders of images: a subfolder for each class, or a table `metadata` that names the files."""

from pathlib import Path
from typing import Any

from mm_piece.data.fields import is_filled
from mm_piece.data.images import IMAGE_SUFFIXES
from mm_piece.errors import DataError

_FIELD_OF_COLUMN = {"file_name": "image", "file_names": "images"}


class ClassFolderRows:
    """The images of `folder/CLASS/*`, by name; each answer is the name of the class."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError where an image has no class or classes have subfolders."""
        inside = (path.relative_to(folder) for path in folder.rglob("*"))
        self.names = [str(path) for path in sorted(inside) if _is_image_file(path)]
        for name in self.names:
            if len(Path(name).parts) != 2:
                raise DataError(
                    f"image {folder / name} is not in {folder}/CLASS: name the folder whose "
                    "subfolders are the classes, or add metadata.csv with file_name and answer"
                )

    def __len__(self) -> int:
        """The number of images."""
        return len(self.names)

    def __getitem__(self, position: int) -> dict[str, str]:
        """The image and its class at a position."""
        name = self.names[position]
        return {"image": name, "answer": Path(name).parts[0]}


class MetadataRows:
    """Rows of a metadata table: `file_name` is the image, `file_names` are the images."""

    def __init__(self, rows: Any) -> None:
        """The rows are read when they are asked for."""
        self.rows = rows

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def __getitem__(self, position: int) -> Any:
        """The row at a position."""
        row = self.rows[position]
        if not isinstance(row, dict):
            return row
        found = {new: row[old] for old, new in _FIELD_OF_COLUMN.items() if is_filled(row.get(old))}
        if doubled := [new for new in found if is_filled(row.get(new))]:
            raise DataError(f"metadata row {position} has both file_name(s) and {doubled[0]!r}")
        return {key: value for key, value in row.items() if key not in _FIELD_OF_COLUMN} | found


def _is_image_file(path: Path) -> bool:
    hidden = any(
        component.startswith(".") for component in path.parts
    )  # such as macOS's second copies
    return path.suffix.lower() in IMAGE_SUFFIXES and not hidden
