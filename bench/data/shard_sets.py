"""Data sets of shards: which shards make a split, and what their labels must be."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import DataError
from ..types import Array, Dataset
from .folders import SPLIT_NAMES, TEST_NAMES
from .layouts import find_shards, pick_splits, shard_split
from .manifest import Manifest
from .reading import read_list
from .shards import Found

MOST_CLASSES = 1_000_000
CLASS_FILES = ("classes.txt", "classnames.txt")


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


def absent_parts(root: Path) -> list[str]:
    """Parquet shards that the names of others count (``-00000-of-00005``) and that are not there."""
    parts: dict[tuple[str, int, str], set[int]] = {}
    for shard in find_shards(root, "parquet"):
        if told := re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})(.*)", shard):
            parts.setdefault((told[1], int(told[3]), told[4]), set()).add(int(told[2]))
    return [
        f"{begin}{number:05d}-of-{count:05d}{end}"
        for (begin, count, end), there in parts.items()
        for number in sorted(set(range(count)) - there)
    ]


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
        names = [line.strip() for line in read_list(paths[0]).splitlines() if line.strip()]
        source = str(paths[0])
    if names and len(names) < number:
        raise DataError(f"{source} names {len(names)} classes, but the label {number - 1} occurs in {root}")
    return names or [str(label) for label in range(number)]
