"""One writer for a folder."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import ConfigError
from .progress import Reporter

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)
"""What the system says where a disk, most often one on a network, was mounted without locks."""
_PATIENCE = 3.0
"""Seconds after which somebody who waits wants to know for whom."""


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Be the only process that writes into a folder; one that is killed gives it free.

    Raises:
        ConfigError: another process writes there, or it is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"{folder} cannot be a folder: a file of its name, or above it, is there") from None
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"another process writes into {folder} and holds {folder / '.lock'}; wait until it has ended, "
            "or give another --out"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise ConfigError(
            f"the disk of {folder} has no file locks ({error.strerror}); give an --out on another one"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def in_turn(path: Path, reporter: Reporter) -> Iterator[None]:
    """Wait until no other process makes this file or folder; a line says so where that takes long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), mode=0o666)
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        reporter.line(f"waiting for another process, which makes {path}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
