"""What `from_pretrained` makes of a checkpoint's files, without their values.

Which files are read, where each of their tensors goes, what is tied and what is left over: all of
that is asked of transformers, by its own functions and by loading onto the meta device, which takes
no memory and a moment. Rules of ours would be guesses, right for one version.
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
from mm_piece.families import hub_name
from mm_piece.models.base import (
    auto_class_of,
    load_family_config,
    raising_model_error,
    require_complete_load,
)


def find_weight_files(source: str, revision: str | None = None, **reading: Any) -> list[Path]:
    """The files that hold the weights of a folder or hub id, which are fetched; ModelError if none.

    `reading`: those of `models.READING`, here and below.
    """
    subfolder = reading.get("subfolder") or ""
    with raising_model_error(f"cannot read {source}"):
        config = load_family_config(source, revision, subfolder)
        found, _ = _get_resolved_checkpoint_files(
            source,
            variant=reading.get("variant"),
            gguf_file=None,
            use_safetensors=reading.get("use_safetensors"),
            user_agent=None,
            is_remote_code=False,
            transformers_explicit_filename=config.to_dict().get("transformers_weights"),
            download_kwargs={"revision": revision, "subfolder": subfolder},
        )
    files = [Path(file) for file in found or ()]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(f"{source} has no {missing[0]}, which its index names")
    return files


def map_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of another format, mapped into memory by transformers' own reader."""
    with raising_model_error(f"{file} cannot be read"):
        found = load_state_dict(file)
    if odd := [key for key, value in found.items() if not isinstance(value, Tensor)]:
        raise ModelError(f"{file} holds {odd[0]!r}, which is no tensor")
    return found


@dataclass(frozen=True)
class Skeleton:
    """A model of a folder's files that has everything but values.

    `first` names for each live name the first one of the same weight; `ties` are the pairs that the
    configuration ties and the files hold apart: transformers ties them if they are equal.
    """

    family: str
    shapes_and_dtypes: dict[
        str, tuple[tuple[int, ...], torch.dtype]
    ]  # live name -> shape and dtype
    canonical_names: dict[str, str]
    ties: dict[str, str]
    unread: list[str]  # tensors of the files that are no weights of the model
    _rename_key: Callable[[str], tuple[str | None, bool]] = field(repr=False)

    def find_live_name(self, key: str) -> tuple[str | None, bool]:
        """Where a file's tensor goes, if anywhere, and whether it may be turned on its way."""
        return self._rename_key(key)

    def published_name_of(self, live: str) -> str:
        """The published name of a live one."""
        return hub_name(live, self.family)


def load_skeleton(folder: Path, dtype: torch.dtype, **reading: Any) -> Skeleton:
    """What `from_pretrained` makes of a folder; ModelError where it would have to invent values."""
    with raising_model_error(f"cannot load base {folder}"), _quiet_logging():
        config = load_family_config(str(folder), subfolder=reading.get("subfolder") or "")
        model, loaded = auto_class_of(config).from_pretrained(
            folder,
            dtype=dtype,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **reading,
        )
    require_complete_load(str(folder), loaded)
    live_parameters = dict(model.named_parameters(remove_duplicate=False))
    owners: dict[int, str] = {}
    canonical_names = {
        name: owners.setdefault(id(weight), name) for name, weight in live_parameters.items()
    }
    pairs = model.all_tied_weights_keys.items()
    return Skeleton(
        family=model.config.model_type,
        shapes_and_dtypes={
            name: (tuple(weight.shape), weight.dtype) for name, weight in live_parameters.items()
        },
        canonical_names=canonical_names,
        ties={
            target: source
            for target, source in pairs
            if canonical_names[target] != canonical_names[source]
        },
        unread=sorted(loaded["unexpected_keys"]),
        _rename_key=_make_key_renaming(model),
    )


def _make_key_renaming(model: Any) -> Callable[[str], tuple[str | None, bool]]:
    """The function from a key of a file to a live name, as transformers renames while it loads."""
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def rename_key(key: str) -> tuple[str | None, bool]:
        name, converted = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:  # it has its live name already
            name, converted = rename_source_key(key, [], [], prefix, state)
        return (name if name in parameters else None), converted is not None

    return rename_key


@contextmanager
def _quiet_logging() -> Iterator[None]:
    """Context without transformers' own report of a load: the model's own load makes it."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
