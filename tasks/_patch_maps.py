"""Pictures of patch tokens: their principal components as colours, and their similarity to one of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..bench.types import Array, Context
from ._math import colour
from ._math.representation import unit

_SIDE = 160
_COARSE = 16
"""Grids with longer sides are averaged for the similarities that the page carries."""
_RAMP = np.array([[24, 15, 62], [59, 60, 140], [32, 130, 142], [94, 201, 98], [253, 231, 37]])


def save_patch_maps(ctx: Context, pixels: Sequence[Array], patches: Array) -> None:
    """Keep patch features by PCA, three images a strip, and the similarity to one patch of some images.

    Args:
        ctx: of the task; the marked patch depends on its seed and on the grid alone.
        pixels: the images shown, uint8 (S, S, 3); without any, nothing is kept.
        patches: (M, h, w, D) with those images first.
    """
    shown = len(pixels)
    if not shown or patches.shape[1] * patches.shape[2] < 2:
        return
    pictures = [_resized(image) for image in pixels]
    size = pictures[0].shape[:2]
    maps = [colour.enlarge(m, size) for m in colour.pca_colours(patches[:shown])]
    directions = unit(_coarse(patches[:shown]))
    for number, start in enumerate(range(0, shown, 3)):
        some = directions[start : start + 3]
        pairs = zip(pictures[start : start + 3], maps[start : start + 3], strict=True)
        ctx.save_image(
            f"pca-{number}",
            [panel for pair in pairs for panel in pair],
            "Patch features by PCA",
            "Each image, then the three leading components of its patch tokens as red, green and blue; "
            f"one PCA over the {shown} images of this checkpoint.",
            downscale=_SIDE,
            similarity=np.einsum("mhwd,mijd->mhwij", some, some, optimize=True),
        )
    height, width, dim = patches.shape[1:]
    for first in range(0, min(shown - 1, 4), 2):
        row, column = (
            int(ctx.rng("patch", first, axis).integers(n)) for axis, n in enumerate((height, width))
        )
        pair = unit(patches[first : first + 2].reshape(2, -1, dim))
        cosine = pair @ pair[0, row * width + column]
        others = np.delete(cosine.ravel(), row * width + column)
        low, high = float(others.min()), float(others.max())
        stretched = np.clip((cosine - low) / max(high - low, 1e-9), 0, 1).reshape(2, height, width)
        own, other = (colour.enlarge(_ramp(m), size) for m in stretched)
        marked = _marked(pictures[first], (row, column), (height, width))
        ctx.save_image(
            f"similar-{first // 2}",
            [marked, own, pictures[first + 1], other],
            "Similarity to one patch",
            "The marked patch against all patches of its image and of another one: "
            f"cosines from {low:.2f} (dark) to {high:.2f} (yellow).",
            downscale=_SIDE,
        )


def _coarse(tokens: Array) -> Array:
    """Tokens (M, h, w, D) averaged over blocks, so that no side of the grid is longer than ``_COARSE``."""
    for axis in (1, 2):
        side = tokens.shape[axis]
        if side > _COARSE:
            starts = np.arange(_COARSE) * side // _COARSE
            sizes = np.diff(starts, append=side).reshape([-1 if a == axis else 1 for a in range(4)])
            tokens = np.add.reduceat(tokens, starts, axis=axis) / sizes
    return tokens


def save_heat(ctx: Context, name: str, values: Array, title: str, caption: str) -> None:
    """Keep a matrix as a picture; 0 and below are dark, 1 is yellow."""
    picture = colour.enlarge(_ramp(np.clip(values, 0, 1)), (_SIDE, _SIDE))
    ctx.save_image(name, [picture], title, f"{caption} Dark is 0, yellow is 1.")


def _ramp(values: Array) -> Array:
    """Numbers from 0 to 1 as colours from dark blue to yellow, uint8 (..., 3)."""
    stops = np.linspace(0, 1, len(_RAMP))
    channels = [np.interp(values, stops, _RAMP[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _resized(pixels: Array) -> Array:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))


def _marked(picture: Array, patch: tuple[int, int], grid: tuple[int, int]) -> Array:
    """The picture with a frame around a patch, at least 6 pixels wide so that it is seen."""
    from PIL import Image, ImageDraw

    image = Image.fromarray(picture)
    top, left = (place * side // n for place, side, n in zip(patch, picture.shape, grid, strict=False))
    bottom, right = (
        max(start + 6, (place + 1) * side // n)
        for start, place, side, n in zip((top, left), patch, picture.shape, grid, strict=False)
    )
    ImageDraw.Draw(image).rectangle((left - 1, top - 1, right, bottom), outline=(255, 40, 40), width=2)
    return np.asarray(image)
