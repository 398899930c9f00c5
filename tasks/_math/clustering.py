"""Data-set level clustering of patch features: streamed standardisation and PCA, then k-means.

Nothing here holds all features of a data set: the moments, the projection and the assignment run over
blocks of a (memory-mapped) array.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .normalise import signs

Float = NDArray[np.float32]
Int = NDArray[np.int64]

_BLOCK = 16384
_STRIDE = 10  # iterations of k-means between two looks at the objective


@dataclass(frozen=True)
class Reducer:
    """Centring, optional scaling and optional PCA: ``((x - mean) / scale) @ components``.

    Attributes:
        mean, scale: (D,).
        components: (D, d) with orthonormal columns, the leading one first, or None.
    """

    mean: Float
    scale: Float
    components: Float | None

    def __call__(self, x: NDArray[np.floating]) -> Float:
        """Reduced features (n, d) of rows (n, D)."""
        z: Float = (x.astype(np.float32, copy=False) - self.mean) / self.scale
        return z if self.components is None else np.asarray(z @ self.components)


@dataclass(frozen=True)
class Lloyd:
    """How k-means is run.

    Attributes:
        niter: most iterations a start.
        nredo: random starts, of which the best is kept.
        tol: a start is left when ten iterations lower its objective by no more than this fraction.
        max_points: points a centroid that it trains on at most (a sample), or None for all.
    """

    niter: int = 100
    nredo: int = 5
    tol: float = 0.0
    max_points: int | None = 256


def blocks(rows: NDArray[np.floating], size: int = _BLOCK) -> Iterator[tuple[int, Float]]:
    """Consecutive rows as float32 with the position of the first, at most ``size`` at once."""
    for start in range(0, len(rows), size):
        yield start, np.asarray(rows[start : start + size], dtype=np.float32)


def fit_reducer(rows: NDArray[np.floating], *, standardise: bool, pca_dim: int) -> Reducer:
    """Mean, standard deviation and principal axes over all rows, in one pass.

    The same as scikit-learn's ``StandardScaler`` followed by ``PCA(pca_dim)`` without whitening, up to
    the signs of the axes, from sums of the block's outer products instead of the data in memory.

    Args:
        rows: (n, D).
        standardise: divide each channel by its standard deviation; constant channels are only centred.
        pca_dim: number of principal axes kept; 0, or D or more, keeps the channels as they are.

    Raises:
        FloatingPointError: a feature is NaN or infinite.
    """
    n, dim = rows.shape
    shift = np.asarray(rows[:_BLOCK], dtype=np.float32).mean(axis=0)
    project = 0 < pca_dim < dim
    total = np.zeros(dim)
    second = np.zeros((dim, dim) if project else dim)
    for _, block in blocks(rows):
        if not np.isfinite(block).all():
            raise FloatingPointError("a feature is NaN or infinite")
        # Moments about a point inside the data: about zero, a channel of large mean would cancel.
        block = block - shift
        total += block.sum(axis=0, dtype=np.float64)
        second += block.T @ block if project else np.square(block, dtype=np.float64).sum(axis=0)
    offset = total / n
    mean = shift.astype(np.float64) + offset
    covariance = second / n - (np.outer(offset, offset) if project else offset**2)
    variance = np.maximum(np.diag(covariance) if project else covariance, 0.0)
    # A channel whose spread is lost in the float32 rounding of its mean is constant.
    constant = variance <= (1e-6 * np.abs(mean)) ** 2
    scale = np.where(constant, 1.0, np.sqrt(variance)) if standardise else np.ones(dim)
    components = None
    if project:
        _, axes = np.linalg.eigh(covariance / np.outer(scale, scale))
        axes = axes[:, ::-1][:, :pca_dim]
        components = (axes * signs(axes)).astype(np.float32)
    return Reducer(mean.astype(np.float32), scale.astype(np.float32), components)


def sample_rows(n: int, k: int, seed: int, max_points: int | None) -> Int:
    """Positions of the rows that k-means trains on: those, and in the order, that faiss itself draws."""
    if max_points is None or n <= k * max_points:
        return np.arange(n)
    return _permutation(n, seed)[: k * max_points]


def _permutation(n: int, seed: int) -> Int:
    """faiss's own permutation of n, so that samples and starts are those of ``faiss.Kmeans``."""
    import faiss

    order = np.empty(n, dtype=np.int32)
    library: Any = faiss  # its type stubs leave the wrapped C++ functions out
    library.rand_perm(library.swig_ptr(order), n, seed)
    return order.astype(np.int64)


