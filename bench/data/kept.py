"""Decoded pixels on disk: written on the way from the files to an encoder, read for the encoders after it.

A GPU waits for images to be decoded; pixels that lie in the system's memory of a disk reach it without. They
are those that decoding gave, to the bit, and come in the same batches.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import ExitStack, closing, suppress
from functools import partial
from io import BufferedReader
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from ..banks import PIXELS, Bank, BankStore, NewRows
from ..engine import Moment
from ..errors import DataError
from .ahead import ahead
from .loading import Batch
from .reading import not_read

_AHEAD = 3
"""Batches that are read before they are asked for."""


def keeping(batches: Generator[Batch], rows: NewRows, meta: Mapping[str, Any]) -> Generator[Batch]:
    """The same batches, and once all were given, their pixels and what is known of them in the bank."""
    broken: list[str] = []
    written = False
    with closing(batches):
        for batch in batches:
            broken += batch.broken
            pixels = batch.images.permute(0, 2, 3, 1).to("cpu", non_blocking=True)
            there = Moment(batch.images.is_cuda)
            yield batch
            there.wait()
            if len(batch.positions):
                rows.write(batch.positions, {PIXELS: pixels.numpy()})
                written = True
    if written:
        rows.publish(broken, meta)


class Kept(NamedTuple):
    """Pixels of a bank, and the open file that they lie in: it stays where another run deletes it."""

    bank: Bank
    stream: BufferedReader


def open_kept(store: BankStore, key: str, skip_broken: bool) -> Kept | None:
    """The pixels of a bank; None where they are not there, or images that are broken must not be left out."""
    path = store.path(key, PIXELS)
    with ExitStack() as opened, suppress(FileNotFoundError):
        stream = opened.enter_context(path.open("rb"))
        bank = store.read(key, [PIXELS])
        # Another run may have put a new file there since, of other rows.
        same = os.path.samestat(os.fstat(stream.fileno()), path.stat())
        if bank is not None and same and (skip_broken or not bank.meta["skipped"]):
            opened.pop_all()
            return Kept(bank, stream)
    return None


def read_kept(kept: Kept, images: int, batch_size: int, device: str) -> Generator[Batch]:
    """The batches that decoding a split of so many images gives, on the device.

    The first one names all broken images.

    Raises:
        DataError: the file is cut, or the disk fails.
    """
    bank, stream = kept
    pixels = bank.columns[PIXELS]
    rows = np.searchsorted(bank.index, np.arange(0, images + batch_size, batch_size))
    stretches = [slice(*ends) for ends in pairwise(rows)]
    broken: list[str] = list(bank.meta["skipped"])
    pinned = device.startswith("cuda")  # a GPU copies by itself from there

    def space(stretch: slice) -> torch.Tensor:
        shape = (stretch.stop - stretch.start, *pixels.shape[1:])
        return torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)

    calls = (partial(_filled, space(stretch), stream) for stretch in stretches)
    with stream, closing(ahead(calls, _AHEAD)) as filled:
        stream.seek(pixels.offset)
        for stretch, read in zip(stretches, filled, strict=True):
            found = read.to(device, non_blocking=True)
            yield Batch(bank.index[stretch], found.permute(0, 3, 1, 2), broken)
            broken = []


def _filled(space: torch.Tensor, stream: BufferedReader) -> torch.Tensor:
    """The next pixels of a file. Read, not mapped: where a disk fails under a map, the process is killed."""
    try:
        got = stream.readinto(space.numpy().data) if space.numel() else 0
    except OSError as error:
        raise not_read(stream.name, error, "cannot be read") from error
    if got != space.numel():
        raise DataError(f"{stream.name} is shorter than it was; delete it")
    return space
