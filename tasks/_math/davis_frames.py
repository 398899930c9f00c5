"""Frames and label maps of videos: sizes, resizing, the DAVIS palette, indexed PNGs, overlays.

Pure functions on uint8 arrays. The resizing rules are those of the scripts named beside each.
"""

from __future__ import annotations

import io
import math
from functools import cache
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .davis_metrics import boundary_map

SizeRule = Literal["dino64", "patch-ceil"]
FrameResize = Literal["cv2-bilinear", "pil-bicubic"]
LabelResize = Literal["nearest", "bilinear"]
Pixels = NDArray[np.uint8]


def network_size(height: int, width: int, size: int, rule: SizeRule, patch: int) -> tuple[int, int]:
    """Height and width at which a frame enters the encoder.

    ``dino64``: the short side becomes ``size``, the long side follows and is floored to a multiple of 64
    (DINO's ``read_frame``; of a square frame the width counts as the long side). Where the patch size
    divides the outcome, as 8 and 16 do, that is all; other sides are rounded up to a multiple of the patch.
    ``patch-ceil``: the short side becomes ``size`` rounded up to a multiple of the patch size, the long side
    follows and is rounded up too (DINOv3's ``ResizeToMultiple``).
    """
    if rule == "patch-ceil":
        short = _up(size, patch)
        if width > height:
            return short, _up(width * short / height, patch)
        return _up(height * short / width, patch), short
    if height > width:
        sides = int(size * height / width // 64 * 64), size
    else:
        sides = size, int(size * width / height // 64 * 64)
    return _up(sides[0], patch), _up(sides[1], patch)


def resize_frame(frame: Pixels, size: tuple[int, int], how: FrameResize) -> Pixels:
    """A frame (H, W, 3) at another size. OpenCV's bilinear does not smooth, Pillow's bicubic does."""
    height, width = size
    if how == "cv2-bilinear":
        return np.asarray(cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR), dtype=np.uint8)
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


def resize_labels(labels: Pixels, size: tuple[int, int]) -> Pixels:
    """A label map at another height and width, by Pillow's nearest neighbour."""
    return np.asarray(Image.fromarray(labels).resize((size[1], size[0]), Image.Resampling.NEAREST))


def spread_labels(labels: Pixels, size: tuple[int, int]) -> Pixels:
    """A label map at another size, where pixel i of n takes cell floor(i * cells / n), as torch does."""
    rows, columns = (np.arange(n) * cells // n for n, cells in zip(size, labels.shape, strict=True))
    spread: Pixels = labels[rows[:, None], columns]
    return spread


def token_labels(
    labels: Pixels, objects: tuple[int, ...], grid: tuple[int, int], how: LabelResize
) -> NDArray[np.float32]:
    """Label map (H, W) as channels on the token grid, (h, w, 1 + objects): background, then each object.

    ``nearest`` gives one-hot labels (DINO); ``bilinear`` interpolates the one-hot maps without smoothing
    (videowalk).
    """
    index = np.zeros(256, dtype=np.uint8)
    index[list(objects)] = np.arange(1, len(objects) + 1)
    one_hot = np.eye(len(objects) + 1, dtype=np.float32)
    if how == "nearest":
        return one_hot[index[resize_labels(labels, grid)]]
    maps = [
        cv2.resize(np.ascontiguousarray(channel), grid[::-1], interpolation=cv2.INTER_LINEAR)
        for channel in np.moveaxis(one_hot[index[labels]], -1, 0)
    ]
    return np.stack(maps, axis=-1).astype(np.float32)


@cache
def palette() -> tuple[tuple[int, int, int], ...]:
    """The 256 colours of DAVIS and PASCAL VOC: bit 7 - j of channel c is bit 3 j + c of the label."""

    def channel(label: int, offset: int) -> int:
        return sum(((label >> (3 * step + offset)) & 1) << (7 - step) for step in range(3))

    return tuple((channel(label, 0), channel(label, 1), channel(label, 2)) for label in range(256))


def indexed_png(labels: Pixels) -> bytes:
    """A label map as an indexed PNG with the DAVIS palette, as the official tools read it."""
    image = Image.fromarray(labels)
    image.putpalette([value for colour in palette() for value in colour])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def read_indexed_png(content: bytes) -> Pixels:
    """The label map of an indexed PNG."""
    return np.asarray(Image.open(io.BytesIO(content)), dtype=np.uint8)


def overlay(frame: Pixels, predicted: Pixels, truth: Pixels, objects: tuple[int, ...]) -> Pixels:
    """A frame with the predicted objects coloured in and the outlines of the true ones in white."""
    colours = np.minimum(255, 1.7 * np.array(palette(), dtype=np.float32))  # the palette is dark on pictures
    shown = np.isin(predicted, objects)
    picture = frame.astype(np.float32)
    picture[shown] = 0.45 * picture[shown] + 0.55 * colours[predicted[shown]]
    outline = np.zeros(truth.shape, dtype=np.uint8)
    for label in objects:
        outline |= boundary_map(truth == label).astype(np.uint8)
    thickness = max(2, round(max(truth.shape) / 300))
    thick: Any = cv2.dilate(outline, np.ones((thickness, thickness), dtype=np.uint8))
    picture[thick > 0] = 255
    return picture.round().astype(np.uint8)


def _up(side: float, multiple: int) -> int:
    return math.ceil(side / multiple) * multiple
