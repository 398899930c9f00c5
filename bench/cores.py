"""What this process may use of its machine: a scheduler may give fewer cores than there are."""

from __future__ import annotations

import os
from itertools import pairwise

_beside = 1


def usable_cores() -> list[int]:
    """The numbers of the processor cores, ascending."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def split_cores(parts: int) -> list[list[int]]:
    """The cores in so many shares, neighbours together; where they are too few, shares of one core each."""
    cores = usable_cores()
    if parts > len(cores):
        return [[cores[i % len(cores)]] for i in range(parts)]
    ends = [i * len(cores) // parts for i in range(parts + 1)]
    return [cores[begin:end] for begin, end in pairwise(ends)]


def keep_to(cores: list[int], processes: int) -> None:
    """Be one of so many processes that share the machine: run on these cores alone, where the system can do
    that, with as many of torch's threads.
    """
    import torch

    global _beside
    _beside = processes
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))


def own_cores() -> int:
    """How many cores are this process's alone; torchrun leaves all of them to each of its processes."""
    return max(1, len(usable_cores()) // _of_torchrun())


def sharers() -> int:
    """How many processes share what this machine has once: those of ``keep_to``, and torchrun's."""
    return _beside * _of_torchrun()


def _of_torchrun() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
