"""What the names of folders say: which hold images, which masks of those, and which a split."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from .files import list_images, stem

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")
SPLIT_NAMES = (*TRAIN_NAMES, *TEST_NAMES)
_IMAGES = {"image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "rgb"}
_MASKS = {
    "ann", "annotation", "annotations", "anns", "groundtruth", "gt", "instance", "instances", "label",
    "labels", "mask", "masks", "panoptic", "seg", "segmentation", "segmentations", "semantic", "semantics",
    "stuffthingmaps", "trimap", "trimaps", "truth",
}  # fmt: skip
FEWEST = 2
"""A file of the same name in two folders may be chance; so many are not."""


@cache
def _words(name: str) -> list[str]:
    """The words of a folder's name: ``image_2``, ``masks_png``, ``JPEGImages``, ``gtFine``, ``train2017``."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def called_masks(name: str) -> bool:
    """Whether a folder's name says that it holds masks."""
    return not _MASKS.isdisjoint(_words(name))


def called_images(name: str) -> bool:
    """Whether a folder's name says that it holds images, of no class in particular."""
    return not _IMAGES.isdisjoint(_words(name)) and not called_masks(name)


def called_split(name: str) -> str | None:
    """The split that a folder is named after: ``val2017`` and ``val_images`` are ``val``; None for others."""
    split, *rest = [word for word in _words(name) if word not in _IMAGES] or [""]
    return split if split in SPLIT_NAMES and not rest else None


def images_with_masks(folder: Path, names: Sequence[str]) -> tuple[str, str] | None:
    """Two of the folders ``names`` in ``folder`` that hold images and their masks, else None.

    Their names say so, and most files of the smaller one have a file of the same stem in the other. Neither
    is enough alone: 0.png lies in every class folder of many data sets, and a mask may be what a class shows.
    """
    for images in filter(called_images, names):
        pictures = set(map(stem, list_images(folder / images)))
        for masks in filter(called_masks, names):
            labels = set(map(stem, list_images(folder / masks)))
            fewest = max(FEWEST, min(len(pictures), len(labels)) / 2)
            if len(pictures & labels) >= fewest:
                return images, masks
    return None
