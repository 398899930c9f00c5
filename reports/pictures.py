"""Pictures of a run folder as data URIs, kept within a budget so that the page stays light.

PNGs are embedded as they are while they fit. Where the whole would grow beyond the budget, pictures are
encoded again as WebP, then smaller; what still does not fit is left out and said to be so, never silently.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..bench.errors import DataError

BUDGET = 5_000_000
"""Bytes of all pictures of a page before base64, which adds a third."""
_STEPS = ((320, 82), (320, 60), (224, 60), (160, 50))
"""(longer side in pixels, WebP quality), tried in this order."""


@dataclass(frozen=True)
class Picture:
    """A picture ready for an ``img`` element; ``uri`` is empty where ``problem`` says why it is not there."""

    uri: str = ""
    width: int = 0
    height: int = 0
    problem: str = ""
    left_out: bool = False
    """Whether the picture is well, and only the budget kept it out."""


@dataclass(frozen=True)
class Album:
    """All pictures of a page by (folder, file), and what was done to make them fit."""

    pictures: dict[tuple[Path, str], Picture]
    note: str = ""


def load_album(wanted: Sequence[tuple[Path, str]], budget: int = BUDGET) -> Album:
    """Read pictures, in order of importance.

    Args:
        wanted: run folder and path below it.
        budget: bytes that all pictures may take together.

    Raises:
        DataError: a path leads out of its run folder.
    """
    pictures: dict[tuple[Path, str], Picture] = {}
    sources: dict[tuple[Path, str], bytes] = {}
    for folder, file in dict.fromkeys(wanted):
        key = (folder, file)
        try:
            sources[key] = inside(folder, file).read_bytes()
            with _open(sources[key]) as image:
                image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            sources.pop(key, None)
            missing = isinstance(error, FileNotFoundError)
            pictures[key] = Picture(problem="is missing" if missing else "cannot be read as a PNG")
    if sum(map(len, sources.values())) <= budget:
        return Album(pictures | {key: _picture(raw, "png", raw) for key, raw in sources.items()})

    for side, quality in _STEPS:
        encoded = {key: _shrink(raw, side, quality) for key, raw in sources.items()}
        if sum(len(data) for _, data in encoded.values()) <= budget:
            break
    left_out, used = 0, 0
    for key, (kind, data) in encoded.items():
        if used + len(data) > budget:
            pictures[key] = Picture(problem="is left out to keep the page light", left_out=True)
            left_out += 1
            continue
        used += len(data)
        pictures[key] = _picture(data, kind, sources[key])
    note = f"Pictures are shown at up to {side} pixels, as WebP of quality {quality} where that is smaller"
    if left_out:
        note += f", and {left_out:,} of {len(sources):,} are left out, to keep this page light"
    return Album(pictures, f"{note}; the originals are in the run folder.")


def inside(folder: Path, file: str) -> Path:
    """The path of a file of a run folder. Raises DataError where it leads out of the folder."""
    root, path = folder.resolve(), (folder / file).resolve()
    if not path.is_relative_to(root):
        raise DataError(f"the results in {folder} name a file outside of it ({file!r}); run the cell again")
    return path


def _open(raw: bytes) -> Image.Image:
    return Image.open(io.BytesIO(raw), formats=("PNG",))


def _shrink(raw: bytes, side: int, quality: int) -> tuple[str, bytes]:
    with _open(raw) as image:
        small = image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, "WEBP", quality=quality, method=4)
    kept = max(small.size) == max(_size(raw))
    return ("png", raw) if kept and len(raw) <= stream.tell() else ("webp", stream.getvalue())


def _size(raw: bytes) -> tuple[int, int]:
    with _open(raw) as image:
        return image.size


def _picture(data: bytes, kind: str, original: bytes) -> Picture:
    width, height = _size(original)
    return Picture(f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}", width, height)
