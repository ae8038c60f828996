"""The published name, group, layer and module of every weight of every family's tiny base.

python tests/support/names_table.py        prints the table that tests/golden/names.txt pins
"""

import sys
from pathlib import Path

import torch
from newer_families import ALL_TEXT, NEWER
from tiny_families import BUILDERS
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from mm_piece.families import parameter_location, weights

GOLDEN = Path(__file__).parents[1] / "golden" / "names.txt"


def table() -> str:
    """One line for each weight of the first layer, under its live name."""
    lines = []
    for family, build in (BUILDERS | NEWER).items():
        auto = AutoModelForCausalLM if family in ALL_TEXT else AutoModelForImageTextToText
        with torch.device("meta"):
            model = auto.from_config(build()[0])
        lines.append(f"# {family}")
        live = (name for name, _ in model.named_parameters())
        for name, published in zip(live, weights(model), strict=True):
            group, layer, module = parameter_location(published)
            if layer in (None, 0):
                lines.append(f"{name} -> {published}  [{group}, {layer}, {module}]")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
