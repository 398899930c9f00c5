"""The processor cores that this process may use: a scheduler may give fewer than the machine has."""

from __future__ import annotations

import os
from itertools import pairwise


def usable_cores() -> list[int]:
    """Their numbers, ascending."""
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


def keep_to(cores: list[int]) -> None:
    """Run this process and torch's threads on these cores alone, where the system can do that."""
    import torch

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
