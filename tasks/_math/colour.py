"""Colours of the pictures: distinct class palettes, patch features by PCA, label overlays."""

from __future__ import annotations

from functools import cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .normalise import signs
from .segmentation import nearest, nearest_centre

Rgb = NDArray[np.uint8]
Scalar = TypeVar("Scalar", bound=np.generic)

_LATTICE = 9  # levels a channel of the colours that palettes are chosen from
_LIGHTNESS = (0.45, 0.9)  # of OKLab: neither lost on black nor on white
_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def oklab(rgb: Rgb) -> NDArray[np.float64]:
    """OKLab coordinates (Ottosson, 2020), in which distance is near to perceived difference: (n, 3)."""
    value = rgb / 255.0
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return np.asarray(np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T)


@cache
def _palette() -> Rgb:
    levels = np.linspace(0, 255, _LATTICE).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = oklab(colours)
    chosen = (lab[:, 0] > _LIGHTNESS[0]) & (lab[:, 0] < _LIGHTNESS[1])
    colours, lab = colours[chosen], lab[chosen]
    order = [int(np.linalg.norm(lab[:, 1:], axis=1).argmax())]
    distance = np.full(len(lab), np.inf)
    while len(order) < len(lab):
        distance = np.minimum(distance, np.linalg.norm(lab - lab[order[-1]], axis=1))
        order.append(int(distance.argmax()))
    return np.asarray(colours[order])


def distinct_colours(n: int) -> Rgb:
    """n colours that are far from each other, uint8 (n, 3); the first ones are the same for every n.

    Greedy farthest points in OKLab (the idea of Glasbey et al., 2007); they repeat after about 500.
    """
    palette = _palette()
    return np.asarray(palette[np.arange(n) % len(palette)])


def pca_colours(tokens: NDArray[np.floating], percentile: float = 2.0) -> Rgb:
    """The three leading principal components of patch features as red, green and blue.

    The axes are shared by all tokens given, so that equal colours mean similar features across images.
    Tokens are L2-normalised first, so that a few of large norm do not own the first axis; each
    component is stretched from its lower to its upper ``percentile``.

    Args:
        tokens: (M, h, w, D).
        percentile: share of the tokens (in %) that saturates at either end.

    Returns:
        uint8 (M, h, w, 3); the sign of an axis is such that its largest loading is positive.
    """
    x = np.asarray(tokens, dtype=np.float64).reshape(-1, tokens.shape[-1])
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    x = x - x.mean(axis=0)
    _, axes = np.linalg.eigh(x.T @ x)
    axes = axes[:, ::-1][:, :3]
    axes = axes * signs(axes)
    score = np.zeros((len(x), 3))
    score[:, : axes.shape[1]] = x @ axes
    low, high = np.percentile(score, [percentile, 100 - percentile], axis=0)
    unit = np.clip((score - low) / np.maximum(high - low, 1e-12), 0, 1)
    colours: Rgb = (unit * 255).round().astype(np.uint8)
    return colours.reshape(*tokens.shape[:-1], 3)


def enlarge(grid: NDArray[Scalar], size: tuple[int, int]) -> NDArray[Scalar]:
    """A map (h, w, ...) on ``size`` = (H, W) pixels by nearest neighbour."""
    return grid[nearest(grid.shape[0], size[0])][:, nearest(grid.shape[1], size[1])]


def overlay(image: Rgb, labels: NDArray[np.integer], colours: Rgb, alpha: float = 0.65) -> Rgb:
    """Labels in their colours over the grey image; negative labels (void) show the image darkened.

    Args:
        image: (H, W, 3).
        labels: (H, W), indices into ``colours``.
        colours: (n, 3).
        alpha: weight of the colour.
    """
    grey = image.mean(axis=2, keepdims=True)
    painted = (1 - alpha) * grey + alpha * colours[np.maximum(labels, 0)]
    out: Rgb = np.where(labels[..., None] < 0, 0.35 * grey, painted).round().astype(np.uint8)
    return out


def strip(
    image: Rgb,
    truth: NDArray[np.integer],
    predicted: NDArray[np.integer],
    features: Rgb,
    parts: NDArray[np.integer] | None,
) -> list[Rgb]:
    """The panels of one image, all of its size: itself, truth, prediction, features, and its own parts.

    Args:
        image: (H, W, 3).
        truth: class map of any size, negative where void.
        predicted: matched class of each patch (h, w), negative where unmatched.
        features: colours of the patches (h, w, 3).
        parts: cluster ids of the image's own tree (h, w), or None for no such panel.
    """
    size = (image.shape[0], image.shape[1])
    colours = distinct_colours(int(max(truth.max(), predicted.max(), 0)) + 1)
    rows, columns = (nearest_centre(source, target) for source, target in zip(truth.shape, size, strict=True))
    panels = [
        image,
        overlay(image, truth[np.ix_(rows, columns)], colours),
        overlay(image, enlarge(predicted, size), colours),
        enlarge(features, size),
    ]
    if parts is not None:
        # Numbered by the mean red of the feature colours: like parts of different images agree more often.
        red = np.bincount(parts.ravel(), weights=features[..., 0].ravel()) / np.bincount(parts.ravel())
        rank = np.argsort(np.argsort(red, kind="stable"), kind="stable")
        panels.append(overlay(image, enlarge(rank[parts], size), distinct_colours(len(rank)), alpha=0.8))
    return panels
