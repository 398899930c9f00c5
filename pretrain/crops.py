"""Random resized crops and flips of a whole batch at once, on the device, as two matrix products an image.

A crop that is resized with a separable filter is rows @ image @ columns^T, whose matrices hold the filter's
weights. The crop is bicubic with antialias, as Pillow and torchvision do it, and a flip is a matrix whose
rows are reversed; images of the batch may have boxes of any size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

_ATTEMPTS = 10
_A = -0.5  # Pillow's bicubic; with antialias torch takes the same


class Crops(NamedTuple):
    """Boxes as shares of the image's height and width, and whether each image is mirrored.

    Attributes:
        boxes: (B, 4) top, left, height, width.
        flips: (B,) bool.
    """

    boxes: torch.Tensor
    flips: torch.Tensor


def draw_crops(
    sizes: torch.Tensor,
    min_scale: float,
    aspect: tuple[float, float],
    flip: bool,
    noise: torch.Tensor,
) -> Crops:
    """Boxes as torchvision's ``RandomResizedCrop`` draws them: area uniform in [min_scale, 1], aspect
    log-uniform, in whole pixels of the original image; the first of ten attempts that fits, else the
    largest central box of an allowed aspect.

    Args:
        sizes: (B, 2) height and width of the original images, pixels.
        min_scale: smallest area.
        aspect: smallest and largest width to height.
        flip: mirror half of the images.
        noise: (B, 41) uniform in [0, 1).
    """
    height, width = sizes[:, :1].double(), sizes[:, 1:].double()
    draws = noise[:, : 4 * _ATTEMPTS].double().reshape(-1, 4, _ATTEMPTS).unbind(1)
    area = height * width * (min_scale + draws[0] * (1 - min_scale))  # (B, attempts)
    low, high = math.log(aspect[0]), math.log(aspect[1])
    ratio = torch.exp(low + draws[1] * (high - low))
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    # The central box of the fall-back is one more attempt, which always fits.
    whole = width / height
    central_w = torch.where(whole > aspect[1], (height * aspect[1]).round(), width).clamp(min=1)
    central_h = torch.where(whole < aspect[0], (width / aspect[0]).round(), height).clamp(min=1)
    top = (draws[2] * (height - h + 1)).floor()
    left = (draws[3] * (width - w + 1)).floor()
    candidates = [
        torch.cat([tried, last], dim=1)
        for tried, last in (
            (top, ((height - central_h) / 2).floor()),
            (left, ((width - central_w) / 2).floor()),
            (h, central_h),
            (w, central_w),
        )
    ]
    chosen = torch.cat([fits, torch.ones_like(fits[:, :1])], dim=1).int().argmax(dim=1, keepdim=True)
    boxes = torch.cat([c.gather(1, chosen) for c in candidates], dim=1)
    boxes = boxes / torch.cat([height, width, height, width], dim=1)
    return Crops(boxes.float(), (noise[:, -1] < 0.5) & flip)


CROP_NOISE = 4 * _ATTEMPTS + 1
"""Random numbers that an image's crop takes."""


def crop_and_resize(images: torch.Tensor, crops: Crops, size: int) -> torch.Tensor:
    """The boxes of images (B, 3, H, W), resized to (B, 3, size, size) in [0, 1].

    Args:
        images: uint8; the whole images, of whatever aspect ratio.
        crops: boxes as shares of the sides.
        size: side of the result.
    """
    height, width = images.shape[-2:]
    top, left, h, w = crops.boxes.unbind(1)
    rows = resize_weights(top * height, h * height, height, size)
    columns = resize_weights(left * width, w * width, width, size)
    columns = torch.where(crops.flips[:, None, None], columns.flip(1), columns)
    pixels = images.to(rows.dtype) / 255
    return (rows[:, None] @ pixels @ columns[:, None].transpose(2, 3)).clamp(0, 1)


def resize_weights(start: torch.Tensor, length: torch.Tensor, side: int, size: int) -> torch.Tensor:
    """Weights (B, size, side) that resize the stretch [start, start + length) of an axis of ``side`` pixels.

    Pixels whose centre is outside the stretch have no weight, as if it had been cut out first.
    """
    start, length = start[:, None, None], length[:, None, None]
    scale = length / size
    widened = scale.clamp(min=1)
    wanted = torch.arange(size, device=start.device)[:, None] + 0.5
    centres = torch.arange(side, device=start.device) + 0.5
    inside = (centres > start) & (centres < start + length)
    # A stretch thinner than a pixel, of a very long image, may hold no centre: the nearest is all of it.
    nearest = (centres - start - length / 2).abs().argmin(dim=-1, keepdim=True) == torch.arange(
        side, device=start.device
    )
    weights = _bicubic((centres - start - wanted * scale) / widened) * inside
    weights = torch.where(inside.any(dim=-1, keepdim=True), weights, nearest.to(weights.dtype))
    return weights / weights.sum(-1, keepdim=True)


def _bicubic(x: torch.Tensor) -> torch.Tensor:
    """Keys' cubic kernel."""
    x = x.abs()
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _A
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
