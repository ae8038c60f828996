"""Images as open_clip prepares them: bit for bit, also after a checkpoint was read back."""

import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from extras import needs
from PIL import Image
from sized_pictures import SIZES, picture
from tiny_llava import CHAT_TEMPLATE, make_tokenizer
from transformers import AutoProcessor, LlavaProcessor

from mm_piece.errors import ModelError
from mm_piece.models.image_processor import make_image_processor

pytestmark = [pytest.mark.slow, needs("open_clip")]

SETTINGS = [
    {"size": 32},
    {"size": (32, 32), "resize_mode": "squash", "mean": (0.5,) * 3, "std": (0.5,) * 3},
    {"size": 33, "interpolation": "bilinear"},
    {"size": 31, "interpolation": "random", "mean": 0.5, "std": (0.2, 0.3, 0.4)},
]


def settings_of(changes):
    from open_clip.transform import PreprocessCfg

    return asdict(PreprocessCfg(**changes))


def saved(folder, settings):
    LlavaProcessor(
        image_processor=make_image_processor(settings),
        tokenizer=make_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_pixels_equal_those_of_open_clip(tmp_path, changes):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    settings = settings_of(changes)
    expected = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    first = AutoProcessor.from_pretrained(saved(tmp_path / "first", settings))
    first.save_pretrained(tmp_path / "second")
    second = AutoProcessor.from_pretrained(tmp_path / "second")
    for size in SIZES:
        for mode in ("RGB", "L", "RGBA", "LA", "P", "1"):
            image = picture(*size, mode)
            for processor in (first, second):
                found = processor(images=image, text="<image>", return_tensors="pt")
                assert torch.equal(found["pixel_values"][0], expected(image)), (size, mode)


def test_a_batch_of_several_sizes(tmp_path):
    images = [picture(*size) for size in SIZES]
    processor = make_image_processor(settings_of(SETTINGS[0]))
    together = processor(images, return_tensors="pt")["pixel_values"]
    alone = [processor(image, return_tensors="pt")["pixel_values"][0] for image in images]
    assert torch.equal(together, torch.stack(alone))


PLAIN = """
import sys
import numpy as np
from PIL import Image
from transformers import AutoProcessor
folder, *images = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder).image_processor
pixels = [processor(Image.open(i), return_tensors="np")["pixel_values"][0] for i in images]
assert "mm_piece" not in sys.modules
np.save(folder + "/pixels.npy", np.stack(pixels))
"""


def test_plain_transformers_reads_the_checkpoint_too(tmp_path):
    """The same pixels, but where the crop leaves 3, 7, 11, … pixels: there it lies one beside."""
    settings = settings_of(SETTINGS[0])
    folder = saved(tmp_path / "folder", settings)
    files = [tmp_path / f"{number}.png" for number in range(len(SIZES))]
    for size, file in zip(SIZES, files, strict=True):
        picture(*size).save(file)
    subprocess.run([sys.executable, "-c", PLAIN, folder, *files], check=True)
    plain = torch.from_numpy(np.load(folder / "pixels.npy"))
    ours = make_image_processor(settings)([Image.open(f) for f in files], return_tensors="pt")
    equal = [torch.equal(*pair) for pair in zip(plain, ours["pixel_values"], strict=True)]
    left = [int(32 * max(size) / min(size)) - 32 for size in SIZES]
    assert equal == [rest % 4 != 3 for rest in left]
    wide = SIZES.index((35, 32))
    assert torch.equal(plain[wide, :, :, 1:], ours["pixel_values"][wide, :, :, :-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resize_mode": "longest"}, "resize mode 'longest' .* supported: shortest, squash"),
        ({"size": (32, 48)}, "32 x 48 .* supported: squares"),
    ],
)
def test_what_cannot_be_expressed(changes, message):
    with pytest.raises(ModelError, match=message):
        make_image_processor(settings_of(changes))
