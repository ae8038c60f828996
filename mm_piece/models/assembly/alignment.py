"""A projector in closed form, from images and short texts that name what is in them.

A projector drawn at random tells the language model nothing, and training it from there takes very
many pairs. Ridge regression finds the linear map from what the tower makes of an image to the
embedding of its text, by solving one system of equations. LLaVA's projector holds that map exactly:
gelu(z) - gelu(-z) = z, so half of its hidden units are the negatives of the other half.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mm_piece.errors import ModelError

ImageTextPair = tuple[Image.Image, str]

_BATCH_SIZE = 16
_MIN_PAIRS = 16
# Ridge strengths that are tried, as shares of the features' total variance.
_RIDGES = tuple(10.0**exponent for exponent in (-5, -4.5, -4, -3.5, -3, -2.5, -2, -1.5, -1))


@dataclass(frozen=True)
class Features:
    """What the projector reads, float64: means over each image, mean and covariance of tokens."""

    pooled: Tensor  # (images, features)
    mean: Tensor  # (features,)
    covariance: Tensor  # (features, features)

    def variance_along(self, directions: Tensor) -> Tensor:
        """Return the variance of tokens along each direction; `directions` is (features, n)."""
        return (directions * (self.covariance @ directions)).sum(0)


def align_projector(model: Any, processor: Any, pairs: Iterable[ImageTextPair]) -> str:
    """Set a LLaVA's projector to the ridge regression from images to their texts' embeddings.

    The strength is the one whose predictions are nearest when each pair is left out (leave-one-out
    error of ridge regression, Allen 1974: PRESS). The map is scaled so that an image's tokens
    differ from the mean as much as the texts' embeddings do. Nothing is drawn at random. Returns a
    note with the share of left-out images whose own text was nearest. Raises ModelError for too few
    pairs or texts, and for a projector of another form.
    """
    _require_two_gelu_layers(model)
    features, texts = _compute_features(model, processor, pairs)
    targets = _embed_texts(model, processor, texts)  # (images, hidden)
    mean_target = targets.mean(0)

    # standardised, so that one strength suits all features
    spread = features.covariance.diagonal().sqrt().clamp_min(1e-6)
    inputs = (features.pooled - features.mean) / spread
    weight, left_out = _solve_ridge(inputs, targets - mean_target)
    share = _share_of_nearest(left_out + mean_target, targets, texts)

    # Ridge regression shrinks what it predicts; an image's tokens vary more than their mean.
    weight = weight / spread[:, None]  # (features, hidden)
    expected = (targets - mean_target).pow(2).sum(1).mean()
    gain = (expected / features.variance_along(weight).sum()).sqrt()
    _write_projector(model, features, weight * gain, mean_target)
    return (
        f"the projector is solved from {len(texts)} pairs: the text of a left-out image is the "
        f"nearest of {len(set(texts))} for {share:.0%}"
    )


def _require_two_gelu_layers(model: Any) -> None:
    """Raise ModelError unless the projector is LLaVA's own, with an even number of hidden units."""
    activation = model.config.projector_hidden_act
    hidden_size = model.config.text_config.hidden_size
    if activation != "gelu" or hidden_size % 2:
        raise ModelError(
            f"a projector with {activation} between {hidden_size} units cannot hold a linear map"
        )


@torch.inference_mode()
def _compute_features(
    model: Any,
    processor: Any,
    pairs: Iterable[ImageTextPair],
) -> tuple[Features, list[str]]:
    """Return what the projector reads of the images, and the texts; ModelError for too few."""
    texts: list[str] = []
    pooled: list[Tensor] = []
    products: list[Tensor] = []
    num_tokens = 0

    def collect(_: Any, inputs: tuple[Tensor, ...]) -> None:
        nonlocal num_tokens
        tokens = inputs[0].double()  # (images, tokens, features)
        pooled.append(tokens.mean(1))
        flat = tokens.flatten(0, 1)
        products.append(flat.T @ flat)
        products[:] = [sum(products)]
        num_tokens += len(flat)

    hook = model.model.multi_modal_projector.register_forward_pre_hook(collect)
    dtype = model.model.vision_tower.dtype
    try:
        remaining = iter(pairs)
        while batch := list(islice(remaining, _BATCH_SIZE)):
            images = [image for image, _ in batch]
            texts += [text for _, text in batch]
            pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
            model.model.get_image_features(pixels.to(dtype))
    finally:
        hook.remove()

    if len(texts) < _MIN_PAIRS or len(set(texts)) < 2:
        raise ModelError(
            f"a projector cannot be solved from {len(texts)} pairs with {len(set(texts))} texts; "
            f"it takes {_MIN_PAIRS} pairs, and more than one text"
        )
    means = torch.cat(pooled)
    mean = means.mean(0)
    covariance = products[0] / num_tokens - mean[:, None] * mean
    return Features(means, mean, covariance), texts


