"""What each field of a store's JSON files may hold.

A table has a rule for each field of one kind of record: a test of the value, and the allowed values
in words.
"""

import re
from collections.abc import Callable
from typing import Any

FieldRule = tuple[Callable[[Any], bool], str]

_SHA256_PATTERN = re.compile(r"[0-9a-f]{64}")
_LINE_BREAKERS = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # breaks a line, a path or a print

# The tests compare types instead of using isinstance, which takes a bool for an int: values of JSON
# have plain types only.


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_line(value: Any) -> bool:
    return type(value) is str and not _LINE_BREAKERS.search(value)


def _is_line_or_null(value: Any) -> bool:
    return value is None or _is_line(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63  # a 64-bit integer


def _is_digest(value: Any) -> bool:
    return type(value) is str and _SHA256_PATTERN.fullmatch(value) is not None


def _is_digest_or_empty(value: Any) -> bool:
    return value == "" or _is_digest(value)


def is_score(value: Any) -> bool:
    """Return whether a value is a number from 0 to 1."""
    return type(value) in (int, float) and 0 <= value <= 1


def _is_list(value: Any) -> bool:
    return type(value) is list


def _is_name_list(value: Any) -> bool:
    if not _is_list(value):
        return False
    if not all(map(_is_text, value)):
        return False
    different = set(value)
    return len(different) == len(value)


def _is_object(value: Any) -> bool:
    return type(value) is dict


def _is_object_map(value: Any) -> bool:
    if not _is_object(value):
        return False
    return all(map(_is_object, value.values()))


_TEXT: FieldRule = (_is_text, "text")
_LINE: FieldRule = (_is_line, "one line of text")
_COUNT: FieldRule = (_is_count, "a whole number from 0 on")
_DIGEST: FieldRule = (_is_digest, "a SHA-256 in lower-case hex")
_TEXTS: FieldRule = (_is_name_list, "a list of different names")
_LIST: FieldRule = (_is_list, "a list")
_OBJECT: FieldRule = (_is_object, "an object")
_OBJECTS: FieldRule = (_is_object_map, "an object of objects")

MANIFEST_FIELDS = {
    "format": _COUNT,
    "base": _OBJECT,
    "deltas": _LIST,
}
BASE_FIELDS = {
    "fingerprint": _DIGEST,
    "digest": _DIGEST,
    "family": _LINE,
    "dtype": _LINE,
    "folder": _LINE,
    "hub": _LINE,
    "revision": (_is_line_or_null, "one line of text, or null"),
    "parameters": _COUNT,
    "bytes": _COUNT,
}
ENTRY_FIELDS = {
    "position": _COUNT,
    "task": _TEXT,
    "file": _TEXT,
    "sha256": _DIGEST,
    "parent": (_is_digest_or_empty, f"{_DIGEST[1]}, or ''"),
    "entries": _COUNT,
    "bytes": _COUNT,
}
RESULTS_FIELDS = {
    "tasks": _TEXTS,
    "general": _TEXTS,
    "matrix": _LIST,
    "base_ability_name": _TEXT,
    "base_kinds": _OBJECT,
    "seconds": _OBJECTS,
    "losses": _OBJECTS,
    "stability": _OBJECTS,
}
ANSWER_FIELDS = {
    "row": _COUNT,
    "prompt": _TEXT,
    "answer": _TEXT,
    "prediction": _TEXT,
    "score": (is_score, "a number from 0 to 1"),
}