def gather(rows: NDArray[np.floating], reduce: Reducer, index: Int) -> Float:
    """Reduced features of the rows ``index``, in that order; the source is read front to back."""
    order = np.argsort(index, kind="stable")
    parts = [
        reduce(np.asarray(rows[index[part]])) for part in np.array_split(order, len(order) // _BLOCK + 1)
    ]
    reduced = np.empty((len(index), parts[0].shape[1]), dtype=np.float32)
    reduced[order] = np.concatenate(parts)
    return reduced


def kmeans(points: Float, k: int, seed: int, how: Lloyd) -> tuple[Float, float]:
    """Lloyd's k-means by faiss, on all the points given.

    With ``tol=0`` the centroids are bit for bit those of ``faiss.Kmeans(d, k, niter=how.niter,
    nredo=how.nredo, seed=seed)``. It runs in strides so that a start can be left when it has settled.

    Args:
        points: (n, d), n at least k.
        k: number of centroids.
        seed: the starts are k of the points, drawn from it.
        how: iterations, starts and tolerance.

    Returns:
        Centroids (k, d), and the sum of squared distances at the last assignment.
    """
    import faiss

    points = np.ascontiguousarray(points, dtype=np.float32)
    n, dim = points.shape
    # The starts are given, so that faiss draws nothing; its seed is a 32-bit number.
    options = {"seed": seed % 2**31, "min_points_per_centroid": 1, "max_points_per_centroid": n, "gpu": False}
    best, lowest = np.empty((0, dim), dtype=np.float32), np.inf
    for redo in range(how.nredo):
        centroids = points[_permutation(n, seed + 1 + redo * 15486557)[:k]]
        objective, done = np.inf, 0
        while done < how.niter:
            step = min(_STRIDE, how.niter - done)
            lloyd: Any = faiss.Kmeans(dim, k, niter=step, **options)
            lloyd.train(points, init_centroids=centroids)
            before, objective = objective, float(lloyd.obj[-1])
            centroids, done = lloyd.centroids, done + step
            if np.isfinite(before) and before - objective <= how.tol * before:
                break
        if objective < lowest:
            best, lowest = centroids, objective
    return best, lowest


def assign(points: Float, centroids: Float) -> NDArray[np.int32]:
    """Index of the nearest centroid (squared Euclidean distance) of each point, (n,)."""
    import faiss

    _, nearest = faiss.knn(np.ascontiguousarray(points), np.ascontiguousarray(centroids), 1)
    return np.asarray(nearest[:, 0], dtype=np.int32)


def cluster_rows(
    rows: NDArray[np.floating], reduce: Reducer, ks: Sequence[int], seed: int, how: Sequence[Lloyd]
) -> list[NDArray[np.int32]]:
    """Cluster ids of all rows (n,), for each number of clusters; the rows are read once a k, and once more.

    Args:
        rows: (n, D), usually memory-mapped.
        reduce: what is clustered is ``reduce(rows)``.
        ks: numbers of clusters.
        seed: of the samples and the starts.
        how: how each k-means is run.
    """
    models = [
        kmeans(gather(rows, reduce, sample_rows(len(rows), k, seed, run.max_points)), k, seed, run)[0]
        for k, run in zip(ks, how, strict=True)
    ]
    ids = [np.empty(len(rows), dtype=np.int32) for _ in ks]
    for start, block in blocks(rows):
        points = reduce(block)
        for centroids, out in zip(models, ids, strict=True):
            out[start : start + len(block)] = assign(points, centroids)
    return ids


def grid_coordinates(grid: tuple[int, int]) -> Float:
    """Row and column of each patch as fractions of the image, (h * w, 2)."""
    rows, columns = np.mgrid[: grid[0], : grid[1]]
    return np.stack([rows.ravel() / grid[0], columns.ravel() / grid[1]], axis=1).astype(np.float32)


def cluster_grid(grid: tuple[int, int], k: int, seed: int, how: Lloyd) -> NDArray[np.int32]:
    """Cluster ids (h * w,) of the patch coordinates: clusters that never look at an image."""
    points = grid_coordinates(grid)
    if k >= len(points):
        return np.arange(len(points), dtype=np.int32)
    return assign(points, kmeans(points, k, seed, how)[0])
