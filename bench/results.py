"""The run folder: what a run leaves behind, and all that the report reads. Never imports torch.

runs/first/
  plan.json                 what was asked, resolved: cells, protocols, data, checkpoints
  results/<cell>.json       one validated result a cell, written atomically when the cell ends
  items/<cell>.npz          per-item outcomes behind each metric, one array a metric
  artefacts/<cell>/...      pictures and files that the task kept
  results.json              the unified file: every cell's result, the checkpoints, the environment
  results.csv, report.html  what the report makes of it
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from .atomic import read_json, write_json
from .errors import ConfigError, DataError, first_problem
from .types import Artefact, CheckpointInfo, DataKind, Dataset, EncoderSpec, Frozen, Score

SchemaVersion = Literal["lmim-bench/results/1"]
SCHEMA: SchemaVersion = "lmim-bench/results/1"
_WARNING = "WARNING: "


class CheckpointRecord(Frozen):
    """One checkpoint of a run: its label, what was loaded, and how it is evaluated."""

    label: str
    reference: str
    fingerprint: str
    spec: EncoderSpec
    info: CheckpointInfo
    flops: float | None = None
    """FLOPs for one image at the encoder's own size (``cost.encoder_flops``); None where not counted."""


class DataRecord(Frozen):
    """One data set as it was scored."""

    name: str
    kind: DataKind
    fingerprint: str
    counts: dict[str, int]
    classes: tuple[str, ...] = ()
    path: str | None = None
    skipped: tuple[str, ...] = ()
    """Broken images that were left out (``--skip-broken``), by id."""
    ignored: dict[str, int] = {}
    """Images beside those of types that are not read, counted by suffix."""

    @staticmethod
    def of(data: Dataset, skipped: tuple[str, ...] = ()) -> DataRecord:
        """The record of an opened data set."""
        return DataRecord(
            name=data.name,
            kind=data.kind,
            fingerprint=data.fingerprint,
            counts=data.counts(),
            classes=data.classes,
            path=data.path,
            skipped=skipped,
            ignored=dict(data.ignored),
        )


class Environment(Frozen):
    """Versions, machine and device of a run."""

    lmim_bench: str
    python: str
    platform: str
    device: str
    precision: str
    packages: dict[str, str]
    git_commit: str | None = None
    git_dirty: bool | None = None


class Result(Frozen):
    """One cell: a checkpoint scored on a task and a data set with a seed; or the reason why it failed."""

    cell: str
    """Id of the cell, also its file name: ``<label>--<task>--<data>--s<seed>``."""
    digest: str
    """Hash of all that decides the numbers: encoder, precision, task, protocol, data, seed, versions."""
    status: Literal["ok", "failed"]
    error: str | None = None
    checkpoint: CheckpointRecord
    task: str
    task_version: int
    task_title: str
    task_summary: str = ""
    """What the task measures: its documentation, as plain text."""
    task_origin: str
    data: DataRecord
    seed: int
    limit: int | None = None
    protocol: dict[str, Any]
    """Every protocol field as used, defaults filled in."""
    overrides: tuple[str, ...] = ()
    """The protocol fields that differ from the task's defaults."""
    defaults: dict[str, Any] = {}
    """What these fields are by default; empty in results of versions before it was kept."""
    headline: str
    """Metric id that stands for the task."""
    scored: bool = True
    """Whether the task gives scores; False for a diagnosis, which nothing counts or ranks."""
    metrics: dict[str, dict[str, Any]] = {}
    """Declared metric families: title, unit, higher_is_better."""
    scores: tuple[Score, ...] = ()
    artefacts: tuple[Artefact, ...] = ()
    notes: tuple[str, ...] = ()
    features_version: int = 0
    """``features.FEATURES_VERSION`` of the code that made the features."""
    images_per_second: float | None = None
    """Images through the encoder when the features of this cell were made, without the decoding of images;
    None where the task reads no bank of features, or another machine made it."""
    seconds: dict[str, float] = {}
    """Wall time by phase: ``features`` (shared passes are counted where they ran), ``task``, ``score``."""
    environment: Environment
    finished: str
    """UTC time, ISO 8601."""

    def score(self, metric: str) -> Score | None:
        """The score of a metric id, or None where the cell failed or has no such metric."""
        return next((s for s in self.scores if s.metric == metric), None)


class RunFile(Frozen):
    """``results.json``: the unified result of a run folder."""

    schema_version: SchemaVersion = SCHEMA
    command: str
    limited: bool
    results: tuple[Result, ...]


def read_result(path: Path) -> Result:
    """Read and validate one cell's file. Raises DataError naming the file where it is not valid."""
    return read_json(path, Result)


def warnings_in(notes: Iterable[str]) -> list[str]:
    """Those of the notes that are warnings, without the word."""
    return [note.removeprefix(_WARNING) for note in notes if note.startswith(_WARNING)]


def read_results(out: Path) -> list[Result]:
    """The results of all cells of a run folder, by their names; [] where there are none."""
    return [read_result(path) for path in sorted((out / "results").glob("*.json"))]


def result_path(out: Path, cell: str) -> Path:
    """The file of one cell's result."""
    return out / "results" / f"{cell}.json"


def collect(out: Path, command: str) -> RunFile:
    """Gather the cells of a run folder into its ``results.json``."""
    run = _gathered(out, command)
    write_json(out / "results.json", run.model_dump(mode="json"))
    return run


def _gathered(out: Path, command: str) -> RunFile:
    results = read_results(out)
    rank = {cell: i for i, cell in enumerate(_plan_of(out).get("order", []))}
    results.sort(key=lambda result: rank.get(result.cell, len(rank)))
    return RunFile(command=command, limited=any(r.limit for r in results), results=tuple(results))


def _plan_of(out: Path) -> dict[str, Any]:
    """``plan.json``; {} where there is none yet, or one that was cut: the results count, not the plan."""
    try:
        plan = json.loads((out / "plan.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return plan if isinstance(plan, dict) else {}


def cell_order(out: Path, planned: Sequence[str]) -> list[str]:
    """The order of cells in a folder: a plan of all that there are decides, another one adds its own."""
    before: list[str] = _plan_of(out).get("order", [])
    if set(before) <= set(planned):
        return list(planned)
    return [*before, *(cell for cell in planned if cell not in before)]


def _behind(unified: Path, out: Path) -> bool:
    """Whether there are cells that were scored after the unified file was written."""
    written = unified.stat().st_mtime_ns if unified.is_file() else 0
    return any(path.stat().st_mtime_ns > written for path in (out / "results").glob("*.json"))


def load_run(folder: str | Path) -> RunFile:
    """Read ``results.json`` of a run folder; of a run that was killed, or is under way, the cells that it has
    scored.

    Raises:
        ConfigError: there is no run in that folder.
        DataError: a file is not a valid result of this schema.
    """
    out = Path(folder)
    path = out / "results.json"
    if _behind(path, out):
        return _gathered(out, _plan_of(out).get("command", ""))
    if not path.is_file():
        what = "is a file" if Path(folder).is_file() else "holds no run (no results.json)"
        raise ConfigError(f"{folder} {what}; give the --out of an earlier run")
    try:
        return RunFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(f"{path} is not a result file of schema {SCHEMA} ({first_problem(error)})") from error
