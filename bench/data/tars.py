"""WebDataset shards: plain tar files; the members of a sample share a key, ``key.jpg`` and ``key.cls``.

A shard is walked through once, header by header, and what was found is remembered; an image is then one seek
and one read.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..types import Array
from .files import IMAGE_SUFFIXES
from .layouts import COMPRESSED_TARS
from .manifest import Manifest
from .reading import not_read
from .shards import Found, RawLabel, Reader, ShardSplit

OPEN_AT_ONCE = 16
"""Shards that a process keeps open: sets of thousands of shards would run into the limit of open files."""

_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_KEY = re.compile(r"(?:\./)*((?:.*/)?[^./]+)\.([^/]*)")
"""Key and suffix of a member: its name up to the first dot of the last part, and what comes after."""
_NUMBER = re.compile(rb"\s*(-?[0-9]{1,18})\s*")
_BLOCK = 512


class TarReader(Reader):
    """Reads ``size`` bytes at ``offset`` of a shard."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, io.FileIO] = OrderedDict()
        super().__init__()

    def close(self) -> None:
        """Close the shards that are open."""
        while self._files:
            self._files.popitem()[1].close()

    def __del__(self) -> None:
        self.close()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._files = OrderedDict()
        super().__setstate__(state)

    def _read(self, path: Path, offset: int, size: int) -> bytes:
        if path not in self._files:
            self._files[path] = io.FileIO(path)
            if len(self._files) > OPEN_AT_ONCE:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(path)
        file, content = self._files[path], b""
        file.seek(offset)
        while len(content) < size:  # a raw file may give less than was asked for
            more = file.read(size - len(content))
            if not more:
                raise EOFError(f"{path.name} ends before it")
            content += more
        return content


def open_tars(root: Path, shards: Sequence[str], cache_dir: Path | None) -> Found:
    """The samples of these shards, in their order.

    Raises:
        DataError: a shard is compressed, cut off or no tar, or holds no image.
    """
    ids: list[str] = []
    where: list[Array] = []
    labels: list[RawLabel] = []
    for number, shard in enumerate(shards):
        path = root / shard
        # One index a shard: it outlives a change of the others, and an interrupted first pass is not lost.
        index = Manifest(root, [(shard, -1)], cache_dir).recall("tar-2", partial(index_tar, path))
        ids += [f"{shard}/{key}" for key in index["keys"]]
        places = [np.full(len(index["keys"]), number), index["offsets"], index["sizes"]]
        where.append(np.stack(places, axis=1).astype(np.int64))
        labels += index["labels"]
    split = ShardSplit(root, list(shards), ids, np.concatenate(where), TarReader())
    return Found(split, labels)


@dataclass
class _Sample:
    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    labels: dict[str, RawLabel] = field(default_factory=dict)


def index_tar(path: Path) -> dict[str, list[Any]]:
    """Key, place, size and label of every sample of a shard, as columns.

    Raises:
        DataError: the file is compressed, cut off or no tar; a sample has no image, or more than one.
    """
    packed = DataError(
        f"{path} is compressed, and only plain tar can be read at random; decompress it to a .tar"
    )
    if path.name.lower().endswith(COMPRESSED_TARS):
        raise packed
    try:
        with path.open("rb") as stream:
            try:
                samples = _samples(stream, path)
            except tarfile.TarError:
                stream.seek(0)
                if stream.read(6).startswith(_MAGIC):
                    raise packed from None
                raise
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, MemoryError) as error:
        raise not_read(path, error, "is broken or no tar") from error
    index: dict[str, list[Any]] = {"keys": [], "offsets": [], "sizes": [], "labels": []}
    for key, sample in samples.items():
        # a name like key.input.jpg gives the image only where there is no plain key.jpg
        images = {s: place for s, place in sample.images.items() if "." not in s} or sample.images
        # a .json may describe anything; only one with a label says that there was an image
        labelled = "cls" in sample.labels or sample.labels.get("json") is not None
        if len(images) != 1 and (images or labelled):
            have = f"several images ({', '.join(images)})" if images else "a label but no image"
            raise DataError(f"{path / key} has {have}; a sample needs one")
        for offset, size in images.values():
            index["keys"].append(key)
            index["offsets"].append(offset)
            index["sizes"].append(size)
            index["labels"].append(sample.labels.get("cls", sample.labels.get("json")))
    if not index["keys"]:
        raise DataError(f"{path} holds no sample with an image (key.jpg, key.png, ...)")
    return index


def _samples(stream: io.BufferedReader, path: Path) -> dict[str, _Sample]:
    samples: dict[str, _Sample] = {}
    # A name that is not UTF-8 stays a name that JSON can hold.
    whole = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="backslashreplace") as tar:
        reached = 0
        for member in tar:
            if member.offset < reached or member.size < 0:  # a hostile header could lead round in a circle
                raise tarfile.ReadError(f"the header of {member.name} points backwards")
            reached = member.offset_data
            if reached + member.size > whole:
                raise tarfile.ReadError(f"it is cut off inside {member.name}")
            named = _KEY.fullmatch(member.name)
            if not named or member.isdir():
                continue
            key, suffix = named[1], named[2].lower()
            is_image = f".{suffix}".endswith(IMAGE_SUFFIXES)
            if not is_image and suffix not in ("cls", "json"):
                continue
            if not member.isfile() or member.issparse():
                raise DataError(f"{path / member.name} is a link or sparse; write shards of plain files")
            sample = samples.setdefault(key, _Sample())
            if suffix in sample.images or suffix in sample.labels:
                raise DataError(f"{path / member.name} is in the shard twice")
            if is_image:
                sample.images[suffix] = (member.offset_data, member.size)
            else:
                stream.seek(member.offset_data)
                sample.labels[suffix] = _label(suffix, stream.read(member.size))
        end = tar.offset
    # tarfile takes a cut or unreadable header for the end; a whole tar ends in blocks of zeros.
    stream.seek(end)
    if stream.read(_BLOCK) != bytes(_BLOCK):
        raise tarfile.ReadError(f"it is cut off, or has no header where one must be (byte {end})")
    return samples


def _label(suffix: str, content: bytes) -> RawLabel:
    if suffix == "cls":
        number = _NUMBER.fullmatch(content)
        return _known(int(number[1])) if number else f"has no whole number in its .cls but {content[:40]!r}"
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return "has a .json that is not valid JSON"
    if not isinstance(fields, dict):
        return None
    given = [fields[name] for name in ("label", "cls") if fields.get(name) is not None]
    for value in given:
        if isinstance(value, int) and not isinstance(value, bool):
            return _known(value)
    return f"has no whole number as label in its .json but {str(given[0])[:40]!r}" if given else None


def _known(label: int | None) -> int | None:
    return None if label == -1 else label
