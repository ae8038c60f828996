"""The vision encoder of a LLaVA, from open_clip or from a folder or hub id of transformers.

Whatever its source, it is a model of transformers in the end, and its tokens are counted by running
it without values: what it returns tells more than the name of its class.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import AutoModel

from mm_piece.errors import ModelError, format_error
from mm_piece.models.assembly.openclip import is_openclip_name
from mm_piece.models.assembly.pretrained import load_pretrained_encoder, read_edge
from mm_piece.models.assembly.towers import load_openclip_encoder

# LLaVA-1.5 reads the last layer but one of CLIP, whose last one is tuned to whole images.
_DEFAULT_LAYERS = {"clip_vision_model": -2}
# Tables with a row for each token of an image of one size.
_POSITION_TABLES = ("embeddings.position_embedding.weight", "embeddings.position_embeddings")


@dataclass(frozen=True)
class VisionEncoder:
    """A vision encoder with its image processor, and notes on it.

    `edge` is that of the square images in pixels. A prefix token belongs to no patch: a class token
    or a register.
    """

    model: Any
    images: Any
    edge: int
    patch_size: int
    num_patches: int
    num_prefix_tokens: int
    notes: tuple[str, ...]

    @property
    def default_layer(self) -> int:
        """The hidden states that LLaVA models with such an encoder read."""
        return _DEFAULT_LAYERS.get(self.model.config.model_type, -1)

    @property
    def feature_strategy(self) -> Literal["default", "full"]:
        """transformers' name for whether the first token is dropped."""
        return "default" if self.num_prefix_tokens else "full"

    @property
    def num_image_tokens(self) -> int:
        """Number of tokens that the language model sees of an image."""
        is_first_dropped = self.feature_strategy == "default"
        return self.num_patches + self.num_prefix_tokens - is_first_dropped


def load_vision_encoder(
    vision: str,
    pretrained: str | None = None,
    image_size: int | None = None,
) -> VisionEncoder:
    """Load a vision encoder, float32.

    `vision` is a folder or hub id of transformers, or one of open_clip's (see
    `load_openclip_encoder`), and then `pretrained` names its weights. `image_size` is the edge of
    the images in pixels, by default that of the image processor. An encoder that is made for one
    size gets a table of positions for this one, by bicubic interpolation. Raises ModelError.
    """
    notes: tuple[str, ...] = ()
    if is_openclip_name(vision):
        model, images = load_openclip_encoder(vision, pretrained, image_size)
    elif pretrained is not None:
        raise ModelError(f"{vision} brings its own weights; leave out {pretrained!r}")
    else:
        model, images, notes = load_pretrained_encoder(vision, image_size)

    edge = read_edge(images, vision)
    patch = _require_patches(model, edge, vision)
    model, num_tokens = _fit_to_edge(model, edge, patch, vision)

    num_patches = (edge // patch) ** 2
    num_prefix_tokens = num_tokens - num_patches
    if num_prefix_tokens < 0:
        raise ModelError(
            f"{vision}: a {type(model).__name__} has no token for each patch of an image "
            f"({num_tokens} tokens, {num_patches} patches), which LLaVA needs"
        )
    if num_prefix_tokens > 1:
        others = num_prefix_tokens - 1
        notes = (*notes, f"{others} of an image's tokens are registers of the tower")
    return VisionEncoder(
        model=model,
        images=images,
        edge=edge,
        patch_size=patch,
        num_patches=num_patches,
        num_prefix_tokens=num_prefix_tokens,
        notes=notes,
    )


def _require_patches(model: Any, edge: int, vision: str) -> int:
    """Return the edge of a patch in pixels; ModelError unless patches fill the image."""
    settings = model.config.to_dict()
    patch = settings.get("patch_size")
    if isinstance(patch, list | tuple) and len(set(patch)) == 1:
        patch = patch[0]
    if not isinstance(patch, int):
        raise ModelError(
            f"{vision}: a {type(model).__name__} does not cut images into square patches, which "
            "LLaVA needs; towers like CLIP, SigLIP, DINOv2, DINOv3 or ViT do"
        )

    if edge % patch:
        smaller = edge // patch * patch
        near = f"{smaller} or {smaller + patch}" if smaller else str(patch)
        raise ModelError(
            f"{vision}: images of {edge} pixels are not whole patches of {patch}; take {near}"
        )
    return patch


def _fit_to_edge(
    model: Any,
    edge: int,
    patch: int,
    vision: str,
) -> tuple[Any, int]:
    """Return the encoder for images of this edge, and its number of tokens for one.

    Raises ModelError for an encoder that needs more than pixels, or has no tokens.
    """
    num_tokens, problem = _count_tokens(model.config, edge)
    if num_tokens is None:
        resized = _resize_positions(model, edge, patch)
        if resized is not None:
            model = resized
            num_tokens, problem = _count_tokens(model.config, edge)

    if num_tokens is None:
        raise ModelError(f"{vision}: a {type(model).__name__} cannot be LLaVA's tower: {problem}")
    return model, num_tokens


@torch.inference_mode()
def _count_tokens(config: Any, edge: int) -> tuple[int | None, str]:
    """Return the tokens that an encoder makes of an image; else None, and what went wrong."""
    try:
        with torch.device("meta"):
            model: Any = AutoModel.from_config(config)
            images = torch.zeros(2, 3, edge, edge)
            output = model(images, output_hidden_states=True, return_dict=True)
        states = {tuple(state.shape) for state in output.hidden_states}
    except Exception as error:  # of any kind: the class was never meant for this input
        return None, format_error(error)

    shape = states.pop()
    if states or len(shape) != 3 or shape[0] != len(images):
        return None, "its hidden states are not the same tokens in every layer"
    return shape[1], ""


def _resize_positions(model: Any, edge: int, patch: int) -> Any | None:
    """Return an encoder with its table of positions made for another edge; None without a table."""
    weights = model.state_dict()
    names = [name for name in weights if name.endswith(_POSITION_TABLES)]
    own_edge = model.config.to_dict().get("image_size")
    if len(names) != 1 or not isinstance(own_edge, int):
        return None

    table = weights[names[0]]  # (tokens, width), or (1, tokens, width)
    resized = _interpolate_table(
        table.flatten(0, -2),
        own_edge // patch,
        edge // patch,
    )
    weights[names[0]] = resized.view(*table.shape[:-2], *resized.shape)

    config = copy.deepcopy(model.config)
    config.image_size = edge
    adapted: Any = AutoModel.from_config(config)
    adapted.load_state_dict(weights)
    return adapted.eval()


def _interpolate_table(
    table: Tensor,
    own_edge: int,
    edge: int,
) -> Tensor:
    """Interpolate a table of positions, (tokens, width), to another edge, counted in patches."""
    num_prefix_tokens = len(table) - own_edge**2
    prefix = table[:num_prefix_tokens]

    grid = table[num_prefix_tokens:].T  # (width, patches)
    grid = grid.reshape(1, -1, own_edge, own_edge)
    resized = interpolate(
        grid,
        size=(edge, edge),
        mode="bicubic",
        align_corners=False,
    )
    patches = resized.flatten(2)[0].T  # (patches, width)
    return torch.cat([prefix, patches])
