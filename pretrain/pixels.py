"""The images of a training, decoded: kept on disk as one array, or decoded again in every epoch.

Images are stored squashed to one square size together with their original height and width. Crops are drawn
in the geometry of the original and mapped to the square, so that what a crop shows, its area and its aspect
ratio are those of a crop of the original; only the resampling passes through the stored size.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset as TorchDataset

from ..bench.atomic import write_json
from ..bench.cache import clear_stale, staging
from ..bench.claims import in_turn
from ..bench.data.splits import spread
from ..bench.data.workers import in_order, workers_that_fit
from ..bench.errors import DataError, UnreadableError
from ..bench.progress import Reporter
from ..bench.room import new_array, room_for
from ..bench.types import Array, ImageSplit
from .recipe import Recipe

_PROBED = 100


class Stored(NamedTuple):
    """Images as they are kept: pixels uint8 (B, 3, S, S), and their original sizes (B, 2), height first."""

    pixels: torch.Tensor
    sizes: torch.Tensor


class Pixels(Protocol):
    """Decoded images by position; must survive pickling to a worker."""

    @property
    def size(self) -> int:
        """Side of the stored squares, pixels."""

    def __len__(self) -> int: ...

    def read(self, index: Array) -> Stored:
        """The images at these positions. Raises DataError naming a file that is broken."""


class DecodedPixels:
    """Images that are decoded whenever they are asked for."""

    def __init__(self, split: ImageSplit, size: int) -> None:
        self.split, self.size = split, size

    def __len__(self) -> int:
        return len(self.split)

    def read(self, index: Array) -> Stored:
        """Decode and squash."""
        decoded = [squash(self.split, int(i), self.size) for i in index]
        pixels = np.stack([pixels for pixels, _ in decoded])
        return Stored(torch.from_numpy(pixels), torch.tensor([size for _, size in decoded]))


class CachedPixels:
    """Images that were decoded once into a memory-mapped file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open()

    def _open(self) -> None:
        self._pixels = np.load(self.folder / "pixels.npy", mmap_mode="r")
        self._sizes = np.load(self.folder / "sizes.npy")

    def __getstate__(self) -> Path:
        return self.folder  # a worker maps the file itself

    def __setstate__(self, folder: Path) -> None:
        self.folder = folder
        self._open()

    def __len__(self) -> int:
        return len(self._pixels)

    @property
    def size(self) -> int:
        """Side of the stored squares, pixels."""
        return int(self._pixels.shape[-1])

    def read(self, index: Array) -> Stored:
        """Copy out of the map."""
        return Stored(torch.from_numpy(self._pixels[index]), torch.from_numpy(self._sizes[index]))


def squash(split: ImageSplit, i: int, size: int) -> tuple[Array, tuple[int, int]]:
    """One image, uint8 (3, size, size), and its original height and width."""
    image = _decoded(split, i)
    height, width = image.shape[:2]
    if (height, width) != (size, size):
        image = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
    return image.transpose(2, 0, 1), (height, width)


def _decoded(split: ImageSplit, i: int) -> Array:
    try:
        return split.image(i)
    except UnreadableError:
        raise
    except DataError as error:
        raise DataError(f"{error}; --skip-broken puts another image in its place") from error


def longest_side(split: ImageSplit) -> int:
    """The longest side among a hundred images from the whole split, pixels."""
    sides: list[int] = [max(_decoded(split, i).shape[:2]) for i in spread(len(split), _PROBED)]
    return max(sides)


def stored_sides(split: ImageSplit, recipe: Recipe) -> tuple[int, int]:
    """The sides at which images may be kept, the better and the least one: as given, else 16/7 and 8/7 of the
    crop (512 and 256 for 224), but never more than the images' own longest side.

    A random crop shows half of an image and less: from 256 pixels most would be enlarged to 224.
    """
    if recipe.data.store_size:
        return recipe.data.store_size, recipe.data.store_size
    own = longest_side(split)
    return min(own, round(recipe.crop_size * 16 / 7)), min(own, round(recipe.crop_size * 8 / 7))


