"""What a plan will cost, before any of it is done: time, memory and disk.

The encoder and the reading of images are timed here, on a few images of the plan. What a task costs beside
them is counted by the task (``Work``), in the seconds of a reference machine, which the speed of matrix
products on this machine brings to it. ``benchmarks/growth.py`` compares those counts with measurements,
``benchmarks/foreseen.py`` whole estimates with whole runs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from .cells import Cell, by_checkpoint_and_data, requests_of, wanted_by
from .data.splits import spread
from .engine import Engine
from .errors import LmimBenchError, first_line
from .features import bank_bytes, bank_key, pixels_key
from .runner import Run
from .types import Dataset, Step, Tap, View

REFERENCE_RATE = 2.0e11
"""Matrix products, FLOP/s in float32, of the machine whose seconds ``Work`` counts: two cores."""
_SIDE, _TRIES = 1024, 8
_PATIENCE = 1.5
"""Seconds that one timing may take, where a single image does not take longer."""
_MOST_READ = 64


@dataclass
class Estimator:
    """Times what a run will do, and adds it up."""

    run: Run
    _rates: dict[str, float] = field(default_factory=dict)
    _engines: dict[str, Engine] = field(default_factory=dict)
    _kept: set[str] = field(default_factory=set)

    def steps(self) -> Iterator[Step]:
        """Every step that is still to be done, in the order of the run."""
        pending = self.run.pending()
        for group in by_checkpoint_and_data(pending):
            data = self.run.data[group[0].evaluation.data]
            yield from self._features(group, data)
            yield from (self._cell(cell, data) for cell in group)

    def _features(self, cells: Sequence[Cell], data: Dataset) -> Iterator[Step]:
        checkpoint = cells[0].checkpoint
        for (split, view), columns in wanted_by(list(cells), checkpoint.spec, data).items():
            precision, device = self.run.plan.config.precision, self.run.device
            key = bank_key(checkpoint.fingerprint, checkpoint.spec, data, split, view, precision, device)
            missing = self.run.store.missing(key, columns)
            if not missing:
                continue
            images, store = len(data.splits[split]), self.run.store
            what = f"features of {data.name}/{split} at {view.size} px"
            try:
                encoding = self._encoding(cells[0], view.size, view.size)
                reading, kept = self._pixels(data, split, view)
            except LmimBenchError as error:
                yield Step(checkpoint.label, what, images, failure=str(error))
                continue
            each = max(encoding, reading / store.workers) if store.workers else encoding + reading
            disk = kept + images * bank_bytes(missing, view, checkpoint.spec)
            yield Step(checkpoint.label, what, images, images * each, disk=disk)

    def _cell(self, cell: Cell, data: Dataset) -> Step:
        task, spec = cell.evaluation.task, cell.checkpoint.spec
        what = f"{task.name} on {data.name}" + (f", seed {cell.seed}" if cell.seed else "")
        try:
            requests_of(cell, spec, data)
            if task.work is None:
                return Step(cell.checkpoint.label, what)
            work = task.work(cell.evaluation.config, spec, data)
            seconds = sum(count * self._encoding(cell, *size) for size, count in work.encoded.items())
        except LmimBenchError as error:
            return Step(cell.checkpoint.label, what, failure=str(error))
        except Exception as error:  # noqa: BLE001 - of a task of others
            return Step(cell.checkpoint.label, what, failure=f"{type(error).__name__}: {first_line(error)}")
        for part, count in work.seconds.items():
            seconds += count * self._slower(self.run.device if part in work.on_device else "cpu")
        return Step(cell.checkpoint.label, what, sum(work.encoded.values()), seconds, work.memory)

    # --------------------------------------------------------------------------------------- what is timed

    def _encoding(self, cell: Cell, height: int, width: int) -> float:
        """Seconds an image of this size in the encoder; checkpoints of one architecture are timed once."""
        key = f"encode {_architecture(cell)} {height} {width}"
        if key not in self._rates:
            import torch

            engine = self._engine(cell)

            def seconds(count: int) -> float:
                images = torch.rand(count, 3, height, width, device=engine.device)
                # Features are checked for what is not finite, which waits for the device.
                return _seconds(lambda: engine.encode(images, (Tap(),)))

            one = seconds(1)
            if one < _PATIENCE:  # the first one had to warm up
                one = seconds(1)
            count = max(1, min(engine.batch_for(height, width), int(_PATIENCE / one)))
            self._rates[key] = min(one, seconds(count) / count) if count > 1 else one
        return self._rates[key]

    def _pixels(self, data: Dataset, split: str, view: View) -> tuple[float, int]:
        """Seconds to come by the pixels of an image, and bytes of pixels that the pass is to keep."""
        key, store = pixels_key(data, split, view), self.run.store
        if key in self._kept or store.keeps(data, split, view):
            return 0.0, 0
        reading = self._reading(data, split, view)
        if not store.keep_pixels:
            return reading, 0
        self._kept.add(key)
        return reading, view.pixel_bytes * len(data.splits[split])

    def _reading(self, data: Dataset, split: str, view: View) -> float:
        """Seconds to decode and cut an image of a split, the mean of some that are spread over it."""
        key = f"read {data.name} {split} {view}"
        if key not in self._rates:
            from .data.loading import iterate_batches

            images = data.splits[split]
            places = np.array(spread(len(images), _MOST_READ))
            begun, read = time.perf_counter(), 0
            chosen, skip_broken = images.subset(places), self.run.store.skip_broken
            for _ in iterate_batches(chosen, view, 1, skip_broken=skip_broken, device=self.run.device):
                read += 1
                if time.perf_counter() - begun > _PATIENCE:
                    break
            self._rates[key] = (time.perf_counter() - begun) / max(1, read)
        return self._rates[key]

    def _slower(self, device: str) -> float:
        """How many times as long as on the reference machine something takes on a device."""
        key = f"products {device}"
        if key not in self._rates:
            self._rates[key] = REFERENCE_RATE / product_rate(device)
        return self._rates[key]

    def _engine(self, cell: Cell) -> Engine:
        from .encoders import load_encoder

        key = _architecture(cell)
        if key not in self._engines:
            self._engines.clear()  # one encoder in memory, as in a run
            self._engines[key] = self.run.engine(load_encoder(cell.checkpoint.reference))
        return self._engines[key]


def resident_peak() -> int:
    """The most memory that this process has held so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def product_rate(device: str) -> float:
    """Matrix products of a device in float32, FLOP/s: the fastest of a few."""
    import torch

    a, b = (torch.rand(_SIDE, _SIDE, device=device) for _ in range(2))
    fastest = min(_seconds(lambda: float((a @ b)[0, 0])) for _ in range(_TRIES))
    return 2 * _SIDE**3 / fastest


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _architecture(cell: Cell) -> str:
    return json.dumps(cell.checkpoint.spec.arch, sort_keys=True, default=str)