@torch.inference_mode()
def _embed_texts(
    model: Any,
    processor: Any,
    texts: Sequence[str],
) -> Tensor:
    """Return the mean embedding of each text's tokens, float64 (texts, hidden)."""
    embedding = model.get_input_embeddings()
    rows = []
    for text in texts:
        # with a space before it, as a word within a sentence
        ids = processor.tokenizer(f" {text.strip()}", add_special_tokens=False).input_ids
        vectors = embedding(torch.tensor(ids))  # (tokens, hidden)
        rows.append(vectors.double().mean(0))
    return torch.stack(rows)


def _solve_ridge(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Solve ridge regression with the strength of least leave-one-out error.

    `inputs` is (rows, features) and `targets` (rows, hidden), both centered. Returns the weights,
    (features, hidden), and the prediction for each row without it, (rows, hidden).
    """
    left, singular, right = torch.linalg.svd(inputs, full_matrices=False)
    rotated = left.T @ targets
    energy = singular**2

    best_error = torch.inf
    weight = left_out = targets
    for share in _RIDGES:
        ridge = share * energy.sum()
        shrinkage = energy / (energy + ridge)
        # what a row contributes to its own prediction; the mean was estimated from it too
        leverage = (left**2 * shrinkage).sum(1) + 1 / len(inputs)
        fitted = left * shrinkage @ rotated
        residual = (targets - fitted) / (1 - leverage)[:, None]

        error = residual.pow(2).mean()
        if error < best_error:
            best_error = error
            left_out = targets - residual
            weight = right.T * (singular / (energy + ridge)) @ rotated
    return weight, left_out


def _share_of_nearest(
    predicted: Tensor,
    targets: Tensor,
    texts: Sequence[str],
) -> float:
    """Return the share of rows whose own text is nearest, by the angle to the mean."""
    distinct = sorted(set(texts))
    rows = torch.tensor([texts.index(text) for text in distinct])
    mean = targets.mean(0)
    known = torch.nn.functional.normalize(targets[rows] - mean)
    found = torch.nn.functional.normalize(predicted - mean) @ known.T  # (rows, texts)

    own = torch.tensor([distinct.index(text) for text in texts])
    return float((found.argmax(1) == own).double().mean())


@torch.no_grad()
def _write_projector(
    model: Any,
    features: Features,
    weight: Tensor,
    mean_target: Tensor,
) -> None:
    """Write (features - their mean) @ weight + mean_target into the projector's two layers.

    The first layer holds as many directions as half of its units, those that matter most. Both
    layers have their share of the map, so that a step of training moves neither far. Units that are
    left keep what they read, and write nothing.
    """
    projector = model.model.multi_modal_projector
    half = projector.linear_1.out_features // 2
    directions, strengths, outputs = torch.linalg.svd(weight, full_matrices=False)
    roots = strengths[:half].sqrt()
    first = directions[:, :half] * roots  # (features, units)
    second = outputs[:half] * roots[:, None]  # (units, hidden)
    bias = features.mean @ first

    projector.linear_2.weight.zero_()
    for start, sign in ((0, 1), (half, -1)):
        units = slice(start, start + first.shape[1])
        projector.linear_1.weight[units] = sign * first.T
        projector.linear_1.bias[units] = -sign * bias
        projector.linear_2.weight[:, units] = sign * second.T
    projector.linear_2.bias.copy_(mean_target)
