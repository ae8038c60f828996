"""From what Arrow stores to the values of the feature types of `datasets`.

Arrow stores JSON as its text and a class as its number, however deep they stand in lists and
objects. Images stay as they are stored, bytes or a path. A type that no base here takes (audio,
video, documents, and whatever `datasets` adds) becomes `UnsupportedValue`: the reader that meets
it can then name it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, repr=False)
class UnsupportedValue:
    """A value of a feature type that is neither text nor image."""

    kind: str  # name of the type

    def __repr__(self) -> str:
        """Return the value as messages show it."""
        return f"a value of type {self.kind}"


def decode_value(feature: Any, stored: Any) -> Any:
    """Return the value of a feature for what Arrow stores."""
    if stored is None:
        return None

    if isinstance(feature, Mapping):
        decoded = dict(stored)  # columns without a known feature stay as they are
        for name, subfeature in feature.items():
            if name in stored:
                decoded[name] = decode_value(subfeature, stored[name])
        return decoded

    kind = type(feature).__name__
    if kind in ("List", "LargeList"):
        item_feature = feature.feature
        if _is_plain(item_feature):  # numbers may be many
            return stored
        return [decode_value(item_feature, item) for item in stored]

    if _is_plain(feature):
        return stored
    decoder = _DECODERS.get(kind, _as_unsupported)
    return decoder(feature, stored)


def features_of(schema: Any) -> Any:
    """Return the features of an Arrow schema.

    They are those that `datasets` wrote into it, else those of Arrow's own types. Columns of a type
    that `datasets` does not know, such as maps, are left out.
    """
    import pyarrow
    from datasets import Features

    fields = []
    for field in schema:
        if _is_known_field(field):
            fields.append(field.with_nullable(True))
    known_schema = pyarrow.schema(fields, metadata=schema.metadata)
    return Features.from_arrow_schema(known_schema)


def _is_known_field(field: Any) -> bool:
    import pyarrow
    from datasets import Features

    try:
        Features.from_arrow_schema(pyarrow.schema([field]))
    except ValueError:
        return False
    return True


def _is_plain(feature: Any) -> bool:
    """Return whether Arrow stores the values of a feature as what they are."""
    return type(feature).__name__ in _PLAIN_TYPES


def _as_class(feature: Any, stored: Any) -> str | None:
    """Return the name of a class; a label of no class, such as -1, is a gap."""
    known_labels = range(len(feature.names))
    if stored not in known_labels:
        return None
    return feature.names[stored]


def _as_json(feature: Any, stored: Any) -> Any:
    """Return JSON by Python's parser: that of `datasets` takes 2.4595 for 2.4595000000000002."""
    if not feature.decode:
        return stored
    return json.loads(stored)


def _as_image(feature: Any, stored: Any) -> Any:
    """Return an image as it is stored; one that is to have a certain mode is decoded now."""
    # a mode other than the file's: no later step would convert to it
    if not feature.decode or not feature.mode:
        return stored
    return feature.decode_example(stored)


def _as_unsupported(feature: Any, _: Any) -> UnsupportedValue:
    return UnsupportedValue(type(feature).__name__)


_PLAIN_TYPES = frozenset(
    (
        "Value",
        "Translation",
        "TranslationVariableLanguages",
        "Array2D",
        "Array3D",
        "Array4D",
        "Array5D",
    )
)
_DECODERS: dict[str, Callable[[Any, Any], Any]] = {
    "ClassLabel": _as_class,
    "Json": _as_json,
    "Image": _as_image,
}
