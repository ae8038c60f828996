"""New bases: a vision encoder, a projector and a language model as one LLaVA checkpoint.

openclip    open_clip's vision encoders: load one, or refuse it
towers      their weights and settings as those of transformers' vision models
language    the language model: image token, padding, chat template
building    `assemble`: put the three together and write the checkpoint
"""

from mm_piece.models.assembly.building import AssembledBase, assemble

__all__ = [
    "AssembledBase",
    "assemble",
]
