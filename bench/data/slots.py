"""Memory that processes share for as long as they work: what they make is written where it is read.

An array that goes through a queue gets shared memory of its own, which the system has to find, to clear page
by page and to map on both sides, for every item anew. Slots stay: items lie in them in turn, and only where
in a slot each array lies goes through the queue.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import DataError
from ..types import Array
from .workers import MORE_SHARED_MEMORY

_ALIGN = 64
"""Bytes of which each slot begins at a multiple: no number has more."""


class Place(NamedTuple):
    """Where in a slot an array lies: its first byte, its shape, its type as NumPy writes it."""

    first: int
    shape: tuple[int, ...]
    dtype: str

    def of(self, slot: torch.Tensor) -> torch.Tensor:
        """The array, as a view of the bytes of the slot, or of a copy of them."""
        dtype = np.dtype(self.dtype)
        last = self.first + math.prod(self.shape) * dtype.itemsize
        kind: torch.dtype = getattr(torch, dtype.name)
        return slot[self.first : last].view(kind).view(self.shape)


class Slot:
    """Arrays one behind the other in memory of a fixed size.

    Attributes:
        used: bytes that are written.
    """

    def __init__(self, memory: Array) -> None:
        self._memory = memory
        self.used = 0

    def put(self, array: Array) -> Place:
        """Write an array behind the others. Raises ValueError where it has no room."""
        align = array.dtype.itemsize
        first = -(-self.used // align) * align
        last = first + array.nbytes
        if last > len(self._memory):
            raise ValueError(f"{last} bytes in a slot of {len(self._memory)}")
        self._memory[first:last].view(array.dtype).reshape(array.shape)[...] = array
        self.used = last
        return Place(first, array.shape, array.dtype.str)


class Slots:
    """``count`` slots of ``size`` bytes each; item i of a sequence lies in slot i modulo their number.

    All shared memory is taken at once: where it did not last, a process would be killed as it writes.

    Args:
        count: at least the items that are made before an item is done with, and that item.
        size: bytes that an item takes at most.
        shared: whether other processes write them.

    Raises:
        DataError: there is not as much shared memory.
    """

    def __init__(self, count: int, size: int, shared: bool) -> None:
        size = -(-size // _ALIGN) * _ALIGN
        memory = _shared(count * size) if shared else torch.empty(count * size, dtype=torch.uint8)
        self._memory = memory.view(count, size)

    def empty(self, item: int) -> Slot:
        """The slot of an item, to be written."""
        return Slot(self._memory[item % len(self._memory)].numpy())

    def filled(self, item: int, used: int) -> torch.Tensor:
        """The bytes that were written, uint8 (used,), until the slot's turn comes again."""
        return self._memory[item % len(self._memory), :used]

    def close(self) -> None:
        """Give the memory back, also where somebody keeps an error and with it all that led there."""
        self._memory = torch.empty((0, 0), dtype=torch.uint8)


def _shared(size: int) -> torch.Tensor:
    # What torch's own collate calls; share_memory_() would copy as much to begin with.
    new: Any = torch.UntypedStorage._new_shared
    try:
        return torch.empty(0, dtype=torch.uint8).set_(new(size))
    except RuntimeError as error:
        raise DataError(
            f"{size / 1e9:.2f} GB of shared memory for decoding processes are not there; {MORE_SHARED_MEMORY}"
        ) from error
