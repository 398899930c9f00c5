"""Broken images of a training: the next image that can be read takes each one's place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset as TorchDataset

from ..bench.atomic import write_json
from ..bench.claims import in_turn
from ..bench.data.workers import in_order
from ..bench.errors import DataError, UnreadableError
from ..bench.progress import Reporter
from ..bench.types import Array, Dataset, ImageSplit

_RUN = 64
"""Images that a process decodes at a time."""


def without_broken(
    data: Dataset, root: Path, workers: int, reporter: Reporter
) -> tuple[Dataset, tuple[str, ...]]:
    """The data set with another image, label and all, in the place of each broken one.

    The number of images and their order stay as they were, so that a training that a broken image stopped
    goes on. Every image of the training and test split is decoded for it, once: what is broken is kept.

    Args:
        data: a classification data set, or images without labels.
        root: the cache's folder for pixels.
        workers: processes that decode.
        reporter: receives the progress, and what was found.

    Returns:
        The data set, and the ids of the broken images.

    Raises:
        DataError: no image of a split can be read, or the system failed to read one.
    """
    names = dict.fromkeys((data.train_split, data.test_split))
    splits = {name: data.splits[name] for name in names if name in data.splits}
    found = root / f"{hashlib.sha256(data.fingerprint.encode()).hexdigest()[:32]}-broken.json"
    if not found.is_file():
        with in_turn(found, reporter):
            if not found.is_file():
                write_json(found, {name: _broken(split, workers, reporter) for name, split in splits.items()})
    broken: Mapping[str, Mapping[str, int]] = json.loads(found.read_bytes())
    ids = tuple(one for places in broken.values() for one in places)
    if ids:
        reporter.line(
            f"WARNING: {len(ids)} broken image(s) left out, another in the place of each, first {ids[0]}; "
            f"all are named in {found}"
        )
    whole = {
        name: _replaced(split, sorted(broken[name].values()), f"{data.name}/{name}")
        for name, split in splits.items()
    }
    return replace(data, splits={**data.splits, **whole}), ids


def _replaced(split: ImageSplit, broken: list[int], name: str) -> ImageSplit:
    if not broken:
        return split
    whole = np.setdiff1d(np.arange(len(split)), broken)
    if not len(whole):
        raise DataError(f"every image of {name} is broken, first {split.ids[0]}")
    places = np.arange(len(split))
    places[broken] = whole[np.searchsorted(whole, broken) % len(whole)]
    return split.subset(places)


def _broken(split: ImageSplit, workers: int, reporter: Reporter) -> dict[str, int]:
    """Ids and positions of the images that cannot be decoded."""
    broken: list[int] = []
    runs = in_order(_Runs(split), workers, batch_size=None)
    with reporter.progress(len(split), "looking for broken images, once") as bar, closing(runs):
        for run in runs:
            if run.stop:
                raise DataError(run.stop)
            broken += run.broken.tolist()
            bar.advance(run.images)
    return {split.ids[place]: place for place in broken}


class _Run(NamedTuple):
    images: int
    broken: Array
    stop: str


class _Runs(TorchDataset[_Run]):
    def __init__(self, split: ImageSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        return -(-len(self.split) // _RUN)

    def __getitem__(self, i: int) -> _Run:
        places = range(i * _RUN, min(len(self.split), (i + 1) * _RUN))
        broken = []
        for place in places:
            # An exception that crosses the process border loses its one-line message.
            try:
                self.split.image(place)
            except UnreadableError as error:
                return _Run(len(places), np.array([], dtype=np.int64), str(error))
            except DataError:
                broken.append(place)
        return _Run(len(places), np.array(broken, dtype=np.int64), "")
