"""The random state of torch, which constructors draw weights from: borrowed, and given back as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ONE_AT_A_TIME = threading.RLock()
"""The state is that of the process, so that threads would draw each other's numbers."""


@contextmanager
def borrowed_state(seed: int | None = None) -> Iterator[None]:
    """Whatever is drawn meanwhile on the CPU starts from ``seed`` (from where it stood without one), and
    leaves no trace. Other threads that borrow the state wait.
    """
    with _ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield
