"""Which modules hold a weight: more than one where weights are tied."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Owner:
    """A module that holds a weight under this attribute, and what the module lies in."""

    attribute: str
    line: tuple[nn.Module, ...]  # the module itself, the one around it, … up to the model

    @property
    def module(self) -> nn.Module:
        """The module that holds the weight."""
        return self.line[0]

    def is_linear(self, attribute: str) -> bool:
        """Whether this is that attribute (weight, bias) of a linear layer and nothing derived."""
        return type(self.module) is nn.Linear and self.attribute == attribute


def owners_of(model: nn.Module) -> dict[int, list[Owner]]:
    """Every module that holds a given weight, by the weight's `id`."""
    found: dict[int, list[Owner]] = {}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        steps = path.split(".") if path else []
        around = [modules[".".join(steps[:end])] for end in range(len(steps) - 1, -1, -1)]
        for attribute, weight in module.named_parameters(recurse=False):
            found.setdefault(id(weight), []).append(Owner(attribute, (module, *around)))
    return found
