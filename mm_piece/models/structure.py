"""Whether a model has the parts that the names of its weights tell.

Deltas and reports have no model, so groups are read from names (`families.group_of`). A family
whose names say something else than its modules would be selected, excluded and counted wrongly.
"""

from typing import Any

from torch import nn

from mm_piece.errors import ModelError
from mm_piece.families import group_of, has_own_rules, make_translator


def require_groups(model: Any) -> None:
    """Raise ModelError for a weight of another group than its name tells.

    Modules are asked for by transformers' own getters. Vision towers may have the projector inside,
    as Qwen's do: there the name decides.
    """
    if has_own_rules(model.config):
        return

    parts = _find_parts(model)
    rest = {"projector"} if "vision" in parts else {"language"}
    translate = make_translator(model)
    for live, weight in model.named_parameters():
        name = translate(live)
        expected = rest
        for part, members in parts.items():
            if id(weight) in members:
                expected = _GROUPS_OF[part]
                break

        group = group_of(name)
        if group not in expected:
            raise ModelError(
                f"model family {model.config.model_type!r}: {name} would count as {group}, and is "
                f"{' or '.join(sorted(expected))}; such families cannot be trained yet"
            )


# Groups that the names of a part's weights may tell; a tied head has the embedding's name.
_GROUPS_OF = {
    "embedding": {"embedding"},
    "head": {"head", "embedding"},
    "vision": {"vision", "projector"},
    "language": {"language"},
}


def _find_parts(model: Any) -> dict[str, set[int]]:
    """Return the ids of the weights of each part; of a weight in several, the first one counts."""
    modules: dict[str, nn.Module | None] = {
        "embedding": model.get_input_embeddings(),
        "head": model.get_output_embeddings(),
        "vision": model.get_encoder(modality="image"),
        "language": model.get_decoder(),
    }
    whole = (model, model.base_model)
    parts = {}
    for part, module in modules.items():
        # a getter that finds no such part returns the model that was asked
        if module is None or (part != "language" and module in whole):
            continue
        parts[part] = {id(weight) for weight in module.parameters()}
    return parts
