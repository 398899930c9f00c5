"""Room on a disk for arrays in files: taken before they are filled, and one line where there is none."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .atomic import FULL
from .errors import DataError

_NOT_OFFERED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


def new_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """A new array in a file, mapped, for which room is taken on the disk at once.

    A map over a file with holes would end the process by a signal where the disk is full later.

    Raises:
        OSError: the disk has no room for it.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as stream:
            try:
                os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
            except OSError as error:
                if error.errno not in _NOT_OFFERED:
                    raise OSError(error.errno, error.strerror, str(path)) from error
    return array


@contextmanager
def room_for(what: str, needed: int, folder: Path, mend: str) -> Iterator[None]:
    """Make files of so many bytes below a folder of the disk that they are for.

    Raises:
        DataError: there is no room for ``what``, before or while they are made; ``mend`` says what to do.
    """

    def short() -> DataError:
        free = shutil.disk_usage(folder).free
        return DataError(f"{what} need {amount(needed)} below {folder} and {amount(free)} are free; {mend}")

    if needed > shutil.disk_usage(folder).free:
        raise short()
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise short() from error


def amount(count: float) -> str:
    """A number of bytes in words: ``12.5 MB``."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
