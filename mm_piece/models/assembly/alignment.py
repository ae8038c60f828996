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
from torch.nn.functional import normalize

from mm_piece.errors import ModelError

ImageTextPair = tuple[Image.Image, str]

_BATCH_SIZE = 16
_MIN_PAIRS = 16
_SMALLEST_SPREAD = 1e-6  # of a feature that hardly varies
# Ridge strengths that are tried, as shares of the features' total variance.
_RIDGES = (
    1e-5,
    3e-5,
    1e-4,
    3e-4,
    1e-3,
    3e-3,
    1e-2,
    3e-2,
    1e-1,
)


@dataclass(frozen=True)
class Features:
    """What the projector reads, float64: means over each image, mean and covariance of tokens."""

    pooled: Tensor  # (images, features)
    mean: Tensor  # (features,)
    covariance: Tensor  # (features, features)

    def variance_along(self, directions: Tensor) -> Tensor:
        """Return the variance of tokens along each direction; `directions` is (features, n)."""
        spread = self.covariance @ directions
        return (directions * spread).sum(0)


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
    centered = targets - mean_target

    # standardised, so that one strength suits all features
    variances = features.covariance.diagonal()
    spread = variances.sqrt().clamp_min(_SMALLEST_SPREAD)
    inputs = (features.pooled - features.mean) / spread
    weight, left_out = _solve_ridge(inputs, centered)
    share = _share_of_nearest(left_out, centered, texts)

    # Ridge regression shrinks what it predicts; an image's tokens vary more than their mean.
    weight = weight / spread[:, None]  # (features, hidden)
    wanted = centered.pow(2).sum(1)
    given = features.variance_along(weight)
    gain = (wanted.mean() / given.sum()).sqrt()

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
    products = torch.zeros(())  # grows to (features, features)
    num_tokens = 0

    def collect(_: Any, inputs: tuple[Tensor, ...]) -> None:
        nonlocal products, num_tokens
        tokens = inputs[0].double()  # (images, tokens, features)
        flat = tokens.flatten(0, 1)
        pooled.append(tokens.mean(1))
        products = products + flat.T @ flat
        num_tokens += len(flat)

    projector = model.model.multi_modal_projector
    hook = projector.register_forward_pre_hook(collect)
    dtype = model.model.vision_tower.dtype
    try:
        remaining = iter(pairs)
        while batch := list(islice(remaining, _BATCH_SIZE)):
            images = []
            for image, text in batch:
                images.append(image)
                texts.append(text)
            inputs = processor.image_processor(images, return_tensors="pt")
            pixels = inputs["pixel_values"]
            model.model.get_image_features(pixels.to(dtype))
    finally:
        hook.remove()

    num_texts = len(set(texts))
    if len(texts) < _MIN_PAIRS or num_texts < 2:
        raise ModelError(
            f"a projector cannot be solved from {len(texts)} pairs with {num_texts} texts; "
            f"it takes {_MIN_PAIRS} pairs, and more than one text"
        )

    means = torch.cat(pooled)
    mean = means.mean(0)
    covariance = products / num_tokens
    covariance -= torch.outer(mean, mean)
    features = Features(means, mean, covariance)
    return features, texts


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
        encoded = processor.tokenizer(
            f" {text.strip()}",
            add_special_tokens=False,
            return_tensors="pt",
        )
        ids = encoded["input_ids"][0]
        vectors = embedding(ids)  # (tokens, hidden)
        mean = vectors.double().mean(0)
        rows.append(mean)
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
    weight = targets
    left_out = targets
    for share in _RIDGES:
        damped = energy + share * energy.sum()
        shrinkage = energy / damped

        # what a row contributes to its own prediction; the mean was estimated from it too
        leverage = (left**2 * shrinkage).sum(1)
        leverage += 1 / len(inputs)
        estimated = left * shrinkage @ rotated
        residual = targets - estimated
        residual /= 1 - leverage[:, None]

        error = residual.pow(2).mean()
        if error < best_error:
            best_error = error
            left_out = targets - residual
            inverse = right.T * (singular / damped)
            weight = inverse @ rotated
    return weight, left_out


def _share_of_nearest(
    predicted: Tensor,
    targets: Tensor,
    texts: Sequence[str],
) -> float:
    """Return the share of rows whose own text is nearest by angle; both tensors are centered."""
    distinct = sorted(set(texts))
    number_of = {text: number for number, text in enumerate(distinct)}
    own = torch.tensor([number_of[text] for text in texts])

    first_rows = [texts.index(text) for text in distinct]
    known = normalize(targets[first_rows])
    found = normalize(predicted)
    nearest = (found @ known.T).argmax(1)  # (rows,)

    is_right = nearest == own
    return float(is_right.double().mean())


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
    reader = projector.linear_1
    writer = projector.linear_2
    half = reader.out_features // 2

    directions, strengths, outputs = torch.linalg.svd(weight, full_matrices=False)
    roots = strengths[:half].sqrt()
    first = directions[:, :half] * roots  # (features, units)
    second = outputs[:half] * roots[:, None]  # (units, hidden)
    bias = features.mean @ first
    num_units = len(second)

    writer.weight.zero_()
    for start, sign in ((0, 1), (half, -1)):
        units = slice(start, start + num_units)
        reader.weight[units] = sign * first.T
        reader.bias[units] = -sign * bias
        writer.weight[:, units] = sign * second.T
    writer.bias.copy_(mean_target)
