"""A checkpoint folder as a stream of weights: published names, one dtype, slice by slice.

Only one slice is in memory at a time, so that a checkpoint of any size goes through. Files may have
a weight *transposed*, with its last two dimensions swapped, see `deltas.file_layout`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import Tensor

from mm_piece.deltas.delta import compute_fingerprint, compute_identity
from mm_piece.deltas.file_layout import (
    layout_of,
    transpose_shape,
)
from mm_piece.distributed import shape_of
from mm_piece.dtypes import as_dtype, dtype_name
from mm_piece.errors import ModelError, as_path
from mm_piece.files.safetensors import MappedTensor, read_tensor_locations
from mm_piece.models.base import raising_model_error
from mm_piece.models.checkpoint_tensor import (
    CheckpointTensor,
    Location,
    compute_weights_fingerprint,
    find_layout,
)
from mm_piece.models.skeleton import (
    find_weight_files,
    load_skeleton,
    map_tensors,
)

_SETTINGS_PATTERNS = [
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
]


class Checkpoint:
    """The weights of a folder as `from_pretrained` loads them, in the order of its files.

    A weight's *live name* is its name in the model that transformers builds.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str | torch.dtype | None = None,
        **reading: Any,
    ) -> None:
        """Read the headers of the folder's files.

        `dtype` is what the weights are cast to, by default their own. `reading` are options of
        `READING_OPTIONS`. Raises ModelError for what cannot be loaded.
        """
        self.root = folder
        self.reading = reading
        self.folder = folder / reading.get("subfolder", "")

        located = _locate_tensors(folder, reading)
        if dtype is None:
            dtype = _dtype_of(located)
        self.dtype = as_dtype(dtype)
        self.skeleton = load_skeleton(folder, self.dtype, **reading)
        self.family = self.skeleton.family

        found: list[CheckpointTensor] = []
        for key, location in located.items():
            tensor = self._to_live_tensor(key, location)
            found.append(tensor)
        copies = self._find_tied_copies(found)
        names = self._map_published_names(copies)
        # Ties of the configuration whose two values differ in the files.
        untied = self.skeleton.ties.keys() - copies
        self.has_untied = bool(untied)

        self.weights: list[CheckpointTensor] = []
        for tensor in found:
            if tensor.name not in copies:
                name = names.get(tensor.name, "")
                self.weights.append(replace(tensor, name=name))
        published_names = dict.fromkeys(names.values())
        self.parameters = self._order_weights(published_names)

        self.tied: dict[str, str] = {}  # published name -> that of the weight it is tied to
        for live, name in names.items():
            other = self.skeleton.published_name_of(live)
            if other != name:
                self.tied[other] = name

    def _to_live_tensor(
        self,
        key: str,
        location: Location,
    ) -> CheckpointTensor:
        """Return a tensor of the files under its live name; under none if it is no weight."""
        name, can_transpose = self.skeleton.find_live_name(key)
        if name is None:
            dtype = location.dtype
            if dtype.is_floating_point:
                dtype = self.dtype
            return CheckpointTensor(key, "", location, dtype, location.shape)

        shape, dtype = self.skeleton.shapes_and_dtypes[name]
        allowed_shapes = [shape]
        if can_transpose:
            allowed_shapes.append(transpose_shape(shape))
        if location.shape not in allowed_shapes:
            found = list(location.shape)
            expected = list(shape)
            raise ModelError(f"{location.file}: {key} is {found}, the model has {expected}")
        return CheckpointTensor(key, name, location, dtype, shape)

    def _find_tied_copies(
        self,
        found: Sequence[CheckpointTensor],
    ) -> set[str]:
        """Return the live names that the configuration ties and the files have a second time.

        Where the two values differ, transformers does not tie them, whatever the configuration
        says.
        """
        live: dict[str, CheckpointTensor] = {}
        for weight in found:
            if weight.name in live:
                other = live[weight.name]
                keys = f"{other.key} and {weight.key}"
                raise ModelError(f"{self.folder} holds {weight.name} twice: as {keys}")
            if weight.name:
                live[weight.name] = weight

        copies: set[str] = set()
        for target, source in self.skeleton.ties.items():
            if _has_same_values(live[target], live[source]):
                copies.add(target)
        return copies

    def _map_published_names(self, copies: set[str]) -> dict[str, str]:
        """Return the published name of each live one; tied ones share that of the model's first."""
        canonical_names = dict(self.skeleton.canonical_names)
        for target in copies:
            source = self.skeleton.ties[target]
            # In the order of the model, which is that of `canonical_names`.
            first = next(name for name in canonical_names if name in (target, source))
            canonical_names[target] = first
            canonical_names[source] = first

        published: dict[str, str] = {}
        for live, canonical in canonical_names.items():
            published[live] = self.skeleton.published_name_of(canonical)
        return published

    def _order_weights(self, names: Iterable[str]) -> dict[str, CheckpointTensor]:
        """Return the weights of the model, in its order; ModelError if the files lack one."""
        named = {weight.name: weight for weight in self.weights}
        ordered: dict[str, CheckpointTensor] = {}
        missing: list[str] = []
        for name in names:
            if name in named:
                ordered[name] = named[name]
            else:
                missing.append(name)

        if missing:
            raise ModelError(f"{self.folder} lacks {len(missing)} weights, {missing[0]} among them")
        return ordered

    def require_same_weights(self, live: Mapping[str, Tensor]) -> None:
        """Raise ModelError unless these are the weights in the files, by published names.

        A store could not be rebuilt from a model that has anything besides its files.
        """
        found: dict[str, str] = {}
        for name, tensor in live.items():
            shape = shape_of(tensor)
            found[name] = _format_kind(shape, tensor.dtype)
        expected: dict[str, str] = {}
        for name, weight in self.parameters.items():
            expected[name] = _format_kind(weight.shape, weight.dtype)

        names = found.keys() | expected.keys()
        for name in sorted(names):
            loaded = found.get(name, "none")
            stored = expected.get(name, "none")
            if loaded != stored:
                raise ModelError(
                    f"{self.folder}: the loaded model is not what its files hold: {name}: "
                    f"loaded {loaded}, in the files {stored} (do options under model: change it?)"
                )

        # Names, shapes and dtypes agree. Values may still differ, as far as a sample shows.
        if compute_fingerprint(live) != self.compute_fingerprint():
            raise ModelError(f"{self.folder}: the loaded model has other values than its files")

    def require_finite(self) -> None:
        """Raise ModelError for a weight with an infinite or NaN entry; reads everything.

        The entries are those of the model: a number that a narrower dtype cannot represent has
        become infinite.
        """
        for name, weight in self.parameters.items():
            for first, piece in weight.iter_pieces():
                low, high = piece.aminmax()  # one pass; a NaN makes both NaN
                if low.isfinite() and high.isfinite():
                    continue

                not_finite = ~piece.isfinite()
                positions = not_finite.nonzero()
                at = int(positions[0])
                dtype = dtype_name(piece.dtype)
                raise ModelError(
                    f"{self.folder}: {name} holds {float(piece[at])} in {dtype} (entry "
                    f"{first + at}), which no training can use; mend the base's weights, or "
                    "take another dtype if their files hold finite ones"
                )

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        """Shapes in the files, of the weights that files may have transposed."""
        return find_layout(self.parameters)

    def make_reading_record(self) -> dict[str, Any]:
        """Return what a store records of how this checkpoint's files are read."""
        record: dict[str, Any] = {}
        if self.reading:
            record["reading"] = self.reading
        layout = self.layout
        record |= layout_of(layout, layout)
        return record

    def compute_fingerprint(self) -> str:
        """Return the fingerprint of the model that `load_base` makes of this folder."""
        return compute_weights_fingerprint(self.parameters)

    def compute_full_digest(self) -> str:
        """Return the full digest of that model; reads everything."""
        digests = {}
        for name, weight in self.parameters.items():
            digest = weight.compute_digest()
            digests[name] = (weight.shape, weight.dtype, digest)
        return compute_identity(digests)


