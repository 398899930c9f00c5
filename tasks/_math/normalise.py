"""Ways to put features on one scale before a classifier sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from ...bench.types import Array

if TYPE_CHECKING:
    import torch


class Rows(Protocol):
    """Features (N, D) of which parts are read: an array, a memory map, or what puts several side by side."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Array: ...


Normalisation = Literal["none", "l2", "batchnorm"]
BATCHNORM_EPS = 1e-6


def unit_rows(x: Array, dtype: type[np.floating] = np.float32) -> Array:
    """Rows at Euclidean length 1, contiguous; a row of zeros stays zero. (N, D) -> (N, D)"""
    rows: Array = np.array(x, dtype=dtype, order="C")
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
        return Normaliser.stream(kind, (rows,))

    @staticmethod
    def stream(kind: Normalisation, blocks: Iterable[Array]) -> Normaliser:
        """The same from blocks of rows (n, D), in one pass; none is read where the kind needs nothing."""
        if kind != "batchnorm":
            return Normaliser(kind)
        n, total, squares, shift = 0, 0.0, 0.0, None
        for block in blocks:
            # Moments about a point inside the data: about zero, a channel of large mean would cancel.
            shift = block.mean(axis=0, dtype=np.float64).astype(np.float32) if shift is None else shift
            offset = block - shift
            n += len(block)
            total = total + offset.sum(axis=0, dtype=np.float64)
            squares = squares + np.square(offset).sum(axis=0, dtype=np.float64)
        assert shift is not None, "statistics need rows"
        mean = shift + total / n
        variance = np.maximum(squares / n - (total / n) ** 2, 0.0)
        scale = 1 / np.sqrt(variance + BATCHNORM_EPS)
        return Normaliser(kind, mean.astype(np.float32), scale.astype(np.float32))

    @staticmethod
    def beside(parts: Sequence[Normaliser]) -> Normaliser:
        """Of rows that are those of the parts side by side: each dimension has statistics of its own."""
        shifts = [part.shift for part in parts if part.shift is not None]
        scales = [part.scale for part in parts if part.scale is not None]
        if not shifts:
            return parts[0]
        return Normaliser(parts[0].kind, np.concatenate(shifts), np.concatenate(scales))

    def on(self, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """The same map for float32 tensors (N, D) on a device."""
        import torch

        if self.kind == "l2":
            return lambda rows: torch.nn.functional.normalize(rows, eps=1e-30)
        if self.shift is None or self.scale is None:
            return lambda rows: rows
        shift, scale = (torch.from_numpy(each).to(device) for each in (self.shift, self.scale))
        return lambda rows: (rows - shift).mul_(scale)

    def __call__(self, rows: Array) -> Array:
        """Normalised copy, float32, (N, D)."""
        if self.kind == "l2":
            return unit_rows(rows)
        out: Array = np.array(rows, dtype=np.float32, order="C")
        if self.shift is not None and self.scale is not None:
            out -= self.shift
            out *= self.scale
        return out


def signs(axes: Array) -> Array:
    """The signs that make the largest entry of each column positive: eigenvectors have none of their own."""
    top = np.abs(axes).argmax(axis=0)
    return np.where(axes[top, np.arange(axes.shape[1])] < 0, -1.0, 1.0)
