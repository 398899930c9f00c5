"""One writer for a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import ConfigError


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Be the only process that writes into a folder; one that is killed gives it free.

    Raises:
        ConfigError: another process writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"another process writes into {folder}; wait until it has ended, or give another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Wait until no other process is in this part of the code for the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock", mode=0o666):
        yield
