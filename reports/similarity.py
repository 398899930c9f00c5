"""Similarities between the patches of a picture, for the maps that answer to a click."""

from __future__ import annotations

import base64
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .exhibits import Strip
from .pictures import inside

BUDGET = 1_200_000
"""Bytes of a page for all of them, in base64."""


@dataclass(frozen=True)
class Similarities:
    """What a strip of images and their maps knows of their patches.

    Attributes:
        height, width: the grid of patches.
        pairs: one text an image: base64 of the cosines of different patches, row after row of the upper
            triangle, in 255 steps (uint8) from the lowest to the highest.
        ranges: lowest and highest cosine of each image.
    """

    height: int
    width: int
    pairs: tuple[str, ...]
    ranges: tuple[tuple[float, float], ...]


def load_similarities(
    strips: Iterable[Strip],
) -> tuple[dict[tuple[Path, str], Similarities], list[str], str]:
    """By folder and file, as long as the budget lasts; what is wrong with files; and a note where it ended.

    Raises:
        DataError: a path leads out of its run folder.
    """
    found: dict[tuple[Path, str], Similarities] = {}
    problems: list[str] = []
    note, used = "", 0
    for strip in strips:
        if not strip.similarity:
            continue
        try:
            read = _read(inside(strip.folder, strip.similarity), len(strip.files) // 2)
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            missing = isinstance(error, FileNotFoundError)
            problems.append(
                f"{strip.similarity} {'is missing' if missing else 'cannot be read as similarities'}"
            )
            continue
        used += sum(map(len, read.pairs))
        if used > BUDGET:
            note = "Some pictures of patches do not answer to clicks, to keep this page light."
            break
        found[strip.folder, strip.similarity] = read
    return found, problems, note


def _read(path: Path, count: int) -> Similarities:
    with np.load(path) as arrays:
        (height, width), steps, ranges = arrays["grid"].tolist(), arrays["steps"], arrays["range"]
    patches = height * width
    if steps.dtype != np.uint8 or steps.shape != (count, patches * (patches - 1) // 2):
        raise ValueError("not one cosine for each pair of patches")
    if ranges.shape != (count, 2) or not np.isfinite(ranges).all():
        raise ValueError("not one range for each image")
    return Similarities(
        height,
        width,
        tuple(base64.b64encode(row.tobytes()).decode() for row in steps),
        tuple((float(low), float(high)) for low, high in ranges),
    )
