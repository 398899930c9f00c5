"""Files of a data set: finding them, decoding them safely, and the fingerprint that names their state."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from ..atomic import write_json
from ..cache import cache_folder
from ..cores import usable_cores
from ..errors import DataError, UnreadableError
from ..types import Array

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
UNREAD_SUFFIXES = (
    ".apng", ".arw", ".avif", ".bpg", ".cr2", ".cr3", ".dcm", ".dds", ".dib", ".dng", ".exr", ".gif",
    ".heic", ".heif", ".j2k", ".jfif", ".jif", ".jp2", ".jpe", ".jpx", ".jxl", ".nef", ".orf", ".pbm",
    ".pcx", ".pfm", ".pjpeg", ".pnm", ".psd", ".qoi", ".raf", ".rw2", ".svg", ".tga", ".xcf",
)  # fmt: skip
"""Files that nobody takes for anything but images, yet are not read: torchvision's ImageFolder, whose counts
are everyone's, leaves them out too. They are counted, so that they are not missed in silence.
"""
_LOSSY = (".jpg", ".jpeg")
CONTENT_LIMIT = 256 * 2**20
"""Contents enter the fingerprint where all files together are at most this many bytes."""
MOST_SAMPLED, END = 256, 4096
"""Of larger sets, so many bytes at both ends of at most so many files do."""

_OF_THE_SYSTEM = {
    errno.EIO, errno.EACCES, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE
}  # fmt: skip
"""Errors of a disk, a network or a limit: they say nothing about what the file holds."""
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
_strict = threading.Lock()


def list_images(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[str]:
    """All images below a folder as relative POSIX paths, in torchvision's ImageFolder order; hidden files
    (``._x.jpg`` of archives packed on a Mac) and hidden folders (``.ipynb_checkpoints``) are left out. Other
    ``suffixes`` list other files. [] where there is no folder.

    Raises:
        UnreadableError: a folder cannot be listed.
        DataError: a link leads nowhere, or back to a folder above ``folder``.
    """
    found = []
    for where, names in sorted(_folders(folder)):
        below = Path(where).relative_to(folder)
        found += [
            (below / name).as_posix()
            for name in sorted(names)
            if name.lower().endswith(suffixes) and not name.startswith(".")
        ]
    return found


def holds_image(folder: Path) -> bool:
    """Whether an image lies in the folder, at any depth. Raises as ``list_images``."""
    return any(
        name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        for _, names in _folders(folder)
        for name in names
    )


def ignored_images(*folders: Path) -> dict[str, int]:
    """How many files below folders are images of types that are not read, by suffix, most frequent first.

    Raises:
        UnreadableError: a folder cannot be listed.
    """
    return by_suffix(path for folder in folders for path in list_images(folder, UNREAD_SUFFIXES))


def by_suffix(paths: Iterable[str]) -> dict[str, int]:
    """How many paths end in each suffix, most frequent first."""
    return dict(Counter(Path(path).suffix.lower() for path in paths).most_common())


def no_image(*folders: Path) -> str:
    """That folders hold no image, in the words of an error; and which of their images are not read."""
    counts = ignored_images(*folders)
    if not counts:
        return "holds no image"
    found = ", ".join(f"{count:,} x {suffix}" for suffix, count in counts.items())
    return f"holds no image of a known type ({found}; known: {', '.join(IMAGE_SUFFIXES)})"


def _folders(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Every folder from ``folder`` down with the names of its files, each once; hidden ones are left out."""

    def fail(error: OSError) -> None:  # os.walk alone would leave the folder out without a word
        raise _not_listed(error) from error

    if not folder.is_dir():
        return
    _leads_back(folder, folder)
    for where, inside, names in os.walk(folder, onerror=fail, followlinks=True):
        inside[:] = [
            name for name in inside if not name.startswith(".") and not _leads_back(Path(where, name), folder)
        ]
        for name in names:
            if not name.startswith(".") and not name.lower().endswith(IMAGE_SUFFIXES):
                _leads_nowhere(Path(where, name))
        yield where, names


def _leads_nowhere(path: Path) -> None:
    """Raise DataError for a link without a target: it may stand for a folder of images."""
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path} is a link to {path.readlink()}, which does not exist; mend or remove it")


def _leads_back(path: Path, top: Path) -> bool:
    """Whether a folder is a link to one that it lies in and that the walk from ``top`` reads anyway.

    Raises:
        DataError: it is a link to a folder above ``top``, whose images would be taken for those of ``top``.
    """
    if not path.is_symlink():
        return False
    try:
        target = next((above for above in path.absolute().parents if above.samefile(path)), None)
    except OSError as error:
        raise _not_listed(error) from error
    if target and not target.is_relative_to(top.absolute()):
        raise DataError(f"{path} is a link to {target}, which it lies in; remove the link")
    return target is not None


