"""From images on disk to batches of pixels: decoded in worker processes, in order, errors with file names."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset as TorchDataset

from ..errors import DataError, UnreadableError
from ..types import Array, ImageSplit, View
from .workers import in_order, part_that_fits, workers_that_fit

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}
Colour = tuple[float, float, float]


class Batch(NamedTuple):
    """Decoded images that follow each other in the split.

    Attributes:
        positions: position of each image in the split, int64 (B,), ascending.
        images: pixels, uint8 (B, 3, S, S), the channels of a pixel side by side in memory; see ``normalise``.
        broken: ids of the images of this stretch that could not be decoded (only with ``skip_broken``).
    """

    positions: Array
    images: torch.Tensor
    broken: list[str]


def view_pixels(image: Image.Image, view: View) -> Array:
    """The view of an image before normalisation, uint8 (S, S, 3).

    Sizes are rounded as in torchvision's ``Resize`` (long side cut to a whole number) and ``CenterCrop``
    (offset rounded to even): ``crop`` equals that pair to the bit, and ``squash`` equals ``Resize((S, S))``.
    """
    image = image if image.mode == "RGB" else image.convert("RGB")
    width, height = image.size
    if view.mode == "squash":
        target = (view.size, view.size)
    elif width <= height:
        target = (view.resize, int(view.resize * height / width))
    else:
        target = (int(view.resize * width / height), view.resize)
    if image.size != target:
        image = image.resize(target, _FILTERS[view.interpolation])
    if view.mode == "crop":
        left, top = (round((side - view.size) / 2.0) for side in target)
        image = image.crop((left, top, left + view.size, top + view.size))
    return np.asarray(image)


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


def apply_view(image: Image.Image, view: View) -> torch.Tensor:
    """The encoder's input for one image, float32 (3, S, S), normalised."""
    return normalise(_tensor(view_pixels(image, view)), view)


def iterate_batches(
    split: ImageSplit,
    view: View,
    batch_size: int,
    workers: int = 0,
    skip_broken: bool = False,
    pin: bool = False,
) -> Generator[Batch]:
    """The images of a split in order, through a view, in batches of uint8 pixels.

    Close it where it is not read to its end: an error that somebody keeps would keep the processes too.

    Args:
        split: where the images come from; it is sent to the workers.
        view: how they are resized and cropped.
        batch_size: images a batch, broken ones counted.
        workers: processes that decode; 0 decodes in this one.
        skip_broken: leave broken images out and name them in the batch, rather than stop.
        pin: in memory from which a GPU copies by itself.

    Raises:
        DataError: an image is broken (unless ``skip_broken``), or cannot be read; the message names the file.
    """
    image = 3 * view.size**2
    part = part_that_fits(batch_size, image, workers)
    whole = part == batch_size
    stretches = [range(i, min(i + batch_size, len(split))) for i in range(0, len(split), batch_size)]
    decoded = _Decoded(split, view, skip_broken)
    made = in_order(
        decoded,
        workers_that_fit(workers, part * image),
        batch_sampler=[stretch[i : i + part] for stretch in stretches for i in range(0, len(stretch), part)],
        collate_fn=decoded.collate,
        pin_memory=pin and whole,
    )
    with closing(made):
        for stretch in stretches:
            parts = (_good(next(made)) for _ in range(0, len(stretch), part))
            joined = next(parts) if whole else _joined(parts, len(stretch), view.size, pin)
            yield Batch(joined.positions, joined.pixels.permute(0, 3, 1, 2), joined.broken)


class _Part(NamedTuple):
    """Images that follow each other: positions, pixels (n, S, S, 3), ids of the broken ones; ``stop`` says
    why nothing may go on.
    """

    positions: Array
    pixels: torch.Tensor
    broken: list[str]
    stop: str


def _good(part: _Part) -> _Part:
    if part.stop:
        raise DataError(part.stop)
    return part


def _joined(parts: Iterator[_Part], most: int, size: int, pin: bool) -> _Part:
    """One part of several, copied as they come, which frees their shared memory."""
    pixels = torch.empty((most, size, size, 3), dtype=torch.uint8, pin_memory=pin)
    positions: list[Array] = []
    broken: list[str] = []
    filled = 0
    for each in parts:
        pixels[filled : filled + len(each.pixels)] = each.pixels
        filled += len(each.pixels)
        positions.append(each.positions)
        broken += each.broken
    return _Part(np.concatenate(positions), pixels[:filled], broken, "")


class _Item(NamedTuple):
    """An image; one without pixels is left out, unless ``stop`` says why nothing may go on without it."""

    position: int
    pixels: Array | None = None
    stop: str = ""


class _Decoded(TorchDataset[_Item]):
    def __init__(self, split: ImageSplit, view: View, skip_broken: bool) -> None:
        self.split, self.view, self.skip_broken = split, view, skip_broken

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> _Item:
        # An exception that crosses the process border loses its one-line message, so the message travels.
        try:
            return _Item(i, view_pixels(self.split.image(i), self.view))
        except UnreadableError as error:
            return _Item(i, stop=f"{error}")
        except DataError as error:
            return _Item(i, stop="" if self.skip_broken else f"{error}; --skip-broken leaves such images out")

    def collate(self, items: Sequence[_Item]) -> _Part:
        whole = [(item.position, item.pixels) for item in items if item.pixels is not None]
        size = self.view.size
        pixels = np.stack([each for _, each in whole]) if whole else np.zeros((0, size, size, 3), np.uint8)
        return _Part(
            np.asarray([position for position, _ in whole], dtype=np.int64),
            torch.from_numpy(pixels),
            [self.split.ids[item.position] for item in items if item.pixels is None],
            next((item.stop for item in items if item.stop), ""),
        )


def _tensor(pixels: Array) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
