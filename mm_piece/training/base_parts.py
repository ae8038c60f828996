"""Whether the parts of a base fit each other: tokenizer and embedding, processor and vision tower.

A tokenizer that got tokens for which the embedding did not grow, or a processor that leaves room
for another number of image features than the tower makes, fails deep inside the model, at the first
row that meets it. So the model without values is asked, before anything is written.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mm_piece.data import Example, pictured, token_ids, tokenizer_of
from mm_piece.errors import DataError, ModelError, reason
from mm_piece.evaluation.answers import pad_of
from mm_piece.models.base import shell_of
from mm_piece.models.placement import require_devices, require_experts


class Parts:
    """The parts of one base: its processor, and its model without values."""

    def __init__(self, base: str, revision: str | None, processor: Any, **reading: Any) -> None:
        """Raises ModelError if batches could not be padded.

        `reading`: those of `models.READING`.
        """
        self.base, self.processor = base, processor
        self.model = shell_of(base, revision, **reading)
        self.rows: int = self.model.get_input_embeddings().num_embeddings
        self._seen: dict[str, int | None] = {}
        pad = pad_of(tokenizer_of(processor))
        if pad is not None and pad >= self.rows:
            raise ModelError(f"{base}: the padding token {self._without_row(pad)}")

    def require_fit(self, example: Example, inputs: dict[str, Tensor]) -> None:
        """Raise unless the model has a place for every token and image of an encoded example.

        DataError for a token, ModelError for an image: the base fits none.
        """
        self._require_rows(example, inputs["input_ids"][0].tolist())
        if pictured(inputs):
            self._require_image_token()
            self._require_features(example, inputs)

    @property
    def notes(self) -> list[str]:
        """What is no fault as long as no row needs it, and what could not be asked; a line each."""
        notes = []
        if without := self._tokens_without_row():
            notes.append(
                f"{self.base}: its tokenizer has {without} tokens more than its embedding has "
                "rows; rows that hold one are refused"
            )
        if None in self._seen.values():
            notes.append(
                f"{self.base}: its vision tower does not run without its values, so whether images "
                "fit it shows when it trains"
            )
        return notes

    def _tokens_without_row(self) -> int:
        tokens = tokenizer_of(self.processor).get_vocab().values()
        return sum(token >= self.rows for token in tokens)

    def require_tokens(self, examples: Iterable[Example], generation: bool = False) -> None:
        """Raise DataError for the first of all examples that has a token without a row.

        They are looked through only if the tokenizer has such tokens.
        """
        if not self._tokens_without_row():
            return
        for example in examples:
            self._require_rows(example, token_ids(example, self.processor, generation))

    def _require_rows(self, example: Example, ids: Sequence[int]) -> None:
        if max(ids, default=0) >= self.rows:
            raise DataError(
                f"{example.source} row {example.row}: its token {self._without_row(max(ids))}"
            )

    def _without_row(self, token: int) -> str:
        text = tokenizer_of(self.processor).convert_ids_to_tokens(token)
        return (
            f"{text!r} ({token}) has no row in the embedding of {self.base}, which has "
            f"{self.rows}: tokens were added and the embedding was not resized"
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
        places = int((inputs["input_ids"] == self.processor.image_token_id).sum())
        made = self._features(example, inputs)
        if made is not None and made != places:
            raise ModelError(
                f"{self.base}: the processor leaves {places} places for the images of "
                f"{example.source} row {example.row}, the model makes {made} features of them: "
                "their patch_size, image size or vision_feature_select_strategy differ"
            )

    def _features(self, example: Example, inputs: dict[str, Tensor]) -> int | None:
        """How many image features the model makes, once for images of like sizes."""
        given = {key: inputs[key] for key in _VISUAL if key in inputs}
        sizes = [value.tolist() for key, value in given.items() if key != "pixel_values"]
        key = f"{list(given['pixel_values'].shape)} {sizes}"
        if key not in self._seen:
            try:
                self._seen[key] = _count_features(self.model, given)
            except ModelError as error:
                raise ModelError(f"{self.base}: {error}") from error
            except Exception as error:  # a tower raises whatever it trips over
                if "meta" not in str(error):
                    raise ModelError(
                        f"{self.base}: its vision tower cannot take the image of {example.source} "
                        f"row {example.row} as its processor makes it: {reason(error)}"
                    ) from error
                self._seen[key] = None  # it reads values, which meta tensors have not
        return self._seen[key]


def require_options_fit(base: str, revision: str | None, options: Mapping[str, Any]) -> None:
    """Raise ModelError for options that `load_base` would trip over, as far as can be told.

    Nothing is loaded for it.
    """
    require_experts(shell_of(base, revision, **options), options)
    require_devices(options)


_VISUAL = ("pixel_values", "image_sizes", "image_grid_thw")


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