def subfolders(folder: Path) -> list[str]:
    """Names of the folders directly inside, sorted, hidden ones left out; [] where there is no folder.

    Raises:
        UnreadableError: it cannot be listed.
        DataError: a link leads nowhere.
    """
    if not folder.is_dir():
        return []
    found = []
    for entry in entries(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found.append(entry.name)
        elif entry.is_symlink():
            _leads_nowhere(Path(entry))
    return sorted(found)


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """What lies directly in a folder.

    Raises:
        UnreadableError: it cannot be listed.
    """
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError as error:
        raise _not_listed(error) from error


def _not_listed(error: OSError) -> UnreadableError:
    return UnreadableError(f"{error.filename} cannot be read: {error.strerror}")


def stem(path: str) -> str:
    """The path of an image without its suffix: what it shares with its mask."""
    return path.rpartition(".")[0]


def by_stem(folder: Path) -> dict[str, str]:
    """Images below a folder by their path without suffix, for pairing them with masks.

    Raises:
        DataError: two files differ in their suffix alone.
    """
    paired: dict[str, str] = {}
    for name in list_images(folder):
        first = paired.setdefault(stem(name), name)
        if first != name:
            raise DataError(f"{folder / first} and {folder / name} have the same name; remove one of them")
    return paired


def masks_by_stem(folder: Path) -> dict[str, str]:
    """As ``by_stem``, of masks.

    Raises:
        DataError: two files differ in their suffix alone, or one is a JPEG.
    """
    masks = by_stem(folder)
    for name in masks.values():
        if name.lower().endswith(_LOSSY):
            raise DataError(
                f"{folder / name} is a JPEG, and its compression makes labels of its own; write masks as PNG"
            )
    return masks


def read_list(path: Path) -> str:
    """The text of a list; the mark of byte order that editors on Windows put first is no part of it.

    Raises:
        DataError: it is not UTF-8, or the system cannot read it.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8; save it as UTF-8") from error
    except OSError as error:
        raise not_read(path, error, "cannot be read") from error


# ------------------------------------------------------------------------------------------- decoding


def spread(n: int, most: int) -> list[int]:
    """At most so many of n positions, evenly from the first to the last."""
    positions: list[int] = np.linspace(0, n - 1, min(n, most)).round().astype(int).tolist()
    return positions


def not_read(name: str | Path, error: Exception, otherwise: str = "is broken") -> DataError:
    """The error for something that was not read: that the system failed, or else what is wrong with it."""
    if isinstance(error, UnreadableError):
        return error
    if isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM:
        return UnreadableError(f"{name} cannot be read: {error.strerror}")
    return DataError(f"{name} {otherwise}: {' '.join(str(error).split())}")


@contextmanager
def _opened(path: Path, content: bytes | None = None) -> Iterator[Image.Image]:
    """The fully decoded image. Pillow's global leave to pad truncated files is overruled meanwhile."""
    source = path if content is None else io.BytesIO(content)
    try:
        with whole_files_only(), Image.open(source) as image:
            image.load()
            yield image
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is broken: not an image that can be read") from error
    except _DECODE_ERRORS as error:
        raise not_read(path, error) from error


@contextmanager
def whole_files_only() -> Iterator[None]:
    """Meanwhile Pillow pads no truncated file, whatever another library has told it."""
    if not ImageFile.LOAD_TRUNCATED_IMAGES:
        yield
        return
    with _strict:  # another library switched it on for the whole process
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def read_image(path: Path, content: bytes | None = None) -> Image.Image:
    """Decode an image to RGB; its EXIF orientation is not applied, as in torchvision.

    ``content`` is the encoded image where it does not lie in a file of its own; ``path`` then only names it.

    Raises:
        UnreadableError: the system failed to read the file.
        DataError: the file is missing, truncated, no image, or not of 8 bits; the message names it.
    """
    with _opened(path, content) as image:
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            # Pillow clips at 255, and nobody knows which range of the numbers is black to white.
            raise DataError(
                f"{path} has the mode {image.mode}, more than 8 bits a pixel; convert it to 8 bits"
            )
        return image.convert("RGB")


def read_mask(path: Path) -> Array:
    """The label of each pixel, uint8 (H, W). Palette indices are kept, never turned into colours.

    Raises:
        DataError: the file is missing or broken, or holds colours rather than labels.
    """
    with _opened(path) as image:
        values = np.asarray(image)
    # The alpha of LA, PA and RGBA is no label; and grey written as RGB still says one number a pixel.
    number = {"LA": 1, "PA": 1, "RGB": 3, "RGBA": 3}.get(image.mode, 0)
    if number and all(np.array_equal(values[..., 0], values[..., c]) for c in range(1, number)):
        values = values[..., 0]
    if values.ndim != 2:
        raise DataError(
            f"{path} holds colours ({image.mode}), not labels; masks must be index or grey images"
        )
    if values.dtype != np.uint8:
        if values.size and not 0 <= values.min() <= values.max() <= 255:
            raise DataError(f"{path} holds labels up to {values.max()}; masks must fit in 0..255")
        values = values.astype(np.uint8)
    return values


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) from the header alone. Raises DataError naming the file."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except _DECODE_ERRORS as error:
        raise not_read(path, error) from error


