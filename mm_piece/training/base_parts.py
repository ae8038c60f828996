"""Checks that the parts of a base fit each other, before anything is written.

They are tokenizer and embedding, processor and vision encoder. A tokenizer may have more tokens
than the embedding has rows, or a processor may write another number of image placeholders than the
vision encoder makes features. Both would fail deep inside the model, at the first row with such a
token or image. A model on the meta device, without values, shows it in advance.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mm_piece.data import Example, has_image, token_ids_of
from mm_piece.data.processor import Processor, pad_token_of, tokenizer_of
from mm_piece.errors import DataError, ModelError, format_error
from mm_piece.models.base import build_meta_model
from mm_piece.models.placement import require_devices, require_experts


class BaseParts:
    """Processor of one base, and its model without values."""

    def __init__(
        self,
        base: str,
        revision: str | None,
        processor: Processor,
        **reading: Any,
    ) -> None:
        """Build the model without values.

        `reading` are the options of `build_meta_model`. Raises ModelError if the padding token has
        no embedding, so that no batch could be padded.
        """
        self.base = base
        self.processor = processor
        self.model = build_meta_model(base, revision, **reading)
        self.num_embeddings: int = self.model.get_input_embeddings().num_embeddings
        # by sizes of images; None: the vision encoder does not run without values
        self._feature_counts: dict[str, int | None] = {}

        pad = pad_token_of(tokenizer_of(processor))
        if pad is not None and pad >= self.num_embeddings:
            raise ModelError(f"{base}: the padding token {self._describe_unembedded(pad)}")

    def require_fit(self, example: Example, inputs: dict[str, Tensor]) -> None:
        """Raise unless the model can embed every token and image of an encoded example.

        A token raises DataError: other rows may do without it. An image raises ModelError: the
        base fits none.
        """
        ids = inputs["input_ids"][0].tolist()
        self._require_embedded(example, ids)
        if has_image(inputs):
            self._require_image_token(inputs)
            self._require_features(example, inputs)

    @property
    def notes(self) -> list[str]:
        """Remarks of one line: faults that may not matter, and checks that were not possible."""
        notes = []
        num_unembedded = self._count_unembedded()
        if num_unembedded:
            notes.append(
                f"{self.base}: its tokenizer has {num_unembedded} tokens more than its embedding "
                "has rows; rows that hold one are refused"
            )

        if None in self._feature_counts.values():
            notes.append(
                f"{self.base}: its vision tower does not run without its values, so whether images "
                "fit it shows when it trains"
            )
        return notes

    def _count_unembedded(self) -> int:
        vocabulary = tokenizer_of(self.processor).get_vocab()
        return sum(token >= self.num_embeddings for token in vocabulary.values())

    def require_tokens(self, examples: Iterable[Example], generation: bool = False) -> None:
        """Raise DataError for the first example with a token that the embedding has no row for.

        Tokenizes the examples only if the tokenizer has such tokens.
        """
        if not self._count_unembedded():
            return

        for example in examples:
            ids = token_ids_of(example, self.processor, generation)
            self._require_embedded(example, ids)

    def _require_embedded(self, example: Example, ids: Sequence[int]) -> None:
        largest = max(ids, default=0)
        if largest >= self.num_embeddings:
            problem = self._describe_unembedded(largest)
            raise DataError(f"{example.source} row {example.row}: its token {problem}")

    def _describe_unembedded(self, token: int) -> str:
        text, *_ = tokenizer_of(self.processor).convert_ids_to_tokens([token])
        return (
            f"{text!r} ({token}) has no row in the embedding of {self.base}, which has "
            f"{self.num_embeddings}: tokens were added and the embedding was not resized"
        )

    def _require_image_token(self, inputs: dict[str, Tensor]) -> None:
        """Raise ModelError unless processor and model mean the same token by an image."""
        expected = self.model.config.image_token_id
        written = self.processor.image_token_id
        # a processor may put other tokens for the one that stands for an image in texts
        is_expected = inputs["input_ids"] == expected
        has_expected = bool(is_expected.any())
        if written != expected and not has_expected:
            raise ModelError(
                f"{self.base}: the processor puts the token {self.processor.image_token!r} "
                f"({written}) where an image goes, the model looks for {expected} "
                "(image_token_id in its config.json)"
            )

    def _require_features(self, example: Example, inputs: dict[str, Tensor]) -> None:
        """Raise ModelError unless there are as many placeholders as image features."""
        image_token = self.model.config.image_token_id
        is_placeholder = inputs["input_ids"] == image_token
        num_placeholders = int(is_placeholder.sum())
        num_features = self._cached_feature_count(example, inputs)

        if num_features is None:
            return
        if num_features == num_placeholders:
            return

        raise ModelError(
            f"{self.base}: the processor leaves {num_placeholders} places for the images of "
            f"{example.source} row {example.row}, the model makes {num_features} features "
            "of them: their patch_size, image size or vision_feature_select_strategy differ"
        )

    def _cached_feature_count(self, example: Example, inputs: dict[str, Tensor]) -> int | None:
        """Return how many image features the model makes, None if that cannot be found out.

        Counts them once for images of the same sizes.
        """
        given = {key: inputs[key] for key in _IMAGE_INPUTS if key in inputs}
        sizes = [value.tolist() for key, value in given.items() if key != "pixel_values"]
        shape = list(given["pixel_values"].shape)
        key = f"{shape} {sizes}"
        if key in self._feature_counts:
            return self._feature_counts[key]

        try:
            count = _count_features(self.model, given)
        except ModelError as error:
            raise ModelError(f"{self.base}: {error}") from error
        except Exception as error:  # a vision encoder raises whatever it trips over
            if "meta" not in str(error):
                raise ModelError(
                    f"{self.base}: its vision tower cannot take the image of {example.source} "
                    f"row {example.row} as its processor makes it: {format_error(error)}"
                ) from error
            count = None  # it reads values, which meta tensors do not have

        self._feature_counts[key] = count
        return count


def require_options_fit(base: str, revision: str | None, options: Mapping[str, Any]) -> None:
    """Raise ModelError for options with which `load_base` would fail, as far as is known.

    Loads no weights.
    """
    model = build_meta_model(base, revision, **options)
    require_experts(model, options)
    require_devices(options)


_IMAGE_INPUTS = ("pixel_values", "image_sizes", "image_grid_thw")


@torch.no_grad()
def _count_features(model: Any, given: dict[str, Tensor]) -> int:
    """Return how many image features a model makes of some images."""
    pixels = given["pixel_values"].to("meta", model.dtype)

    # Qwen-VL: pixels are (patches, values), and the grid (images, 3) says how many there are
    if "image_grid_thw" in given:
        _require_patches(model, pixels.shape[-1])
        patches_per_image = given["image_grid_thw"].prod(-1)  # (images,)
        num_patches = int(patches_per_image.sum())
        return num_patches // model.model.visual.spatial_merge_size**2

    inputs = given | {"pixel_values": pixels}
    found = model.get_image_features(**inputs).pooler_output
    # one tensor for each image: (features, width)
    return sum(features.shape[:-1].numel() for features in found)


def _require_patches(model: Any, found: int) -> None:
    """Raise ModelError unless the model takes patches of `found` values."""
    projection = model.model.visual.patch_embed.proj.weight  # (width, *patch)
    expected = projection[0].numel()
    if found != expected:
        raise ModelError(
            f"the processor makes patches of {found} values, the model takes {expected}: their "
            "patch_size or temporal_patch_size differ"
        )
