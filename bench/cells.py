"""One cell at a time: what it is, the features it needs, scoring it, and the record of that."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from .atomic import atomic_write
from .context import RunContext, generator
from .engine import Engine
from .errors import LmimBenchError, TaskError, complaint
from .features import FEATURES_VERSION, FeatureStore, merge_requests
from .plan import Evaluation
from .progress import Reporter
from .results import CheckpointRecord, DataRecord, Environment, Result
from .stats import is_plain, score, terms
from .types import (
    Column,
    Dataset,
    EncoderSpec,
    FeatureBank,
    FeatureRequest,
    Measurement,
    Score,
    TaskSpec,
    View,
    ignored_files,
)


@dataclass(frozen=True)
class Cell:
    """One number to be made: a checkpoint on an evaluation with a seed, and the hash of all it depends on."""

    id: str
    checkpoint: CheckpointRecord
    evaluation: Evaluation
    seed: int
    digest: str


def by_checkpoint_and_data(cells: Iterable[Cell]) -> list[list[Cell]]:
    """The cells of each checkpoint on each data set, in the order in which they come."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.checkpoint.label, cell.evaluation.data), []).append(cell)
    return list(groups.values())


@dataclass
class Banks:
    """The feature banks of one (checkpoint, data set), opened or extracted at first use."""

    store: FeatureStore
    engine: Engine
    data: Dataset
    wanted: dict[tuple[str, View], tuple[Column, ...]]
    reporter: Reporter
    _found: dict[tuple[str, View], tuple[FeatureBank, tuple[str, ...]] | LmimBenchError] = field(
        default_factory=dict
    )

    def get(self, split: str, view: View) -> tuple[FeatureBank, tuple[str, ...]]:
        """The bank with every column that any task wants; a failure is the same for all of them."""
        key = (split, view)
        if key not in self._found:
            try:
                self._found[key] = self.store.bank(
                    self.engine, self.data, split, view, self.wanted[key], self.reporter
                )
            except LmimBenchError as error:
                self._found[key] = error
        found = self._found[key]
        if isinstance(found, LmimBenchError):
            raise found
        return found


@dataclass
class Attempt:
    """Scoring a cell: what it found, as far as it came."""

    cell: Cell
    data: Dataset
    out: Path
    reporter: Reporter
    error: str | None = None
    """Why it came no further, in words."""
    measurements: Sequence[Measurement] = ()
    _scores: Sequence[Score] = ()
    _opened: dict[str, FeatureBank] = field(default_factory=dict)
    _skipped: tuple[str, ...] = ()
    _seconds: dict[str, float] = field(default_factory=dict)
    _context: RunContext | None = None

    def score(self, engine: Engine, banks: Banks) -> None:
        """Extract the features, run the task, score what it measured. Raises whatever stops it."""
        task = self.cell.evaluation.task
        with self._timed("features"):
            for request in requests_of(self.cell, engine.encoder.spec, self.data):
                for split in request.splits:
                    self._opened[split], left_out = banks.get(split, request.view)
                    self._skipped += tuple(one for one in left_out if one not in self._skipped)
        self._context = context = self._make_context(engine)
        with self._timed("task"):
            self.measurements = _measured(task, task.run(context, self.cell.evaluation.config))
        with self._timed("score"):
            self._scores = scores_of(self.measurements, self.cell)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._seconds[phase] = round(time.perf_counter() - begun, 4)

    def _make_context(self, engine: Engine) -> RunContext:
        context = RunContext(
            task=self.cell.evaluation.task.name,
            cell=self.cell.id,
            reference=self.cell.checkpoint.reference,
            engine=engine,
            data=self.data,
            banks=self._opened,
            seed=self.cell.seed,
            out=self.out,
            reporter=self.reporter,
        )
        if self._skipped:
            first = self._skipped[0]
            context.note(f"{len(self._skipped)} broken image(s) left out (--skip-broken), first {first}")
        if self.data.ignored:
            context.note(ignored_files(self.data.ignored))
        return context

    def result(self, limit: int | None, made_on: Environment) -> Result:
        """The record of the cell, scored or failed."""
        cell, task, context = self.cell, self.cell.evaluation.task, self._context
        defaults = task.config().model_dump(mode="json")
        return Result(
            cell=cell.id,
            digest=cell.digest,
            status="failed" if self.error else "ok",
            error=self.error,
            checkpoint=cell.checkpoint,
            task=task.name,
            task_version=task.version,
            task_title=task.title,
            task_origin=task.origin,
            task_summary=task.doc,
            data=DataRecord.of(self.data, self._skipped),
            seed=cell.seed,
            limit=limit,
            protocol=cell.evaluation.config.model_dump(mode="json"),
            overrides=cell.evaluation.overrides,
            defaults={name: defaults[name] for name in cell.evaluation.overrides},
            headline=task.headline(cell.evaluation.config),
            scored=task.scored,
            metrics={m.id: m.model_dump(mode="json", exclude={"id"}) for m in task.metrics},
            scores=tuple(self._scores),
            artefacts=tuple(context.artefacts) if context and not self.error else (),
            notes=tuple(context.notes) if context else (),
            images_per_second=_speed(self._opened.values()),
            seconds=self._seconds,
            features_version=FEATURES_VERSION,
            environment=made_on,
            finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )


