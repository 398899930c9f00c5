"""Which layout a folder has, told from its folder names and a few files; and which of its splits are used."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError
from ..types import DataKind, ignored_files
from .files import IMAGE_SUFFIXES, entries, holds_file, holds_image, ignored_images, list_images, subfolders
from .folders import SPLIT_NAMES, TEST_NAMES, TRAIN_NAMES, called_images, called_masks, images_with_masks

RESOLUTIONS = ("480p", "Full-Resolution", "1080p")
SHARD_SUFFIXES = {"webdataset": (".tar",), "parquet": (".parquet",)}
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
METADATA = ("metadata.csv", "metadata.jsonl")
"""Where Hugging Face's image folders say the labels of loose images."""
CIFAR_FOLDERS = {10: "cifar-10-batches-py", 100: "cifar-100-python"}


class Layout(NamedTuple):
    """A layout that is understood: its kind, and what a folder of it holds."""

    kind: DataKind
    holds: str


LAYOUTS: dict[str, Layout] = {
    "imagefolder": Layout("classification", "train/<class>/*.jpg and test/ or val/<class>/*.jpg"),
    "cifar": Layout("classification", f"the python batches of CIFAR ({' or '.join(CIFAR_FOLDERS.values())})"),
    "webdataset": Layout("classification", "shards train-*.tar and test- or val-*.tar, or train/*.tar ..."),
    "parquet": Layout(
        "classification", "shards train-*.parquet and test- or validation-*.parquet, or in data/"
    ),
    "segmentation": Layout(
        "segmentation",
        "train/, val/, test/, each with images/ and masks/ of the same stems, or images/train/ and so on",
    ),
    "segmentation-flat": Layout("segmentation", "images/ and masks/ of the same stems, one split"),
    "voc": Layout("segmentation", "JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/*.txt"),
    "davis": Layout("video", "JPEGImages/480p/<sequence>/ and Annotations/480p/<sequence>/"),
}


class Detected(NamedTuple):
    """What a folder was taken for: layout, kind, and the reason in words."""

    layout: str
    kind: DataKind
    reason: str


def has_image(folder: Path) -> bool:
    """Whether an image lies directly in the folder."""
    return folder.is_dir() and any(
        e.name.lower().endswith(IMAGE_SUFFIXES) and not e.name.startswith(".") for e in entries(folder)
    )


def resolutions(root: Path) -> list[str]:
    """The resolutions of DAVIS of which both frames and masks are there, the usual one first."""
    both = set(subfolders(root / "JPEGImages")) & set(subfolders(root / "Annotations"))
    return [size for size in RESOLUTIONS if size in both]


def cifar_folder(root: Path) -> tuple[Path, int] | None:
    """The folder of CIFAR's python batches at or below ``root``, and the number of classes.

    Raises:
        DataError: both CIFARs are there.
    """
    found = []
    for folder in (root, *(root / name for name in CIFAR_FOLDERS.values())):
        if (folder / "data_batch_1").is_file() and (folder / "test_batch").is_file():
            found.append((folder, 10))
        elif all((folder / name).is_file() for name in ("train", "test", "meta")):
            found.append((folder, 100))
    if len(found) > 1:
        raise DataError(f"{root} holds {' and '.join(folder.name for folder, _ in found)}; name one of them")
    return found[0] if found else None


def class_folders(split: Path) -> list[str]:
    """The folders of a split that stand for classes: all, but not one alone that is called ``images``."""
    names = subfolders(split)
    return [] if len(names) == 1 and called_images(names[0]) else names


def shard_split(path: str, names: Sequence[str] = SPLIT_NAMES) -> str | None:
    """The split that a shard belongs to: the folder it lies in, else its first word, else the one split that
    is a word of its name (``imagenet1k-train-0000.tar``). None where nothing tells it.

    Raises:
        DataError: the folder says one split, the name another.
    """
    *folders, file = path.split("/")
    words = [re.sub(r"\d+$", "", word) for word in re.split(r"[-_.]", file.lower())[:-1]]
    within = next((name for name in reversed(folders) if name in names), None)
    first = words[0] if words[0] in names else None
    if within and first and first != within:
        raise DataError(f"{path} lies in {within}/ but is named {first}; rename it or move it to {first}/")
    told = {word for word in words if word in names}
    return within or first or (told.pop() if len(told) == 1 else None)


