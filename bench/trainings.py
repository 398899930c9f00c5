"""Trainings that are compared: each in a folder that its recipe and data name; one at a time, or several."""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import NamedTuple

from ..pretrain.api import MAY_CHANGE, open_images, pretrain, resume, save_random_weights
from ..pretrain.engine import resolve_precision
from ..pretrain.pixels import open_pixels, stored_sides
from ..pretrain.recipe import Recipe
from ..pretrain.signals import stop_signals
from ..pretrain.studies import Row
from .atomic import write_json
from .cache import cache_folder
from .config import Precision
from .cores import keep_to, split_cores
from .data.workers import most_workers
from .engine import resolve_device
from .errors import LmimBenchError, TrainingError
from .names import digest
from .progress import Reporter
from .types import Dataset

_LOOK_EVERY_SECONDS = 0.5


class PlannedRow(NamedTuple):
    """One row of a study: its recipe, and the folder with its encoder and its ``summary.json``."""

    row: Row
    recipe: Recipe
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        summary = self.folder / "summary.json"
        return summary.is_file() and bool(json.loads(summary.read_bytes())["finished"])


def plan_row(row: Row, recipe: Recipe, data: Dataset, out: Path) -> PlannedRow:
    """A row with the folder below ``out`` that only this recipe on these data, in this precision, has.

    Raises:
        ConfigError: a device that is not there.
    """
    decides = recipe.model_dump(mode="json", exclude={"name", "about", "engine", "watch"})
    decides |= {"trained on": data.fingerprint, "precision": training_precision(recipe)}
    if recipe.over_parts:
        decides["parts"] = recipe.engine.accumulate
    name = f"{row.recipe or 'random'}-{digest(decides)[:8]}"
    return PlannedRow(row, recipe, out / "trainings" / name)


def training_precision(recipe: Recipe) -> Precision:
    """The arithmetic that ``auto`` comes to on the device at hand, or what the recipe names.

    Raises:
        ConfigError: a device that is not there.
    """
    return resolve_precision(recipe.engine, resolve_device(recipe.engine.device).partition(":")[0])


@dataclass(frozen=True)
class Trainer:
    """Trains rows on one data set.

    Args:
        data: the opened data set; None is opened by whoever needs it.
        reference: what it is opened by.
        cache_dir: where decoded images are kept.
        command: recorded in the trainings.
    """

    data: Dataset | None
    reference: str
    cache_dir: Path | None
    command: str

    def train(self, trained: PlannedRow, reporter: Reporter) -> None:
        """Train a row, go on with it as this recipe's ``engine`` and ``watch`` say, or find it finished.

        Raises:
            LmimBenchError: as ``pretrain`` does.
            KeyboardInterrupt: the training was told to stop; it is saved.
        """
        row, recipe, folder = trained
        if trained.finished:
            return
        if row.recipe is None:
            health = save_random_weights(recipe, self._opened(reporter), folder)
            write_json(folder / "summary.json", {"finished": True, "health": asdict(health)})
            return
        if (folder / "recipe.json").is_file():
            fields = recipe.model_dump(mode="json", include=set(MAY_CHANGE))
            sets = [f"{part}.{name}={value}" for part, of in fields.items() for name, value in of.items()]
            data = self._opened(reporter)
            summary = resume(folder, sets=sets, reporter=reporter, cache_dir=self.cache_dir, data=data)
        else:
            summary = pretrain(
                recipe,
                self.reference,
                folder,
                reporter=reporter,
                cache_dir=self.cache_dir,
                command=self.command,
            )
        if not summary.finished:
            raise KeyboardInterrupt

    def train_all(self, rows: Sequence[PlannedRow], reporter: Reporter, jobs: int = 1) -> None:
        """Train rows in their order, ``jobs`` at a time; rows that share a folder are trained once.

        Side by side each training is a process that keeps to its share of the cores; where ``device`` is
        ``auto`` and there are several GPUs, they are taken in turn. The encoders are the same as one at a
        time, up to the order in which numbers are added up.

        Raises:
            LmimBenchError: as ``pretrain`` does; the other trainings are saved.
            KeyboardInterrupt: told to stop; all trainings are saved.
        """
        folders: dict[Path, PlannedRow] = {}
        for trained in rows:
            if not trained.finished:
                folders.setdefault(trained.folder, trained)
        jobs = min(jobs, len(folders))
        if jobs > 1:
            self._decode_once(
                [trained.recipe for trained in folders.values() if trained.row.recipe], reporter
            )
            self._side_by_side(deque(folders.values()), jobs)
            return
        for trained in folders.values():
            reporter.line(f"{trained.row.label}:")
            self.train(trained, reporter)

    def _decode_once(self, recipes: Sequence[Recipe], reporter: Reporter) -> None:
        """Fill the cache of images with all cores, before each training keeps to its share of them."""
        data, root = self._opened(reporter), cache_folder(self.cache_dir) / "pixels"
        split = data.splits[data.train_split]
        by_side = {(stored_sides(split, recipe), recipe.data.cache): recipe for recipe in recipes}
        for recipe in by_side.values():
            asked = recipe.data.workers
            workers = most_workers() if asked is None else asked  # nothing else runs yet
            open_pixels(split, data.fingerprint, recipe, root, workers, reporter)

    def _opened(self, reporter: Reporter) -> Dataset:
        return self.data or open_images(self.reference, reporter, self.cache_dir)

    def _side_by_side(self, todo: deque[PlannedRow], jobs: int) -> None:
        # A process a training, with nothing shared: one of a pool that is told to stop while it waits for
        # its next training dies with the lock of the pool's queue, and all others wait forever.
        context = multiprocessing.get_context("spawn")
        # Each opens the data itself: a start waits until what it is sent was taken over, and that is when a
        # process has imported what reads it.
        alone = replace(self, data=None)
        free = [_Slot(jobs, *share) for share in zip(split_cores(jobs), _devices(jobs), strict=True)]
        running: list[_Job] = []
        with stop_signals() as asked:
            try:
                while (todo or running) and not asked.is_set():
                    while todo and free:
                        running.append(_begin(context, alone, todo.popleft(), free.pop(0)))
                    ready = wait([job.outcome for job in running], _LOOK_EVERY_SECONDS)
                    for job in [job for job in running if job.outcome in ready]:
                        running.remove(job)
                        free.append(job.slot)
                        job.end()
            finally:
                for job in running:
                    job.process.terminate()  # a training saves itself and ends
                for job in running:
                    job.process.join()
        if asked.is_set():
            raise KeyboardInterrupt


