"""Pictures of awkward sizes."""

import numpy as np
from PIL import Image

# (width, height): small, odd, tall, wide; a crop to 32 of 35 and of 39 pixels is where rules differ
SIZES = [(32, 32), (45, 32), (35, 32), (32, 39), (71, 33), (33, 100), (300, 31), (1, 7), (5, 500)]


def picture(width, height, mode="RGB"):
    shape = (height, width, 4)
    numbers = np.random.default_rng(width * height).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(numbers).convert(mode) if mode != "RGBA" else Image.fromarray(numbers)
