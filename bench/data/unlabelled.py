"""Every image of a folder, of whatever layout, as one split without labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError
from ..types import Dataset, ImageSplit
from .files import IMAGE_SUFFIXES, UNREAD_SUFFIXES, by_suffix, list_images, no_image, stem
from .folders import FEWEST, TEST_NAMES, TRAIN_NAMES, called_images, called_masks, called_split
from .layouts import COMPRESSED_TARS, SHARD_SUFFIXES, listing, reasons, shard_split
from .manifest import Manifest
from .shard_sets import fingerprint, opener
from .splits import FileSplit


@dataclass(frozen=True)
class Unlabelled(Dataset):
    """Images without labels."""

    left_out: Mapping[str, int] = field(default_factory=dict)
    """Images that are not trained on, masks and those of a test: how many, by the name of their folder."""


def load_every_image(root: Path, name: str, cache_dir: Path | None) -> Unlabelled:
    """One split ``train``, ``labels`` None: the images below ``root``, or those in its tar or parquet shards.

    Raises:
        DataError: no image and no shard, or loose images beside shards that name no split.
    """
    files = list_images(root, IMAGE_SUFFIXES + UNREAD_SUFFIXES)
    unwanted = _unwanted(files)
    read = [path for path in files if path.lower().endswith(IMAGE_SUFFIXES)]
    others = [path for path in files if not path.lower().endswith(IMAGE_SUFFIXES)]
    images = [path for path in read if _folder(path) not in unwanted]
    left_out = Counter(unwanted[_folder(path)] for path in read if _folder(path) in unwanted)
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
    return Unlabelled(
        name=name,
        kind="classification",
        fingerprint=identity,
        splits={"train": split},
        test_split="train",  # the only one there is; without labels no task scores it
        path=str(root),
        ignored=by_suffix(path for path in others if _folder(path) not in unwanted),
        left_out=dict(left_out.most_common()) if isinstance(split, FileSplit) else {},
    )


def _shards(root: Path) -> tuple[str, list[str]]:
    """Layout and shards; tar before parquet, which img2dataset leaves beside each tar to describe it."""
    for layout, suffixes in SHARD_SUFFIXES.items():
        more = COMPRESSED_TARS if layout == "webdataset" else ()
        shards = _to_train_on(list_images(root, suffixes + more))
        if shards:
            return layout, shards
    return "", []


def _to_train_on(shards: Sequence[str]) -> list[str]:
    """The shards without those of a test split, where there is a train split beside it."""
    told = {shard: shard_split(shard) for shard in shards}
    if not set(told.values()) & set(TRAIN_NAMES):
        return list(shards)
    return [shard for shard in shards if told[shard] not in TEST_NAMES]


# ------------------------------------------------------------------------------------------- loose images


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _steps(folder: str) -> Iterator[tuple[str, str]]:
    """Each folder on the way down to ``folder``: the path of the one that it lies in, and its name."""
    parts = folder.split("/")
    yield from (("/".join(parts[:i]), name) for i, name in enumerate(parts) if name)


def _unwanted(files: Sequence[str]) -> dict[str, str]:
    """The folders whose images are not to be trained on, each with the name of the topmost one that says so.

    That is one for a test beside one to train on, or one that is called after masks and lies beside one that
    is called after images, or most of whose files have the path of an image beside it.
    """
    stems: dict[str, set[str]] = {}
    for path in files:
        stems.setdefault(_folder(path), set()).add(stem(path.rpartition("/")[2]))
    beside: dict[str, set[str]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    paired: Counter[tuple[str, str]] = Counter()
    for folder, names in stems.items():
        for step in _steps(folder):
            above, name = step
            beside.setdefault(above, set()).add(name)
            if called_masks(name):
                twin = (above + folder[len(f"{above}/{name}".lstrip("/")) :]).lstrip("/")
                counts[step] += len(names)
                paired[step] += len(names & stems.get(twin, set()))

    def unwanted(step: tuple[str, str]) -> bool:
        above, name = step
        if called_split(name) in TEST_NAMES:
            return any(called_split(other) in TRAIN_NAMES for other in beside[above])
        if not called_masks(name):
            return False
        fewest = max(FEWEST, counts[step] / 2)
        return paired[step] >= fewest or any(map(called_images, beside[above]))

    topmost = {folder: next(filter(unwanted, _steps(folder)), None) for folder in stems}
    return {folder: step[1] for folder, step in topmost.items() if step}
