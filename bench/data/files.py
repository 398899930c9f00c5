"""Files of a data set: which there are, and how images and masks go together."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import DataError, UnreadableError

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


def holds_file(folder: Path) -> bool:
    """Whether a file of any type lies in the folder, at any depth. Raises as ``list_images``."""
    return any(names for _, names in _folders(folder))


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