def _measured(task: TaskSpec, found: Any) -> list[Measurement]:
    """What a task returned. Raises TaskError where it is no list of measurements."""
    listed = list(found) if isinstance(found, Sequence) else [found]
    for one in listed:
        if not isinstance(one, Measurement):
            raise TaskError(f"the task {task.name} returned {type(one).__name__}, not a list of Measurement")
    return listed


def _speed(banks: Iterable[FeatureBank]) -> float | None:
    """Images a second of the largest bank, which its start and end disturb least."""
    timed = [bank for bank in banks if bank.images_per_second is not None]
    return max(timed, key=len).images_per_second if timed else None


def requests_of(cell: Cell, spec: EncoderSpec, data: Dataset) -> list[FeatureRequest]:
    """The task's feature requests, checked against the encoder and the splits that there are."""
    requests = list(cell.evaluation.task.features(cell.evaluation.config, spec, data))
    views: dict[str, View] = {}
    for request in requests:
        for split in request.splits:
            if split not in data.splits:
                raise TaskError(f"{data.name} has no split {split!r}; it has {', '.join(data.splits)}")
            if views.setdefault(split, request.view) != request.view:
                task = cell.evaluation.task.name
                raise TaskError(
                    f"the task {task} asks for {split!r} through two views; a task has one a split"
                )
        for column in request.columns:
            if column.kind == "cls" and not spec.has_cls:
                raise TaskError(f"{cell.checkpoint.label} has no class token; use pooling=mean")
            if not 1 <= -column.tap.layer <= spec.depth:
                raise TaskError(
                    f"{cell.checkpoint.label} has {spec.depth} layers; layer {column.tap.layer} is not one "
                    f"of -1 to -{spec.depth}"
                )
    return requests


def wanted_by(
    cells: list[Cell], spec: EncoderSpec, data: Dataset
) -> dict[tuple[str, View], tuple[Column, ...]]:
    """The union of what the cells want, so that one pass serves all; a cell whose request is wrong fails
    by itself when its turn comes.
    """
    triples = []
    for cell in cells:
        try:
            requests = requests_of(cell, spec, data)
        except Exception:  # noqa: BLE001 - of a task of others, told by the cell when its turn comes
            continue
        triples += [(s, r.view, c) for r in requests for s in r.splits for c in r.columns]
    return merge_requests(triples)


def scores_of(measurements: Sequence[Measurement], cell: Cell) -> list[Score]:
    """Value and interval of each measurement, checked against what the task declares."""
    task = cell.evaluation.task
    scores: dict[str, Score] = {}
    for m in measurements:
        returned = f"the task {task.name} returned the metric {m.metric!r}"
        try:
            task.metric(m.metric)
        except KeyError:
            raise TaskError(f"{returned}, which it does not declare") from None
        if m.metric in scores:
            raise TaskError(f"{returned} twice")
        try:
            scores[m.metric] = score(m, generator(cell.seed, task.name, "bootstrap", m.metric))
        except (ValueError, TypeError) as error:
            raise TaskError(f"{returned}, and it cannot be scored: {complaint(error)}") from error
    headline = task.headline(cell.evaluation.config)
    if headline not in scores:
        raise TaskError(f"the task {task.name} did not return its headline metric {headline!r}")
    return list(scores.values())


def write_items(path: Path, measurements: Sequence[Measurement]) -> None:
    """Keep the per-item numbers of each metric, the clusters where there are any, and the first-order terms
    of a metric that is no mean of its items.
    """
    arrays: dict[str, Any] = {}
    for m in measurements:
        arrays[m.metric] = np.asarray(m.items)
        if m.clusters is not None:
            arrays[f"{m.metric}/clusters"] = np.asarray(m.clusters)
        if not is_plain(m):
            arrays[f"{m.metric}/terms"] = terms(m)
    # numpy's own function takes no array that is called as one of its arguments.
    with atomic_write(path, "wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
