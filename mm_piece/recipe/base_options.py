"""What `model:` may say: every keyword of transformers' `from_pretrained`, and what becomes of it.

The lists are complete: a test compares them to what `from_pretrained` reads. What stands in none of
them would be swallowed there, or would change the base's configuration, which no store records.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from mm_piece.errors import format_value

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
# Each with the reason; the value that changes nothing may be written all the same.
REFUSED = {
    "revision": "it is a key beside `model`",
    "cache_dir": _ENVIRONMENT.format("HF_HUB_CACHE"),
    "token": _ENVIRONMENT.format("HF_TOKEN"),
    "proxies": _ENVIRONMENT.format("HTTPS_PROXY"),
    "local_files_only": _ENVIRONMENT.format("HF_HUB_OFFLINE=1"),
    "force_download": "`hf download --force-download` does it once",
    "mirror": "transformers 5 reads it no more",
    "trust_remote_code": "bases are of transformers' own classes",
    "code_revision": "bases are of transformers' own classes",
    "weights_only": "false would run what a file of weights holds",
    "ignore_mismatched_sizes": "weights of another shape would be drawn at random",
    "quantization_config": _OTHER_WEIGHTS,
    "state_dict": _OTHER_WEIGHTS,
    "key_mapping": "weights go by their published names",
    "gguf_file": _OTHER_WEIGHTS,
    "from_tf": _OTHER_WEIGHTS,
    "from_flax": _OTHER_WEIGHTS,
    "adapter_kwargs": "merge the adapter into the base first",
    "adapter_name": "merge the adapter into the base first",
    "fusion_config": "it replaces layers by others",
    "use_kernels": "it replaces layers by others",
    "kernel_config": "it replaces layers by others",
    "allow_all_kernels": "it replaces layers by others",
    "offload_folder": "weights that lie on a disk cannot be trained",
    "offload_buffers": "weights that lie elsewhere cannot be trained",
    "distributed_config": _DIVIDED,
    "device_mesh": _DIVIDED,
    "tp_plan": _DIVIDED,
    "tp_size": _DIVIDED,
    "config": "a base is one folder or hub id, its configuration in it",
    "generation_config": "answers are greedy",
    "model_type": "a base is one folder or hub id, its configuration in it",
    "_commit_hash": _INTERNAL,
    "_fast_init": _INTERNAL,
    "_from_auto": _INTERNAL,
    "_from_pipeline": _INTERNAL,
}
AUTOMATIC_MAPS = (
    "auto",
    "balanced",
    "balanced_low_0",
    "sequential",
)  # maps that transformers makes
_WITHOUT_VALUES = ("meta", "disk")
_FLAG, _TEXT = (bool, "true or false"), (str, "text")
_BY_SUBMODEL = ((str, dict), "text, or a mapping from parts of the model")
_TYPES: dict[str, tuple[Any, str]] = {
    "use_safetensors": _FLAG,
    "disable_mmap": _FLAG,
    "variant": _TEXT,
    "subfolder": _TEXT,
    "attn_implementation": _BY_SUBMODEL,
    "experts_implementation": _BY_SUBMODEL,
    "max_memory": (dict, "a mapping from devices to sizes"),
}
_NEUTRAL = {"weights_only": True, "adapter_name": "default"}


def require_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that loading a base takes, under the names of today.

    Raises ValueError for one that is unknown, with the nearest known one, or refused, with the
    reason, and for two names of one option that disagree.
    """
    found: dict[str, Any] = {}
    for written, value in options.items():
        key = ALIASES.get(written, written)
        _require_known(key)
        if key in REFUSED and not _is_neutral(key, value):
            raise ValueError(f"{key!r} is not an option here: {REFUSED[key]}")
        if key in found and _format_value(found[key]) != _format_value(value):
            raise ValueError(
                f"{key} is {_format_value(found[key])}, and {_format_value(value)} by another name"
            )
        if key in HONOURED and (value is not None or key == "dtype"):
            _require_type(key, value)
            found[key] = value
    _require_devices(found)
    return found


def _require_type(key: str, value: Any) -> None:
    kinds, words = _TYPES.get(key, (object, ""))
    if not isinstance(value, kinds):
        raise ValueError(f"{key} must be {words}, not {format_value(value)}")


def _require_devices(options: Mapping[str, Any]) -> None:
    """Raise ValueError for weights without values, and for a bound that nothing reads."""
    placed = options.get("device_map")
    for device in placed.values() if isinstance(placed, Mapping) else [placed]:
        if (name := str(device).partition(":")[0]) in _WITHOUT_VALUES:
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
    if key not in HONOURED | HARMLESS | REFUSED:
        close = get_close_matches(key, [*HONOURED, *ALIASES], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(HONOURED)}"
        raise ValueError(f"unknown option {key!r}; {hint}")


def _is_neutral(key: str, value: Any) -> bool:
    return value is None or (value == _NEUTRAL[key] if key in _NEUTRAL else not value)


def _format_value(value: Any) -> str:
    return str(value).removeprefix("torch.")
