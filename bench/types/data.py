"""Data sets: splits of images, video sequences, and a smaller choice of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from .base import Array, DataKind


class ImageSplit(Protocol):
    """The images of one split; decoding happens on access, and must survive pickling to a worker."""

    ids: Sequence[str]
    """A stable name for each image: the path below the root of the data set."""
    labels: Array | None
    """Class index of each image, int64 (N,), or None."""

    def __len__(self) -> int: ...

    def image(self, i: int) -> Array:
        """The decoded image, RGB, uint8 (H, W, 3). Raises DataError naming the file where it is broken."""

    def mask(self, i: int) -> Array:
        """The label map, uint8 (H, W), at the image's own size. Raises DataError where there is none."""

    def subset(self, index: Array) -> ImageSplit:
        """The split made of these positions, in this order."""


class VideoSequence(Protocol):
    """One video with label maps: 0 is background, 1..K are objects, 255 is void."""

    name: str
    frame_ids: Sequence[str]
    """File stems of the frames, in order; result PNGs carry them."""

    def __len__(self) -> int: ...

    def frame(self, i: int) -> Array:
        """RGB frame, uint8 (H, W, 3)."""

    def mask(self, i: int) -> Array:
        """Label map, uint8 (H, W). Raises DataError where the frame has none."""

    def head(self, n: int) -> VideoSequence:
        """The first n frames."""


@dataclass(frozen=True)
class Dataset:
    """A data set of one kind. Classification and segmentation have ``splits``, video has ``sequences``."""

    name: str
    kind: DataKind
    fingerprint: str
    classes: tuple[str, ...] = ()
    splits: Mapping[str, ImageSplit] = field(default_factory=dict)
    sequences: tuple[VideoSequence, ...] = ()
    void: tuple[int, ...] = (255,)
    """Labels that are no class, or no object: left out of every count."""
    train_split: str = "train"
    test_split: str = "val"
    path: str | None = None
    ignored: Mapping[str, int] = field(default_factory=dict)
    """Files beside the images that are images of types which are not read, counted by suffix."""

    def limited(self, n: int, seed: int = 0) -> Dataset:
        """At most ``n`` images a split (spread over the classes, seeded), or ``n`` frames a sequence.

        Fewer images than classes are of the same ``n`` classes in every split: what is scored has neighbours.
        Splits without a class in common (novel classes) are each spread over their own.
        """
        labels = [np.unique(split.labels) for split in self.splits.values() if split.labels is not None]
        classes = np.unique(np.concatenate(labels)) if labels else np.array([], dtype=np.int64)
        apart = sum(map(len, labels)) == len(classes)
        some = n < len(classes) and not apart
        kept = None
        if some:
            order = np.random.default_rng([seed, len(classes)]).permutation(classes)
            everywhere = np.logical_and.reduce([np.isin(order, those) for those in labels])
            kept = order[np.argsort(~everywhere, kind="stable")][:n]  # those first that all splits have
        return replace(
            self,
            splits={name: _limit(split, n, seed, kept) for name, split in self.splits.items()},
            sequences=tuple(s.head(n) for s in self.sequences),
            fingerprint=f"{self.fingerprint}:limit={n}:seed={seed}" + (":classes" if some else ""),
        )

    def counts(self) -> dict[str, int]:
        """Images a split, or frames a sequence."""
        if self.kind == "video":
            return {s.name: len(s) for s in self.sequences}
        return {name: len(split) for name, split in self.splits.items()}


def mask_values(data: Dataset) -> str:
    """What the values of masks of a video data set mean, in words."""
    return "object ids, 255 is void (DAVIS 2017)" if data.void else "0 and 255, the one object (DAVIS 2016)"


def ignored_files(counts: Mapping[str, int]) -> str:
    """What ``Dataset.ignored`` counts, in words: ``20 files ignored (.avif 18, .gif 2)``."""
    total = sum(counts.values())
    kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in counts.items())
    return f"{total:,} file{'' if total == 1 else 's'} ignored ({kinds})"


def _limit(split: ImageSplit, n: int, seed: int, classes: Array | None) -> ImageSplit:
    """At most ``n`` images of a split, of these classes alone where there are labels and some are given."""
    if classes is not None and split.labels is not None:
        split = split.subset(np.flatnonzero(np.isin(split.labels, classes)))
    if len(split) <= n:
        return split
    order = np.random.default_rng(seed).permutation(len(split))
    if split.labels is not None:
        # Round robin over the classes: the r-th image of each class comes before the (r+1)-th of any.
        labels = split.labels[order]
        by_class = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[by_class], labels[by_class])
        rank = np.empty(len(labels), dtype=np.int64)
        rank[by_class] = np.arange(len(labels)) - starts
        order = order[np.argsort(rank, kind="stable")]
    return split.subset(np.sort(order[:n]))
