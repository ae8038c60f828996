"""The options under a recipe's `model:`, and what becomes of each.

They are the keywords of transformers' `from_pretrained`. The tables are complete: a test compares
them to what `from_pretrained` reads. It would swallow any other keyword, or change the base's
configuration by it, which no store records.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from mm_piece.errors import format_value
from mm_piece.recipe.parsing import is_mapping

HONOURED = {
    "dtype": "the weights' dtype, which a store records",
    "attn_implementation": "how attention is computed",
    "experts_implementation": "how experts are computed; refused where there are none",
    "device_map": "where the weights lie",
    "max_memory": "of each device, for a device_map that transformers makes",
    "use_safetensors": "which files are read",
    "variant": "which files are read",
    "subfolder": "which files are read",
    "disable_mmap": "how files are read",
}
# Those that select a base's files of weights. A store records them: other files would be another
# base.
READING_OPTIONS = ("subfolder", "variant", "use_safetensors")
ALIASES = {"torch_dtype": "dtype"}
HARMLESS = {
    "low_cpu_mem_usage": "transformers 5 reads it no more",
    "offload_state_dict": "transformers 5 reads it no more",
    "output_loading_info": "always asked for",
    "tqdm_class": "no bars are shown while a base loads",
}
_ENVIRONMENT = "the processor and the configuration are read too: set {}"
_OTHER_WEIGHTS = "deltas are of the weights as published"
_DIVIDED = "processes divide the work by train: {deepspeed: …}"
_INTERNAL = "transformers uses it inside"
# Each with the reason. A recipe may still write the value that changes nothing (`_NEUTRAL`).
REFUSED = {
    "revision": "it is a key beside `model`",
    # what every download of Hugging Face reads, by environment variables
    "cache_dir": _ENVIRONMENT.format("HF_HUB_CACHE"),
    "token": _ENVIRONMENT.format("HF_TOKEN"),
    "proxies": _ENVIRONMENT.format("HTTPS_PROXY"),
    "local_files_only": _ENVIRONMENT.format("HF_HUB_OFFLINE=1"),
    "force_download": "`hf download --force-download` does it once",
    "mirror": "transformers 5 reads it no more",
    # code from a repository
    "trust_remote_code": "bases are of transformers' own classes",
    "code_revision": "bases are of transformers' own classes",
    "weights_only": "false would run what a file of weights holds",
    # weights that are not those of the files
    "ignore_mismatched_sizes": "weights of another shape would be drawn at random",
    "quantization_config": _OTHER_WEIGHTS,
    "state_dict": _OTHER_WEIGHTS,
    "key_mapping": "weights go by their published names",
    "gguf_file": _OTHER_WEIGHTS,
    "from_tf": _OTHER_WEIGHTS,
    "from_flax": _OTHER_WEIGHTS,
    "adapter_kwargs": "merge the adapter into the base first",
    "adapter_name": "merge the adapter into the base first",
    # other layers than the published model has
    "fusion_config": "it replaces layers by others",
    "use_kernels": "it replaces layers by others",
    "kernel_config": "it replaces layers by others",
    "allow_all_kernels": "it replaces layers by others",
    # places where weights cannot be trained
    "offload_folder": "weights that lie on a disk cannot be trained",
    "offload_buffers": "weights that lie elsewhere cannot be trained",
    # other ways to divide a model
    "distributed_config": _DIVIDED,
    "device_mesh": _DIVIDED,
    "tp_plan": _DIVIDED,
    "tp_size": _DIVIDED,
    # what the folder or hub id says itself
    "config": "a base is one folder or hub id, its configuration in it",
    "generation_config": "answers are greedy",
    "model_type": "a base is one folder or hub id, its configuration in it",
    "_commit_hash": _INTERNAL,
    "_fast_init": _INTERNAL,
    "_from_auto": _INTERNAL,
    "_from_pipeline": _INTERNAL,
}
# Values of `device_map` for which transformers divides the layers itself.
AUTOMATIC_MAPS = (
    "auto",
    "balanced",
    "balanced_low_0",
    "sequential",
)
_WITHOUT_VALUES = ("meta", "disk")
# Types, and how a message says them.
_FLAG = (bool, "true or false")
_TEXT = (str, "text")
_BY_SUBMODEL = ((str, dict), "text, or a mapping from parts of the model")
_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "use_safetensors": _FLAG,
    "disable_mmap": _FLAG,
    "variant": _TEXT,
    "subfolder": _TEXT,
    "attn_implementation": _BY_SUBMODEL,
    "experts_implementation": _BY_SUBMODEL,
    "max_memory": (dict, "a mapping from devices to sizes"),
}
# Refused options whose neutral value is not simply false or empty.
_NEUTRAL = {"weights_only": True, "adapter_name": "default"}


def require_options(options: Mapping[str, object]) -> dict[str, Any]:
    """Return the options that loading a base takes, under their current names.

    Raises ValueError for an unknown option (with the nearest known one), for a refused one (with
    the reason), and for two names of one option that disagree.
    """
    found: dict[str, Any] = {}

    for written, value in options.items():
        key = ALIASES.get(written, written)
        _require_known(key)
        if key in REFUSED and not _is_neutral(key, value):
            raise ValueError(f"{key!r} is not an option here: {REFUSED[key]}")

        if key in found:
            first, second = _format_value(found[key]), _format_value(value)
            if first != second:
                raise ValueError(f"{key} is {first}, and {second} by another name")

        # `dtype: null` must not become the default: it is refused where a base is loaded
        if key in HONOURED and (value is not None or key == "dtype"):
            _require_type(key, value)
            found[key] = value

    _require_devices(found)
    return found


def _require_type(key: str, value: object) -> None:
    kinds, words = _TYPES.get(key, (object, ""))
    if not isinstance(value, kinds):
        raise ValueError(f"{key} must be {words}, not {format_value(value)}")


def _require_devices(options: Mapping[str, object]) -> None:
    """Raise ValueError for weights without values, and for a bound that nothing reads."""
    placed = options.get("device_map")
    devices = placed.values() if is_mapping(placed) else [placed]

    for device in devices:
        name = str(device).partition(":")[0]
        if name in _WITHOUT_VALUES:
            raise ValueError(
                f"device_map: weights on {name!r} have no values to train; name devices such as "
                f"cpu or cuda:0, or one of {', '.join(AUTOMATIC_MAPS)}"
            )

    if options.get("max_memory") and placed not in AUTOMATIC_MAPS:
        raise ValueError(
            f"max_memory does nothing without device_map: {' or '.join(AUTOMATIC_MAPS)}; leave "
            "it out"
        )


def _require_known(key: str) -> None:
    if key in HONOURED | HARMLESS | REFUSED:
        return

    hint = f"allowed: {', '.join(HONOURED)}"
    # a refused option is never suggested
    if close := get_close_matches(key, [*HONOURED, *ALIASES], n=1):
        hint = f"did you mean {close[0]!r}?"
    raise ValueError(f"unknown option {key!r}; {hint}")


def _is_neutral(key: str, value: object) -> bool:
    """Return whether a refused option's value asks for nothing."""
    if value is None:
        return True
    if key in _NEUTRAL:
        return value == _NEUTRAL[key]
    return not value


def _format_value(value: object) -> str:
    # a dtype may come as torch's own object, whose text has the prefix
    return str(value).removeprefix("torch.")
