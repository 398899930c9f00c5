"""Carry out a plan: load each checkpoint, extract features once, score the cells, write the run folder."""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .atomic import atomic_write, write_json
from .cache import cache_folder, clear_stale
from .cells import Attempt, Banks, Cell, by_checkpoint_and_data, wanted_by, write_items
from .claims import claim
from .data.workers import decoding_workers
from .engine import Engine, resolve_device
from .environment import environment
from .errors import CheckpointError, ConfigError, LmimBenchError, first_line, said_by_the_system
from .features import FEATURES_VERSION, FeatureStore
from .plan import RunPlan
from .progress import Reporter
from .results import (
    CheckpointRecord,
    DataRecord,
    Result,
    RunFile,
    cell_order,
    collect,
    read_result,
    result_path,
)
from .types import Dataset, Encoder


@dataclass
class Run:
    """A plan whose checkpoints and data sets were opened; ``execute`` does the work."""

    plan: RunPlan
    reporter: Reporter
    command: str
    data: dict[str, Dataset]
    cells: list[Cell]
    debug: bool = False

    @cached_property
    def device(self) -> str:
        """The device that the run goes to. Raises ConfigError where there is none of that name."""
        return resolve_device(self.plan.config.device)

    @cached_property
    def store(self) -> FeatureStore:
        """The feature cache that the run reads and fills."""
        config = self.plan.config
        return FeatureStore(
            cache_folder(config.cache_dir) / "features",
            int(config.cache_size_gb * 1e9),
            decoding_workers(self.device, config.workers),
            config.skip_broken,
            config.keep_pixels,
        )

    def engine(self, encoder: Encoder) -> Engine:
        """The encoder where, and at the precision at which, the run has it."""
        config = self.plan.config
        return Engine(encoder, self.device, config.precision, config.batch_size)

    def pending(self) -> list[Cell]:
        """The cells that have no valid result yet.

        Raises:
            ConfigError: the folder holds results that were made otherwise, or ``--overwrite never``.
        """
        overwrite = self.plan.config.overwrite
        pending = []
        for cell in self.cells:
            path = result_path(self.plan.out, cell.id)
            if not path.is_file() or overwrite == "always":
                pending.append(cell)
                continue
            if overwrite == "never":
                raise ConfigError(
                    f"{self.plan.out} already holds {cell.id}; give another --out, or drop --overwrite never"
                )
            old = read_result(path)
            if old.status != "ok":
                pending.append(cell)
                continue
            if old.digest != cell.digest:
                raise ConfigError(
                    f"{self.plan.out} holds {cell.id} with {_difference(old, cell, self)}; give another "
                    "--out, another label (--ckpt NAME=...), or --overwrite always"
                )
            if old.data.skipped and not self.plan.config.skip_broken:
                raise ConfigError(
                    f"{self.plan.out} holds {cell.id} scored without {len(old.data.skipped)} broken "
                    f"image(s), first {old.data.skipped[0]}; add --skip-broken, or mend them and "
                    "--overwrite always"
                )
        return pending

    def execute(self, present: Callable[[Path], None] = lambda out: None) -> RunFile:
        """Score what is pending, keep what is there, and write ``results.json``.

        An interrupt leaves every finished cell in place and the unified file up to date.

        Args:
            present: what is done with the run folder then, also after an interrupt, and before another
                process may write there.

        Raises:
            ConfigError: the folder holds results that were made otherwise, or another process writes there.
        """
        if not self.plan.out.is_dir():
            _ = self.device  # one that is not there leaves no folder behind
        with claim(self.plan.out):
            return self._execute(present)

    def _execute(self, present: Callable[[Path], None]) -> RunFile:
        out = self.plan.out
        pending = self.pending()
        if pending:
            self.reporter.line(f"scoring {len(pending)} cells on {self.device}")
        order = cell_order(out, [cell.id for cell in self.cells])
        write_json(out / "plan.json", {**self.describe(), "order": order})
        if len(pending) < len(self.cells):
            self.reporter.line(
                f"{len(self.cells) - len(pending)} of {len(self.cells)} cells are already scored"
            )
        try:
            for checkpoint in _in_order(c.checkpoint.label for c in pending):
                self._score_checkpoint([c for c in pending if c.checkpoint.label == checkpoint])
        except KeyboardInterrupt:
            self._present(present)
            raise
        return self._present(present)

    def _present(self, present: Callable[[Path], None]) -> RunFile:
        run = collect(self.plan.out, self.command)
        present(self.plan.out)
        return run

    def describe(self) -> dict[str, Any]:
        """The plan as JSON: what ``--dry-run`` prints and ``plan.json`` keeps."""
        return {
            "command": self.command,
            "config": self.plan.config.model_dump(mode="json"),
            "checkpoints": [c.model_dump(mode="json") for c in _in_order(c.checkpoint for c in self.cells)],
            "data": [DataRecord.of(d).model_dump(mode="json") for d in self.data.values()],
            "cells": [
                {
                    "cell": c.id,
                    "task": c.evaluation.task.name,
                    "data": c.evaluation.data,
                    "seed": c.seed,
                    "protocol": c.evaluation.config.model_dump(mode="json"),
                    "overrides": list(c.evaluation.overrides),
                    "digest": c.digest,
                }
                for c in self.cells
            ],
        }

    def _score_checkpoint(self, cells: list[Cell]) -> None:
        try:
            encoder = _load_again(cells[0].checkpoint)
        except LmimBenchError as failure:  # of this checkpoint: the others are scored
            for cell in cells:
                attempt = self._begun(cell)
                attempt.error = str(failure)
                self._keep(attempt, 0.0)
            return
        engine = self.engine(encoder)
        clear_stale(self.store.root)
        for group in by_checkpoint_and_data(cells):
            data = self.data[group[0].evaluation.data]
            wanted = wanted_by(group, encoder.spec, data)
            banks = Banks(self.store, engine, data, wanted, self.reporter)
            for cell in group:
                self._score_cell(cell, engine, banks)

    def _score_cell(self, cell: Cell, engine: Engine, banks: Banks) -> None:
        started = time.perf_counter()
        attempt = self._begun(cell)
        try:
            attempt.score(engine, banks)
        except LmimBenchError as failure:
            attempt.error = str(failure)
        except Exception as failure:
            if self.debug:
                raise
            attempt.error = self._unexpected(cell, failure)
        self._keep(attempt, time.perf_counter() - started)

    def _begun(self, cell: Cell) -> Attempt:
        out = self.plan.out
        result_path(out, cell.id).unlink(missing_ok=True)  # first: it names the files that go
        shutil.rmtree(out / "artefacts" / cell.id, ignore_errors=True)
        return Attempt(cell, self.data[cell.evaluation.data], out, self.reporter)

    def _keep(self, attempt: Attempt, seconds: float) -> None:
        """Write what became of a cell, and say it."""
        out, config, cell = self.plan.out, self.plan.config, attempt.cell.id
        result = attempt.result(config.limit, environment(self.device, config.precision))
        if not attempt.error:
            write_items(out / "items" / f"{cell}.npz", attempt.measurements)
        write_json(result_path(out, cell), result.model_dump(mode="json"))
        self.reporter.line(_news(result, seconds))

    def _unexpected(self, cell: Cell, failure: Exception) -> str:
        """What to say of a failure that no task foresaw; of a bug, the traceback goes to a file."""
        if isinstance(failure, OSError) and failure.errno:  # a full disk, a cache that may not be written
            return said_by_the_system(failure)
        with atomic_write(self.plan.out / "artefacts" / cell.id / "error.txt") as stream:
            stream.write(traceback.format_exc())
        said = f"{type(failure).__name__}: {first_line(failure)}"
        return f"{said} (a bug: details in artefacts/{cell.id}/error.txt)"


