"""A split of shards: many images in few files, read at random without unpacking them.

``tars.py`` and ``parquet.py`` know where the images lie inside; ``shard_sets.py`` makes data sets of them.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..types import Array
from .reading import not_read, read_image
from .splits import Unmasked

RawLabel = int | str | None
"""A label as a shard has it: a number, None where there is none (or -1), or in words what is wrong."""


class Reader(ABC):
    """Reads one encoded image out of a shard. What it keeps open or decoded belongs to one process: it is not
    pickled, and dropped after a fork, where two processes would share a file's position.
    """

    def __init__(self) -> None:
        self._start()

    def read(self, path: Path, first: int, second: int) -> bytes:
        """The image at two numbers of ``ShardSplit.where``. Raises OSError, EOFError or DataError."""
        if self._pid != os.getpid():
            self.close()
            self._start()
        with self._lock:
            return self._read(path, first, second)

    @abstractmethod
    def close(self) -> None:
        """Let go of whatever is kept; the next ``read`` starts anew."""

    def _start(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()

    @abstractmethod
    def _read(self, path: Path, first: int, second: int) -> bytes:
        """As ``read``, by one thread at a time."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._start()


@dataclass(eq=False)
class ShardSplit(Unmasked):
    """Images inside shards; nothing is read before it is asked for.

    ``where`` is int64 (N, 3): the position of the shard in ``shards``, and the two numbers by which the
    reader finds the image in it.
    """

    root: Path
    shards: Sequence[str]
    ids: Sequence[str]
    where: Array
    reader: Reader
    labels: Array | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, i: int) -> Array:
        """The decoded image, RGB, uint8 (H, W, 3).

        Raises:
            DataError: it cannot be read; the message names shard and sample.
        """
        shard, first, second = self.where[i].tolist()
        name = self.root / self.ids[i]
        try:
            content = self.reader.read(self.root / self.shards[shard], first, second)
        except (OSError, EOFError, DataError) as error:
            raise not_read(name, error, "cannot be read") from error
        return read_image(name, content)

    def subset(self, index: Array) -> ShardSplit:
        """The split made of these positions, in this order."""
        labels = None if self.labels is None else self.labels[index]
        return replace(self, ids=[self.ids[i] for i in index], where=self.where[index], labels=labels)


@dataclass(frozen=True)
class Found:
    """What the shards of a split hold, before their labels are checked. ``classes`` are names that the shards
    themselves give.
    """

    split: ShardSplit
    labels: Sequence[RawLabel]
    classes: Sequence[str] = ()

    @property
    def labelled(self) -> bool:
        """Whether any sample has a label."""
        return any(label is not None for label in self.labels)
