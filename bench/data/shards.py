"""Classification from shards: many images in few files, read at random without unpacking them.

What tar and parquet have in common: which shards make a split, what their labels must be, and the split
itself. ``tars.py`` and ``parquet.py`` know where the images lie inside.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..errors import DataError
from ..types import Array, Dataset
from .files import Manifest, read_image
from .layouts import SPLIT_NAMES, TEST_NAMES, find_shards, pick_splits, shard_split

MOST_CLASSES = 1_000_000
CLASS_FILES = ("classes.txt", "classnames.txt")

RawLabel = int | str | None
"""A label as a shard has it: a number, None where there is none (or -1), or in words what is wrong."""


class Reader:
    """Reads one encoded image out of a shard. What it keeps open or decoded belongs to one process: it is not
    pickled, and dropped after a fork, where two processes would share a file's position.
    """

    def __init__(self) -> None:
        self._start()

    def read(self, path: Path, first: int, second: int) -> bytes:
        """The image at two numbers of ``ShardSplit.where``. Raises OSError, EOFError or DataError."""
        if self._pid != os.getpid():
            self.close()
            self._start()
        with self._lock:
            return self._read(path, first, second)

    def close(self) -> None:
        """Let go of whatever is kept; the next ``read`` starts anew."""

    def _start(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()

    def _read(self, path: Path, first: int, second: int) -> bytes:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._start()


@dataclass(eq=False)
class ShardSplit:
    """Images inside shards; nothing is read before it is asked for.

    ``where`` is int64 (N, 3): the position of the shard in ``shards``, and the two numbers by which the
    reader finds the image in it.
    """

    root: Path
    shards: Sequence[str]
    ids: Sequence[str]
    where: Array
    reader: Reader
    labels: Array | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, i: int) -> Image.Image:
        """The decoded image, RGB. Raises DataError naming shard and sample where it is broken."""
        shard, first, second = self.where[i].tolist()
        name = self.root / self.ids[i]
        try:
            content = self.reader.read(self.root / self.shards[shard], first, second)
        except (OSError, EOFError, DataError) as error:
            raise DataError(f"{name} cannot be read: {error}") from error
        return read_image(name, content)

    def mask(self, i: int) -> Array:
        """Raises DataError: there are no masks."""
        raise DataError(f"{self.root / self.ids[i]} has no mask: this is a classification data set")

    def subset(self, index: Array) -> ShardSplit:
        """The split made of these positions, in this order."""
        labels = None if self.labels is None else self.labels[index]
        return replace(self, ids=[self.ids[i] for i in index], where=self.where[index], labels=labels)


@dataclass(frozen=True)
class Found:
    """What the shards of a split hold, before their labels are checked. ``classes`` are names that the shards
    themselves give.
    """

    split: ShardSplit
    labels: Sequence[RawLabel]
    classes: Sequence[str] = ()

    @property
    def labelled(self) -> bool:
        """Whether any sample has a label."""
        return any(label is not None for label in self.labels)


class Opener(Protocol):
    """Finds the images of shards; the index of each is remembered in the cache while it does not change."""

    def __call__(self, root: Path, shards: Sequence[str], cache_dir: Path | None) -> Found: ...


def opener(layout: str) -> Opener:
    """The function that opens shards of a layout."""
    if layout == "parquet":
        from .parquet import open_parquet

        return open_parquet
    from .tars import open_tars

    return open_tars


def load_shards(
    root: Path, name: str, layout: str, train: str | None, test: str | None, cache_dir: Path | None
) -> Dataset:
    """Shards of a train and a test split. A test split without labels is passed over where another has some.

    Raises:
        DataError: a split is missing, a shard tells no split or is broken, labels are not as they must be, or
            the splits name other classes.
    """
    shards = _by_split(root, layout, [*SPLIT_NAMES, *(s for s in (train, test) if s)])
    found: dict[str, Found] = {}

    def opened(split: str) -> Found:
        if split not in found:
            found[split] = opener(layout)(root, shards[split], cache_dir)
        return found[split]

    test = test or next((s for s in TEST_NAMES if s in shards and s != train and opened(s).labelled), None)
    chosen = pick_splits(root, train, test, shards.__contains__, "shards")
    parts = [opened(split) for split in chosen]
    if parts[0].classes and parts[1].classes and parts[0].classes != parts[1].classes:
        raise DataError(f"{root}: the splits {chosen[0]} and {chosen[1]} name different classes")
    labels = {split: check_labels(root, part) for split, part in zip(chosen, parts, strict=True)}
    classes = _class_names(root, [shards[split][0] for split in chosen], parts[0].classes, labels)
    return Dataset(
        name=name,
        kind="classification",
        fingerprint=fingerprint(root, parts, cache_dir, classes=classes, train=chosen[0], test=chosen[1]),
        classes=tuple(classes),
        splits={
            split: replace(part.split, labels=labels[split])
            for split, part in zip(chosen, parts, strict=True)
        },
        train_split=chosen[0],
        test_split=chosen[1],
        path=str(root),
    )


def fingerprint(root: Path, parts: Sequence[Found], cache_dir: Path | None, **extra: object) -> str:
    """The identity of shards: of the files, and of the name, the place and the label of each image."""
    digest = hashlib.sha256()
    for found in parts:
        digest.update(json.dumps([list(found.split.ids), list(found.labels)]).encode())
        digest.update(found.split.where.astype("<i8").tobytes())
    files = [(shard, -1) for found in parts for shard in found.split.shards]
    return Manifest(root, files, cache_dir).fingerprint(samples=digest.hexdigest(), **extra)


def _by_split(root: Path, layout: str, names: Sequence[str]) -> dict[str, list[str]]:
    shards: dict[str, list[str]] = {}
    for shard in find_shards(root, layout, names):
        split = shard_split(shard, names)
        if split is None:
            raise DataError(
                f"{root / shard} does not say which split it belongs to; let its name begin with train-, "
                "val- or test-, or move it away"
            )
        shards.setdefault(split, []).append(shard)
    return shards


# ------------------------------------------------------------------------------------------- labels


def check_labels(root: Path, found: Found) -> Array | None:
    """The labels of a split, int64 (N,); None where no sample has one.

    Raises:
        DataError: a label is no whole number from 0, or some samples have one and others not.
    """
    if not found.labelled:
        return None
    for sample, label in zip(found.split.ids, found.labels, strict=True):
        if label is None:
            have = sum(label is not None for label in found.labels)
            raise DataError(f"{root / sample} has no label, but {have} others of its split do")
        if isinstance(label, str):
            raise DataError(f"{root / sample} {label}")
        if not 0 <= label < MOST_CLASSES:
            raise DataError(f"{root / sample} has the label {label}; labels count the classes from 0")
    return np.asarray(found.labels, dtype=np.int64)


def _class_names(
    root: Path, shards: Sequence[str], given: Sequence[str], labels: dict[str, Array | None]
) -> list[str]:
    number = max((int(part.max()) + 1 for part in labels.values() if part is not None), default=0)
    folders = dict.fromkeys([root, *(root / Path(shard).parent for shard in shards)])
    paths = [folder / name for folder in folders for name in CLASS_FILES if (folder / name).is_file()]
    names, source = list(given), "the schema of the shards"
    if not names and paths:
        try:
            names = [
                line.strip() for line in paths[0].read_text(encoding="utf-8").splitlines() if line.strip()
            ]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{paths[0]} cannot be read: {error}") from error
        source = str(paths[0])
    if names and len(names) < number:
        raise DataError(f"{source} names {len(names)} classes, but the label {number - 1} occurs in {root}")
    return names or [str(label) for label in range(number)]