class _Slot(NamedTuple):
    """What a training has of the machine."""

    jobs: int
    cores: list[int]
    device: str | None


class _Job(NamedTuple):
    """A training in a process of its own."""

    trained: PlannedRow
    slot: _Slot
    process: SpawnProcess
    outcome: Connection

    def end(self) -> None:
        """Wait until the process is gone, and raise what ended it."""
        try:
            error: BaseException | None = self.outcome.recv()
        except EOFError:
            error = None
        self.process.join()
        code = self.process.exitcode
        if error is None and code:
            error = KeyboardInterrupt() if code == -signal.SIGTERM else self._killed(code)
        if error is not None:
            raise error

    def _killed(self, code: int) -> TrainingError:
        label = self.trained.row.label
        if code > 0:
            return TrainingError(f"{label}: the training ended by the error above, which is a fault of ours")
        return TrainingError(
            f"{label}: the training was killed ({signal.Signals(-code).name}), as a rule for want of memory; "
            f"the same command goes on, best with fewer --jobs than {self.slot.jobs}"
        )


def _begin(context: SpawnContext, trainer: Trainer, trained: PlannedRow, slot: _Slot) -> _Job:
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_train_in_slot, args=(trainer, trained, slot, sending))
    resource_tracker.ensure_running()  # starting it unblocks Ctrl-C
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()  # which keeps Ctrl-C blocked: the parent tells it to stop, once, by SIGTERM
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    sending.close()  # the other end is the process's alone, so that its death is seen
    return _Job(trained, slot, process, receiving)


def _train_in_slot(trainer: Trainer, trained: PlannedRow, slot: _Slot, outcome: Connection) -> None:
    from rich.console import Console

    keep_to(slot.cores, slot.jobs)
    console = Console(stderr=True, highlight=False, force_terminal=False)
    reporter = Reporter(console, f"{trained.row.label}: ")
    engine = trained.recipe.engine
    if engine.device == "auto" and slot.device is not None:
        engine = engine.model_copy(update={"device": slot.device})
        trained = trained._replace(recipe=trained.recipe.model_copy(update={"engine": engine}))
    try:
        trainer.train(trained, reporter)
    except (LmimBenchError, KeyboardInterrupt) as error:
        outcome.send(error)


def _devices(jobs: int) -> list[str | None]:
    """The GPU of each job, or None where there is nothing to choose from."""
    import torch

    count = torch.cuda.device_count()
    return [f"cuda:{i % count}" if count > 1 else None for i in range(jobs)]