def open_pixels(
    split: ImageSplit, fingerprint: str, recipe: Recipe, root: Path, workers: int, reporter: Reporter
) -> Pixels:
    """The images of a split for training, decoded into ``root`` first where the configuration says so.

    Args:
        split: the images.
        fingerprint: identity of the data set's content.
        recipe: stored size, and whether decoded images are kept.
        root: the cache's folder for pixels.
        workers: processes that decode.
        reporter: receives the progress.

    Raises:
        DataError: a broken image, or no room on the disk.
    """
    if not len(split):
        raise DataError("the training split holds no image")
    config, sides = recipe.data, stored_sides(split, recipe)
    fit = [side for side in sides if len(split) * 3 * side**2 <= config.cache_limit_gb * 1e9]
    if config.cache == "never" or (config.cache == "auto" and not fit):
        reporter.line(f"images are decoded in every epoch, to {sides[0]} x {sides[0]} pixels")
        return DecodedPixels(split, sides[0])
    size = fit[0] if fit else sides[1]
    reporter.line(f"images are kept at {size} x {size} pixels")
    needed = len(split) * 3 * size * size
    identity = json.dumps([fingerprint, size, *split.ids])
    folder = root / hashlib.sha256(identity.encode()).hexdigest()[:32]
    found = _kept(folder)
    if found is None:
        with in_turn(folder, reporter):  # trainings that begin together decode once
            found = _kept(folder)
            if found is None:
                _fill(folder, DecodedPixels(split, size), needed, workers, reporter)
                found = CachedPixels(folder)
    return found


def _kept(folder: Path) -> CachedPixels | None:
    """The images of a folder; None where it is not complete or is damaged."""
    if not (folder / "complete.json").is_file():
        return None
    try:
        return CachedPixels(folder)
    except (FileNotFoundError, ValueError, EOFError):  # a disk that was full or lost its power
        return None


def _fill(folder: Path, source: DecodedPixels, needed: int, workers: int, reporter: Reporter) -> None:
    clear_stale(folder.parent)
    shutil.rmtree(folder, ignore_errors=True)  # damaged, and in the way of its successor
    mend = "--set data.cache=never decodes in every epoch, data.store_size=N keeps smaller images"
    half = staging(folder)
    try:
        with room_for("decoded images", needed, folder.parent, mend):
            shape = (len(source), 3, source.size, source.size)
            pixels = new_array(half / "pixels.npy", np.uint8, shape)
        sizes = np.empty((len(source), 2), dtype=np.int64)
        able = workers_that_fit(workers, _Blocks.size * needed // len(source))
        blocks = in_order(_Blocks(source), able, batch_size=None)
        with reporter.progress(len(source), "decoding images, once") as bar, closing(blocks):
            done = 0
            for block in blocks:
                if isinstance(block, str):
                    raise DataError(block)
                count = len(block.pixels)
                pixels[done : done + count] = block.pixels.numpy()
                sizes[done : done + count] = block.sizes.numpy()
                done += count
                bar.advance(count)
        pixels.flush()
        np.save(half / "sizes.npy", sizes)
        write_json(half / "complete.json", {"images": len(source), "size": source.size})
        half.replace(folder)
    finally:
        shutil.rmtree(half, ignore_errors=True)


class _Blocks(TorchDataset["Stored | str"]):
    """Runs of images; a broken one comes back as its message, which keeps it one line across processes."""

    size = 64

    def __init__(self, source: DecodedPixels) -> None:
        self.source = source

    def __len__(self) -> int:
        return -(-len(self.source) // self.size)

    def __getitem__(self, i: int) -> Stored | str:
        stop = min(len(self.source), (i + 1) * self.size)
        return guarded_read(self.source, np.arange(i * self.size, stop))


def guarded_read(pixels: Pixels, index: Array) -> Stored | str:
    """``read``, with the message of a DataError in place of the error."""
    try:
        return pixels.read(index)
    except DataError as error:
        return str(error)
