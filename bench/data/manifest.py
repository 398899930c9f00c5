"""The fingerprint that names the state of a data set's files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..atomic import write_json
from ..cache import cache_folder
from ..errors import DataError
from .splits import spread

CONTENT_LIMIT = 256 * 2**20
"""Contents enter the fingerprint where all files together are at most this many bytes."""
MOST_SAMPLED, END = 256, 4096
"""Of larger sets, so many bytes at both ends of at most so many files do."""


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
