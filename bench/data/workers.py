"""Processes that decode images, within the shared memory through which they hand them over.

Docker gives a container 64 MB of it unless told otherwise, and a process whose pixels do not fit there never
delivers them, so that whoever waits for them waits forever: no more is under way at any time than has room.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Generator, Iterable
from multiprocessing import current_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..cores import own_cores, sharers
from ..errors import DataError

if TYPE_CHECKING:
    from torch.utils.data import Dataset as TorchDataset

T = TypeVar("T")
MORE_SHARED_MEMORY = "give the container more shared memory (--ipc=host or --shm-size=8g for Docker)"
KILLED = (
    "a process that decodes images was killed, as a rule for want of memory; take fewer (--workers, "
    "or --set data.workers in a training)"
)
_SHARED = Path("/dev/shm")
_MOST_IN_A_PART = 64
_MOST_BYTES_IN_A_PART = 32 * 2**20
_AHEAD = 2
"""Items that each process may make before they are asked for."""


def decoding_workers(device: str, asked: int | None = None) -> int:
    """Decoding processes: as many as asked for, else none beside an encoder that keeps the CPU busy, and
    ``most_workers`` beside a GPU. None in a process of a pool, which may have no children.
    """
    if current_process().daemon:
        return 0
    if asked is not None:
        return asked
    return 0 if device == "cpu" else most_workers()


def most_workers() -> int:
    """Decoding processes on all cores but one, which is left to whoever takes what they decode."""
    return max(1, min(16, own_cores() - 1))


def shared_room() -> int | None:
    """Free bytes of shared memory for this process; None where the system does not say."""
    return shutil.disk_usage(_SHARED).free // sharers() if _SHARED.is_dir() else None


def under_way(workers: int) -> int:
    """Items that so many processes and whoever asks for them hold at a time, and one to spare: torch has item
    i + _AHEAD * workers begun just before it gives item i.
    """
    return _AHEAD * (workers + 1)


def workers_that_fit(wanted: int, item: int) -> int:
    """How many of the processes ``wanted`` may work at a time on items of so many bytes, in half of the room.

    0: the items are to be made in this process.
    """
    room = shared_room()
    if room is None:
        return wanted
    return max(0, min(wanted, (room // 2 // item) // _AHEAD - 1))


def part_that_fits(count: int, each: int, workers: int) -> int:
    """How many of ``count`` images of so many bytes are to be one item, so that all processes may work; few
    enough that they start and end together, and that their memory is soon taken.
    """
    if not workers:
        return count
    room = shared_room()
    fits = count if room is None else room // 2 // under_way(workers) // each
    return max(1, min(count, _MOST_IN_A_PART, _MOST_BYTES_IN_A_PART // each, fits))


def room_wanted(workers: int) -> int:
    """Shared memory with which no item of so many processes has to be smaller for want of it."""
    return 2 * under_way(workers) * _MOST_BYTES_IN_A_PART


def in_order(dataset: TorchDataset[Any], workers: int, **options: Any) -> Generator[Any]:
    """The items of a dataset in order, made by so many processes, or in this one for 0.

    Args:
        dataset: what is sent to the processes.
        workers: at most ``workers_that_fit``.
        options: further ones of torch's DataLoader.

    Raises:
        DataError: a process was killed.
    """
    import torch

    loader: Iterable[Any] = torch.utils.data.DataLoader(
        dataset,
        num_workers=workers,
        prefetch_factor=_AHEAD if workers else None,
        worker_init_fn=_leave_signals_to_parent if workers else None,
        generator=torch.Generator(),  # otherwise the iterator draws from, and so changes, the global state
        **options,
    )
    yield from killed_in_one_line(loader)


def killed_in_one_line(made: Iterable[T]) -> Generator[T]:
    """The same items; torch's error that a process was killed, which comes wherever Python is by then, is a
    DataError.
    """
    try:
        yield from made
        return
    except RuntimeError as error:
        if not says_killed(error):
            raise
    # Raised out here, where torch's error is gone: whoever keeps that keeps the other processes too.
    raise DataError(KILLED)


def says_killed(error: RuntimeError) -> bool:
    """Whether torch says that a process was killed, which it does in whatever Python is at by then."""
    return str(error).startswith("DataLoader worker")


def _leave_signals_to_parent(_: int) -> None:
    """What is sent to the whole group is for the parent to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
