"""From images on disk to batches of pixels: decoded in worker processes, in order, errors with file names.

Beside a GPU the processes only decode images of ordinary size, and the GPU resizes them (see resampling.py);
the pixels are the same.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from functools import partial
from itertools import starmap
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from ..errors import DataError, UnreadableError
from ..types import Array, ImageSplit, View
from . import resampling
from .ahead import ahead
from .slots import Place, Slot, Slots
from .views import check_shape, geometry, view_pixels
from .workers import in_order, killed_in_one_line, part_that_fits, under_way, workers_that_fit

_MOST_SIDE = 2.5
"""The longest side of what a GPU is sent of an image, over that of the result; larger ones come resized."""


class Batch(NamedTuple):
    """Decoded images that follow each other in the split.

    Attributes:
        positions: position of each image in the split, int64 (B,), ascending.
        images: pixels, uint8 (B, 3, S, S), of any strides; see ``normalise``.
        broken: ids of the images of this stretch that could not be decoded (only with ``skip_broken``).
    """

    positions: Array
    images: torch.Tensor
    broken: list[str]


def iterate_batches(
    split: ImageSplit,
    view: View,
    batch_size: int,
    workers: int = 0,
    skip_broken: bool = False,
    device: str = "cpu",
) -> Generator[Batch]:
    """The images of a split in order, through a view, in batches of uint8 pixels.

    Close it where it is not read to its end: an error that somebody keeps would keep the processes too.

    Args:
        split: where the images come from; it is sent to the workers.
        view: how they are resized and cropped.
        batch_size: images a batch, broken ones counted.
        workers: processes that decode; 0 decodes in this one.
        skip_broken: leave broken images out and name them in the batch, rather than stop.
        device: where the pixels are wanted; a GPU resizes them too.

    Raises:
        DataError: an image is broken (unless ``skip_broken``), or cannot be read; the message names the file.
    """
    with closing(_batches(split, view, batch_size, workers, skip_broken, device)) as batches:
        yield from killed_in_one_line(batches)


def _batches(
    split: ImageSplit, view: View, batch_size: int, workers: int, skip_broken: bool, device: str
) -> Generator[Batch]:
    way = _way(view, device, batch_size, workers)
    part, able = _room(way, batch_size, workers)
    stretches = [range(i, min(i + batch_size, len(split))) for i in range(0, len(split), batch_size)]
    parts = [stretch[i : i + part] for stretch in stretches for i in range(0, len(stretch), part)]
    able = min(able, len(parts))
    count = min(under_way(able), len(parts)) if able else 1
    most = max(map(len, parts), default=0) * way.most_bytes
    with closing(Slots(count, most, shared=able > 0)) as slots:
        decoded = _Decoded(split, parts, way, slots, skip_broken)
        made = in_order(decoded, able, batch_size=None, collate_fn=_as_it_is)
        with closing(made), closing(_brought(made, slots, device)) as brought:
            whole = starmap(partial(_batch, way, device), brought)
            for stretch in stretches:
                yield _joined((next(whole) for _ in range(0, len(stretch), part)), len(stretch))


class _Way(Protocol):
    """How an image comes to its pixels: what is made of it in a process, and what of that on the device.

    Attributes:
        most_bytes: what an image takes in a slot, at most.
    """

    view: View
    most_bytes: int

    def put(self, image: Array, slot: Slot) -> Any:
        """Write what is needed of an image, uint8 (H, W, 3); what is returned goes to ``put_rest``."""

    def put_rest(self, put: list[Any], slot: Slot) -> Any:
        """Write what is needed of all of them; what is returned goes through a queue to ``finish``."""

    def finish(self, written: torch.Tensor, rest: Any) -> torch.Tensor:
        """Their pixels, uint8 (n, 3, S, S), of the bytes of the slot, on the device where these are."""


class _Resized:
    """The processes resize, by Pillow."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.most_bytes = view.pixel_bytes

    def put(self, image: Array, slot: Slot) -> None:
        slot.put(view_pixels(image, self.view))

    def put_rest(self, put: list[None], slot: Slot) -> None:
        return None

    def finish(self, written: torch.Tensor, rest: None) -> torch.Tensor:
        return written.view(-1, self.view.size, self.view.size, 3).permute(0, 3, 1, 2)


class _Put(NamedTuple):
    """``resampling.Cut``, its pixels by their place."""

    pixels: Place
    rows: resampling.Taps
    columns: resampling.Taps
    rows_first: bool


class _Cuts(NamedTuple):
    """``resampling.Cuts``, by their places."""

    pixels: list[Place]
    rows: tuple[Place, Place]
    columns: tuple[Place, Place]
    rows_first: list[bool]


