"""What the readers return: splits of files, of decoded arrays, and video sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..types import Array
from .reading import check_size, read_image, read_mask


class Unmasked:
    """What splits without masks have in common."""

    ids: Sequence[str]

    def mask(self, i: int) -> Array:
        """Raises DataError: there are no masks."""
        raise DataError(f"{self.ids[i]} has no mask: this is a classification data set")


@dataclass(eq=False)
class FileSplit(Unmasked):
    """Images on disk, each with a class index or a mask; nothing is decoded before it is asked for.

    ``masks`` are paths below ``root`` in the order of ``ids``; ``known`` are the labels that masks may hold.
    """

    root: Path
    ids: Sequence[str]
    labels: Array | None = None
    masks: Sequence[str] | None = None
    known: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, i: int) -> Array:
        """The decoded image, RGB, uint8 (H, W, 3). Raises DataError naming the file where it is broken."""
        return read_image(self.root / self.ids[i])

    def mask(self, i: int) -> Array:
        """The label map, uint8 (H, W). Raises DataError where there is none, or it does not fit."""
        if self.masks is None:
            return super().mask(i)
        path = self.root / self.masks[i]
        mask = read_mask(path)
        check_size(mask, path, self.root / self.ids[i])
        strange = set(np.flatnonzero(np.bincount(mask.ravel())).tolist()) - self.known
        if self.known and strange:
            raise DataError(
                f"{path} holds the label {min(strange)}, which is neither a class nor void; "
                "name the void labels or correct the class list"
            )
        return mask

    def subset(self, index: Array) -> FileSplit:
        """The split made of these positions, in this order."""
        return replace(
            self,
            ids=[self.ids[i] for i in index],
            labels=None if self.labels is None else self.labels[index],
            masks=None if self.masks is None else [self.masks[i] for i in index],
        )


@dataclass(eq=False)
class ArraySplit(Unmasked):
    """Images that a data set stores as one array, uint8 (N, H, W, 3)."""

    pixels: Array
    ids: Sequence[str]
    labels: Array | None

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, i: int) -> Array:
        """The image, RGB, uint8 (H, W, 3)."""
        pixels: Array = self.pixels[i]
        return pixels

    def subset(self, index: Array) -> ArraySplit:
        """The split made of these positions, in this order."""
        labels = None if self.labels is None else self.labels[index]
        return ArraySplit(self.pixels[index], [self.ids[i] for i in index], labels)


@dataclass(eq=False)
class FileSequence:
    """One video on disk. ``single`` maps a mask's 255 to object 1 (DAVIS 2016)."""

    root: Path
    name: str
    frame_ids: Sequence[str]
    frames: Sequence[str]
    masks: Sequence[str]
    single: bool = False

    def __len__(self) -> int:
        return len(self.frames)

    def frame(self, i: int) -> Array:
        """RGB frame, uint8 (H, W, 3). Raises DataError naming the file where it is broken."""
        return read_image(self.root / self.frames[i])

    def mask(self, i: int) -> Array:
        """Label map, uint8 (H, W): 0 background, 1..K objects, 255 void."""
        path = self.root / self.masks[i]
        mask = read_mask(path)
        check_size(mask, path, self.root / self.frames[i])
        if not self.single:
            return mask
        if ((mask != 0) & (mask != 255)).any():
            raise DataError(
                f"{path} holds object ids, but the data set was read as DAVIS 2016 (only 0 and 255)"
            )
        return (mask // 255).astype(np.uint8)

    def head(self, n: int) -> FileSequence:
        """The first n frames."""
        return replace(self, frame_ids=self.frame_ids[:n], frames=self.frames[:n], masks=self.masks[:n])


def spread(n: int, most: int) -> list[int]:
    """At most so many of n positions, evenly from the first to the last."""
    positions: list[int] = np.linspace(0, n - 1, min(n, most)).round().astype(int).tolist()
    return positions
