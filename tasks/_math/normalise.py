"""Ways to put features on one scale before a classifier sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...bench.types import Array

Normalisation = Literal["none", "l2", "batchnorm"]
BATCHNORM_EPS = 1e-6


def unit_rows(x: Array) -> Array:
    """Rows at Euclidean length 1, float32 and contiguous; a row of zeros stays zero. (N, D) -> (N, D)"""
    rows: Array = np.array(x, dtype=np.float32, order="C")
    # Squares of large half-precision features overflow no sooner than float32 does; scale first all the same.
    peak = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
    np.divide(rows, peak, out=rows, where=peak > 0)
    length = np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]
    np.divide(rows, length, out=rows, where=length > 0)
    return rows


@dataclass(frozen=True)
class Normaliser:
    """A fixed map on feature rows, fitted on the train split and applied to every split.

    ``batchnorm`` is MAE's BatchNorm1d(affine=False, eps=1e-6) in the limit of the full batch: each
    dimension loses its train mean and is divided by sqrt(train variance + eps).
    """

    kind: Normalisation
    shift: Array | None = None
    scale: Array | None = None

    @staticmethod
    def fit(kind: Normalisation, rows: Array) -> Normaliser:
        """Take the statistics of ``rows`` (N, D), where the kind needs any."""
        if kind != "batchnorm":
            return Normaliser(kind)
        mean = rows.mean(axis=0, dtype=np.float64)
        variance = np.mean(np.square(rows - mean.astype(np.float32)), axis=0, dtype=np.float64)
        scale = 1 / np.sqrt(variance + BATCHNORM_EPS)
        return Normaliser(kind, mean.astype(np.float32), scale.astype(np.float32))

    def __call__(self, rows: Array) -> Array:
        """Normalised copy, float32, (N, D)."""
        if self.kind == "l2":
            return unit_rows(rows)
        out: Array = np.array(rows, dtype=np.float32, order="C")
        if self.shift is not None and self.scale is not None:
            out -= self.shift
            out *= self.scale
        return out
