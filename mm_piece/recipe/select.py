"""What a recipe may say of the selection: which entries a task may change."""

import os.path
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from mm_piece.families import GROUPS, Group
from mm_piece.importance.rules import RULES
from mm_piece.recipe.parsing import YAML
from mm_piece.sizes import parse_bytes

Density = float | str | dict[str, float]


def _expand_path(text: str) -> str:
    """Return a path as a shell would: `~` and variables that are set are replaced."""
    expanded = os.path.expandvars(text)
    if not expanded.startswith("~"):
        return expanded

    try:
        return str(Path(expanded).expanduser())
    except RuntimeError:  # no such user: a name that begins with ~
        return expanded


# A path, or a source or base that may be one.
PathText = Annotated[str, AfterValidator(_expand_path)]

_PATTERN_MARKS = "*?[."  # a key of `density` with any of these is a pattern of names


class StrictModel(BaseModel):
    """No unknown key, no change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SelectionSettings(StrictModel):
    """Which entries a task may change."""

    method: str = "piece-s"
    density: Density = 0.001  # a share, one by group or pattern of names, or auto
    unit: Literal["entry", "row"] = "entry"
    scope: Literal["global", "tensor"] = "global"
    floor: dict[Group, float] = {}
    ceiling: float | dict[Group, float] = {}
    samples: int = Field(default=1000, ge=1)
    # How many examples a pass looks at together.
    batch_size: int = Field(
        default=8,
        ge=1,
        le=32,
    )
    memory: str | int = "8GiB"
    accumulators: Literal["device", "host"] = "device"
    exclude: tuple[Group, ...] = (
        "embedding",
        "head",
    )
    xi: float = Field(
        default=1e-3,
        gt=0,
        allow_inf_nan=False,
    )
    prompts: tuple[str, ...] = ()  # asked of the model, for retention and rehearsal
    cache: PathText | None = None  # a folder that holds masks for other runs

    @model_validator(mode="before")
    @classmethod
    def _apply_method_defaults(cls, content: YAML) -> YAML:
        if not isinstance(content, dict):
            return content
        method = str(content.get("method"))
        if method not in RULES:
            return dict(content)
        return {**RULES[method].defaults, **content}

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        if method in RULES or "." in method:
            return method
        hint = f"allowed: {', '.join(RULES)}, or a dotted path"
        if close := get_close_matches(method, RULES, n=1, cutoff=0.8):
            hint = f"{hint}; did you mean {close[0]!r}?"
        raise ValueError(f"unknown method {method!r}; {hint}")

    @field_validator("density", mode="before")
    @classmethod
    def _density_in_range(cls, density: YAML) -> YAML:
        return require_density(density)

    @field_validator("floor", "ceiling", mode="before")
    @classmethod
    def _bounds_in_range(cls, bound: YAML) -> YAML:
        shares = bound.values() if isinstance(bound, dict) else [bound]
        for share in shares:
            _require_share(share, "share")
        return bound

    @field_validator("memory", mode="before")
    @classmethod
    def _memory_readable(cls, memory: str | int) -> str | int:
        parse_bytes(memory)
        return memory

    @model_validator(mode="after")
    def _require_consistent(self) -> "SelectionSettings":
        is_auto = self.density == "auto"
        rule = RULES.get(self.method)
        if is_auto and rule is not None and rule.is_data_free:
            raise ValueError(f"density: auto weighs scores of data, and {self.method} has none")

        ceiling_is_number = isinstance(self.ceiling, float)
        if ceiling_is_number and not is_auto:
            raise ValueError("ceiling: a number bounds density: auto; else map groups to shares")

        has_group_ceilings = bool(self.ceiling) and not ceiling_is_number
        bounds_groups = bool(self.floor) or has_group_ceilings
        has_one_density = isinstance(self.density, float)
        if bounds_groups and (self.scope == "tensor" or not has_one_density):
            raise ValueError("floor and ceiling of groups go with one density, scope global")
        return self


def require_density(density: YAML) -> YAML:
    """Return the density as it is; ValueError for what is no share, mapping of shares or auto."""
    if density == {}:
        raise ValueError(f"no group has a density; groups: {', '.join(GROUPS)}")
    if density == "auto":
        return density
    if isinstance(density, str):
        raise ValueError(f"density {density!r} is no share in (0, 1], no mapping and not auto")

    if not isinstance(density, dict):
        _require_share(density, "density")
        return density
    for key, share in density.items():
        _require_group_or_pattern(key)
        _require_share(share, "density")
    return density


def _require_group_or_pattern(key: Any) -> None:
    """Raise ValueError, with the nearest group, for a key that is neither a group nor a pattern."""
    text = str(key)
    is_pattern = any(mark in text for mark in _PATTERN_MARKS)
    if key in GROUPS or is_pattern:
        return

    hint = f"groups: {', '.join(GROUPS)}"
    close = get_close_matches(
        text,
        GROUPS,
        n=1,
        cutoff=0.5,
    )
    if close:
        hint = f"did you mean {close[0]!r}?"
    raise ValueError(f"density: unknown group {key!r}; {hint} (or a pattern of names)")


def _require_share(value: Any, what: str) -> None:
    """Raise ValueError, naming `what` it is, for what is no number in (0, 1]."""
    is_boolean = isinstance(value, bool)  # an int in Python, and no share
    if is_boolean or not isinstance(value, int | float):
        raise ValueError(f"{what} {value!r} is out of (0, 1]")
    if not 0 < value <= 1:
        raise ValueError(f"{what} {float(value)} is out of (0, 1]")
