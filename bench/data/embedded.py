"""The embedded data sets on disk: drawn once into the cache, in layouts that the ordinary readers serve.

``scenes`` is an image folder (train/val), ``scenes-seg`` images and masks (train/val, 0 is background),
``scenes-video`` DAVIS 2017.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..atomic import write_json
from ..cache import cache_folder, clear_stale, staging
from ..cores import usable_cores
from ..errors import DataError
from .scenes import CLASSES, VERSION, classification_scene, generator, segmentation_scene, video_scene


class Sizes(NamedTuple):
    """How much is drawn; the default is what the cache holds."""

    train_per_class: int = 100
    val_per_class: int = 40
    segmentation: tuple[int, int] = (96, 160)
    sequences: int = 8


def ensure_scenes(cache_dir: Path | None = None) -> Path:
    """The folder with ``scenes``, ``scenes-seg`` and ``scenes-video``, generated on first use.

    Raises:
        DataError: the cache folder cannot be written.
    """
    folder = cache_folder(cache_dir) / f"scenes-v{VERSION}"
    if (folder / "complete.json").is_file():
        return folder
    try:
        clear_stale(folder.parent)
        half = staging(folder)
        try:
            generate(half)
            _publish(half, folder)
        finally:
            shutil.rmtree(half, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"the embedded scenes cannot be written below {folder.parent}: {error.strerror or error}"
        ) from error
    return folder


def _publish(half: Path, folder: Path) -> None:
    if (folder / "complete.json").is_file():
        return  # another process was faster, with the same bytes
    shutil.rmtree(folder, ignore_errors=True)  # a folder that somebody emptied in part
    try:
        half.replace(folder)
    except OSError:
        if not (folder / "complete.json").is_file():
            raise


def generate(folder: Path, sizes: Sizes | None = None, seed: int = 0) -> None:
    """Draw and write the three data sets below a folder; ``complete.json`` is written last.

    Each picture has a generator of its own, so neither the number of threads nor the sizes change it.
    """
    sizes = sizes or Sizes()
    jobs: list[Callable[[], None]] = []
    for split, count in (("train", sizes.train_per_class), ("val", sizes.val_per_class)):
        for category, name in enumerate(CLASSES):
            target = folder / "scenes" / split / name
            target.mkdir(parents=True)
            jobs += [partial(_write_classified, target, seed, split, category, i) for i in range(count)]
    for split, count in zip(("train", "val"), sizes.segmentation, strict=True):
        target = folder / "scenes-seg" / split
        for part in ("images", "masks"):
            (target / part).mkdir(parents=True)
        jobs += [partial(_write_segmented, target, seed, split, i) for i in range(count)]
    (folder / "scenes-seg" / "classes.txt").write_text("\n".join(("background", *CLASSES)) + "\n")
    names = [f"scene-{i:02d}" for i in range(sizes.sequences)]
    for i, name in enumerate(names):
        for part in ("JPEGImages", "Annotations"):
            (folder / "scenes-video" / part / "480p" / name).mkdir(parents=True)
        jobs.append(partial(_write_video, folder / "scenes-video", seed, name, i))
    lists = folder / "scenes-video" / "ImageSets" / "2017"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("".join(f"{name}\n" for name in names))
    _run(jobs)
    write_json(folder / "complete.json", {"version": VERSION, "seed": seed, "sizes": sizes._asdict()})


def _run(jobs: Iterable[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(max_workers=min(8, len(usable_cores()))) as pool:
        try:
            for done in [pool.submit(job) for job in jobs]:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_classified(folder: Path, seed: int, split: str, category: int, i: int) -> None:
    picture, _ = classification_scene(generator(seed, "classification", split, category, i), category)
    _save(folder / f"{i:04d}.png", picture)


def _write_segmented(folder: Path, seed: int, split: str, i: int) -> None:
    picture, labels = segmentation_scene(generator(seed, "segmentation", split, i))
    _save(folder / "images" / f"{i:04d}.png", picture)
    _save(folder / "masks" / f"{i:04d}.png", labels)


def _write_video(folder: Path, seed: int, name: str, i: int) -> None:
    for frame, (picture, labels) in enumerate(video_scene(generator(seed, "video", i))):
        _save(folder / "JPEGImages" / "480p" / name / f"{frame:05d}.png", picture)
        _save(folder / "Annotations" / "480p" / name / f"{frame:05d}.png", labels)


def _save(path: Path, pixels: NDArray[np.uint8]) -> None:
    Image.fromarray(pixels).save(path, compress_level=3)
