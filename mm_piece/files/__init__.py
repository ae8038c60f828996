"""Files: whole or not at all, piece by piece, without a name that occurs twice.

atomic         files and folders that are there whole or not at all
safetensors    slices of tensors
tensor_specs   a safetensors file laid out before its data exist
sealed         checksummed cache files
strict_json    JSON in which no name occurs twice
"""
