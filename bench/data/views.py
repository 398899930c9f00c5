"""What a view makes of an image: its pixels, and the numbers that an encoder is given."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from ..errors import DataError
from ..types import Array, View

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}
Colour = tuple[float, float, float]


def view_pixels(image: Array, view: View) -> Array:
    """The view of an image, uint8 (H, W, 3), before normalisation, uint8 (S, S, 3).

    Sizes are rounded as in torchvision's ``Resize`` (long side cut to a whole number) and ``CenterCrop``
    (offset rounded to even): ``crop`` equals that pair to the bit, and ``squash`` equals ``Resize((S, S))``.
    """
    picture = Image.fromarray(image)
    target, (left, top) = geometry(image, view)
    if picture.size != target:
        picture = picture.resize(target, _FILTERS[view.interpolation])
    if view.mode == "crop":
        picture = picture.crop((left, top, left + view.size, top + view.size))
    return np.asarray(picture)


def check_shape(image: Array, view: View, name: str) -> None:
    """Raise DataError for an image so elongated that it would be a decompression bomb once resized."""
    (width, height), _ = geometry(image, view)
    if width * height > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise DataError(
            f"{name} is {image.shape[1]}x{image.shape[0]} pixels, which at a short side of {view.resize} are "
            f"{width}x{height}: too many"
        )


def geometry(image: Array, view: View) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height that an image is resized to, and the left and top of what is kept of it."""
    height, width = image.shape[:2]
    if view.mode == "squash":
        return (view.size, view.size), (0, 0)
    if width <= height:
        target = (view.resize, int(view.resize * height / width))
    else:
        target = (int(view.resize * width / height), view.resize)
    left, top = (round((side - view.size) / 2.0) for side in target)
    return target, (left, top)


def normalise(pixels: torch.Tensor, view: View) -> torch.Tensor:
    """From uint8 pixels (..., 3, H, W) to float32 with the view's mean and standard deviation."""
    return standardise(pixels, view.mean, view.std)


def standardise(pixels: torch.Tensor, mean: Colour, std: Colour) -> torch.Tensor:
    """(pixels / 255 - mean) / std of uint8 pixels (..., 3, H, W) of any strides, float32 and contiguous."""
    images = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return images.div_(255).sub_(_channels(mean, pixels.device)).div_(_channels(std, pixels.device))


@lru_cache(maxsize=64)
def _channels(values: Colour, device: torch.device) -> torch.Tensor:
    """(3, 1, 1); kept, because bringing them to a GPU waits for all that it was given to do before."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def apply_view(image: Array, view: View) -> torch.Tensor:
    """The encoder's input for one image, uint8 (H, W, 3): float32 (3, S, S), normalised."""
    return normalise(torch.from_numpy(view_pixels(image, view).copy()).permute(2, 0, 1), view)
