"""Models: bases as transformers loads them, and their files as streams of weights.

base               a model and its processor, from a hub id or a folder
placement          the devices that a base is put on
structure          whether a model has the parts that its names tell
skeleton           a base's weights by their names in its files, without values
checkpoint         a folder's weights under published names
plain_checkpoint   the same without transformers, for a base that is known by its fingerprint
checkpoint_tensor  one tensor of its files, read slice by slice
generation         greedy decoding
image_processor    open_clip's image transform for transformers
assembly/          new bases out of a vision encoder and a language model
"""
