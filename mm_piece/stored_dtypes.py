"""What safetensors files call dtypes: the name elsewhere, the bytes of an entry; without torch."""

from typing import NamedTuple


class StoredDtype(NamedTuple):
    """A dtype of safetensors files."""

    name: str  # as torch and recipes have it
    itemsize: int


# In the order of safetensors' own writer: it lays wider numbers first, so that all are aligned.
STORED_DTYPES = {
    "I64": StoredDtype("int64", 8),
    "F64": StoredDtype("float64", 8),
    "F32": StoredDtype("float32", 4),
    "I32": StoredDtype("int32", 4),
    "BF16": StoredDtype("bfloat16", 2),
    "F16": StoredDtype("float16", 2),
    "I16": StoredDtype("int16", 2),
    "F8_E4M3": StoredDtype("float8_e4m3fn", 1),
    "F8_E5M2": StoredDtype("float8_e5m2", 1),
    "I8": StoredDtype("int8", 1),
    "U8": StoredDtype("uint8", 1),
    "BOOL": StoredDtype("bool", 1),
}