def find_shards(root: Path, layout: str, names: Sequence[str] = SPLIT_NAMES) -> list[str]:
    """Shards of a layout as sorted paths below ``root``: in it, in ``data/``, or in a folder of a split."""
    suffixes = SHARD_SUFFIXES[layout] + (COMPRESSED_TARS if layout == "webdataset" else ())
    found: set[str] = set()  # a folder may be scanned twice: a split that a suite names may be known already
    for below in ("", "data"):
        inside = subfolders(root / below)
        for folder in (root / below, *(root / below / name for name in names if name in inside)):
            if not folder.is_dir():
                continue
            found |= {
                (folder / entry.name).relative_to(root).as_posix()
                for entry in entries(folder)
                if entry.name.lower().endswith(suffixes)
                and not entry.name.startswith(".")
                and entry.is_file()
            }
    return sorted(found)


def reasons(root: Path) -> dict[str, str]:
    """Every layout that the folder could be, each with what speaks for it."""
    here = set(subfolders(root))
    found: dict[str, str] = {}
    splits = [name for name in SPLIT_NAMES if name in here]
    inside = {name: set(subfolders(root / name)) for name in splits}
    paired = [name for name in splits if {"images", "masks"} <= inside[name]]
    if paired:
        found["segmentation"] = f"{paired[0]}/images and {paired[0]}/masks"
    for name in splits:
        classes = sorted(inside[name] - ({"images", "masks"} if name in paired else set()))
        if any(holds_image(root / name / folder) for folder in classes[:20]):
            found["imagefolder"] = f"class folders with images in {name}/"
            break
    if {"images", "masks"} <= here:
        shared = set(subfolders(root / "images")) & set(subfolders(root / "masks")) & set(SPLIT_NAMES)
        if shared and not paired and not has_image(root / "images"):
            split = min(shared, key=SPLIT_NAMES.index)
            found["segmentation"] = f"images/{split} and masks/{split}"
        else:
            found["segmentation-flat"] = "images/ and masks/"
    if {"JPEGImages", "SegmentationClass", "ImageSets"} <= here:
        found["voc"] = "JPEGImages/, SegmentationClass/ and ImageSets/"
    if sizes := resolutions(root):
        found["davis"] = f"JPEGImages/{sizes[0]} and Annotations/{sizes[0]}"
    batches = cifar_folder(root)
    if batches:
        found["cifar"] = f"CIFAR-{batches[1]} python batches in {batches[0].name}/"
    # The archive that loose images were unpacked from may lie beside them.
    if found or any(has_image(root / name) for name in splits):
        return found
    for layout in SHARD_SUFFIXES:
        shards = [shard for shard in find_shards(root, layout) if shard_split(shard)]
        if shards:
            found[layout] = shards[0] + (f" and {len(shards) - 1} more" if len(shards) > 1 else "")
    return found


def require_folder(root: Path) -> None:
    """Raise DataError where there is no such folder, with the nearest name beside it."""
    if root.is_dir():
        return
    beside = [path.name for path in root.parent.glob("*/")] if root.parent.is_dir() else []
    near = difflib.get_close_matches(root.name, beside, n=1, cutoff=0.6)
    hint = f". Did you mean {root.with_name(near[0])}?" if near else ""
    raise DataError(f"there is no data folder {root}{hint}")


def detect(root: Path) -> Detected:
    """What the folder is.

    Raises:
        DataError: no such folder, no known layout, more than one, or masks that would be taken for a class.
    """
    require_folder(root)
    found = reasons(root)
    if len(found) == 1:
        layout, reason = next(iter(found.items()))
        if layout == "imagefolder":
            _refuse_masks(root)
        return Detected(layout, LAYOUTS[layout].kind, reason)
    known = "; ".join(f"{name}: {layout.holds}" for name, layout in LAYOUTS.items())
    if found:
        seen = " and ".join(f"{name} ({reason})" for name, reason in found.items())
        raise DataError(
            f"{root} could be more than one layout: {seen}; name one with layout: NAME in a suite"
        )
    if not holds_file(root):
        empty = "is empty" if not entries(root) else f"holds no file, only {listing(root)}"
        raise DataError(f"{root} {empty}")
    told = "; ".join(filter(None, (_unsorted(root, name) for name in SPLIT_NAMES)))
    if told:
        raise DataError(f"{root} has no known layout: {told}")
    unread = ignored_images(*(root / name for name in SPLIT_NAMES))
    beside = f" ({ignored_files(unread)})" if unread else ""
    raise DataError(
        f"{root} has no known layout: it holds {listing(root)}{beside}. Known layouts are {known}"
    )


