"""A *skeleton*: what `from_pretrained` makes of a checkpoint's files, without their values.

It tells which files are read, where each of their tensors goes, which weights are tied and which
tensors are left over. transformers answers all of that, by its own functions and by loading onto
the meta device, which takes no memory and a moment. Rules of our own would be guesses, right for
one version.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import _get_resolved_checkpoint_files, load_state_dict
from transformers.utils import logging

from mm_piece.errors import ModelError
from mm_piece.families import make_translator
from mm_piece.models.base import (
    auto_class_of,
    load_family_config,
    raising_model_error,
    require_complete_load,
)


def find_weight_files(
    source: str,
    revision: str | None = None,
    **reading: Any,
) -> list[Path]:
    """Return the files with the weights of a folder or hub id, downloaded if need be.

    `reading` are options of `READING_OPTIONS`, here and below. Raises ModelError if there are none.
    """
    subfolder = reading.get("subfolder") or ""
    with raising_model_error(f"cannot read {source}"):
        config = load_family_config(source, revision, subfolder)
        weights_file = config.to_dict().get("transformers_weights")
        found, _ = _get_resolved_checkpoint_files(
            source,
            variant=reading.get("variant"),
            gguf_file=None,
            use_safetensors=reading.get("use_safetensors"),
            user_agent=None,
            is_remote_code=False,
            transformers_explicit_filename=weights_file,
            download_kwargs={
                "revision": revision,
                "subfolder": subfolder,
            },
        )

    files = [Path(file) for file in found or ()]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"{source} has no {missing[0]}, which its index names")
    return files


def map_tensors(file: Path) -> dict[str, Tensor]:
    """Map the tensors of a file that is no safetensors file into memory, by transformers' reader.

    Raises ModelError for a file with anything but tensors.
    """
    with raising_model_error(f"{file} cannot be read"):
        found = load_state_dict(file)

    others = [key for key, value in found.items() if not isinstance(value, Tensor)]
    if others:
        raise ModelError(f"{file} holds {others[0]!r}, which is no tensor")
    return found


@dataclass(frozen=True)
class Skeleton:
    """A model of a folder's files that has everything but values.

    A *live name* is the name of a weight in the model that transformers builds. `canonical_names`
    maps each live name to the first one of the same weight. `ties` are pairs of weights that the
    configuration ties and the files have separately: transformers ties them if they are equal.
    """

    family: str
    shapes_and_dtypes: dict[str, tuple[tuple[int, ...], torch.dtype]]  # by live name
    canonical_names: dict[str, str]
    ties: dict[str, str]
    unread: list[str]  # tensors of the files that are no weights of the model
    _rename_key: Callable[[str], tuple[str | None, bool]] = field(repr=False)
    _translate: Callable[[str], str] = field(repr=False)

    def find_live_name(
        self,
        key: str,
    ) -> tuple[str | None, bool]:
        """Return the live name of a file's tensor, if any, and whether loading may transpose it."""
        return self._rename_key(key)

    def published_name_of(self, live: str) -> str:
        """Return the published name of a live one."""
        return self._translate(live)


def load_skeleton(
    folder: Path,
    dtype: torch.dtype,
    **reading: Any,
) -> Skeleton:
    """Load the skeleton of a folder; ModelError where `from_pretrained` would invent values."""
    subfolder = reading.get("subfolder") or ""
    with raising_model_error(f"cannot load base {folder}"), quiet_logging():
        config = load_family_config(str(folder), subfolder=subfolder)
        model, loaded = auto_class_of(config).from_pretrained(
            folder,
            dtype=dtype,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **reading,
        )
    require_complete_load(str(folder), loaded)

    owners: dict[int, str] = {}  # id of a parameter -> its first name
    canonical_names: dict[str, str] = {}
    shapes_and_dtypes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        canonical_names[name] = owners.setdefault(id(weight), name)
        shape = tuple(weight.shape)
        shapes_and_dtypes[name] = (shape, weight.dtype)

    ties: dict[str, str] = {}
    for target, source in model.all_tied_weights_keys.items():
        if canonical_names[target] != canonical_names[source]:
            ties[target] = source

    return Skeleton(
        family=model.config.model_type,
        shapes_and_dtypes=shapes_and_dtypes,
        canonical_names=canonical_names,
        ties=ties,
        unread=sorted(loaded["unexpected_keys"]),
        _rename_key=_make_key_renaming(model),
        _translate=make_translator(model),
    )


def _make_key_renaming(model: Any) -> Callable[[str], tuple[str | None, bool]]:
    """Return the function from a key of a file to a live name, as transformers loads the model.

    The function also returns whether loading converts the tensor, which may transpose it.
    """
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]

    state = model.state_dict()
    prefix = model.base_model_prefix
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def rename_key(key: str) -> tuple[str | None, bool]:
        name, converted = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:  # the key is a live name already
            name, converted = rename_source_key(key, [], [], prefix, state)

        live_name = name if name in parameters else None  # buffers are no weights
        return live_name, converted is not None

    return rename_key


@contextmanager
def quiet_logging() -> Iterator[None]:
    """Keep transformers from reporting a load while the block runs.

    The model's own load makes that report.
    """
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
