"""Classification from folders: ``root/<split>/<class>/<image>``."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..types import Array, Dataset
from .files import ignored_images, list_images, no_image
from .folders import TEST_NAMES
from .layouts import choose_splits, class_folders
from .manifest import Manifest
from .splits import FileSplit


def load_image_folder(
    root: Path, name: str, train: str | None, test: str | None, cache_dir: Path | None
) -> Dataset:
    """The classes are the sorted folder names of the train split, as in torchvision's ImageFolder.

    Where no class of test is one of train (the base and novel classes of few-shot benchmarks), test's follow.

    Raises:
        DataError: a split is missing or empty, or some test classes are not classes of train.
    """
    chosen_train, chosen_test = choose_splits(root, train, test)
    known = class_folders(root / chosen_train)
    classes = known + _novel_classes(root, chosen_train, chosen_test, set(known))
    splits: dict[str, FileSplit] = {}
    files: list[tuple[str, int]] = []
    for split_name in (chosen_train, chosen_test):
        must_have = set(known) if split_name == chosen_train else set()
        ids, labels = _scan(root, split_name, classes, must_have)
        splits[split_name] = FileSplit(root, ids, labels)
        files += zip(ids, labels.tolist(), strict=True)
    manifest = Manifest(root, files, cache_dir)
    return Dataset(
        name=name,
        kind="classification",
        fingerprint=manifest.fingerprint(classes=classes, train=chosen_train, test=chosen_test),
        classes=tuple(classes),
        splits=splits,
        train_split=chosen_train,
        test_split=chosen_test,
        path=str(root),
        ignored=ignored_images(root / chosen_train, root / chosen_test),
    )


def _novel_classes(root: Path, train: str, test: str, classes: set[str]) -> list[str]:
    """The classes of the test split where train has none of them; nothing where train has all.

    Raises:
        DataError: train has some of them, or another split would do.
    """
    found = set(class_folders(root / test))
    unknown = sorted(found - classes)
    if not unknown:
        return []
    others = [name for name in TEST_NAMES if name not in (train, test)]
    fits = next((name for name in others if set() < set(class_folders(root / name)) <= classes), None)
    alike = {_folded(name): name for name in classes}
    if spelled := [name for name in unknown if _folded(name) in alike]:
        known = root / train / alike[_folded(spelled[0])]
        raise DataError(
            f"{root / test / spelled[0]} and {known} differ in their spelling alone; call them the same"
        )
    if not fits and found.isdisjoint(classes):
        return unknown
    mend = f"; with test: {fits} in a suite, {fits}/ is scored" if fits else ""
    raise DataError(
        f"{root / test / unknown[0]} is not a class of the train split; it has {len(classes)} others{mend}"
    )


def _folded(name: str) -> str:
    """A name without its case, and however its accents are coded."""
    return unicodedata.normalize("NFC", name).casefold()


def _scan(root: Path, split: str, classes: list[str], must_have: set[str]) -> tuple[list[str], Array]:
    present = class_folders(root / split)
    ids: list[str] = []
    labels: list[int] = []
    for label, class_name in enumerate(classes):
        found = list_images(root / split / class_name) if class_name in present else []
        if not found and class_name in must_have:
            folder = root / split / class_name
            raise DataError(f"{folder} {no_image(folder)}; remove the folder or fill it")
        ids += [f"{split}/{class_name}/{image}" for image in found]
        labels += [label] * len(found)
    if not ids:
        raise DataError(f"{root / split} {no_image(root / split)} below its class folders")
    return ids, np.asarray(labels, dtype=np.int64)
