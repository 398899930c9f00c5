"""Segmentation: images beside index masks, and the layout of Pascal VOC."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import DataError
from ..types import Dataset
from .files import by_stem, ignored_images, masks_by_stem, no_image
from .folders import SPLIT_NAMES, TEST_NAMES, TRAIN_NAMES
from .layouts import pick_splits
from .manifest import Manifest
from .reading import labels_present, read_list
from .splits import FileSplit, spread

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip

_SAMPLE = 32
Pairs = list[tuple[str, str]]
"""(image, mask), both relative to the root of the data set."""


def load_split_folders(
    root: Path,
    name: str,
    train: str | None,
    test: str | None,
    void: Sequence[int] | None,
    classes: Sequence[str] | None,
    cache_dir: Path | None,
) -> Dataset:
    """``root/<split>/images`` and ``root/<split>/masks``, or ``root/images/<split>`` and so on, with one mask
    of the same stem for each image.

    Every split that is there can be asked for; where no name is given the scored one is ``test`` if it has
    masks, else ``val``.
    """
    parts_first = (root / "masks").is_dir() and not any((root / s / "masks").is_dir() for s in SPLIT_NAMES)

    def place(part: str, split: str) -> str:
        return f"{part}/{split}" if parts_first else f"{split}/{part}"

    def usable(split: str) -> bool:
        return (root / place("masks", split)).is_dir()

    if not train and not any(map(usable, TRAIN_NAMES)):
        # Unsupervised protocols need no train split, so one that is absent is not an error here.
        train = next((s for s in (test, *TEST_NAMES) if s and usable(s)), None)
        test = test or train
    chosen_train, chosen_test = pick_splits(root, train, test, usable, "masks")
    names = [split for split in SPLIT_NAMES if usable(split)]
    names += [split for split in (chosen_train, chosen_test) if split not in names]
    pairs = {split: pair_up(root, place("images", split), place("masks", split)) for split in names}
    data = _dataset(root, name, pairs, chosen_train, chosen_test, void, classes, cache_dir)
    read = (root / place(part, split) for split in names for part in ("images", "masks"))
    return replace(data, ignored=ignored_images(*read))


def load_flat(
    root: Path, name: str, void: Sequence[int] | None, classes: Sequence[str] | None, cache_dir: Path | None
) -> Dataset:
    """``root/images`` and ``root/masks``: one split, called ``all``."""
    pairs = {"all": pair_up(root, "images", "masks")}
    data = _dataset(root, name, pairs, "all", "all", void, classes, cache_dir)
    return replace(data, ignored=ignored_images(root / "images", root / "masks"))


def load_voc(
    root: Path,
    name: str,
    train: str | None,
    test: str | None,
    void: Sequence[int] | None,
    classes: Sequence[str] | None,
    cache_dir: Path | None,
) -> Dataset:
    """Pascal VOC: the lists of ``ImageSets/Segmentation``, palette masks, 255 void."""
    lists = root / "ImageSets" / "Segmentation"
    test = test or "val"
    # As above: one that is absent is not an error, unless it was named.
    train = train or ("train" if (lists / "train.txt").is_file() else test)
    pictures, masks = by_stem(root / "JPEGImages"), masks_by_stem(root / "SegmentationClass")
    pairs: dict[str, Pairs] = {}
    for split in dict.fromkeys((train, test)):
        path = lists / f"{split}.txt"
        if not path.is_file():
            raise DataError(f"{path} does not exist; it lists the images of the split {split!r}")
        stems = dict.fromkeys(line.strip() for line in read_list(path).splitlines() if line.strip())
        for folder, found in (("JPEGImages", pictures), ("SegmentationClass", masks)):
            if absent := [stem for stem in stems if stem not in found]:
                raise DataError(f"{path} lists {absent[0]!r}, and {root / folder} has no file of that name")
        pairs[split] = [(f"JPEGImages/{pictures[s]}", f"SegmentationClass/{masks[s]}") for s in stems]
        if not stems:
            raise DataError(f"{path} lists no image")
    names = classes if classes is not None else _described(root).get("classes", VOC_CLASSES)
    return _dataset(root, name, pairs, train, test, void, names, cache_dir)


def pair_up(root: Path, images: str, masks: str) -> Pairs:
    """Each image with its mask of the same stem. Raises DataError naming a file that is alone, or a mask that
    is a JPEG.
    """
    pictures, labels = by_stem(root / images), masks_by_stem(root / masks)
    for folder, found in ((root / images, pictures), (root / masks, labels)):
        if not found:
            raise DataError(f"{folder} {no_image(folder)}")
    for stem, image in pictures.items():
        if stem not in labels:
            raise DataError(f"{root / images / image} has no mask: {root / masks / stem}.png does not exist")
    for stem, mask in labels.items():
        if stem not in pictures:
            raise DataError(f"{root / masks / mask} has no image of the same name in {root / images}")
    return [(f"{images}/{pictures[stem]}", f"{masks}/{labels[stem]}") for stem in pictures]


def _dataset(
    root: Path,
    name: str,
    pairs: Mapping[str, Pairs],
    train: str,
    test: str,
    void: Sequence[int] | None,
    classes: Sequence[str] | None,
    cache_dir: Path | None,
) -> Dataset:
    described = _described(root)
    chosen = void if void is not None else described.get("void")
    void = (255,) if chosen is None else chosen
    outside = [label for label in void if not 0 <= label <= 255]
    if outside:
        raise DataError(f"{root}: void names the label {outside[0]}, but labels of masks are 0..255")
    names = classes if classes is not None else described.get("classes")
    if twice := [one for one, count in Counter(names or ()).items() if count > 1]:
        raise DataError(f"{root}: two classes are called {twice[0]!r}; give each a name of its own")
    files = [(path, -1) for split in pairs.values() for pair in split for path in pair]
    manifest = Manifest(root, files, cache_dir)
    masks = [root / mask for split in pairs.values() for _, mask in split]

    def present() -> list[int]:
        found: list[int] = manifest.recall("labels", lambda: labels_present(masks))
        return found

    if names is None:
        used = _classes_among(present(), root, void)
        if 255 in used and chosen is not None and 254 not in used:
            raise DataError(
                f"the masks of {root} hold 255, which is void unless other labels are named: add 255 to void "
                f"({', '.join(map(str, void))}), or name all classes"
            )
        names = [f"class {label}" for label in range(max(used) + 1)]
    elif len(names) > 1:
        sample = [masks[i] for i in spread(len(masks), _SAMPLE)]
        some = manifest.recall("some-labels", lambda: labels_present(sample))
        if set(some) <= {0, *void}:  # which may be all that there is
            _classes_among(present(), root, void)
    known = frozenset(range(len(names))) | frozenset(void)
    return Dataset(
        name=name,
        kind="segmentation",
        fingerprint=manifest.fingerprint(
            classes=list(names),
            void=list(void),
            train=train,
            test=test,
            # The files of one split follow those of another, whatever folders they lie in.
            sizes={split: len(found) for split, found in pairs.items()},
        ),
        classes=tuple(names),
        splits={
            split: FileSplit(root, [i for i, _ in found], None, [m for _, m in found], known)
            for split, found in pairs.items()
        },
        void=tuple(void),
        train_split=train,
        test_split=test,
        path=str(root),
    )


def _classes_among(present: Sequence[int], root: Path, void: Sequence[int]) -> list[int]:
    """The labels of masks that are not void. Raises DataError where they are none, or 0 alone."""
    used = [label for label in present if label not in void]
    if not used:
        raise DataError(f"the masks of {root} hold no label besides void ({', '.join(map(str, void))})")
    if used == [0]:
        hidden = ", ".join(str(label) for label in present if label in void)
        beside = f" beside void {hidden}: where that is the object, write masks of 0 and 1" if hidden else ""
        raise DataError(f"the masks of {root} hold one class, the label 0 alone{beside}")
    return used


def _described(root: Path) -> dict[str, Any]:
    """What ``dataset.yaml`` (``classes``, ``void``) or ``classes.txt`` (a name a line) in the root says."""
    path = root / "dataset.yaml"
    if path.is_file():
        try:
            content = yaml.safe_load(read_list(path))
        except yaml.YAMLError as error:
            raise DataError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
        content = {} if content is None else content
        if not isinstance(content, dict) or not set(content) <= {"classes", "void"}:
            raise DataError(f"{path} may hold the fields classes and void alone")
        for field, kind in (("classes", str), ("void", int)):
            values = content.get(field, [])
            if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
                raise DataError(
                    f"{path}: {field} must be a list of {'names' if kind is str else 'whole numbers'}"
                )
        return content
    path = root / "classes.txt"
    if path.is_file():
        names = [line.strip() for line in read_list(path).strip().splitlines()]
        if "" in names:
            raise DataError(f"{path}: line {names.index('') + 1} is blank, and each line names a class")
        return {"classes": names}
    return {}
