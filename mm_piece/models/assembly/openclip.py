"""The only module that imports open_clip: load a vision encoder, or say plainly why not."""

from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from mm_piece.errors import ModelError

SUPPORTED = "supported: plain ViT towers (ViT-B-32, ViT-L-14, …) and SigLIP's (ViT-B-16-SigLIP, …)"
RANDOM = "random"  # in place of the name of weights: untrained ones, for trials
_SCHEMES = ("hf-hub:", "local-dir:")  # open_clip's own prefixes, of a source with weights

# Settings of a vision encoder that transformers' models have nothing equal for.
_UNSUPPORTED_SETTINGS = {
    "attentional_pool": "has attentional pooling",
    "ls_init_value": "has layer scale",
    "no_ln_pre": "has no norm before its layers",
    "qk_norm": "has normed queries and keys",
    "scaled_cosine_attn": "has cosine attention",
    "scale_heads": "has scaled heads",
    "scale_attn_inner": "has a norm inside its attention",
    "scale_attn": "has a norm after its attention",
    "scale_fc": "has a norm inside its MLP",
}


def is_openclip_name(vision: str) -> bool:
    """Return whether `vision` names a model of open_clip, and not a folder or hub id."""
    if vision.startswith(_SCHEMES):
        return True
    if Path(vision).is_dir():
        return False
    if "/" not in vision:
        return True
    # a hub id, or an architecture as the paper writes it
    if find_spec("open_clip") is None:
        return False
    return _architecture_of(vision) in _import_open_clip().list_models()


def _architecture_of(vision: str) -> str:
    """Return open_clip's way to write an architecture: ViT-B-32 for the paper's ViT-B/32."""
    return vision.replace("/", "-")


def load_visual(vision: str, pretrained: str | None) -> nn.Module:
    """Load the vision encoder of an open_clip model, float32, with its `preprocess_cfg`.

    `vision` is an architecture, `hf-hub:owner/name` or `local-dir:folder`. `pretrained` is one of
    open_clip's tags for an architecture, a checkpoint file, or `random`. Raises ModelError; for
    what cannot work, before anything is downloaded.
    """
    open_clip = _import_open_clip()
    name = vision if vision.startswith(_SCHEMES) else _architecture_of(vision)
    config = _read_model_config(open_clip, name)
    _require_convertible(config.get("vision_cfg", {}), name)

    has_quick_gelu = bool(config.get("quick_gelu"))
    _require_pretrained(open_clip, name, pretrained, has_quick_gelu)

    try:
        if pretrained == RANDOM:
            model = open_clip.create_model(name, load_weights=False, pretrained_text=False)
        else:
            model = open_clip.create_model_from_pretrained(
                name,
                pretrained,
                return_transform=False,
            )
    except Exception as error:  # open_clip calls many readers of files, each with its own errors
        what = f"{name} {pretrained}" if pretrained else name
        raise ModelError(f"open_clip cannot load {what}: {_format_error(error)}") from error
    return model.visual


def _import_open_clip() -> Any:
    """Import open_clip; ModelError if it is not installed."""
    try:
        import open_clip
    except ImportError as error:
        raise ModelError("assemble needs open_clip: pip install 'mm-piece[open_clip]'") from error
    return open_clip


def _read_model_config(open_clip: Any, name: str) -> dict[str, Any]:
    """Read the settings of a model; ModelError if there are none, with the nearest names."""
    try:
        config = open_clip.get_model_config(name)
    except Exception as error:  # of a folder or the hub, with as many kinds of errors
        raise ModelError(
            f"open_clip cannot read the settings of {name}: {_format_error(error)}"
        ) from error

    if config is None:
        close = get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.5)
        near = close or ["ViT-B-32"]
        raise ModelError(
            f"open_clip has no architecture {name!r}; nearest: {', '.join(near)} "
            "(others: a folder or hub id of transformers, hf-hub:owner/name, local-dir:folder)"
        )
    return config


def _format_error(error: Exception) -> str:
    """Return an error's message in one line, cut off where it is long."""
    return " ".join(str(error).split())[:300]


def _require_convertible(settings: dict[str, Any], name: str) -> None:
    """Raise ModelError for a vision encoder whose settings show that it cannot be converted."""
    unsupported = (what for key, what in _UNSUPPORTED_SETTINGS.items() if settings.get(key))
    found = next(unsupported, None)
    if isinstance(settings.get("layers"), list):
        found = "is a ResNet"
    if "siglip" not in settings.get("timm_model_name", "siglip"):
        found = f"is timm's {settings['timm_model_name']}"

    if found:
        raise ModelError(f"{name} is not supported: its tower {found}; {SUPPORTED}")


def _require_pretrained(
    open_clip: Any,
    name: str,
    pretrained: str | None,
    has_quick_gelu: bool,
) -> None:
    """Raise ModelError unless `pretrained` names weights, and they suit the architecture."""
    if pretrained == RANDOM or name.startswith(_SCHEMES):
        if pretrained not in (None, RANDOM):
            raise ModelError(f"{name} brings its own weights; leave out {pretrained!r}")
        return

    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    is_file = bool(pretrained) and Path(pretrained).is_file()
    if not tag and not is_file:
        tags = [*open_clip.list_pretrained_tags_by_model(name), "a checkpoint file", RANDOM]
        problem = f"has no weights {pretrained!r}" if pretrained else "needs weights (--pretrained)"
        raise ModelError(f"{name} {problem}; allowed: {', '.join(tags)}")

    # open_clip itself only warns.
    if tag.get("quick_gelu") and not has_quick_gelu:
        raise ModelError(f"{pretrained!r} was trained with QuickGELU; use {name}-quickgelu")
