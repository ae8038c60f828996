"""open_clip's inference transform as an image processor of transformers, equal bit for bit.

A checkpoint names the class of its image processor. Those that `assemble` writes name `PilBackend`,
which every installation of transformers has, and which alone among the general ones resizes with
PIL as open_clip does. (The others come in two backends, and the default one differs by a grey
level.) transformers' own `PilBackend` still crops another window than open_clip where the crop
leaves an odd number of pixels, and blends transparency with white. The class here has that name and
is registered for it: a process that imports this module gets open_clip's transform for such a
checkpoint, any other process a near one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import transformers
from torchvision.transforms import functional
from transformers import AutoImageProcessor, PreTrainedConfig
from transformers.image_processing_base import BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import ChannelDimension, ImageInput

from mm_piece.errors import ModelError

# PIL's filters, by the numbers that checkpoints write.
FILTERS = {
    2: functional.InterpolationMode.BILINEAR,
    3: functional.InterpolationMode.BICUBIC,
}


class PilBackend(transformers.PilBackend):
    """Resizing and cropping of torchvision for a PIL image, in the image's own mode; then RGB."""

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **settings: Any,
    ) -> np.ndarray:
        """Return one image, resized and cropped: uint8 (3, height, width)."""
        pil_image: Any = to_pil_image(image)
        if settings["do_resize"]:
            size = settings["size"]
            edges = [size.shortest_edge] if size.shortest_edge else [size.height, size.width]
            pil_filter = FILTERS[settings["resample"]]
            pil_image = functional.resize(pil_image, edges, pil_filter)
        if settings["do_center_crop"]:
            crop = settings["crop_size"]
            pil_image = functional.center_crop(pil_image, [crop.height, crop.width])

        pixels = np.array(pil_image.convert("RGB"))  # (height, width, 3)
        return np.moveaxis(pixels, -1, 0)

    def _preprocess(
        self,
        images: list[np.ndarray],
        *args: Any,
        **settings: Any,
    ) -> BatchFeature:
        # `process_image` has done these two steps.
        settings["do_resize"] = False
        settings["do_center_crop"] = False
        return super()._preprocess(images, *args, **settings)


def make_image_processor(settings: Mapping[str, Any]) -> PilBackend:
    """Make the image processor that equals open_clip's transform for `settings`.

    `settings` is the `preprocess_cfg` of a vision encoder. Raises ModelError for what transformers
    cannot express.
    """
    height, width = _to_edge_pair(settings["size"])
    mode = settings["resize_mode"]
    if mode not in ("shortest", "squash"):
        raise ModelError(f"resize mode {mode!r} is not supported; supported: shortest, squash")
    if height != width:
        raise ModelError(f"images of {height} x {width} are not supported; supported: squares")

    square = {"height": height, "width": width}
    is_bilinear = settings["interpolation"] == "bilinear"
    return PilBackend(
        do_resize=True,
        size=square if mode == "squash" else {"shortest_edge": height},
        resample=2 if is_bilinear else 3,  # open_clip resizes with no other
        do_center_crop=mode == "shortest",
        crop_size=square,
        do_rescale=True,
        do_normalize=True,
        image_mean=_to_channel_values(settings["mean"]),
        image_std=_to_channel_values(settings["std"]),
        do_convert_rgb=True,
    )


def _to_edge_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return the height and the width that open_clip's `size` stands for."""
    if isinstance(size, int):
        return size, size
    return size[0], size[1]


def _to_channel_values(values: float | Sequence[float]) -> list[float]:
    """Return one value for each of the three channels."""
    if isinstance(values, Sequence):
        return list(values)
    return [values] * 3


class _RegistrationConfig(PreTrainedConfig):
    """The configuration that an image processor is registered under; no model has it."""

    model_type = "mm_piece_preprocessing"


# transformers picks a backend by what is installed; both of them are this class.
_BACKENDS = {
    "torchvision": PilBackend,
    "pil": PilBackend,
}
AutoImageProcessor.register(
    _RegistrationConfig,
    image_processor_classes=_BACKENDS,
    exist_ok=True,
)
