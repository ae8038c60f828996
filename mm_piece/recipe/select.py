"""What a recipe may say of the selection: which entries a task may change."""

from difflib import get_close_matches
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mm_piece.families import GROUPS, Group
from mm_piece.importance.rules import RULES
from mm_piece.recipe.parsing import YAML
from mm_piece.sizes import parse_bytes

Density = float | str | dict[str, float]


class StrictModel(BaseModel):
    """No unknown key, no change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SelectionSettings(StrictModel):
    """Which entries a task may change."""

    method: str = "piece-f"
    density: Density = 0.001  # a share, one by group or pattern of names, or auto
    unit: Literal["entry", "row"] = "entry"
    scope: Literal["global", "tensor"] = "global"
    floor: dict[Group, float] = {}
    ceiling: float | dict[Group, float] = {}
    samples: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=8, ge=1, le=32)  # examples a pass looks at together
    memory: str | int = "8GiB"
    accumulators: Literal["device", "host"] = "device"
    exclude: tuple[Group, ...] = (
        "embedding",
        "head",
    )
    xi: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    prompts: tuple[str, ...] = ()  # asked of the model, for retention and rehearsal
    cache: str | None = None  # a folder that holds masks for other runs

    @model_validator(mode="before")
    @classmethod
    def _apply_method_defaults(cls, content: YAML) -> YAML:
        if not isinstance(content, dict):
            return content
        rule = RULES.get(str(content.get("method")))
        return {**(rule.defaults if rule else {}), **content}

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        if method in RULES or "." in method:
            return method
        raise ValueError(
            f"unknown method {method!r}; allowed: {', '.join(RULES)}, or a dotted path"
        )

    @field_validator("density", mode="before")
    @classmethod
    def _density_in_range(cls, density: YAML) -> YAML:
        return require_density(density)

    @field_validator("floor", "ceiling", mode="before")
    @classmethod
    def _bounds_in_range(cls, bound: YAML) -> YAML:
        for share in bound.values() if isinstance(bound, dict) else [bound]:
            _require_share(share, "share")
        return bound

    @field_validator("memory", mode="before")
    @classmethod
    def _memory_readable(cls, memory: str | int) -> str | int:
        parse_bytes(memory)
        return memory

    @model_validator(mode="after")
    def _require_consistent(self) -> "SelectionSettings":
        rule = RULES.get(self.method)
        if self.density == "auto" and rule is not None and rule.is_data_free:
            raise ValueError(f"density: auto weighs scores of data, and {self.method} has none")
        if isinstance(self.ceiling, float) and self.density != "auto":
            raise ValueError("ceiling: a number bounds density: auto; else map groups to shares")
        bound = bool(self.floor) or (isinstance(self.ceiling, dict) and bool(self.ceiling))
        if bound and (self.scope == "tensor" or not isinstance(self.density, float)):
            raise ValueError("floor and ceiling of groups go with one density, scope global")
        return self


def require_density(density: YAML) -> YAML:
    """The density as it stands; ValueError for what is no share, mapping of shares or auto."""
    if density == {}:
        raise ValueError(f"no group has a density; groups: {', '.join(GROUPS)}")
    if not isinstance(density, dict):
        if isinstance(density, str) and density != "auto":
            raise ValueError(f"density {density!r} is no share in (0, 1], no mapping and not auto")
        if density != "auto":
            _require_share(density, "density")
        return density
    for key, share in density.items():
        if key not in GROUPS and not set(str(key)) & set("*?[."):
            close = get_close_matches(str(key), GROUPS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"groups: {', '.join(GROUPS)}"
            raise ValueError(f"density: unknown group {key!r}; {hint} (or a pattern of names)")
        _require_share(share, "density")
    return density


def _require_share(value: Any, what: str) -> None:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not 0 < value <= 1:
        shown = float(value) if plain else repr(value)
        raise ValueError(f"{what} {shown} is out of (0, 1]")
