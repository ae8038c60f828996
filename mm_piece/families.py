"""Published hub names of a model's weights, and the group each of them belongs to.

A live name is what a module calls a weight. The same weight has had three of them over the
generations of transformers (as published, 4.52 to 5.5, from 5.6 on). Scores, masks and deltas use
the published name only, so the rules below turn any live name into it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    get_args,
)
from weakref import WeakKeyDictionary

from mm_piece.errors import ModelError, format_value

if TYPE_CHECKING:  # only the annotations need torch, and recipes are read without it
    from torch import Tensor, nn

RenamingRules = tuple[tuple[str, str], ...]
Group = Literal["vision", "projector", "language", "embedding", "head"]

GROUPS: tuple[str, ...] = get_args(Group)

# The first match wins, so the specific patterns stand before the general ones.
_GROUP_PATTERNS: tuple[tuple[str, Group], ...] = (
    (r"(^|\.)lm_head\.", "head"),
    (r"(^|\.)embed_tokens\.", "embedding"),
    (
        r"(^|\.)(multi_modal_projector|merger|connector|projector|aligner|mlp_AR"
        r"|vision_projector|vision_adapter)\.|deepstack_merger_list|image_newline",
        "projector",
    ),
    (r"(^|\.)(vision_tower|vision_model|vision_encoder|visual)\.", "vision"),
    (r"", "language"),
)


def group_of(name: str) -> Group:
    """Return the group of a published weight name."""
    matching: Iterator[Group] = (
        group for pattern, group in _GROUP_PATTERNS if re.search(pattern, name)
    )
    return next(matching)  # the last pattern matches any name


def parameter_location(name: str) -> tuple[str, int | None, str]:
    """Return group, layer number (None outside the stacked layers) and module of a weight.

    `name` is its published name.
    """
    stem = name
    if name.endswith((".weight", ".bias")):
        stem = name.rsplit(".", 1)[0]

    layer = re.search(r"\.(?:layers?|blocks)\.(\d+)\.", name)
    module = re.search(r"[^.]+(?:\.\d+)?$", stem)  # `mlp.0`: a number alone says nothing
    return (
        group_of(name),
        int(layer[1]) if layer else None,
        module[0] if module else stem,
    )


def hub_name(live: str, model_type: str) -> str:
    """Return the published name of a live parameter, for any generation of transformers.

    Raises ModelError for an unknown family.
    """
    for pattern, replacement in rules_of(model_type):
        live = re.sub(pattern, replacement, live)
    return live


def rules_of(model_type: str) -> RenamingRules:
    """Return the renaming rules of a family; raise ModelError, with the known ones, for others."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"unknown model family {model_type!r}; known: {known}")
    return FAMILIES[model_type]


def has_own_rules(config: Any) -> bool:
    """Return whether `rules_of` knows the names of all parts of a model with this configuration.

    LLaVA takes any vision tower of transformers; the rules know those that are published in it.
    """
    family = config.model_type
    if FAMILIES.get(family) is not _LLAVA:
        return family in FAMILIES
    return config.vision_config.model_type in _LLAVA_TOWERS


def make_translator(model: nn.Module) -> Callable[[str], str]:
    """Return the function from live to published names; a plain torch module keeps its own.

    Raises ModelError for a family without published names, see `published_names`.
    """
    config = getattr(model, "config", None)  # what tells a transformers model from a plain one
    if config is None:
        return lambda live: live
    if has_own_rules(config) or not is_transformers(model):
        return lambda live: hub_name(live, config.model_type)

    translator = _translators.get(model)
    if translator is None:
        from mm_piece.published_names import PublishedNames

        translator = _translators[model] = PublishedNames(model)
    return translator


def inner_model(model: nn.Module) -> nn.Module:
    """Return the transformers model that a module wraps (DDP, torch.compile, one of your own).

    A module without one is returned itself. Raises ModelError for anything but a module, and for a
    module with several such models.
    """
    from torch.nn import Module

    if not isinstance(model, Module):
        raise ModelError(f"the model must be a torch module, not {format_value(model)}")

    found = list(_iter_outermost_models(model))
    if len(found) > 1:
        raise ModelError(f"{type(model).__name__} holds {len(found)} models; name one of them")
    return found[0] if found else model


def is_transformers(module: nn.Module) -> bool:
    """Return whether a module is a model of transformers, without importing the library."""
    return any(kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__)


def _iter_outermost_models(module: nn.Module) -> Iterator[nn.Module]:
    if is_transformers(module):
        yield module
        return
    for child in module.children():
        yield from _iter_outermost_models(child)


def why_fixed(weight: Tensor) -> str:
    """Return why entries of a weight cannot be read, scored and written; "" if they can."""
    from torch import Tensor
    from torch.nn import Parameter

    if weight.is_meta:
        return "has no values here: it lies on the meta device"
    if not weight.is_floating_point():
        return f"is {weight.dtype}, as quantisation leaves it"
    if type(weight) not in (Tensor, Parameter):
        return f"is a {type(weight).__name__}, as quantisation and parallelism leave it"
    return ""


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters under their published names, in model order.

    A tied weight appears once. Of a wrapper the parameters are those of the model inside.
    """
    model = inner_model(model)
    translate = make_translator(model)
    named = {translate(live): parameter for live, parameter in model.named_parameters()}
    if len(named) != sum(1 for _ in model.named_parameters()):
        raise ModelError("two parameters share one published name; the family's rules need mending")

    # A model keeps the order in which its weights were first seen here, even if something takes
    # them out and puts them back (a parametrization does): masks, ties and random streams follow
    # this order.
    order = _orders.setdefault(model, tuple(named))
    ordered = {name: named[name] for name in order if name in named}
    ordered.update(named)  # weights that are new come last
    return ordered


_orders: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()
_translators: WeakKeyDictionary[nn.Module, Callable[[str], str]] = WeakKeyDictionary()


# Live name (any generation), or a name in a file, to published name, applied in order.
_LLAVA: RenamingRules = (
    (r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.|image_newline$)", ""),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (
        r"^vision_tower\.(?=(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)",
        "vision_tower.vision_model.",
    ),
)
_QWEN2_VL: RenamingRules = (
    (r"^model\.visual\.", "visual."),
    (r"^model\.language_model\.", "model."),
)
_QWEN3_VL: RenamingRules = ((r"^(?=visual\.|language_model\.)", "model."),)

# Vision towers whose names `_LLAVA` knows, by the `model_type` of their configuration.
_LLAVA_TOWERS = ("clip_vision_model", "siglip_vision_model", "pixtral")

# Families whose names are known for every version of transformers, by the `model_type` of their
# configuration. The names of language models have never changed. Those of all other families come
# from transformers, see `published_names`.
FAMILIES: dict[str, RenamingRules] = {
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": _LLAVA,
    "qwen2_vl": _QWEN2_VL,
    "qwen2_5_vl": _QWEN2_VL,
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": _QWEN3_VL,
    "llama": (),
    "mistral": (),
    "gemma2": (),
    "qwen2": (),
    "qwen3": (),
}
