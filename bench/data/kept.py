"""Decoded pixels on disk: written on the way from the files to an encoder, read for the encoders after it.

A GPU waits for images to be decoded; pixels that lie on a disk, or in the memory of the system that the disk
is read through, reach it several times as fast. They are those that decoding gave, to the bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..banks import Bank, NewRows
from ..errors import DataError
from ..types import Array
from .loading import Batch

PIXELS = "pixels"
"""The column of a bank that they are: uint8 (N, S, S, 3)."""
_AHEAD = 3
"""Batches that are read before they are asked for."""


def keeping(batches: Generator[Batch], rows: NewRows, meta: Mapping[str, Any]) -> Generator[Batch]:
    """The same batches, and once all were given, their pixels and what is known of them in the bank."""
    index: list[Array] = []
    broken: list[str] = []
    with closing(batches):
        for batch in batches:
            broken += batch.broken
            if len(batch.positions):
                index.append(batch.positions)
                rows.write({PIXELS: batch.images.permute(0, 2, 3, 1).cpu().numpy()})
            yield batch
    if index:
        rows.publish(np.concatenate(index), {**meta, "images": sum(map(len, index)), "skipped": broken})


def read_kept(bank: Bank, batch_size: int, device: str) -> Generator[Batch]:
    """The batches of a bank's pixels, on the device; the first one names the broken images.

    Raises:
        DataError: the file is cut, or the disk fails.
    """
    pixels = bank.columns[PIXELS]
    path, shape = Path(str(pixels.filename)), pixels.shape[1:]
    stretches = [range(i, min(i + batch_size, len(pixels))) for i in range(0, len(pixels), batch_size)]
    broken: list[str] = list(bank.meta["skipped"])
    with path.open("rb") as stream, ThreadPoolExecutor(1) as reader:
        stream.seek(pixels.offset)
        waiting: deque[Future[torch.Tensor]] = deque()

        def begin(i: int) -> None:
            if i < len(stretches):
                # A GPU copies by itself from memory that is pinned.
                pinned = device.startswith("cuda")
                images = torch.empty((len(stretches[i]), *shape), dtype=torch.uint8, pin_memory=pinned)
                waiting.append(reader.submit(_filled, images, stream))

        for i in range(_AHEAD):
            begin(i)
        try:
            for i, stretch in enumerate(stretches):
                begin(i + _AHEAD)
                images = waiting.popleft().result().to(device, non_blocking=True)
                yield Batch(bank.index[stretch.start : stretch.stop], images.permute(0, 3, 1, 2), broken)
                broken = []
        finally:
            reader.shutdown(cancel_futures=True)


def _filled(images: torch.Tensor, stream: BufferedReader) -> torch.Tensor:
    """The next pixels of a file. Read, not mapped: where a disk fails under a map, the process is killed."""
    try:
        got = stream.readinto(images.numpy().data)
    except OSError as error:
        raise DataError(f"{stream.name} cannot be read: {error.strerror}") from error
    if got != images.numel():
        raise DataError(f"{stream.name} is shorter than it was; delete it")
    return images
