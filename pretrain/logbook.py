"""What a training writes about itself (a metrics file, one JSON object a line; TensorBoard's files), and the
sums behind a line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..bench.atomic import atomic_write
from ..bench.errors import DataError


class Logbook:
    """Appends to ``metrics.jsonl``; what lies behind the step where a training goes on is cut off first."""

    def __init__(self, folder: Path, tensorboard: bool, start: int) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if start and line["step"] <= start]
        with atomic_write(self.path) as stream:
            stream.writelines(json.dumps(line) + "\n" for line in kept)
        self._stream = self.path.open("a", encoding="utf-8")
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder / "tensorboard", purge_step=start + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers as of the end of a step (counted from 1)."""
        self._stream.write(json.dumps({"step": step, **values}) + "\n")
        self._stream.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish both."""
        self._stream.close()
        if self._writer is not None:
            self._writer.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a training's metrics file; a last line that was cut off is left out.

    Raises:
        DataError: another line is damaged.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise DataError(f"{path}: line {number} is damaged; delete it and those below it") from error
    return found


@dataclass
class Tally:
    """Running sums between two lines of the log, and over the sitting."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    steps: int = 0
    busy: float = 0.0
    waited: float = 0.0
    all_steps: int = 0
    all_busy: float = 0.0
    all_waited: float = 0.0

    def add(self, terms: Mapping[str, torch.Tensor]) -> None:
        """The losses of a step, which stay on their device."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value

    def close_step(self, busy: float, waited: float) -> None:
        """The seconds of a step, and those of them in which it waited for data."""
        self.steps += 1
        self.busy += busy
        self.waited += waited
        self.all_steps += 1
        self.all_busy += busy
        self.all_waited += waited

    def await_device(self, seconds: float) -> None:
        """Seconds between steps, in which the work that a device was handed ahead of time was waited for."""
        self.busy += seconds
        self.all_busy += seconds

    def clear(self) -> None:
        """Begin anew after a line of the log; what is over the sitting stays."""
        self.sums, self.steps, self.busy, self.waited = {}, 0, 0.0, 0.0
