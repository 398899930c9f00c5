"""Video with label maps, in the layouts of DAVIS 2016 and 2017.

Which of the two a folder is: 2016 where the list of sequences holds paths of images and masks, or where
no annotation of the listed sequences holds a value other than 0 and 255; else 2017. In 2016 the value 255
is the one object; in 2017 values are object ids, and 255 is void.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..types import Dataset
from .files import IMAGE_SUFFIXES, by_stem, ignored_images, masks_by_stem, no_image, subfolders
from .layouts import RESOLUTIONS, resolutions
from .manifest import Manifest
from .reading import labels_present, read_list
from .splits import FileSequence

_LISTS = ("2017/val.txt", "2016/val.txt", "480p/val.txt", "1080p/val.txt", "val.txt")


def load_davis(root: Path, name: str, layout: str, test: str | None, cache_dir: Path | None) -> Dataset:
    """Sequences of ``JPEGImages/<resolution>`` with ``Annotations/<resolution>``.

    Args:
        root: the folder that holds them.
        name: how the data set is called in results.
        layout: ``davis``, or ``davis2016`` / ``davis2017`` to say which it is, each with the resolution
            after a colon where 480p is not wanted (``davis:Full-Resolution``).
        test: the list below ``ImageSets``, ``2017/val``; else the first that is there of 2017/val,
            2016/val; all sequences where there is no list.
        cache_dir: where what was read from the masks is remembered.

    Raises:
        DataError: a file or folder is missing; the message names it.
    """
    year, _, wanted = layout.partition(":")
    resolution = wanted or (*resolutions(root), RESOLUTIONS[0])[0]
    frames_root, masks_root = f"JPEGImages/{resolution}", f"Annotations/{resolution}"
    for folder in (frames_root, masks_root):
        if not (root / folder).is_dir():
            raise DataError(f"{root / folder} does not exist")
    names, lists_pairs = _listed(root, frames_root, test)
    sequences = [_sequence(root, sequence, frames_root, masks_root) for sequence in names]
    files = [(path, -1) for s in sequences for path in (*s.frames, *s.masks)]
    manifest = Manifest(root, files, cache_dir)
    single = year == "davis2016" or (
        year == "davis"
        and (lists_pairs or bool(manifest.recall("single", lambda: _only_0_and_255(sequences))))
    )
    for sequence in sequences:
        sequence.single = single
    return Dataset(
        name=name,
        kind="video",
        fingerprint=manifest.fingerprint(single=single),
        sequences=tuple(sequences),
        void=() if single else (255,),
        path=str(root),
        ignored=ignored_images(
            *(root / folder / name for folder in (frames_root, masks_root) for name in names)
        ),
    )


def _listed(root: Path, frames_root: str, test: str | None) -> tuple[list[str], bool]:
    """Names of the sequences, and whether the list gives paths of images and masks (DAVIS 2016)."""
    candidates = [f"{test.removesuffix('.txt')}.txt"] if test else _LISTS
    path = next((p for p in (root / "ImageSets" / c for c in candidates) if p.is_file()), None)
    if path is None:
        if test:
            raise DataError(f"{root / 'ImageSets' / candidates[0]} does not exist")
        return subfolders(root / frames_root), False
    lines = [line.strip() for line in read_list(path).splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{path} lists no sequence")
    first, *others = lines[0].split()  # where it is no pair, a name may have blanks in it
    in_pairs = len(others) == 1 and all(one.lower().endswith(IMAGE_SUFFIXES) for one in (first, *others))
    names = [Path(line.split()[0]).parent.name if in_pairs else line for line in lines]
    if nested := [one for one in names if "/" in one]:
        raise DataError(
            f"{path} lists {nested[0]!r}; each line is the name of a folder of {frames_root}, or the paths "
            "of a frame and of its mask (DAVIS 2016)"
        )
    return list(dict.fromkeys(names)), in_pairs


def _sequence(root: Path, name: str, frames_root: str, masks_root: str) -> FileSequence:
    for folder in (frames_root, masks_root):
        if not (root / folder / name).is_dir():
            raise DataError(f"{root / folder / name} does not exist, but the sequence {name!r} is listed")
    frames, masks = by_stem(root / frames_root / name), masks_by_stem(root / masks_root / name)
    if not frames:
        raise DataError(f"{root / frames_root / name} {no_image(root / frames_root / name)}")
    if nested := [frame for frame in frames.values() if "/" in frame]:
        raise DataError(
            f"{root / frames_root / name / nested[0]} lies in a folder of its own; a sequence is one folder "
            "of frames"
        )
    for stem in frames:
        if stem not in masks:
            raise DataError(
                f"{root / masks_root / name / stem}.png does not exist; every frame needs its mask"
            )
    for stem, mask in masks.items():
        if stem not in frames:
            raise DataError(f"{root / masks_root / name / mask} has no frame of the same name")
    stems = sorted(frames, key=_in_time)
    return FileSequence(
        root,
        name,
        stems,
        [f"{frames_root}/{name}/{frames[stem]}" for stem in stems],
        [f"{masks_root}/{name}/{masks[stem]}" for stem in stems],
    )


def _in_time(stem: str) -> list[str | int]:
    """Frame 10 comes after frame 9, also where numbers are not filled up with zeros."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", stem))]


def _only_0_and_255(sequences: list[FileSequence]) -> bool:
    """Whether no mask holds an object id; first frames first, since in 2017 they answer at once."""
    for part in (slice(0, 1), slice(1, None)):
        for sequence in sequences:
            if np.setdiff1d(labels_present([sequence.root / m for m in sequence.masks[part]]), (0, 255)).size:
                return False
    return True
