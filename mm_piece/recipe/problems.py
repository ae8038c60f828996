"""What is wrong with a YAML's content, in one line that says what would be right."""

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mm_piece.errors import format_value

Sections = Mapping[str, type[BaseModel]]  # key of the root -> what stands under it
Places = Mapping[str, Collection[str]]  # where keys may stand, as a message says it -> these keys

_UNION_BRANCH = re.compile(r"float$|dict\[|\[key\]|literal\[")  # pydantic's own steps into a union

# Kind of a problem, in pydantic's word -> what the value must be, with facts of the problem.
_REQUIREMENTS = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping, {{key: value}}",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "list_type": "a list, of items that each begin with -",
    "model_attributes_type": "a mapping, {{key: value}}",
    "model_type": "a mapping, {{key: value}}",
    "string_pattern_mismatch": "a letter or digit, and then of letters, digits, spaces and . _ -",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "at least {min_length} characters",
    "string_type": "a text",
    "tuple_type": "a list, of items that each begin with -",
}


def format_problem(
    error: ValidationError,
    root: type[BaseModel],
    sections: Sections,
    places: Places | None = None,
) -> str:
    """Return the most telling problem in one line, with the keys or values that are allowed.

    `places` tell of a key that stands in the wrong one where it belongs.
    """
    # A misspelt key also leaves one missing; of a union's branches the deepest error tells most.
    problem = max(
        error.errors(),
        key=lambda found: (found["type"] == "extra_forbidden", len(found["loc"])),
    )
    kind = problem["type"]
    steps = [str(step) for step in problem["loc"]]
    keys = [step for step in steps if not _UNION_BRANCH.match(step)]
    key_path = ".".join(keys)

    if kind == "extra_forbidden":
        model = root
        if len(steps) > 1:
            model = sections.get(steps[0], root)
        hint = _suggest_place(steps[-1], problem["input"], model, places or {})
        return f"unknown key {key_path!r}; {hint}"

    if kind == "missing":
        return f"missing key {key_path!r}"

    message = describe_problem(problem)
    if not key_path:
        return message
    return f"{key_path}: {message}"


def describe_problem(problem: ErrorDetails) -> str:
    """Return what a value must be and what it is, in place of pydantic's words."""
    kind = problem["type"]
    value = format_value(problem["input"])
    if kind == "literal_error":
        allowed = problem["msg"].removeprefix("Input should be ")
        return f"unknown {problem['input']!r}; allowed: {allowed}"

    if kind == "too_short":
        return "must not be empty"

    if kind in _REQUIREMENTS:
        bounds = problem.get("ctx", {})
        requirement = _REQUIREMENTS[kind].format(**bounds)
        quotes = _suggest_quotes(kind, problem["input"])
        return f"must be {requirement}, not {value}{quotes}"

    return problem["msg"].removeprefix("Value error, ")


def _suggest_quotes(kind: str, value: Any) -> str:
    """Return a hint for a text that YAML took for something else, such as `yes`."""
    if kind == "string_type" and value is None:
        return "; give one, or leave the key out"
    if kind == "string_type" and not isinstance(value, dict | list):
        return "; put it in quotes"
    return ""


def _suggest_place(
    key: str,
    value: Any,
    model: type[BaseModel],
    places: Places,
) -> str:
    """Return where an unknown key belongs, or what it may have been meant as."""
    fields = model.model_fields
    known = [field.alias or name for name, field in fields.items()]

    home = find_home(key, places)
    if home:
        return f"it belongs {home}"

    # `{prompt: Red, or blue}` has a key `or blue`
    if value is None and " " in key:
        return "if it is part of a text with a comma, put the text in quotes"

    close = get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"allowed: {', '.join(known)}"


def find_home(key: str, places: Places) -> str:
    """Return the places that know a key, as a message says them; empty if none does."""
    homes = [place for place, keys in places.items() if key in keys]
    return " or ".join(homes)
