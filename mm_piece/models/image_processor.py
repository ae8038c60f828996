"""open_clip's inference transform as an image processor of transformers, equal bit for bit.

A checkpoint names the class of its image processor. `PilBackend` is one that every installation of
transformers has, and the only general one that resizes with PIL as open_clip does: the others come
in two backends, of which the one that is picked by default differs by a grey level. It still takes
another window than open_clip where the crop leaves an odd number of pixels, and blends transparency
with white. So the class here bears that name and is registered for it: where this module is
imported, checkpoints that name it get open_clip's transform, elsewhere the near one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import transformers
from torchvision.transforms import functional
from transformers import AutoImageProcessor, BatchFeature, PreTrainedConfig
from transformers.image_transforms import to_pil_image

from mm_piece.errors import ModelError


class PilBackend(transformers.PilBackend):
    """Resize and crop as torchvision does with a PIL image, in its own mode; then RGB."""

    def process_image(self, image: Any, **settings: Any) -> np.ndarray:
        """One image, resized and cropped: uint8 (3, height, width)."""
        pil_image: Any = to_pil_image(image)
        if settings["do_resize"]:
            size = settings["size"]
            edges = [size.shortest_edge] if size.shortest_edge else [size.height, size.width]
            pil_image = functional.resize(pil_image, edges, FILTERS[settings["resample"]])
        if settings["do_center_crop"]:
            crop = settings["crop_size"]
            pil_image = functional.center_crop(pil_image, [crop.height, crop.width])
        return np.moveaxis(np.array(pil_image.convert("RGB")), -1, 0)

    def _preprocess(self, images: list[np.ndarray], *args: Any, **settings: Any) -> BatchFeature:
        disabled_steps = {"do_resize": False, "do_center_crop": False}
        return super()._preprocess(images, *args, **{**settings, **disabled_steps})


def make_image_processor(settings: Mapping[str, Any]) -> PilBackend:
    """The image processor equal to the transform that open_clip makes of `settings`.

    `settings` is a tower's `preprocess_cfg`. Raises ModelError for what cannot be expressed.
    """
    height, width = _to_edge_pair(settings["size"])
    mode, filter_name = settings["resize_mode"], settings["interpolation"]
    if mode not in ("shortest", "squash"):
        raise ModelError(f"resize mode {mode!r} is not supported; supported: shortest, squash")
    if height != width:
        raise ModelError(f"images of {height} x {width} are not supported; supported: squares")
    square = {"height": height, "width": width}
    return PilBackend(
        do_resize=True,
        size=square if mode == "squash" else {"shortest_edge": height},
        resample=2 if filter_name == "bilinear" else 3,  # open_clip resizes with no other
        do_center_crop=mode == "shortest",
        crop_size=square,
        do_rescale=True,
        do_normalize=True,
        image_mean=_to_channel_values(settings["mean"]),
        image_std=_to_channel_values(settings["std"]),
        do_convert_rgb=True,
    )


def _to_edge_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _to_channel_values(values: float | Sequence[float]) -> list[float]:
    return list(values) if isinstance(values, Sequence) else [values] * 3


class _RegistrationConfig(PreTrainedConfig):
    """What an image processor must be registered under; no model has this configuration."""

    model_type = "mm_piece_preprocessing"


# PIL's numbers, as checkpoints write them.
FILTERS = {
    2: functional.InterpolationMode.BILINEAR,
    3: functional.InterpolationMode.BICUBIC,
}

_BACKENDS = {"torchvision": PilBackend, "pil": PilBackend}  # whichever is asked for
AutoImageProcessor.register(_RegistrationConfig, image_processor_classes=_BACKENDS, exist_ok=True)
