"""How time and memory grow: the same work at several sizes, and the exponent of the line through them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from _peer_code import Build, peak_memory

_REPEATS = 3
_LEAST_MB = 1.0
"""Memory is measured in pages and moves by about so much from run to run."""


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log value over log size: 0 is constant, 1 is in proportion."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def growth(
    name: str, sizes: Sequence[int], build: Callable[[int], Build], threads: int, unit: str
) -> dict[str, Any]:
    """Time (fastest of three) and peak memory of the work at each size, printed as lines.

    Args:
        name: whose work it is.
        sizes: of what is varied.
        build: for a size, prepares the work; picklable.
        unit: what a size counts.
    """
    seconds, megabytes = [], []
    for size in sizes:
        made = build(size)
        work = made()
        work()
        taken = []
        for _ in range(_REPEATS):
            begun = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begun)
        seconds.append(min(taken))
        megabytes.append(max(peak_memory(made, threads)[0].resident, _LEAST_MB))
        print(f"{name}, {size} {unit}: {seconds[-1]:.3f} s, {megabytes[-1]:.0f} MB", flush=True)
    found = {"time": exponent(sizes, seconds), "memory": exponent(sizes, megabytes)}
    print(f"{name}: time grows as {unit}^{found['time']:.2f}, memory as {unit}^{found['memory']:.2f}")
    return {"name": name, "unit": unit, "sizes": [*sizes], "seconds": seconds, "mb": megabytes, **found}
