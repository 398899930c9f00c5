"""Measures of representations: rank, collapse, uniformity, position codes, norm outliers, CKA.

Functions of arrays, in float64. What ends in ``_items`` returns one number an item (image) whose mean is the
value exactly, and whose spread is that of the value to first order (the influence of the item): resampling
the items gives its interval, and the items of two encoders on the same images can be subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Rows = NDArray[np.floating]

COLLAPSED = 0.99
"""A mean cosine between different images above this is a collapse."""
POSITION_CODE = 0.9
"""A share of variance by position above this is a code of position."""
RANKME_EPS = 1e-7
_BLOCK = 8192
_ROUNDING = 1e-6
"""What differs by less than this share of its size differs by the rounding of fp32 encoders."""


def unit(rows: Rows) -> Float:
    """Rows at Euclidean length 1, (..., D); a row of zeros stays zero."""
    x = np.asarray(rows, dtype=np.float64)
    x = x / np.maximum(np.abs(x).max(axis=-1, keepdims=True, initial=0), np.finfo(np.float64).tiny)
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.asarray(np.divide(x, length, out=np.zeros_like(x), where=length > 0))


def mean_cosines(rows: Rows) -> Float:
    """Mean cosine of each row to all others, (N,) from (N, D), N at least 2.

    Rows that are all zero have no direction and are as collapsed as can be: their cosine is 1.
    """
    x = unit(rows)
    if not x.any():
        return np.ones(len(x))
    return np.asarray((x @ x.sum(axis=0) - np.square(x).sum(axis=1)) / (len(x) - 1))


def pair_items(means: Float) -> Float:
    """Items of a mean over all pairs, from each item's mean over its pairs (N,).

    An item belongs to the pairs of every other one, which doubles its influence (Hoeffding 1948): the plain
    means would give an interval of half the width.
    """
    return np.asarray(2 * means - means.mean())


def uniformity_items(rows: Rows, t: float = 2.0) -> Float:
    """Items of log E exp(-t |x - y|^2) over pairs of different unit rows (Wang and Isola, ICML 2020); (N,).

    0 where all rows are alike; about -2t where many are spread evenly over a sphere of many dimensions.
    """
    x = unit(rows)
    squared = np.maximum(np.square(x).sum(1)[:, None] + np.square(x).sum(1) - 2 * x @ x.T, 0)
    kernel = np.exp(-t * squared)
    means = (kernel.sum(axis=1) - np.diagonal(kernel)) / (len(x) - 1)
    potential = means.mean()
    return np.asarray(np.log(potential) + 2 * (means - potential) / potential)


# ------------------------------------------------------------------------------------------- rank


@dataclass(frozen=True)
class Spectrum:
    """Singular values of N x D rows.

    Attributes:
        values: (K,), the largest first, K = min(N, D).
        shares: (G, K), what each group of rows adds to the square of each value; columns sum to 1.
    """

    values: Float
    shares: Float

    @property
    def variance(self) -> Float:
        """Share of each component in the sum of squares, (K,); zeros where there is none."""
        squares = np.square(self.values)
        return np.asarray(squares / (squares.sum() or 1.0))


def spectrum(rows: Rows, *, centre: bool, group: int = 1) -> Spectrum:
    """Singular values of rows (N, D), and which of the consecutive groups of ``group`` rows they come from.

    Values below the resolution of the arithmetic are 0; so are those of centred rows that are next to nothing
    beside the rows themselves, which may be nothing but the rounding errors of a collapsed encoder.
    """
    mean = rows.mean(axis=0, dtype=np.float64) if centre else np.zeros(rows.shape[1])
    n, dim = rows.shape
    most = min(n, dim)
    if n <= dim:
        left, values, _ = np.linalg.svd(rows - mean, full_matrices=False)
        squares = np.square(left)
        floor = values.max(initial=0) * max(n, dim) * np.finfo(np.float64).eps
    else:
        starts = range(0, n, _BLOCK)
        gram = np.zeros((dim, dim))
        for start in starts:
            block = rows[start : start + _BLOCK] - mean
            gram += block.T @ block
        found, axes = np.linalg.eigh(gram)
        values, axes = np.sqrt(np.maximum(found[::-1], 0)), axes[:, ::-1]
        squares = np.concatenate([np.square((rows[s : s + _BLOCK] - mean) @ axes) for s in starts])
        # The roots of the eigenvalues' own rounding errors.
        floor = values.max(initial=0) * np.sqrt(max(n, dim) * np.finfo(np.float64).eps)
    floor = max(floor, _ROUNDING * float(np.sqrt(n * np.square(mean).sum())))
    shares = squares.reshape(-1, group, most).sum(axis=1)
    shares /= np.maximum(shares.sum(axis=0), np.finfo(np.float64).tiny)
    return Spectrum(np.where(values > floor, values, 0.0), shares)


def effective_rank(values: Float, eps: float = 0.0) -> float:
    """Exponential of the entropy of the normalised singular values (K,).

    Roy and Vetterli (EUSIPCO 2007) with ``eps`` 0; RankMe (Garrido et al., ICML 2023) adds 1e-7 to each
    share, and takes rows that are not centred. 1 where nothing varies.
    """
    return float(np.exp(_entropy(values, eps)[0]))


def rank_items(found: Spectrum, eps: float = 0.0) -> Float:
    """Items (G,) of the effective rank: its value, and the influence of each group of rows on it.

    To first order a group that holds the share s of a squared singular value moves that value by the factor
    1 + (G s - 1) / 2.
    """
    entropy, slope = _entropy(found.values, eps)
    shares = found.values / (found.values.sum() or 1.0)
    move = (len(found.shares) * found.shares - 1) / 2
    move[:, found.values == 0] = 0
    step = shares * (move - (move @ shares)[:, None])
    rank = np.exp(entropy)
    return np.asarray(rank + rank * (step @ slope))


def _entropy(values: Float, eps: float) -> tuple[float, Float]:
    """Entropy of the normalised values, and its derivative by each share; 0 where all are 0."""
    total = values.sum()
    if total == 0:
        return 0.0, np.zeros(len(values))
    shares = values / total + eps
    logs = np.log(shares, out=np.zeros(len(values)), where=shares > 0)
    return float(-(shares * logs).sum()), -(logs + 1)


# ------------------------------------------------------------------------------------------- patches


def position_items(patches: Rows) -> Float:
    """Items of the share of the variance of patches (N, P, D) that their position alone explains; (N,).

    The variance over positions of the mean over images, over the variance of all patches. 1 where every
    image has the same tokens, about 1/N where position says nothing, 0 where nothing varies.
    """
    code = patches.mean(axis=0, dtype=np.float64)
    code -= code.mean(axis=0)
    mean = patches.mean(axis=(0, 1), dtype=np.float64)
    explained, total, along = np.square(code).sum(), np.empty(len(patches)), np.empty(len(patches))
    for i, image in enumerate(patches):
        x = image - mean
        total[i], along[i] = np.square(x).sum(), (code * x).sum()
    whole = total.mean()
    if whole <= _ROUNDING**2 * patches.shape[1] * np.square(mean).sum():
        return np.zeros(len(patches))
    share = explained / whole
    return np.asarray(share + (2 * (along - explained) - share * (total - whole)) / whole)


@dataclass(frozen=True)
class Outliers:
    """Tokens of unusually large norm.

    Attributes:
        norms: norm of each token over the median of all, (N, P).
        threshold: above this, in the same measure, a token is an outlier.
    """

    norms: Float
    threshold: float

    @property
    def share(self) -> Float:
        """Share of outliers among the tokens of each image, (N,)."""
        return np.asarray((self.norms > self.threshold).mean(axis=1))


def norm_outliers(norms: Rows, deviations: float, floor: float = 0.01) -> Outliers:
    """Outliers of norms (N, P): above the median by ``deviations`` median absolute deviations.

    The deviation counts as ``floor`` of the median at least: where a last norm makes all tokens equally
    long, rounding errors are no outliers.
    """
    x = np.asarray(norms, dtype=np.float64)
    relative = x / (np.median(x) or 1.0)
    centre = float(np.median(relative))
    spread = max(float(np.median(np.abs(relative - centre))), floor)
    return Outliers(relative, centre + deviations * spread)


# ------------------------------------------------------------------------------------------- layers


def cka(features: Sequence[Rows]) -> Float:
    """Debiased linear CKA between all pairs of features of the same N rows (N, D_i), N at least 4; (L, L).

    CKA of Kornblith et al. (ICML 2019) with the unbiased HSIC of Song et al. (2012): without it few rows of
    many dimensions look alike whatever they hold. 0 on average for independent features, slightly negative
    at times; features that do not vary have the CKA 0 with all others.
    """
    grams = [_centred_gram(x) for x in features]
    products = np.array([[(a * b).sum() for b in grams] for a in grams])
    scale = np.sqrt(np.maximum(np.diagonal(products), 0))
    scale = np.outer(scale, scale)
    return np.asarray(np.divide(products, scale, out=np.zeros_like(products), where=scale > 0))


def _centred_gram(rows: Rows) -> Float:
    """The U-centred Gram matrix (N, N), zero on its diagonal (Szekely and Rizzo 2014): the sum of products of
    two of them is the unbiased HSIC up to a factor of N alone.
    """
    n = len(rows)
    x = rows - rows.mean(axis=0, dtype=np.float64)
    size = np.abs(x).max(initial=0)
    if size <= _ROUNDING * np.abs(rows).max(initial=0):  # the rounding errors of a constant
        return np.zeros((n, n))
    x = x / size
    gram = x @ x.T
    np.fill_diagonal(gram, 0)
    sums = gram.sum(axis=0) / (n - 2)
    gram += sums.sum() / (n - 1) - sums[:, None] - sums
    np.fill_diagonal(gram, 0)
    return np.asarray(gram)
