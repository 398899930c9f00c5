"""Memory of mapped files: give back the pages that were read.

A tensor of a mapped file and its copy in the model would count twice. Only Linux has a way to drop the
pages of a mapping that is in use; elsewhere the system takes them back when memory is short.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import torch

_MAPS = Path("/proc/self/maps")


class MappedFiles:
    """The files that are mapped into this process now."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        if sys.platform == "linux" and _MAPS.exists():
            for line in _MAPS.read_text().splitlines():
                bounds, mode, _, _, _, *path = line.split(maxsplit=5)
                if path and path[0].startswith("/") and mode.endswith("p"):
                    low, high = (int(bound, 16) for bound in bounds.split("-"))
                    self._ranges.append((low, high))

    def release(self, tensor: torch.Tensor) -> None:
        """Drop the pages of a file below a tensor; they come back where they are read again.

        Nothing is done to memory that is no mapping of a file, whose content would be lost.
        """
        size = tensor.numel() * tensor.element_size()
        start = tensor.data_ptr()
        page = mmap.PAGESIZE
        low, high = (start + page - 1) // page * page, (start + size) // page * page
        if high <= low or not tensor.is_contiguous():
            return
        if any(first <= low and high <= last for first, last in self._ranges):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), mmap.MADV_DONTNEED)