class _Resampled:
    """The device resizes what the processes cut out."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.longest = int(_MOST_SIDE * view.size)
        # A row more of each axis than there are: arrays begin at multiples of the size of their numbers.
        self.most_bytes = 3 * self.longest**2 + 2 * (view.size + 1) * (8 + 4 * resampling.MOST_TAPS)

    def put(self, image: Array, slot: Slot) -> _Put:
        cut = self.cut(image)
        return _Put(slot.put(cut.pixels), *cut[1:])

    def cut(self, image: Array) -> resampling.Cut:
        """What is needed of an image."""
        view = self.view
        target, corner = geometry(image, view)
        made = resampling.cut(image, target, corner, view.size, view.interpolation)
        if made is None or max(made.pixels.shape) > self.longest:
            return resampling.finished(view_pixels(image, view))
        return made

    def put_rest(self, put: list[_Put], slot: Slot) -> _Cuts:
        rows = resampling.stack([each.rows for each in put], self.view.size)
        columns = resampling.stack([each.columns for each in put], self.view.size)
        return _Cuts(
            [each.pixels for each in put],
            (slot.put(rows.first), slot.put(rows.weights)),
            (slot.put(columns.first), slot.put(columns.weights)),
            [each.rows_first for each in put],
        )

    def finish(self, written: torch.Tensor, rest: _Cuts) -> torch.Tensor:
        rows, columns = (
            resampling.Axis(*(place.of(written) for place in axis)) for axis in (rest.rows, rest.columns)
        )
        pixels = [place.of(written) for place in rest.pixels]
        return resampling.resample(resampling.Cuts(pixels, rows, columns, rest.rows_first))


def _way(view: View, device: str, batch_size: int, workers: int) -> _Way:
    ready = _Resized(view)
    if (
        device == "cpu"
        or view.interpolation not in resampling.FILTERS
        or not resampling.equals_pillow(device)
    ):
        return ready
    whole = _Resampled(view)
    # Whole images take more of the shared memory; where they leave it to fewer processes, nothing is won.
    fewer = _room(whole, batch_size, workers)[1] < _room(ready, batch_size, workers)[1]
    return ready if fewer else whole


def _room(way: _Way, batch_size: int, workers: int) -> tuple[int, int]:
    """How many images are one item on their way from the processes, and how many of those may work."""
    part = part_that_fits(batch_size, way.most_bytes, workers)
    return part, workers_that_fit(workers, part * way.most_bytes)


class _Part(NamedTuple):
    """Images that follow each other: which part they are, positions, bytes in its slot, what
    ``_Way.put_rest`` said of them, ids of the broken ones; ``stop`` says why nothing may go on.
    """

    item: int
    positions: Sequence[int] = ()
    used: int = 0
    rest: Any = None
    broken: Sequence[str] = ()
    stop: str = ""


def _as_it_is(part: _Part) -> _Part:
    return part


def _brought(made: Iterable[_Part], slots: Slots, device: str) -> Generator[tuple[_Part, torch.Tensor]]:
    """Parts and their bytes, where the device can take them: a GPU copies by itself from pinned memory, into
    which a thread brings a part while the part before is taken.
    """

    def found(part: _Part) -> tuple[_Part, torch.Tensor]:
        if part.stop:
            raise DataError(part.stop)
        return part, slots.filled(part.item, part.used)

    def pinned(part: _Part) -> tuple[_Part, torch.Tensor]:
        part, written = found(part)
        return part, written.pin_memory()

    if device.startswith("cuda"):
        # A part is asked for once the one before is out of its slot.
        yield from ahead((partial(pinned, part) for part in made), 1)
    else:
        yield from map(found, made)


def _batch(way: _Way, device: str, part: _Part, written: torch.Tensor) -> Batch:
    """Of a part, on the device; where that is the CPU, the pixels may lie in the part's slot."""
    written = written.to(device, non_blocking=True)
    return Batch(np.asarray(part.positions, np.int64), way.finish(written, part.rest), [*part.broken])


def _joined(parts: Iterable[Batch], most: int) -> Batch:
    """One batch of several, copied as they come, so that their slots may be written again."""
    images: torch.Tensor | None = None
    positions: list[Array] = []
    broken: list[str] = []
    filled = 0
    for each in parts:
        if images is None:
            images = each.images.new_empty((most, *each.images.shape[2:], 3)).permute(0, 3, 1, 2)
        images[filled : filled + len(each.images)] = each.images
        filled += len(each.images)
        positions.append(each.positions)
        broken += each.broken
    assert images is not None
    return Batch(np.concatenate(positions), images[:filled], broken)


class _Decoded(TorchDataset[_Part]):
    def __init__(
        self, split: ImageSplit, parts: Sequence[range], way: _Way, slots: Slots, skip_broken: bool
    ) -> None:
        self.split, self.parts, self.way, self.slots = split, parts, way, slots
        self.skip_broken = skip_broken

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: int) -> _Part:
        slot = self.slots.empty(i)
        positions: list[int] = []
        put: list[Any] = []
        broken: list[str] = []
        for position in self.parts[i]:
            # An exception that crosses the process border loses its one-line message, so the message travels.
            try:
                image = self.split.image(position)
                check_shape(image, self.way.view, self.split.ids[position])
            except UnreadableError as error:
                return _Part(i, stop=f"{error}")
            except DataError as error:
                if not self.skip_broken:
                    return _Part(i, stop=f"{error}; --skip-broken leaves such images out")
                broken.append(self.split.ids[position])
            else:
                positions.append(position)
                put.append(self.way.put(image, slot))
        rest = self.way.put_rest(put, slot)
        return _Part(i, positions, slot.used, rest, broken)
