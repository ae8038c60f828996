"""Values of the feature types of `datasets`: what Arrow stores, and what that stands for.

Arrow gives JSON as its text and a class as its number, however deep they stand in lists and
objects. Images stay as they are stored, bytes or a path, and are decoded when they are needed. A
type that no base here takes (audio, video, documents, and whatever `datasets` adds) becomes
`Unsupported`, so that it is named where it is read.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, repr=False)
class UnsupportedValue:
    """A value of a feature type that is neither text nor image."""

    kind: str

    def __repr__(self) -> str:
        """As messages show it."""
        return f"a value of type {self.kind}"


def decode_value(feature: Any, stored: Any) -> Any:
    """What a stored value of a feature stands for."""
    if stored is None:
        return None

    if isinstance(feature, Mapping):
        subfeatures = {name: subfeature for name, subfeature in feature.items() if name in stored}
        return {
            **stored,
            **{
                name: decode_value(subfeature, stored[name])
                for name, subfeature in subfeatures.items()
            },
        }

    kind = type(feature).__name__
    if kind in ("List", "LargeList"):
        is_plain = type(feature.feature).__name__ in _PLAIN_TYPES  # numbers may be many
        return stored if is_plain else [decode_value(feature.feature, item) for item in stored]

    return stored if kind in _PLAIN_TYPES else _DECODERS.get(kind, _as_unsupported)(feature, stored)


def features_of(schema: Any) -> Any:
    """The features of an Arrow schema, by what `datasets` wrote into it or by Arrow's own types.

    Columns of a type that `datasets` does not know, such as maps, are left out.
    """
    import pyarrow
    from datasets import Features

    fields = [field.with_nullable(True) for field in schema if _is_known_field(field)]
    return Features.from_arrow_schema(pyarrow.schema(fields, metadata=schema.metadata))


def _is_known_field(field: Any) -> bool:
    import pyarrow
    from datasets import Features

    try:
        Features.from_arrow_schema(pyarrow.schema([field]))
    except ValueError:
        return False
    return True


def _as_class(feature: Any, stored: Any) -> str | None:
    """The name of a class; a label of no class, such as -1, is a gap."""
    return feature.names[stored] if stored in range(len(feature.names)) else None


def _as_json(feature: Any, stored: Any) -> Any:
    """JSON by Python's parser: that of `datasets` takes 2.4595 for 2.4595000000000002."""
    return json.loads(stored) if feature.decode else stored


def _as_image(feature: Any, stored: Any) -> Any:
    """An image; only one that is to have another mode than its file is decoded now."""
    return feature.decode_example(stored) if feature.decode and feature.mode else stored


def _as_unsupported(feature: Any, _: Any) -> UnsupportedValue:
    return UnsupportedValue(type(feature).__name__)


# Stored as what they are.
_PLAIN_TYPES = frozenset(
    ("Value", "Translation", "TranslationVariableLanguages")
    + tuple(f"Array{dimensions}D" for dimensions in range(2, 6))
)
_DECODERS: dict[str, Callable[[Any, Any], Any]] = {
    "ClassLabel": _as_class,
    "Json": _as_json,
    "Image": _as_image,
}