def _refuse_masks(root: Path) -> None:
    """Raise DataError where two folders of a split are no classes, but images and their masks."""
    for split in SPLIT_NAMES:
        names = subfolders(root / split)
        pair = sorted(names, key=called_masks)
        if len(names) == 2 and called_images(pair[0]) and called_masks(pair[1]):
            found: tuple[str, str] | None = (pair[0], pair[1])  # of other stems, as Cityscapes has them
        else:
            found = images_with_masks(root / split, names)
        if found:
            raise DataError(
                f"{root / split} looks like images ({found[0]}/) with masks ({found[1]}/): name the folders "
                "images/ and masks/, or say layout: imagefolder in a suite where they are classes"
            )


def _unsorted(root: Path, split: str) -> str:
    """That a split holds images but no class folders, in the words of an error; "" where that is not so."""
    folder = root / split
    if not folder.is_dir() or class_folders(folder):
        return ""
    images = list_images(folder)
    if not images:
        return ""
    listed = next((f" ({name} is not read)" for name in METADATA if (folder / name).is_file()), "")
    where = "".join(f"{name}/" for name in subfolders(folder))
    return (
        f"{split}/{where} has {len(images):,} loose images and no class folders{listed}: sort them into "
        f"{split}/<class>/"
    )


def choose_splits(root: Path, train: str | None, test: str | None) -> tuple[str, str]:
    """The train and test split of class folders: as named, else train/training, and the first that is there
    of test, val... A ``test`` folder without labels (no class folder) is passed over.
    """

    def usable(name: str) -> bool:
        return bool(class_folders(root / name))

    return pick_splits(root, train, test, usable, "class folders", partial(_unsorted, root))


def pick_splits(
    root: Path,
    train: str | None,
    test: str | None,
    usable: Callable[[str], bool],
    what: str,
    lacks: Callable[[str], str] = lambda name: "",
) -> tuple[str, str]:
    """The train and test split: as named, else the first usable one of the known names.

    Args:
        root: the folder of the data set.
        train: the name of the train split where one is given.
        test: the name of the test split where one is given.
        usable: whether a split of that name can be used.
        what: what a usable split holds.
        lacks: what is wrong with a split of that name and how to mend it, "" where nothing is known.

    Raises:
        DataError: a named split is not usable, or there is no train or test split.
    """
    for given in (train, test):
        if given and not usable(given):
            there = lacks(given) or f"it holds {listing(root)}"
            raise DataError(f"{root} has no split {given!r} with {what}; {there}")
    train = train or _first(TRAIN_NAMES, usable)
    test = test or _first((name for name in TEST_NAMES if name != train), usable)
    if not train or not test:
        missing, names = ("train", TRAIN_NAMES) if not train else ("test", TEST_NAMES)
        there = "; ".join(filter(None, map(lacks, names))) or f"it holds {listing(root)}"
        raise DataError(
            f"{root} has no {missing} split ({', '.join(names)}); {there}. "
            "Both a train and a test split are needed"
        )
    return train, test


def only_splits(what: str, *splits: tuple[str | None, str | None]) -> None:
    """Raise DataError where a split is named, first of each pair, and is not the only one that there is."""
    for named, only in splits:
        if named and named != only:
            there = f"it is {only!r}" if only else "it has none to train on"
            raise DataError(f"{what} has no choice of the split {named!r}; {there}")


def _first(names: Iterable[str], usable: Callable[[str], bool]) -> str | None:
    return next((name for name in names if usable(name)), None)


def listing(root: Path) -> str:
    """What a folder holds, in a few words for an error."""
    names = sorted(e.name + ("/" if e.is_dir() else "") for e in entries(root) if not e.name.startswith("."))
    if not names:
        return "nothing"
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
