"""Vision encoders of transformers: from a folder or hub id, as they were published."""

from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from mm_piece.errors import ModelError
from mm_piece.models.base import load_plain_config, raising_model_error, require_complete_load
from mm_piece.models.skeleton import quiet_logging

# Parts that no hidden state depends on; a checkpoint with another head lacks them.
_UNREAD_PARTS = ("pooler.",)


def load_pretrained_encoder(
    source: str,
    image_size: int | None,
) -> tuple[Any, Any, tuple[str, ...]]:
    """Return a vision encoder, float32, its image processor, and notes on them.

    `source` may hold more than the encoder, as a CLIP with its text model does. Raises ModelError,
    in one line, for what is missing or no vision encoder.
    """
    # What transformers reports of unused weights would fill the screen for half of a CLIP.
    with raising_model_error(f"cannot load vision tower {source}"), quiet_logging():
        config = _load_vision_config(source)
        model_class: Any = MODEL_MAPPING[type(config)]
        loading: Any = model_class.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        images = _load_image_processor(source, image_size)

    model, loaded = loading
    notes = _fill_unread_parts(model, loaded)
    require_complete_load(source, loaded)
    # The checkpoint's configuration must not contain a path of the machine that wrote it.
    model.config.name_or_path = ""
    return model.eval(), images, notes


def _load_vision_config(source: str) -> Any:
    """Load the configuration of the encoder in a checkpoint; ModelError if there is none."""
    config: Any = load_plain_config(source)
    if "vision_config" in config.sub_configs:
        config = config.vision_config

    model_class: Any = MODEL_MAPPING.get(type(config), None)
    if model_class is None or model_class.main_input_name != "pixel_values":
        raise ModelError(f"{source} is a {config.model_type} model, which is no vision tower")

    # The head pools hidden states, which LLaVA reads before that.
    if "vision_use_head" in config.to_dict():
        config.vision_use_head = False
    return config


def _load_image_processor(source: str, image_size: int | None) -> Any:
    """Load the image processor of a checkpoint, made for images of another edge if one is given."""
    images = AutoImageProcessor.from_pretrained(source)
    if image_size is None:
        return images

    settings = images.to_dict()
    square = {"height": image_size, "width": image_size}
    size = dict(settings["size"])
    changes: dict[str, Any] = {"size": square}
    if settings.get("do_center_crop"):
        crop = settings["crop_size"]["height"]
        changes["crop_size"] = square
        if "shortest_edge" in size:  # what is cropped away stays the same share
            shortest = round(size["shortest_edge"] / crop * image_size)
            changes["size"] = {"shortest_edge": shortest}
    return AutoImageProcessor.from_pretrained(source, **changes)


def _fill_unread_parts(
    model: Any,
    loaded: dict[str, Any],
) -> tuple[str, ...]:
    """Set the parts that no hidden state depends on to zero where the files lack them."""
    missing = set(loaded["missing_keys"])
    unread = {name for name in missing if name.startswith(_UNREAD_PARTS)}
    if not unread:
        return ()

    state = model.state_dict()
    for name in unread:
        state[name].zero_()
    loaded["missing_keys"] = missing - unread
    return (f"the tower has no pooler of its own; {len(unread)} weights are zero, and not used",)


def read_edge(images: Any, source: str) -> int:
    """Return the edge of the square images that an image processor makes, in pixels.

    Raises ModelError for one that makes others.
    """
    shapes = set()
    for size in ((96, 64), (64, 96)):
        image = Image.new("RGB", size)
        inputs = images(image, return_tensors="pt")
        pixels = inputs["pixel_values"]
        shapes.add(tuple(pixels.shape))

    shape = shapes.pop()
    if shapes or len(shape) != 4 or shape[2] != shape[3]:
        raise ModelError(
            f"{source}: its image processor ({type(images).__name__}) does not make square images "
            "of one size, which LLaVA needs"
        )
    return shape[2]
