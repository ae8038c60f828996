"""Whether the parts of a base fit each other: tokenizer and embedding, processor and vision tower.

A tokenizer that got tokens for which the embedding did not grow, or a processor that leaves room
for another number of image features than the tower makes, fails deep inside the model, at the first
row that meets it. So the model without values is asked, before anything is written.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mm_piece.data import Example, has_image, token_ids_of, tokenizer_of
from mm_piece.errors import DataError, ModelError, format_error
from mm_piece.evaluation.answers import pad_token_of
from mm_piece.models.base import build_meta_model
from mm_piece.models.placement import require_devices, require_experts


class BaseParts:
    """The parts of one base: its processor, and its model without values."""

    def __init__(self, base: str, revision: str | None, processor: Any, **reading: Any) -> None:
        """Raises ModelError if batches could not be padded.

        `reading`: those of `models.READING`.
        """
        self.base, self.processor = base, processor
        self.model = build_meta_model(base, revision, **reading)
        self.num_embeddings: int = self.model.get_input_embeddings().num_embeddings
        self._feature_counts: dict[str, int | None] = {}
        pad = pad_token_of(tokenizer_of(processor))
        if pad is not None and pad >= self.num_embeddings:
            raise ModelError(f"{base}: the padding token {self._describe_unembedded(pad)}")

    def require_fit(self, example: Example, inputs: dict[str, Tensor]) -> None:
        """Raise unless the model has a place for every token and image of an encoded example.

        DataError for a token, ModelError for an image: the base fits none.
        """
        self._require_embedded(example, inputs["input_ids"][0].tolist())
        if has_image(inputs):
            self._require_image_token()
            self._require_features(example, inputs)

    @property
    def notes(self) -> list[str]:
        """What is no fault as long as no row needs it, and what could not be asked; a line each."""
        notes = []
        if num_unembedded := self._count_unembedded():
            notes.append(
                f"{self.base}: its tokenizer has {num_unembedded} tokens more than its "
                "embedding has "
                "rows; rows that hold one are refused"
            )
        if None in self._feature_counts.values():
            notes.append(
                f"{self.base}: its vision tower does not run without its values, so whether images "
                "fit it shows when it trains"
            )
        return notes

    def _count_unembedded(self) -> int:
        tokens = tokenizer_of(self.processor).get_vocab().values()
        return sum(token >= self.num_embeddings for token in tokens)

    def require_tokens(self, examples: Iterable[Example], generation: bool = False) -> None:
        """Raise DataError for the first of all examples that has a token without a row.

        They are looked through only if the tokenizer has such tokens.
        """
        if not self._count_unembedded():
            return
        for example in examples:
            self._require_embedded(example, token_ids_of(example, self.processor, generation))

    def _require_embedded(self, example: Example, ids: Sequence[int]) -> None:
        if max(ids, default=0) >= self.num_embeddings:
            raise DataError(
                f"{example.source} row {example.row}: its token "
                f"{self._describe_unembedded(max(ids))}"
            )

    def _describe_unembedded(self, token: int) -> str:
        text = tokenizer_of(self.processor).convert_ids_to_tokens(token)
        return (
            f"{text!r} ({token}) has no row in the embedding of {self.base}, which has "
            f"{self.num_embeddings}: tokens were added and the embedding was not resized"
        )

    def _require_image_token(self) -> None:
        own, theirs = self.model.config.image_token_id, self.processor.image_token_id
        if own != theirs:
            raise ModelError(
                f"{self.base}: the processor puts the token {self.processor.image_token!r} "
                f"({theirs}) where an image goes, the model looks for {own} "
                "(image_token_id in its config.json)"
            )

    def _require_features(self, example: Example, inputs: dict[str, Tensor]) -> None:
        """Raise ModelError unless there are as many places for image features as features."""
        num_placeholders = int((inputs["input_ids"] == self.processor.image_token_id).sum())
        num_features = self._cached_feature_count(example, inputs)
        if num_features is not None and num_features != num_placeholders:
            raise ModelError(
                f"{self.base}: the processor leaves {num_placeholders} places for the images of "
                f"{example.source} row {example.row}, the model makes {num_features} features "
                "of them: "
                "their patch_size, image size or vision_feature_select_strategy differ"
            )

    def _cached_feature_count(self, example: Example, inputs: dict[str, Tensor]) -> int | None:
        """How many image features the model makes, once for images of like sizes."""
        given = {key: inputs[key] for key in _IMAGE_INPUTS if key in inputs}
        sizes = [value.tolist() for key, value in given.items() if key != "pixel_values"]
        key = f"{list(given['pixel_values'].shape)} {sizes}"
        if key not in self._feature_counts:
            try:
                self._feature_counts[key] = _count_features(self.model, given)
            except ModelError as error:
                raise ModelError(f"{self.base}: {error}") from error
            except Exception as error:  # a tower raises whatever it trips over
                if "meta" not in str(error):
                    raise ModelError(
                        f"{self.base}: its vision tower cannot take the image of {example.source} "
                        f"row {example.row} as its processor makes it: {format_error(error)}"
                    ) from error
                self._feature_counts[key] = None  # it reads values, which meta tensors have not
        return self._feature_counts[key]


def require_options_fit(base: str, revision: str | None, options: Mapping[str, Any]) -> None:
    """Raise ModelError for options that `load_base` would trip over, as far as can be told.

    Nothing is loaded for it.
    """
    require_experts(build_meta_model(base, revision, **options), options)
    require_devices(options)


_IMAGE_INPUTS = ("pixel_values", "image_sizes", "image_grid_thw")


@torch.no_grad()
def _count_features(model: Any, given: dict[str, Tensor]) -> int:
    pixels = given["pixel_values"].to("meta", model.dtype)
    if "image_grid_thw" in given:  # patches in rows: their grid alone says how many are merged
        _require_patches(model, pixels.shape[-1])
        return (
            int(given["image_grid_thw"].prod(-1).sum()) // model.model.visual.spatial_merge_size**2
        )
    found = model.get_image_features(**{**given, "pixel_values": pixels}).pooler_output
    return sum(features.shape[:-1].numel() for features in found)


def _require_patches(model: Any, found: int) -> None:
    expected = model.model.visual.patch_embed.proj.weight[0].numel()
    if found != expected:
        raise ModelError(
            f"the processor makes patches of {found} values, the model takes {expected}: their "
            "patch_size or temporal_patch_size differ"
        )