def fetch_checkpoint(
    source: str | Path,
    revision: str | None = None,
    **reading: Any,
) -> Path:
    """Return the folder of a checkpoint, downloaded if `source` is a hub id."""
    if as_path(source, "a checkpoint").is_dir():
        return Path(source)

    hub_id = str(source)
    if hub_id.count("/") > 1 or hub_id[:1] in "/.":
        raise ModelError(f"{source}: there is no such folder")

    # Finding the files of weights downloads them; settings and tokenizer come after.
    find_weight_files(hub_id, revision, **reading)
    with raising_model_error(f"cannot get {source}"):
        folder = huggingface_hub.snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=_SETTINGS_PATTERNS,
        )
    return Path(folder)


def _locate_tensors(
    folder: Path,
    reading: Mapping[str, Any],
) -> dict[str, Location]:
    """Return where each tensor of a folder's files is, by its key."""
    located: dict[str, Location] = {}
    files = find_weight_files(str(folder), **reading)
    for file in files:
        if file.suffix == ".safetensors":
            located |= read_tensor_locations(file)
            continue
        for key, tensor in map_tensors(file).items():
            located[key] = MappedTensor(file, tensor)
    return located


def _dtype_of(located: Mapping[str, Location]) -> torch.dtype:
    """Return the dtype of a checkpoint: that of its largest tensor."""
    sizes = {key: location.size for key, location in located.items()}
    largest = max(sizes, key=sizes.__getitem__)
    return as_dtype(dtype_name(located[largest].dtype))


def _has_same_values(
    left: CheckpointTensor,
    right: CheckpointTensor,
) -> bool:
    """Return whether two weights have the same numbers, which is when transformers ties them."""
    if left.shape != right.shape:
        return False

    pairs = zip(
        left.iter_pieces(),
        right.iter_pieces(),
        strict=True,
    )
    return all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in pairs)


def _format_kind(shape: Sequence[int], dtype: torch.dtype) -> str:
    name = dtype_name(dtype)
    return f"{name} {list(shape)}"
