"""New bases: a vision encoder, a projector and a language model as one LLaVA checkpoint.

openclip    open_clip's vision encoders: load one, or refuse it
towers      their weights and settings as those of transformers' vision models
pretrained  vision encoders of transformers, from a folder or hub id
vision      any of these encoders, for one size of images, its tokens counted
language    the language model: image token, padding, chat template
gguf        language models out of GGUF files
alignment   a projector in closed form, from images and texts
building    `assemble`: put the three together and write the checkpoint
"""

from mm_piece.models.assembly.building import AssembledBase, assemble

__all__ = [
    "AssembledBase",
    "assemble",
]
