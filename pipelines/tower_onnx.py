"""The vision tower of the small base: an ONNX file's DINOv2 as a folder of transformers.

The file holds a whole `Dinov2Model` under a decoder that finds what stands out. Weights have their
published names there, but for those of matrix products: these are anonymous, and the node that
multiplies by one has the name of its module.
"""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from transformers import BitImageProcessor, Dinov2Config

from mm_piece.files.atomic import creating_folder

BACKBONE = "backbone"
CLASS_POSITION = "onnx::Concat_1957"  # (1, 1, width)
PATCH_POSITIONS = "onnx::Reshape_1962"  # (1, 37 * 37, width)
WIDTH = 384
LAYERS = 12
HEADS = 6
PRETRAINED_EDGE = 518
PATCH = 14
# those of ImageNet
IMAGE_MEAN = [0.485, 0.456, 0.406]
IMAGE_STD = [0.229, 0.224, 0.225]


def convert_tower(file: Path, folder: Path) -> None:
    """Write configuration, weights and image processor of an ONNX file's tower to a folder."""
    graph = onnx.load(file).graph
    arrays = {item.name: numpy_helper.to_array(item) for item in graph.initializer}

    weights: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if name.startswith(f"{BACKBONE}."):
            weights[name.removeprefix(f"{BACKBONE}.")] = array
    for node in graph.node:
        is_product = node.op_type == "MatMul" and node.name.startswith(f"/{BACKBONE}/")
        if is_product and node.input[1] in arrays:
            module = node.name.removeprefix(f"/{BACKBONE}/").removesuffix("/MatMul")
            # ONNX multiplies from the right: (in, out) -> (out, in)
            weights[f"{module.replace('/', '.')}.weight"] = arrays[node.input[1]].T

    positions = [arrays[CLASS_POSITION], arrays[PATCH_POSITIONS]]
    weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    # The graph lacks the token for masked patches, which is read in pretraining alone.
    weights["embeddings.mask_token"] = np.zeros((1, WIDTH), np.float32)

    config = Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=PRETRAINED_EDGE,
        patch_size=PATCH,
        architectures=["Dinov2Model"],
    )
    # The whole picture, not its middle: flags and signs have something to say at their edges.
    images = BitImageProcessor(
        size={"height": 224, "width": 224},
        do_center_crop=False,
        image_mean=IMAGE_MEAN,
        image_std=IMAGE_STD,
    )
    tensors = {name: torch.tensor(array).contiguous() for name, array in weights.items()}
    with creating_folder(folder) as new:
        config.save_pretrained(new)
        images.save_pretrained(new)
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