def _difference(old: Result, cell: Cell, run: Run) -> str:
    config = run.plan.config
    if old.limit != config.limit:
        return f"--limit {old.limit or 'none'}, not {config.limit or 'none'}"
    if old.checkpoint.fingerprint != cell.checkpoint.fingerprint:
        return "other weights under the same label"
    if old.data.fingerprint != run.data[cell.evaluation.data].fingerprint:
        return f"another content of the data set {cell.evaluation.data!r}"
    if old.task_version != cell.evaluation.task.version:
        return f"version {old.task_version} of the task"
    if old.environment.precision != config.precision:
        return f"--precision {old.environment.precision}"
    if old.features_version != FEATURES_VERSION:
        return f"features of an earlier version ({old.environment.lmim_bench})"
    new = cell.evaluation.config.model_dump(mode="json")
    changed = [f"{k}={old.protocol.get(k)}" for k in new if old.protocol.get(k) != new[k]]
    return f"another protocol ({', '.join(changed)}); repeat its --set or --suite"


def _load_again(record: CheckpointRecord) -> Encoder:
    """The encoder of a checkpoint that was opened. Raises CheckpointError where it is another by now."""
    from .encoders import load_encoder

    encoder = load_encoder(record.reference)
    if encoder.fingerprint != record.fingerprint:
        raise CheckpointError(
            f"{record.reference} gives other weights than when it was opened: a file that changed, or a "
            "factory that is not deterministic"
        )
    return encoder


def _in_order(items: Iterable[Any]) -> list[Any]:
    seen: list[Any] = []
    for item in items:
        if item not in seen:
            seen.append(item)
    return seen


def _news(result: Result, seconds: float) -> str:
    where = f"{result.checkpoint.label} · {result.task} · {result.data.name}"
    if result.seed:
        where += f" · seed {result.seed}"
    if result.status == "failed":
        return f"{where}: FAILED: {result.error}"
    head = result.score(result.headline)
    if head is None:
        return f"{where}: no headline"
    percent = result.metrics[result.headline.split("@")[0]]["unit"] == "%"
    scale, digits, unit = (100, 1, "%") if percent else (1, 3, "")
    value, *ends = ("" if x is None else f"{x * scale:.{digits}f}" for x in (head.value, head.low, head.high))
    interval = f" [{', '.join(ends)}]" if all(ends) else ""
    return f"{where}: {result.headline} {value}{unit}{interval} in {seconds:.1f} s"
