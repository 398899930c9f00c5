"""Reading images, masks and lists: whole and safely, or an error that names the file."""

from __future__ import annotations

import errno
import io
import math
import os
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError

from ..cores import usable_cores
from ..errors import DataError, UnreadableError
from ..types import Array

_OF_THE_FILE = {errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
"""Errors that a name or the content of a file can bring about. All others are of a disk, a network or a
limit, and say nothing about what the file holds; what a decoder complains of has no number.
"""
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, EOFError, Image.DecompressionBombError)
_COLOURS = ("YCbCr", "Gray", "RGB")
"""JPEG files of which both decoders make the same RGB pixels; CMYK is read in more than one way."""
_AS_PNG = "write masks as PNG"
_strict = threading.Lock()
_readers, _leave = 0, False
"""Threads that read an image, and whether Pillow's leave to pad is to be given back after the last one."""


def _renew() -> None:
    """A forked process has none of the threads that may have held the lock."""
    global _strict, _readers
    _strict, _readers = threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def not_read(name: str | Path, error: Exception, otherwise: str = "is broken") -> DataError:
    """The error for something that was not read: that the system failed, or else what is wrong with it."""
    if isinstance(error, UnreadableError):
        return error
    if isinstance(error, OSError) and error.errno is not None and error.errno not in _OF_THE_FILE:
        return UnreadableError(f"{name} cannot be read: {error.strerror}")
    return DataError(f"{name} {otherwise}: {' '.join(str(error).split())}")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Whatever goes wrong with a file meanwhile is a DataError that names it."""
    try:
        yield
    except FileNotFoundError as error:
        # It was there when the data set was opened.
        raise UnreadableError(f"{path} does not exist") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is broken: not an image that can be read") from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DataError(f"{path} is broken: more than {most:,} pixels; make it smaller") from error
    except _DECODE_ERRORS as error:
        raise not_read(path, error) from error


@contextmanager
def _opened(path: Path, source: Path | io.BytesIO) -> Iterator[ImageFile.ImageFile]:
    """An image to be decoded. Pillow's global leave to pad truncated files is overruled meanwhile."""
    with _named(path), whole_files_only(), Image.open(source) as image:
        yield image


@contextmanager
def whole_files_only() -> Iterator[None]:
    """Meanwhile Pillow pads no truncated file, whatever another library has told it."""
    global _readers, _leave
    with _strict:
        _readers += 1
        if ImageFile.LOAD_TRUNCATED_IMAGES:  # another library switched it on for the whole process
            ImageFile.LOAD_TRUNCATED_IMAGES, _leave = False, True
    try:
        yield
    finally:
        with _strict:
            _readers -= 1
            if _leave and not _readers:  # not before: others may be reading still
                ImageFile.LOAD_TRUNCATED_IMAGES, _leave = True, False


def read_image(path: Path, content: bytes | None = None) -> Array:
    """Decode an image to RGB, uint8 (H, W, 3); its EXIF orientation is not applied, as in torchvision.

    ``content`` is the encoded image where it does not lie in a file of its own; ``path`` then only names it.
    The pixels are Pillow's.

    Raises:
        UnreadableError: the system failed to read the file.
        DataError: the file is missing, truncated, no image, or not of 8 bits; the message names it.
    """
    if content is None:
        with _named(path):
            content = path.read_bytes()
    pixels = _sound_jpeg(content)
    if pixels is not None:
        return pixels
    with _opened(path, io.BytesIO(content)) as image:
        image.load()
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            # Pillow clips at 255, and nobody knows which range of the numbers is black to white.
            raise DataError(
                f"{path} has the mode {image.mode}, more than 8 bits a pixel; convert it to 8 bits"
            )
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _sound_jpeg(content: bytes) -> Array | None:
    """The RGB pixels of a JPEG of the usual kind in which the decoder finds nothing strange; None for all
    others, of which Pillow has to say whether they can be read.

    Both have the same decoder, libjpeg-turbo; Pillow goes through a memory of its own, and takes half as long
    again.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours not in _COLOURS or height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
            return None
        pixels: Array = simplejpeg.decode_jpeg(content)
    except ValueError:
        return None
    return pixels


def read_mask(path: Path) -> Array:
    """The label of each pixel, uint8 (H, W). Palette indices are kept, never turned into colours.

    Raises:
        DataError: the file is missing or broken, holds colours rather than labels, or numbers that are not
            those that were written.
    """
    with _opened(path, path) as image:
        if lossy := _lossy(path, image):
            raise DataError(f"{path} is {lossy} inside, whose compression makes labels of its own; {_AS_PNG}")
        if scaled := _scaled(image):
            raise DataError(f"{path} has {scaled}: what its labels are cannot be known; {_AS_PNG} of 8 bits")
        image.load()
        values = np.asarray(image)
    # The alpha of LA, PA and RGBA is no label; and grey written as RGB still says one number a pixel.
    number = {"LA": 1, "PA": 1, "RGB": 3, "RGBA": 3}.get(image.mode, 0)
    if number and all(np.array_equal(values[..., 0], values[..., c]) for c in range(1, number)):
        values = values[..., 0]
    if values.ndim != 2:
        raise DataError(
            f"{path} holds colours ({image.mode}), not labels; masks must be index or grey images"
        )
    if values.dtype.kind == "f" and (values % 1 != 0).any():
        raise DataError(f"{path} holds numbers that are not whole ({image.mode}), not labels")
    if values.dtype != np.uint8:
        if values.size and not 0 <= values.min() <= values.max() <= 255:
            worst = values.min() if values.min() < 0 else values.max()
            raise DataError(f"{path} holds the label {worst}; masks must fit in 0..255")
        values = values.astype(np.uint8)
    return values


def _lossy(path: Path, image: ImageFile.ImageFile) -> str:
    """The kind of file, where decoded values are not those that were written; "" for others. The suffix
    says nothing of it.
    """
    if image.format in ("JPEG", "MPO"):
        return "a JPEG"
    if image.format == "TIFF" and image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp"):
        return f"a TIFF with {image.info['compression']} data"
    if image.format == "WEBP" and path.read_bytes()[12:16] != b"VP8L":
        return "a WebP that may be lossy"
    return ""


def _scaled(image: ImageFile.ImageFile) -> str:
    """What makes Pillow stretch or cut grey values as it decodes them to 8 bits; "" where nothing does."""
    for codec, _, _, args in image.tile:
        values = args if isinstance(args, tuple) else (args,)
        if codec.startswith("ppm") and values[-1] not in (255, 65535):
            return f"the highest value {values[-1]}"
        mode = str(values[0])
        if re.match(r"L;\d", mode):
            return f"grey values of {mode[2]} bits"
        if ";16" in mode and not image.mode.startswith("I"):
            return f"{image.mode} values of 16 bits"
    return ""


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
