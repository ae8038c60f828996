"""New bases: an open_clip tower, a projector and a language model as one LLaVA checkpoint.

towers      open_clip's weights as those of transformers' vision models
openclip    the seam to open_clip
language    the language model: image token, padding, chat template
building    `assemble`
"""

from mm_piece.models.assembly.building import AssembledBase, assemble

__all__ = ["AssembledBase", "assemble"]
