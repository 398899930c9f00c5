"""Trainings that are compared: each in a folder that its recipe and data name; one at a time, or several."""

from __future__ import annotations

import json
import multiprocessing
import signal
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from ..pretrain.api import pretrain, resume, save_random_weights
from ..pretrain.recipe import Recipe
from ..pretrain.signals import stop_signals
from ..pretrain.studies import Row
from .cores import keep_to, split_cores
from .errors import TrainingError
from .plan import digest
from .progress import Reporter
from .results import write_json
from .types import Dataset

_LOOK_EVERY_SECONDS = 0.5


class Trained(NamedTuple):
    """One row of a study: its recipe, and the folder with its encoder and its ``summary.json``."""

    row: Row
    recipe: Recipe
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        summary = self.folder / "summary.json"
        return summary.is_file() and bool(json.loads(summary.read_bytes())["finished"])


def plan_row(row: Row, recipe: Recipe, data: Dataset, out: Path) -> Trained:
    """A row with the folder below ``out`` that only this recipe on these data has."""
    decides = recipe.model_dump(mode="json", exclude={"name", "about", "engine", "watch"})
    name = f"{row.recipe or 'random'}-{digest({**decides, 'trained on': data.fingerprint})[:8]}"
    return Trained(row, recipe, out / "trainings" / name)


@dataclass(frozen=True)
class Trainer:
    """Trains rows on one data set.

    Args:
        data: the opened data set.
        reference: what it was opened by.
        cache_dir: where decoded images are kept.
        command: recorded in the trainings.
    """

    data: Dataset
    reference: str
    cache_dir: Path | None
    command: str

    def train(self, trained: Trained, reporter: Reporter) -> None:
        """Train a row, go on with it, or find it finished.

        Raises:
            LmimBenchError: as ``pretrain`` does.
            KeyboardInterrupt: the training was told to stop; it is saved.
        """
        row, recipe, folder = trained
        if trained.finished:
            return
        if row.recipe is None:
            health = save_random_weights(recipe, self.data, folder)
            write_json(folder / "summary.json", {"finished": True, "health": asdict(health)})
            return
        if (folder / "recipe.json").is_file():
            device = f"engine.device={recipe.engine.device}"
            summary = resume(folder, sets=(device,), reporter=reporter, cache_dir=self.cache_dir)
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

    def train_all(self, rows: Sequence[Trained], reporter: Reporter, jobs: int = 1) -> None:
        """Train rows in their order, ``jobs`` at a time; rows that share a folder are trained once.

        Each of several jobs is a process that keeps to its share of the cores; where ``device`` is ``auto``
        and there are several GPUs, jobs take them in turn. The encoders are the same as one at a time, up to
        the order in which numbers are added up.

        Raises:
            LmimBenchError: as ``pretrain`` does; the other trainings are saved.
            KeyboardInterrupt: told to stop; all trainings are saved.
        """
        folders: dict[Path, Trained] = {}
        for trained in rows:
            if not trained.finished:
                folders.setdefault(trained.folder, trained)
        todo = list(folders.values())
        jobs = min(jobs, len(todo))
        if jobs <= 1:
            for trained in todo:
                reporter.line(f"{trained.row.label}:")
                self.train(trained, reporter)
            return
        context = multiprocessing.get_context("spawn")
        slots = context.Queue()
        for cores, device in zip(split_cores(jobs), _devices(jobs), strict=True):
            slots.put(_Slot(jobs, cores, device))
        with (
            stop_signals() as asked,
            ProcessPoolExecutor(jobs, context, initializer=_take_slot, initargs=(slots,)) as pool,
        ):
            pending = {pool.submit(_train_in_slot, self, trained) for trained in todo}
            try:
                while pending and not asked.is_set():
                    done, pending = wait(pending, _LOOK_EVERY_SECONDS, FIRST_COMPLETED)
                    for future in done:
                        future.result()
            except BrokenProcessPool:
                raise TrainingError(
                    f"one of {jobs} trainings was killed, as a rule for want of memory; the same command "
                    "goes on, best with fewer --jobs"
                ) from None
            finally:
                if pending:
                    for future in pending:
                        future.cancel()
                    for process in multiprocessing.active_children():
                        process.terminate()  # a training saves itself and ends
        if pending:
            raise KeyboardInterrupt


class _Slot(NamedTuple):
    """What a job has of the machine, for as long as it lives."""

    jobs: int
    cores: list[int]
    device: str | None


_device: str | None = None
_stopped = False


def _take_slot(slots: multiprocessing.Queue[_Slot]) -> None:
    """Start-up of a job."""
    global _device
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells it, by SIGTERM
    jobs, cores, _device = slots.get()
    keep_to(cores, jobs)


def _train_in_slot(trainer: Trainer, trained: Trained) -> None:
    global _stopped
    from rich.console import Console

    if _stopped:  # the pool hands out one row more than it has processes
        raise KeyboardInterrupt

    console = Console(stderr=True, highlight=False, force_terminal=False)
    reporter = Reporter(console, f"{trained.row.label}: ")
    engine = trained.recipe.engine
    if engine.device == "auto" and _device is not None:
        engine = engine.model_copy(update={"device": _device})
        trained = trained._replace(recipe=trained.recipe.model_copy(update={"engine": engine}))
    try:
        trainer.train(trained, reporter)
    except KeyboardInterrupt:
        _stopped = True
        raise


def _devices(jobs: int) -> list[str | None]:
    """The GPU of each job, or None where there is nothing to choose from."""
    import torch

    count = torch.cuda.device_count()
    return [f"cuda:{i % count}" if count > 1 else None for i in range(jobs)]