def check_size(mask: Array, mask_path: Path, image_path: Path) -> None:
    """Raise DataError naming both files where a mask is not of its image's size."""
    size = image_size(image_path)
    if mask.shape != size:
        raise DataError(
            f"{mask_path} is {mask.shape[1]}x{mask.shape[0]} pixels, "
            f"its image {image_path} {size[1]}x{size[0]}"
        )


def labels_present(paths: Sequence[Path]) -> list[int]:
    """The labels that occur in any of these masks, ascending."""

    def one(path: Path) -> Array:
        return np.bincount(read_mask(path).ravel(), minlength=256) > 0

    seen = np.zeros(256, dtype=bool)
    with ThreadPoolExecutor(max_workers=min(8, len(usable_cores()))) as pool:
        for present in pool.map(one, paths):
            seen |= present
    return [int(label) for label in np.flatnonzero(seen)]


# ------------------------------------------------------------------------------------------- fingerprint


@dataclass(frozen=True)
class Manifest:
    """The files that make a data set, each with its label (-1: none), and what was worked out from them.

    The fingerprint is a SHA-256 over (relative path, size, label) of every file in order, over the contents
    too where the files together hold at most ``CONTENT_LIMIT`` bytes, else over both ends of some of them,
    and over ``extra`` (classes, void, the choice and sizes of splits). It does not depend on the folder's
    place or on time stamps. Whatever is derived from reading files is remembered in the cache under their
    paths, sizes and times of change, so that the next start does not read them again.
    """

    root: Path
    files: Sequence[tuple[str, int]]
    cache_dir: Path | None = None
    _stats: list[os.stat_result] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in (str(self.root.resolve()), *(name for name, _ in self.files)):
            _check_name(self.root, name)
        try:
            object.__setattr__(self, "_stats", [(self.root / name).stat() for name, _ in self.files])
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error

    @cached_property
    def total(self) -> int:
        """Bytes of all files together."""
        return sum(stat.st_size for stat in self._stats)

    @cached_property
    def _key(self) -> str:
        digest = hashlib.sha256(f"{self.root.resolve()}\n".encode())
        for (name, label), stat in zip(self.files, self._stats, strict=True):
            digest.update(
                f"{name}\0{label}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\n".encode()
            )
        return digest.hexdigest()[:32]

    def recall(self, what: str, compute: Callable[[], Any]) -> Any:
        """The JSON value that ``compute`` makes from these files, from the cache while no file changes."""
        path = cache_folder(self.cache_dir) / "manifests" / f"{self._key}-{what}.json"
        with contextlib.suppress(OSError, ValueError):
            return json.loads(path.read_bytes())
        value = compute()
        with contextlib.suppress(OSError):  # a read-only cache costs time, never the run
            write_json(path, value)
        return value

    def fingerprint(self, **extra: object) -> str:
        """The identity of the data set's contents, 64 hexadecimal digits."""
        contents = self.recall("contents-2", self._contents)
        return hashlib.sha256(json.dumps([contents, extra], sort_keys=True).encode()).hexdigest()

    def _contents(self) -> str:
        digest = hashlib.sha256()
        whole = self.total <= CONTENT_LIMIT
        sampled = set(spread(len(self.files), MOST_SAMPLED))
        for i, ((name, label), stat) in enumerate(zip(self.files, self._stats, strict=True)):
            digest.update(f"{name}\0{stat.st_size}\0{label}\n".encode())
            if whole:
                digest.update((self.root / name).read_bytes())
            elif i in sampled:
                digest.update(_ends(self.root / name))
        return digest.hexdigest()


def _check_name(root: Path, name: str) -> None:
    """Raise DataError where a name has bytes that are no text: results and records could not hold it."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(root / name).decode("utf-8", "backslashreplace")
        raise DataError(f"{shown} cannot be used: its name is not UTF-8; rename it") from error


def _ends(path: Path) -> bytes:
    """The first and the last bytes of a file."""
    with path.open("rb") as stream:
        first = stream.read(END)
        stream.seek(max(stream.seek(0, os.SEEK_END) - END, 0))
        return first + stream.read(END)
