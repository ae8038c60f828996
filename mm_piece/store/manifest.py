"""The JSON files of a store, validated on every read and write.

store.json      `read_manifest`, `serialize_manifest`: the base and the deltas
results.json    `require_valid_results`: one row of scores per position
answers         `require_valid_answers`: the generated answer to each example of a test set
any file        `read_json_object`, `serialize_json`, `read_bytes`, `require_inside`

A file with a fault raises StoreError, in one line that names the file.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mm_piece.errors import (
    BaseError,
    DamageError,
    MismatchError,
    OrderError,
    StoreError,
    TruncatedError,
    format_value,
)
from mm_piece.files.atomic import reporting_os_errors
from mm_piece.files.strict_json import parse_json
from mm_piece.store.fields import (
    ANSWER_FIELDS,
    BASE_FIELDS,
    ENTRY_FIELDS,
    MANIFEST_FIELDS,
    RESULTS_FIELDS,
    FieldRule,
    is_score,
)
from mm_piece.store.folder import LOGS, MANIFEST, RETENTION, WORK
from mm_piece.store.records import BaseRecord, ManifestEntry

FORMAT_VERSION = 1
DELTA_FILE_PATTERN = re.compile(r"([0-9]{4,})-[a-z0-9-]+\.safetensors")


def delta_file_name(position: int, task: str) -> str:
    """Return the name of the delta file that leads to a position."""
    slug = re.sub(r"[^a-z0-9]+", "-", task.lower())
    # a file system allows 255 bytes; a name without any such letter becomes "task"
    slug = slug[:60].strip("-") or "task"
    return f"{position:04d}-{slug}.safetensors"


def read_manifest(store: Path) -> tuple[BaseRecord, list[ManifestEntry]]:
    """Read the base and the entries of a store's manifest.

    Raises StoreError unless every field is as this library writes it.
    """
    path = store / MANIFEST
    require_inside(store, path)
    content = read_json_object(path)

    # the format comes first: another version may have other fields
    version = content.get("format")
    is_known = type(version) is int and version == FORMAT_VERSION
    _require_sound(
        is_known,
        path,
        f"unknown format {format_value(version)}; known: {FORMAT_VERSION}",
    )
    _require_fields(path, "", content, MANIFEST_FIELDS)
    base = BaseRecord(content["base"])
    records = content["deltas"]
    require_valid_base(path, base)

    for position, record in enumerate(records, 1):
        _require_fields(path, f"position {position}: ", record, ENTRY_FIELDS)
    entries = [ManifestEntry(**record) for record in records]
    require_valid_entries(path, entries)
    # a delta may be a link inside of the store, but not out of it
    for entry in entries:
        require_inside(store, store / entry.file)
    return base, entries


def require_replaceable(path: Path, over_empty: bool) -> None:
    """Raise StoreError unless a store has no deltas and may be replaced."""
    if over_empty:
        _, entries = read_manifest(path)
        if not entries:
            return
    raise StoreError(f"{path}: is a store already")


def serialize_manifest(base: BaseRecord, entries: Iterable[ManifestEntry]) -> str:
    """Return the manifest of a base and its deltas."""
    content = {
        "format": FORMAT_VERSION,
        "base": dict(base.facts),
        "deltas": [asdict(entry) for entry in entries],
    }
    return serialize_json(content, MANIFEST)


def require_valid_base(path: Path, base: BaseRecord) -> None:
    """Raise StoreError unless the record of a base can be used.

    Only the fingerprint is required. Fields that this library does not know may be there.
    """
    _require_sound("fingerprint" in base.facts, path, "base has no fingerprint")
    _require_allowed(path, "base: ", base.facts, BASE_FIELDS)


def require_valid_entries(
    path: Path,
    entries: Sequence[ManifestEntry],
) -> None:
    """Raise StoreError unless each delta continues the one before and its file is well named."""
    parent = ""  # of the first delta: it starts from the base
    for position, entry in enumerate(entries, 1):
        context = f"position {position}"
        _require_sound(entry.position == position, path, f"{context}: position is {entry.position}")
        _require_sound(
            entry.parent == parent,
            path,
            f"{context}: another parent; allowed: {parent!r}",
        )

        # a name outside the pattern might be a path, or hide from `gc`
        name = DELTA_FILE_PATTERN.fullmatch(entry.file)
        is_plain = name is not None and name[1] == f"{position:04d}"
        allowed = f"{position:04d}-name.safetensors, the name in a-z, 0-9 and -"
        _require_sound(
            is_plain,
            path,
            f"{context}: file is {format_value(entry.file)}; allowed: {allowed}",
        )
        parent = entry.sha256


def require_listed_content(
    path: Path,
    entry: ManifestEntry,
    data: bytes,
) -> None:
    """Raise DamageError or MismatchError unless a delta file is the one of the manifest."""
    found = hashlib.sha256(data).hexdigest()
    if found != entry.sha256:
        # a file that was cut off in a copy deserves its own message
        if len(data) < entry.bytes:
            raise TruncatedError(f"{path}: {entry.bytes} bytes expected, {len(data)} found")
        raise DamageError(f"{path}: expected SHA-256 {entry.sha256}, found {found}")

    require_same(path, "bytes", entry.bytes, len(data))


def require_valid_results(
    path: Path,
    results: Mapping[str, Any],
    positions: int,
) -> None:
    """Raise StoreError unless results are {}, or tasks and the rows of positions 0…`positions`."""
    if not results:
        return

    for key in ("tasks", "matrix"):
        _require_sound(key in results, path, f"it has no {key}")
    _require_allowed(path, "", results, RESULTS_FIELDS)

    tasks = results["tasks"]
    matrix = results["matrix"]
    most = min(positions, len(tasks)) + 1  # one row for the base
    _require_sound(
        len(matrix) <= most,
        path,
        f"matrix has {len(matrix)} rows; allowed: at most {most}",
    )
    for number, row in enumerate(matrix):
        _require_scores(path, f"matrix: row {number}", row, len(tasks))

    # base ability is one score per row, and so is each of its kinds
    abilities = {}
    if "base_ability" in results:
        abilities["base_ability"] = results["base_ability"]
    for kind, values in results.get("base_kinds", {}).items():
        abilities[f"base_kinds: {format_value(kind)}"] = values
    for name, values in abilities.items():
        _require_scores(path, name, values, len(matrix))


def require_valid_answers(path: Path, answers: Mapping[str, Any]) -> None:
    """Raise StoreError unless answers are, by task, lists of records with all fields."""
    for task, rows in answers.items():
        _require_sound(
            type(rows) is list,
            path,
            f"task {format_value(task)} has no list of answers",
        )
        for number, row in enumerate(rows):
            context = f"task {format_value(task)}, answer {number}: "
            missing = type(row) is not dict or ANSWER_FIELDS.keys() - row.keys()
            _require_sound(
                not missing,
                path,
                f"{context}expected the fields {', '.join(ANSWER_FIELDS)}",
            )
            _require_allowed(path, context, row, ANSWER_FIELDS)


def serialize_json(content: Mapping[str, Any], label: str) -> str:
    """Return content as JSON text; StoreError, naming `label`, for what is no plain JSON."""
    try:
        # NaN is no JSON: other readers would refuse the file
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        parse_json(text)  # names that are no text, such as 1 and "1", may have become one
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"{label} is not plain JSON: {error}") from error
    return text


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object strictly; StoreError for anything else."""
    try:
        content = parse_json(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: damaged JSON: {error}") from error
    _require_sound(type(content) is dict, path, "damaged: expected a JSON object")
    return content


def read_bytes(path: Path) -> bytes:
    """Read a whole file; StoreError if the system refuses, or for a pipe, which may never end."""
    with reporting_os_errors(path):
        _require_sound(path.is_file() or not path.exists(), path, "is no file")
        return path.read_bytes()


def require_inside(store: Path, path: Path) -> None:
    """Raise StoreError for a link out of the store; the store itself may lie behind a link."""
    real = Path(os.path.realpath(path))  # Path.resolve trips over a loop of links
    _require_sound(real.is_relative_to(os.path.realpath(store)), path, "leads out of the store")


def require_folders_inside(store: Path) -> None:
    """Raise StoreError for a link out of the store in the folders that a training writes into."""
    for name in (WORK, LOGS, RETENTION):
        require_inside(store, store / name)
        for folder, folders, files in os.walk(store / name):
            for child in (*folders, *files):
                require_inside(store, Path(folder, child))


def require_same(
    source: Path,
    field: str,
    expected: object,
    found: object,
) -> None:
    """Raise unless both are equal: BaseError for a base, OrderError for a parent, MismatchError."""
    if expected == found:
        return

    kinds: dict[str, type[MismatchError]] = {
        "base": BaseError,
        "parent": OrderError,
    }
    first_word = field.split()[0]  # of "parent of position 3"
    error = kinds.get(first_word, MismatchError)
    raise error(
        f"{source}: {field}: expected {format_value(expected, 80)}, found {format_value(found, 80)}"
    )


def _require_sound(is_sound: bool, path: Path, problem: str) -> None:
    """Raise StoreError, naming file and problem, unless a test has passed."""
    if not is_sound:
        raise StoreError(f"{path}: {problem}")


def _require_fields(
    path: Path,
    context: str,
    record: Any,
    rules: Mapping[str, FieldRule],
) -> None:
    """Raise StoreError unless a record has exactly these fields, with allowed values."""
    is_exact = type(record) is dict and record.keys() == rules.keys()
    _require_sound(is_exact, path, f"{context}expected exactly the fields {', '.join(rules)}")
    _require_allowed(path, context, record, rules)


def _require_allowed(
    path: Path,
    context: str,
    record: Mapping[str, Any],
    rules: Mapping[str, FieldRule],
) -> None:
    """Raise StoreError unless each field with a rule has an allowed value; it may be absent."""
    for key, (is_allowed, description) in rules.items():
        is_sound = key not in record or is_allowed(record[key])
        value = format_value(record.get(key))
        _require_sound(
            is_sound,
            path,
            f"{context}{key} is {value}; allowed: {description}",
        )


def _require_scores(
    path: Path,
    context: str,
    row: Any,
    count: int,
) -> None:
    """Raise StoreError unless a row is a list of `count` scores."""
    is_sound = type(row) is list and len(row) == count and all(map(is_score, row))
    _require_sound(
        is_sound,
        path,
        f"{context} is {format_value(row)}; allowed: {count} numbers from 0 to 1",
    )
