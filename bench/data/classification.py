"""Classification from folders: ``root/<split>/<class>/<image>``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import DataError
from ..types import Array, Dataset
from .files import Manifest, ignored_images, list_images, no_image
from .folders import TEST_NAMES
from .layouts import choose_splits, class_folders
from .splits import FileSplit


def load_image_folder(
    root: Path, name: str, train: str | None, test: str | None, cache_dir: Path | None
) -> Dataset:
    """The classes are the sorted folder names of the train split, as in torchvision's ImageFolder.

    Raises:
        DataError: a split is missing or empty, or a test class is not a class of train.
    """
    chosen_train, chosen_test = choose_splits(root, train, test, marker=None)
    classes = class_folders(root / chosen_train)
    _check_classes(root, chosen_train, chosen_test, set(classes))
    splits: dict[str, FileSplit] = {}
    files: list[tuple[str, int]] = []
    for split_name in (chosen_train, chosen_test):
        ids, labels = _scan(root, split_name, classes, every_class=split_name == chosen_train)
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


def _check_classes(root: Path, train: str, test: str, classes: set[str]) -> None:
    """Raise DataError where a class of the test split is none of train, with another split that would do."""
    unknown = sorted(set(class_folders(root / test)) - classes)
    if not unknown:
        return
    others = [name for name in TEST_NAMES if name not in (train, test)]
    fits = next((name for name in others if set() < set(class_folders(root / name)) <= classes), None)
    mend = f"; with test: {fits} in a suite, {fits}/ is scored" if fits else ""
    raise DataError(
        f"{root / test / unknown[0]} is not a class of the train split; it has {len(classes)} others{mend}"
    )


def _scan(root: Path, split: str, classes: list[str], every_class: bool) -> tuple[list[str], Array]:
    present = class_folders(root / split)
    ids: list[str] = []
    labels: list[int] = []
    for label, class_name in enumerate(classes):
        found = list_images(root / split / class_name) if class_name in present else []
        if every_class and not found:
            folder = root / split / class_name
            raise DataError(f"{folder} {no_image(folder)}; remove the folder or fill it")
        ids += [f"{split}/{class_name}/{image}" for image in found]
        labels += [label] * len(found)
    if not ids:
        raise DataError(f"{root / split} {no_image(root / split)} below its class folders")
    return ids, np.asarray(labels, dtype=np.int64)
