"""Sixty small images to learn and twenty to test, in one folder per class.

From the repository's root: python examples/make_photos.py
They go to photos/train and photos/test; `pipelines/photos.yaml` learns them.
"""

import sys
from pathlib import Path

from mm_piece.data import read

COUNTS = {"train": 60, "test": 20}

if __name__ == "__main__":
    photos = Path(sys.argv[1] if len(sys.argv) > 1 else "photos")
    for split, count in COUNTS.items():
        for example in read(f"scenes:textures/{split}[:{count}]"):
            folder = photos / split / example.answer
            folder.mkdir(parents=True, exist_ok=True)
            (image,) = example.open_images()
            image.save(folder / f"{example.row:02}.png")

    for split in COUNTS:
        for folder in sorted((photos / split).iterdir()):
            number = len(list(folder.iterdir()))
            print(f"{folder}: {number} images")
