"""What a thread does before it is asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def ahead(calls: Iterable[Callable[[], T]], most: int) -> Generator[T]:
    """What the calls return, in order. One thread makes them, one after the other; ``calls`` is asked for the
    next one by whoever asks for results, ``most`` of them before they are.

    Close it where it is not read to its end. Raises what a call raises.
    """
    with ThreadPoolExecutor(1) as thread:
        begun = (thread.submit(call) for call in calls)
        waiting = deque(islice(begun, most))
        try:
            while waiting:
                wait([waiting[0]])
                waiting.extend(islice(begun, 1))
                yield waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()
            waiting.clear()  # an error that somebody keeps would keep them too
