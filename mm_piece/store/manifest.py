"""What the JSON files of a store may say; everything is checked whenever it is read or written.

store.json      read, text, check_base, check_entries    base and deltas: what counts
results.json    check_results                            one row of scores per position
answers         check_answers                            what was said to each row of a test set
any file        load, dump, read_bytes, require_inside   one line for whatever is wrong with it
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mm_piece.errors import (
    BaseError,
    DamageError,
    MismatchError,
    OrderError,
    StoreError,
    TruncatedError,
    short,
)
from mm_piece.files.atomic import reported
from mm_piece.files.strict_json import parse_json

FORMAT = 1
MANIFEST = "store.json"
FILE_NAME = re.compile(r"([0-9]{4,})-[a-z0-9-]+\.safetensors")
SHA256 = re.compile(r"[0-9a-f]{64}")
_NO_LINE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # breaks a line, a path or a print

Rule = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and what is


@dataclass(frozen=True)
class Entry:
    """One delta as the manifest lists it."""

    position: int
    task: str
    file: str
    sha256: str
    parent: str
    entries: int
    bytes: int


def file_name(position: int, task: str) -> str:
    """Return the name of the delta file that leads to a position."""
    slug = re.sub(r"[^a-z0-9]+", "-", task.lower())[:60].strip("-") or "task"
    return f"{position:04d}-{slug}.safetensors"


def read(store: Path) -> tuple[dict[str, Any], list[Entry]]:
    """Return base and entries of a manifest in which everything is as this library writes it."""
    path = store / MANIFEST
    require_inside(store, path)
    content = load(path)
    known = type(content.get("format")) is int and content["format"] == FORMAT
    _require(known, path, f"unknown format {short(content.get('format'))}; known: {FORMAT}")
    _require_fields(path, "", content, _MANIFEST)
    check_base(path, content["base"])
    for position, record in enumerate(content["deltas"], 1):
        _require_fields(path, f"position {position}: ", record, _ENTRY)
    entries = [Entry(**record) for record in content["deltas"]]
    check_entries(path, entries)
    for entry in entries:
        require_inside(store, store / entry.file)
    return content["base"], entries


def text(base: Mapping[str, Any], entries: Iterable[Entry]) -> str:
    """Return the manifest of a base and its deltas."""
    deltas = [asdict(entry) for entry in entries]
    return dump({"format": FORMAT, "base": dict(base), "deltas": deltas}, MANIFEST)


def check_base(path: Path, base: dict[str, Any]) -> None:
    """Raise unless the record of a base can be used; what this library does not know may be there.

    Only the fingerprint is required.
    """
    _require("fingerprint" in base, path, "base has no fingerprint")
    _require_allowed(path, "base: ", base, _BASE)


def check_entries(path: Path, entries: Sequence[Entry]) -> None:
    """Raise unless each delta follows from the one before and its file is named as it should be."""
    parent = ""
    for position, entry in enumerate(entries, 1):
        name, place = FILE_NAME.fullmatch(entry.file), f"position {position}"
        _require(entry.position == position, path, f"{place}: position is {entry.position}")
        _require(entry.parent == parent, path, f"{place}: another parent; allowed: {parent!r}")
        plain = name is not None and name[1] == f"{position:04d}"
        allowed = f"{position:04d}-name.safetensors, the name in a-z, 0-9 and -"
        _require(plain, path, f"{place}: file is {short(entry.file)}; allowed: {allowed}")
        parent = entry.sha256


def check_content(path: Path, entry: Entry, data: bytes) -> None:
    """Raise unless a delta file holds what the manifest says; DamageError or MismatchError."""
    if (found := hashlib.sha256(data).hexdigest()) != entry.sha256:
        if len(data) < entry.bytes:
            raise TruncatedError(f"{path}: {entry.bytes} bytes expected, {len(data)} found")
        raise DamageError(f"{path}: expected SHA-256 {entry.sha256}, found {found}")
    require_same(path, "bytes", entry.bytes, len(data))


def check_results(path: Path, results: dict[str, Any], positions: int) -> None:
    """Raise unless results are {}, or tasks and the rows measured at positions 0…`positions`."""
    if not results:
        return
    for key in ("tasks", "matrix"):
        _require(key in results, path, f"it has no {key}")
    _require_allowed(path, "", results, _RESULTS)
    tasks, matrix = results["tasks"], results["matrix"]
    most = min(positions, len(tasks)) + 1
    _require(len(matrix) <= most, path, f"matrix has {len(matrix)} rows; allowed: at most {most}")
    for number, row in enumerate(matrix):
        _require_scores(path, f"matrix: row {number}", row, len(tasks))
    kinds = {f"base_kinds: {short(k)}": v for k, v in results.get("base_kinds", {}).items()}
    abilities = {key: results[key] for key in ("base_ability",) if key in results}
    for name, values in (abilities | kinds).items():
        _require_scores(path, name, values, len(matrix))


def check_answers(path: Path, answers: dict[str, Any]) -> None:
    """Raise unless answers are lists of rows by task, each with what was asked, said and scored."""
    for task, rows in answers.items():
        _require(type(rows) is list, path, f"task {short(task)} has no list of answers")
        for number, row in enumerate(rows):
            place = f"task {short(task)}, answer {number}: "
            missing = type(row) is not dict or _ANSWER.keys() - row.keys()
            _require(not missing, path, f"{place}expected the fields {', '.join(_ANSWER)}")
            _require_allowed(path, place, row, _ANSWER)


def dump(content: Mapping[str, Any], what: str) -> str:
    """Return content as JSON text; StoreError names `what` is no plain JSON."""
    try:
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        parse_json(text)  # names that are no text, such as 1 and "1", may have become one
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"{what} is not plain JSON: {error}") from error
    return text


def load(path: Path) -> dict[str, Any]:
    """Read a JSON object, strictly."""
    try:
        content = parse_json(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: damaged JSON: {error}") from error
    _require(type(content) is dict, path, "damaged: expected a JSON object")
    return content


def read_bytes(path: Path) -> bytes:
    """Read a whole file; StoreError if that cannot be done, or would wait for ever as on a pipe."""
    with reported(path):
        _require(path.is_file() or not path.exists(), path, "is no file")
        return path.read_bytes()


def require_inside(store: Path, path: Path) -> None:
    """Raise for a link that leads out of the store; the store itself may be reached by one."""
    real = Path(os.path.realpath(path))  # Path.resolve trips over a loop of links
    _require(real.is_relative_to(os.path.realpath(store)), path, "leads out of the store")


def require_folders_inside(store: Path) -> None:
    """Raise for a link out of the store in the folders that a training writes into."""
    for name in ("work", "logs", "kept"):
        require_inside(store, store / name)
        for place, folders, files in os.walk(store / name):
            for child in (*folders, *files):
                require_inside(store, Path(place, child))


def require_same(place: Path, what: str, expected: object, found: object) -> None:
    """Raise a MismatchError of the kind that belongs to `what` unless both are equal."""
    if expected != found:
        error = {"base": BaseError, "parent": OrderError}.get(what.split()[0], MismatchError)
        raise error(f"{place}: {what}: expected {short(expected, 80)}, found {short(found, 80)}")


def _require(sound: bool, path: Path, problem: str) -> None:
    if not sound:
        raise StoreError(f"{path}: {problem}")


def _require_fields(path: Path, place: str, record: Any, rules: Mapping[str, Rule]) -> None:
    """Raise unless a record has exactly these fields, each of them allowed."""
    exact = type(record) is dict and record.keys() == rules.keys()
    _require(exact, path, f"{place}expected exactly the fields {', '.join(rules)}")
    _require_allowed(path, place, record, rules)


def _require_allowed(
    path: Path, place: str, record: dict[str, Any], rules: Mapping[str, Rule]
) -> None:
    """Raise unless each field that is there and has a rule is allowed by it."""
    for key, (allowed, what) in rules.items():
        sound = key not in record or allowed(record[key])
        _require(sound, path, f"{place}{key} is {short(record.get(key))}; allowed: {what}")


def _require_scores(path: Path, place: str, row: Any, count: int) -> None:
    sound = type(row) is list and len(row) == count and all(map(_is_score, row))
    _require(sound, path, f"{place} is {short(row)}; allowed: {count} numbers from 0 to 1")


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_line(value: Any) -> bool:
    return type(value) is str and not _NO_LINE.search(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_digest(value: Any) -> bool:
    return type(value) is str and SHA256.fullmatch(value) is not None


def _is_score(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _are_texts(value: Any) -> bool:
    return type(value) is list and all(map(_is_text, value)) and len({*value}) == len(value)


def _are_objects(value: Any) -> bool:
    return type(value) is dict and all(type(facts) is dict for facts in value.values())


_TEXT: Rule = (_is_text, "text")
_LINE: Rule = (_is_line, "one line of text")
_COUNT: Rule = (_is_count, "a whole number from 0 on")
_DIGEST: Rule = (_is_digest, "a SHA-256 in lower-case hex")
_TEXTS: Rule = (_are_texts, "a list of different names")
_LIST: Rule = (lambda value: type(value) is list, "a list")
_OBJECT: Rule = (lambda value: type(value) is dict, "an object")
_OBJECTS: Rule = (_are_objects, "an object of objects")

_MANIFEST = {"format": _COUNT, "base": _OBJECT, "deltas": _LIST}
_BASE = {
    "fingerprint": _DIGEST,
    "digest": _DIGEST,
    "family": _LINE,
    "dtype": _LINE,
    "folder": _LINE,
    "hub": _LINE,
    "revision": (lambda value: value is None or _is_line(value), "one line of text, or null"),
    "parameters": _COUNT,
    "bytes": _COUNT,
}
_ENTRY = {
    "position": _COUNT,
    "task": _TEXT,
    "file": _TEXT,
    "sha256": _DIGEST,
    "parent": (lambda value: value == "" or _is_digest(value), f"{_DIGEST[1]}, or ''"),
    "entries": _COUNT,
    "bytes": _COUNT,
}
_RESULTS = {
    "tasks": _TEXTS,
    "general": _TEXTS,
    "matrix": _LIST,
    "base_ability_name": _TEXT,
    "base_kinds": _OBJECT,
    "seconds": _OBJECTS,
    "stability": _OBJECTS,
}
_ANSWER = {
    "row": _COUNT,
    "prompt": _TEXT,
    "answer": _TEXT,
    "prediction": _TEXT,
    "score": (_is_score, "a number from 0 to 1"),
}
