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

from ..types import Array

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

    Args:
        count: more than the items that are under way or looked at at a time.
        size: bytes that an item takes at most; memory that no item reaches is never taken.
        shared: whether other processes write them.
    """

    def __init__(self, count: int, size: int, shared: bool) -> None:
        size = -(-size // _ALIGN) * _ALIGN
        if shared:
            new: Any = (
                torch.UntypedStorage._new_shared
            )  # what torch's own collate takes; others copy it first
            self._memory = torch.empty(0, dtype=torch.uint8).set_(new(count * size)).view(count, size)
        else:
            self._memory = torch.empty((count, size), dtype=torch.uint8)

    def empty(self, item: int) -> Slot:
        """The slot of an item, to be written."""
        return Slot(self._memory[item % len(self._memory)].numpy())

    def filled(self, item: int, used: int) -> torch.Tensor:
        """The bytes that were written, uint8 (used,), until the slot's turn comes again."""
        return self._memory[item % len(self._memory), :used]
