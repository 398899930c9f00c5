"""One cell at a time: what it is, the features it needs, the scores that come of its measurements."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .atomic import atomic_write
from .context import generator
from .engine import Engine
from .errors import LmimBenchError, TaskError
from .features import FeatureStore, merge_requests
from .plan import Evaluation
from .progress import Reporter
from .results import CheckpointRecord
from .stats import is_plain, score, terms
from .types import Column, Dataset, EncoderSpec, FeatureBank, FeatureRequest, Measurement, Score, View


@dataclass(frozen=True)
class Cell:
    """One number to be made: a checkpoint on an evaluation with a seed, and the hash of all it depends on."""

    id: str
    checkpoint: CheckpointRecord
    evaluation: Evaluation
    seed: int
    digest: str


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
                    self.engine, self.data, split, view, self.wanted[key], self.reporter.progress
                )
            except LmimBenchError as error:
                self._found[key] = error
        found = self._found[key]
        if isinstance(found, LmimBenchError):
            raise found
        return found


def requests_of(cell: Cell, spec: EncoderSpec, data: Dataset) -> list[FeatureRequest]:
    """The task's feature requests, checked against the encoder and the splits that there are."""
    requests = list(cell.evaluation.task.features(cell.evaluation.config, spec, data))
    for request in requests:
        for split in request.splits:
            if split not in data.splits:
                raise TaskError(f"{data.name} has no split {split!r}; it has {', '.join(data.splits)}")
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
        except LmimBenchError:
            continue
        triples += [(s, r.view, c) for r in requests for s in r.splits for c in r.columns]
    return merge_requests(triples)


def scores_of(measurements: Sequence[Measurement], cell: Cell) -> list[Score]:
    """Value and interval of each measurement, checked against what the task declares."""
    task = cell.evaluation.task
    scores = []
    for m in measurements:
        try:
            task.metric(m.metric)
        except KeyError:
            raise TaskError(
                f"the task {task.name} returned the metric {m.metric!r}, which it does not declare"
            ) from None
        scores.append(score(m, generator(cell.seed, task.name, "bootstrap", m.metric)))
    headline = task.headline(cell.evaluation.config)
    if headline not in {s.metric for s in scores}:
        raise TaskError(f"the task {task.name} did not return its headline metric {headline!r}")
    return scores


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
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    with atomic_write(path, "wb") as stream:
        stream.write(buffer.getvalue())
