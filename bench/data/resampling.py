"""Pillow's resizing as matrix products: the same pixels, to the bit, of many images at once, on any device.

Pillow (src/libImaging/Resample.c) resizes 8-bit images one axis after the other. A pixel of the result is a
sum over the few pixels that its filter covers, weighed with whole numbers (weights times 2^22), plus a half,
shifted back and clipped to 8 bits. Here that sum is a product with a matrix. Each of those numbers, over
2^12, is split into a whole one and a fraction, so that no sum outgrows what float32 holds, and no factor the
TF32 of a GPU: the products are exact, in whatever order they add.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image

from ..types import Array, Interpolation

_BITS = 22
_FRACTION_BITS = 12
MOST_TAPS = 32
"""Pixels under a filter: sums of fractions stay below 2^12, so that float32 holds them to the last bit."""
FILTERS: dict[Interpolation, float] = {"bilinear": 1.0, "bicubic": 2.0}
"""What can be done, and how far each filter reaches, in pixels of the coarser of both sides."""
_ALIGN = 8
"""Numbers of which rows of a matrix are a multiple: the units of a GPU that multiply in TF32 ask for it."""
_AT_ONCE = 32
"""Images that are resized at a time: at 224 pixels they take about 15 MB each meanwhile."""
_TRIED = (
    *((37, 53, (11, 16)), (53, 37, (16, 11)), (12, 60, (9, 45)), (30, 90, (10, 12)), (9, 8, (20, 21))),
    (500, 375, (341, 256)),
)
"""Width, height and what they are resized to: some begin with the rows, some with the columns."""
_ROWS_FIRST = int(PIL.__version__.split(".")[0]) >= 13
"""Whether this Pillow begins with the rows where that saves most; older ones begin with the columns."""


class Taps(NamedTuple):
    """What each of S places of a resized axis sees of the axis before.

    Attributes:
        first: int64 (S,) the first pixel.
        weights: float32 (S, K) of this and the following ones: whole numbers, times 2^22.
    """

    first: Array
    weights: Array


class Axis(NamedTuple):
    """``Taps`` of n images: (n, S) and (n, S, K)."""

    first: torch.Tensor
    weights: torch.Tensor

    def of(self, images: slice) -> Axis:
        """Those of some of the images."""
        return Axis(self.first[images], self.weights[images])


class Cut(NamedTuple):
    """What a view needs of an image.

    Attributes:
        pixels: uint8 (h, w, 3), the part of the image that the result depends on.
        rows, columns: how each axis of it is resized.
        rows_first: whether the rows are resized before the columns.
    """

    pixels: Array
    rows: Taps
    columns: Taps
    rows_first: bool


class Cuts(NamedTuple):
    """Several cuts on one device: their pixels, both axes, a flag each."""

    pixels: list[torch.Tensor]
    rows: Axis
    columns: Axis
    rows_first: list[bool]


def cut(
    image: Array,
    target: tuple[int, int],
    corner: tuple[int, int],
    size: int,
    interpolation: Interpolation,
) -> Cut | None:
    """What is needed to resize an image, uint8 (H, W, 3), to ``target`` (width, height) and to take the
    square of ``size`` pixels whose left and top are ``corner``; None where ``resample`` cannot do it.
    """
    (height, width), (left, top) = image.shape[:2], corner
    outside = min(corner) < 0 or left + size > target[0] or top + size > target[1]  # filled with black
    if outside or height > 100 * width:  # so tall, Pillow 12 begins with the rows, by another way
        return None
    columns = _taps(width, target[0], left, size, interpolation)
    rows = _taps(height, target[1], top, size, interpolation)
    if max(columns.weights.shape[1], rows.weights.shape[1]) > MOST_TAPS:
        return None
    right, bottom = (min(side, _end(axis)) for side, axis in ((width, columns), (height, rows)))
    left, top = int(columns.first[0]), int(rows.first[0])
    fewer_rows, fewer_columns = height - target[1], width - target[0]
    return Cut(
        image[top:bottom, left:right],
        rows._replace(first=rows.first - top),
        columns._replace(first=columns.first - left),
        _ROWS_FIRST and fewer_rows > 0 and fewer_rows > 2 * fewer_columns,
    )


def finished(pixels: Array) -> Cut:
    """A cut of pixels (S, S, 3) that is the result already."""
    same = _taps(len(pixels), len(pixels), 0, len(pixels), "bilinear")
    return Cut(pixels, same, same, False)


def stack(axes: Sequence[Taps], size: int) -> Taps:
    """The taps of n images whose result has ``size`` pixels a side: (n, S) and (n, S, K)."""
    most = max((axis.weights.shape[1] for axis in axes), default=1)
    first = np.zeros((len(axes), size), np.int64)
    weights = np.zeros((len(axes), size, most), np.float32)
    for i, axis in enumerate(axes):
        first[i] = axis.first
        weights[i, :, : axis.weights.shape[1]] = axis.weights
    return Taps(first, weights)


def on_device(cuts: Sequence[Cut], size: int, device: str) -> Cuts:
    """Cuts whose result has ``size`` pixels a side, one after the other on a device."""
    rows, columns = (
        Axis(*(torch.from_numpy(each).to(device) for each in stack(axes, size)))
        for axes in ([one.rows for one in cuts], [one.columns for one in cuts])
    )
    pixels = [torch.tensor(one.pixels).to(device) for one in cuts]
    return Cuts(pixels, rows, columns, [one.rows_first for one in cuts])


def resample(cuts: Cuts) -> torch.Tensor:
    """The resized pixels, uint8 (n, 3, S, S), where the cuts are."""
    size, device = cuts.rows.first.shape[1], cuts.rows.first.device
    out = torch.empty((len(cuts.pixels), 3, size, size), dtype=torch.uint8, device=device)
    first = 0
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _in_tf32():
        for rows_first, alike in groupby(cuts.rows_first):
            end = first + len(list(alike))
            for begin in range(first, end, _AT_ONCE):
                some = slice(begin, min(end, begin + _AT_ONCE))
                x = _side_by_side(cuts.pixels[some])
                out[some] = _both_axes(x, cuts.rows.of(some), cuts.columns.of(some), rows_first)
            first = end
    return out


@cache
def equals_pillow(device: str) -> bool:
    """Whether ``resample`` gives the pixels of the Pillow that is installed, on a device; tried on noise,
    since a later one may resize in another way, and a device multiply in one that is not exact.
    """
    draws = np.random.default_rng(0)
    for interpolation in FILTERS:
        for width, height, target in _TRIED:
            image = draws.integers(0, 256, (height, width, 3), dtype=np.uint8)
            size = min(target)
            made = cut(image, target, (0, 0), size, interpolation)
            whole = Image.fromarray(image).resize(target, Image.Resampling[interpolation.upper()])
            expected = torch.from_numpy(np.asarray(whole)[:size, :size].copy()).permute(2, 0, 1)
            if made is None or not torch.equal(resample(on_device([made], size, device))[0].cpu(), expected):
                return False
    return True


@lru_cache(maxsize=512)
def _taps(side: int, target: int, start: int, count: int, interpolation: Interpolation) -> Taps:
    """``count`` places from ``start`` on, of an axis of ``side`` pixels that is resized to ``target``."""
    places = np.arange(start, start + count)
    if side == target:
        return Taps(places, np.full((count, 1), 1 << _BITS, np.float32))
    scale = side / target
    widened = max(scale, 1.0)
    reach = FILTERS[interpolation] * widened
    centres = (places + 0.5) * scale
    first = np.maximum((centres - reach + 0.5).astype(np.int64), 0)
    counts = np.minimum((centres + reach + 0.5).astype(np.int64), side) - first
    offsets = np.arange(counts.max())
    weights = _filter((offsets + first[:, None] - centres[:, None] + 0.5) * (1.0 / widened), interpolation)
    weights[offsets >= counts[:, None]] = 0.0
    weights /= weights.cumsum(axis=1)[:, -1:]  # which adds one after the other, as Pillow does
    weights = np.trunc(weights * (1 << _BITS) + np.where(weights < 0, -0.5, 0.5))
    return Taps(first, weights.astype(np.float32))


def _filter(x: Array, interpolation: Interpolation) -> Array:
    x = np.abs(x)
    if interpolation == "bilinear":
        return np.maximum(1.0 - x, 0.0)
    a = -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _end(axis: Taps) -> int:
    """One behind the last pixel that is seen; it may lie outside, under weights of zero."""
    return int(axis.first[-1]) + int(axis.weights.shape[1])


@contextmanager
def _in_tf32() -> Iterator[None]:
    """Products of float32 by the fast units of a GPU, which round factors to 11 bits: none here has more."""
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if before == "tf32":
        yield
        return

    def allow(allowed: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the newer way alone, after which torch's profiler fails
            matmul.allow_tf32 = allowed

    allow(True)
    try:
        yield
    finally:
        allow(False)
        matmul.fp32_precision = before


def _side_by_side(images: list[torch.Tensor]) -> torch.Tensor:
    """float32 (n, H, 3, W) of uint8 images (h, w, 3), filled up below and on the right."""
    height, width = (_aligned(max(image.shape[axis] for image in images)) for axis in (0, 1))
    x = torch.zeros((len(images), height, 3, width), dtype=torch.float32, device=images[0].device)
    for place, image in zip(x, images, strict=True):
        place[: image.shape[0], :, : image.shape[1]] = image.permute(0, 2, 1)
    return x


def _both_axes(x: torch.Tensor, rows: Axis, columns: Axis, rows_first: bool) -> torch.Tensor:
    """(n, 3, S, S) of x (n, H, 3, W), whole numbers in float32."""
    size = rows.first.shape[1]

    def along_rows(x: torch.Tensor) -> torch.Tensor:
        n, height, colours, width = x.shape
        flat = x.reshape(n, height, colours * width)
        whole, fraction = _matrices(*rows, height)
        return _pixels(torch.bmm(fraction, flat), whole, flat).view(n, size, colours, width)

    def along_columns(x: torch.Tensor) -> torch.Tensor:
        n, height, colours, width = x.shape
        flat = x.reshape(n, height * colours, width)
        whole, fraction = (part.transpose(1, 2) for part in _matrices(*columns, width))
        return _pixels(torch.bmm(flat, fraction), flat, whole).view(n, height, colours, size)

    x = along_columns(along_rows(x)) if rows_first else along_rows(along_columns(x))
    return x.permute(0, 2, 1, 3)


def _matrices(first: torch.Tensor, weights: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights over 2^12: whole numbers, and the fractions of -1/2 to 1/2 that they leave; float32
    (n, S, side) each.
    """
    n, size, taps = weights.shape
    places = first[:, :, None] + torch.arange(taps, device=first.device)
    weights = weights / 2**_FRACTION_BITS
    whole = weights.round()
    # Taps that lie outside, whose weights are zero, go to columns that are cut off again.
    empty = torch.zeros((n, size, _aligned(side + taps)), device=first.device)
    whole, fraction = (empty.scatter(2, places, part)[:, :, :side] for part in (whole, weights - whole))
    return whole, fraction


def _pixels(fractions: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What Pillow makes of sums: whole numbers of 0 to 255 in float32, written over the sums of fractions.

    A shift leaves out what lies below its last bit: of the fractions all but their whole part, and of the sum
    with the whole weights (``a @ b``) and a half, over 2^10, the same.
    """
    scale = 2.0 ** (_FRACTION_BITS - _BITS)
    sums = fractions.floor_().baddbmm_(a, b, beta=scale, alpha=scale)
    return sums.add_(0.5).floor_().clamp_(0, 255)


def _aligned(side: int) -> int:
    return -(-side // _ALIGN) * _ALIGN
