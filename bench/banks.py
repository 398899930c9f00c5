"""Rows in files: folders of arrays that have a row for each image, never half-written, bounded in size.

A bank is a folder named by the hash of everything that decides its content. Each column is one ``.npy`` file,
streamed to a temporary name and renamed when whole; columns that are missing are added by a later pass. All
columns of a bank have the rows of its index: where a pass reads other images than the one before (a disk that
failed then), the older columns go.

    <root>/<key>/  meta.json  index.npy  cls@-1.npy  patches@-1.npy ...
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .atomic import atomic_write, write_json
from .cache import folder_bytes, staging
from .room import new_array, room_for
from .types import Array

Mapped = np.memmap[Any, Any]
PIXELS = "pixels"
"""The column of decoded images: uint8 (N, S, S, 3)."""


@dataclass(frozen=True)
class Bank:
    """What a bank holds.

    Attributes:
        meta: what is known of it; ``images`` is how many rows there are, ``skipped`` the ids of the images
            that have none.
        index: the position of each row's image in its split, int64 (N,), ascending.
        columns: arrays (N, ...) by name, mapped from their files.
    """

    meta: dict[str, Any]
    index: Array
    columns: dict[str, Mapped]


@dataclass(frozen=True)
class BankStore:
    """The banks below one folder, at most so many bytes: those that were used longest ago go first."""

    root: Path
    max_bytes: int

    def missing(self, key: str, names: Sequence[str]) -> list[str]:
        """The columns that a bank does not hold yet."""
        folder, wanted = self.root / key, list(dict.fromkeys(names))
        if not all((folder / name).is_file() for name in ("meta.json", "index.npy")):
            return wanted
        return [name for name in wanted if not _column_path(folder, name).is_file()]

    def path(self, key: str, name: str) -> Path:
        """The file of a column."""
        return _column_path(self.root / key, name)

    def read(self, key: str, names: Sequence[str]) -> Bank | None:
        """A bank with these columns; None where one is not there (another pass read other images, or another
        run needed the room), or where the bank is damaged, which then goes.
        """
        folder = self.root / key
        try:
            found = _read(folder, names)
        except FileNotFoundError:
            return None
        except (ValueError, EOFError, KeyError):  # a disk that was full or lost its power
            with suppress(FileNotFoundError):  # another run removes it too
                shutil.rmtree(folder)
            return None
        with suppress(OSError):  # a cache of others is read all the same
            os.utime(folder / "meta.json")  # the eviction order is by last use
        return found

    def forget(self, key: str) -> None:
        """Delete a bank, where it is there."""
        shutil.rmtree(self.root / key, ignore_errors=True)

    @contextmanager
    def adding(self, key: str, most: int, what: str, mend: str) -> Iterator[NewRows]:
        """Columns to be filled row by row and published when whole; left off, nothing stays of them.

        Args:
            key: the bank that they are for.
            most: rows that there may be.
            what: that needs room, in words.
            mend: what to do where the disk has none.
        """
        half = staging(self.root / key)
        try:
            yield NewRows(self, key, half, most, what, mend)
        finally:
            shutil.rmtree(half, ignore_errors=True)

    def evict(self, keep: str) -> None:
        """Delete the banks that were used longest ago until all fit; never the one to keep."""
        # One without meta.json was left half-published by a process that was killed, or is just being made.
        banks = sorted((path for path in self.root.iterdir() if _is_bank(path)), key=_last_used)
        total = sum(folder_bytes(bank) for bank in banks)
        for bank in banks:
            if total <= self.max_bytes:
                return
            if bank.name != keep:
                total -= folder_bytes(bank)
                shutil.rmtree(bank, ignore_errors=True)


class NewRows:
    """Columns of a bank that grow; see ``BankStore.adding``."""

    def __init__(self, store: BankStore, key: str, half: Path, most: int, what: str, mend: str) -> None:
        self._store, self._key, self._half = store, key, half
        self._most, self._what, self._mend = most, what, mend
        self._columns: dict[str, Mapped] = {}
        self._positions: list[Array] = []

    def write(self, positions: Array, values: Mapping[str, Array]) -> None:
        """Append the rows of the images at these positions of the split to each column.

        Raises:
            DataError: the disk has no room for all that may come.
        """
        if not self._columns:
            self._allocate(values)
        done = sum(map(len, self._positions))
        for name, rows in values.items():
            self._columns[name][done : done + len(positions)] = rows
        self._positions.append(positions)

    def publish(self, skipped: Sequence[str], meta: Mapping[str, Any]) -> None:
        """Bring what was written to the disk and into its bank; other banks make room for it.

        Args:
            skipped: ids of the images that have no row.
            meta: what else is known.
        """
        index = np.concatenate(self._positions)
        for name in list(self._columns):
            self._columns.pop(name).flush()
            if len(index) < self._most:
                _truncate(_column_path(self._half, name), len(index))
        # Where another run evicts the bank meanwhile, whoever reads it finds it missing and makes it again.
        with suppress(FileNotFoundError, FileExistsError):
            self._bring(index, skipped, meta)
        self._store.evict(keep=self._key)

    def _bring(self, index: Array, skipped: Sequence[str], meta: Mapping[str, Any]) -> None:
        folder = self._store.root / self._key
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.utime(folder / "meta.json")  # in use: not the one that goes first
        known = folder / "index.npy"
        if not _holds(known, index):
            for path in folder.glob("*.npy"):
                path.unlink()
            with atomic_write(known, "wb") as stream:  # before the columns, which are worth nothing without
                np.save(stream, index)
        for path in self._half.glob("*.npy"):
            path.replace(folder / path.name)
        write_json(folder / "meta.json", {**meta, "images": len(index), "skipped": list(skipped)})

    def _allocate(self, first: Mapping[str, Array]) -> None:
        shapes = {name: (self._most, *rows.shape[1:]) for name, rows in first.items()}
        needed = sum(int(np.prod(shapes[name])) * rows.dtype.itemsize for name, rows in first.items())
        with room_for(self._what, needed, self._store.root, self._mend):
            for name, rows in first.items():
                self._columns[name] = new_array(_column_path(self._half, name), rows.dtype, shapes[name])


def _is_bank(path: Path) -> bool:
    return not path.name.startswith(".") and any((path / n).is_file() for n in ("meta.json", "index.npy"))


def _last_used(bank: Path) -> float:
    """When a bank was used last; long ago where another run evicts it meanwhile."""
    for path in (bank / "meta.json", bank):
        with suppress(FileNotFoundError):
            return path.stat().st_mtime
    return 0.0


def _column_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _read(folder: Path, names: Sequence[str]) -> Bank:
    """The content of a bank.

    Raises:
        FileNotFoundError: a part of it is not there.
        ValueError, EOFError, KeyError: one is damaged, or they do not belong together.
    """
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if not isinstance(meta, dict) or not isinstance(meta["skipped"], list):
        raise ValueError("not the description of a bank")
    index = np.load(folder / "index.npy")
    columns = {name: np.load(_column_path(folder, name), mmap_mode="r") for name in names}
    if any(len(rows) != len(index) for rows in columns.values()):
        raise ValueError("the columns are of different passes")
    return Bank(meta, index, columns)


def _holds(path: Path, values: Array) -> bool:
    """Whether a file holds this array; not where there is none or it is damaged."""
    try:
        return np.array_equal(np.load(path), values)
    except (FileNotFoundError, ValueError, EOFError):
        return False


def _truncate(path: Path, rows: int) -> None:
    """Cut an array in a file to its first rows, in place."""
    whole = np.load(path, mmap_mode="r")
    shape = (rows, *whole.shape[1:])
    header = {"descr": np.lib.format.dtype_to_descr(whole.dtype), "fortran_order": False, "shape": shape}
    with path.open("r+b") as stream:
        # NumPy's headers have room for any number of rows, so that the array stays where it is.
        np.lib.format.write_array_header_1_0(stream, header)
        if stream.tell() != whole.offset:
            raise RuntimeError(f"a header of {stream.tell()} bytes in place of one of {whole.offset}")
        stream.truncate(whole.offset + rows * whole[:1].nbytes)
