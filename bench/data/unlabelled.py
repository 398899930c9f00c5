"""Every image of a folder, of whatever layout, as one split without labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from ..types import Dataset, ImageSplit
from .files import UNREAD_SUFFIXES, Manifest, by_suffix, list_images, no_image
from .layouts import (
    COMPRESSED_TARS,
    SHARD_SUFFIXES,
    TEST_NAMES,
    TRAIN_NAMES,
    listing,
    reasons,
    shard_split,
)
from .shard_sets import fingerprint, opener
from .splits import FileSplit


def load_every_image(root: Path, name: str, cache_dir: Path | None) -> Dataset:
    """One split ``train``, ``labels`` None: the images below ``root``, or those in its tar or parquet shards.

    Raises:
        DataError: no image and no shard, or loose images beside shards that name no split.
    """
    images = _to_train_on(list_images(root), loose=True)
    layout, shards = _shards(root)
    known = reasons(root)
    split: ImageSplit
    if shards and (not images or (known and set(known) <= set(SHARD_SUFFIXES))):
        found = opener(layout)(root, shards, cache_dir)
        split, identity = found.split, fingerprint(root, [found], cache_dir, split="unlabelled")
    elif shards and not known:
        raise DataError(
            f"{root} holds both loose images ({images[0]}) and shards ({shards[0]}); name the folder that "
            "holds what is meant alone"
        )
    elif images:
        split = FileSplit(root, images)
        manifest = Manifest(root, [(image, -1) for image in images], cache_dir)
        identity = manifest.fingerprint(split="unlabelled")
    else:
        raise DataError(f"{root} {no_image(root)}, no *.tar and no *.parquet; it holds {listing(root)}")
    return Dataset(
        name=name,
        kind="classification",
        fingerprint=identity,
        splits={"train": split},
        test_split="train",  # the only one there is; without labels no task scores it
        path=str(root),
        ignored=by_suffix(_to_train_on(list_images(root, UNREAD_SUFFIXES), loose=True)),
    )


def _shards(root: Path) -> tuple[str, list[str]]:
    """Layout and shards; tar before parquet, which img2dataset leaves beside each tar to describe it."""
    for layout, suffixes in SHARD_SUFFIXES.items():
        more = COMPRESSED_TARS if layout == "webdataset" else ()
        shards = _to_train_on(list_images(root, suffixes + more), loose=False)
        if shards:
            return layout, shards
    return "", []


def _to_train_on(paths: Sequence[str], loose: bool) -> list[str]:
    """The paths without those of a test split, where there is a train split beside it. A loose image belongs
    to the split whose folder is the first of its path; its own name says nothing.
    """

    def split(path: str) -> str | None:
        return path.split("/")[0] if loose else shard_split(path)

    told = {path: split(path) for path in paths}
    if not set(told.values()) & set(TRAIN_NAMES):
        return list(paths)
    return [path for path in paths if told[path] not in TEST_NAMES]
