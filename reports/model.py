"""What a report shows, as plain values: from results to checkpoints, columns and summary cells. Pure.

A *column* is a task on a data set under one protocol. Cells of the same task and data set that were scored
under different protocols, task versions, data or limits never share a column, since their numbers cannot
be compared.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from ..bench.results import CheckpointRecord, DataRecord, Environment, Result, RunFile, load_run, warnings_in
from ..bench.types import Metric
from .readings import Reading, Row, declared, listed, metric_rows, show

State = Literal["ok", "partial", "failed", "missing"]
"""``partial``: some seeds failed; ``missing``: the cell was never run, or its headline is not there."""
Standing = Literal["best", "close", "untested", ""]
"""``close``: not told apart from the best, which the paired tests say (``verdicts.Pairings``); ``untested``:
there is no such test, and the intervals overlap.
"""


@dataclass(frozen=True)
class Entry:
    """A result and the run folder that its artefacts are in (None where only the numbers are at hand)."""

    result: Result
    folder: Path | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint under a label that no other checkpoint of the report has."""

    index: int
    label: str
    record: CheckpointRecord


@dataclass(frozen=True)
class Cell:
    """One field of the summary table."""

    state: State
    reading: Reading | None = None
    standing: Standing = ""
    heat: float = 0.0
    span: tuple[float, float, float] | None = None
    errors: tuple[str, ...] = ()

    @property
    def seeds(self) -> int:
        """How many seeds the value is the mean of; 0 where there is none."""
        return len(self.reading.scores) if self.reading else 0


@dataclass(frozen=True)
class Column:
    """A task on a data set under one protocol: everything in it can be compared."""

    id: str
    first: Result
    """The result that stands for what is common to the column: task, data, protocol."""
    variant: str
    """What tells this column from others of the same task and data set; usually empty."""
    cells: tuple[tuple[Entry, ...], ...]
    """For each checkpoint its entries, by seed."""
    rows: tuple[Row, ...]

    @property
    def task(self) -> str:
        """The name of the task."""
        return self.first.task

    @property
    def data(self) -> DataRecord:
        """The data set."""
        return self.first.data

    @property
    def name(self) -> str:
        """Task, data set and variant: no other column of the report is called so."""
        return f"{self.task} on {self.data.name}" + (f" [{self.variant}]" if self.variant else "")

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries, by checkpoint and seed."""
        return tuple(entry for cell in self.cells for entry in cell)

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds of this column."""
        return tuple(sorted({entry.result.seed for entry in self.entries}))

    @property
    def headline(self) -> Row | None:
        """The row that stands for the task; None where no cell could be scored."""
        return next((row for row in self.rows if row.headline), None)

    @property
    def metric(self) -> Metric:
        """The family of the headline, as it is declared: also where no cell could be scored."""
        return declared(self.first, self.first.headline.split("@")[0])

    @property
    def content(self) -> str:
        """What tells data sets apart whatever they are called: a hash, the same for every limit."""
        return _content(self.first)

    @property
    def families(self) -> tuple[tuple[Row, ...], ...]:
        """The rows by metric family."""
        names = dict.fromkeys(row.metric.id for row in self.rows)
        return tuple(tuple(row for row in self.rows if row.metric.id == name) for name in names)

    @property
    def notes(self) -> dict[str, tuple[int, ...]]:
        """What was noted beside the scores, and at which checkpoints."""
        found: dict[str, dict[int, None]] = {}
        for index, entries in enumerate(self.cells):
            for note in (note for entry in entries for note in entry.result.notes):
                found.setdefault(note, {})[index] = None
        return {note: tuple(indices) for note, indices in found.items()}

    def summary(self) -> tuple[Cell, ...]:
        """The summary cell of each checkpoint; of the standings only which are best."""
        row, out = self.headline, []
        for index, entries in enumerate(self.cells):
            errors = tuple(reason(e.result) for e in entries if e.result.status == "failed")
            reading = row.readings[index] if row else None
            if row is None or reading is None:
                out.append(Cell("failed" if errors else "missing", errors=errors))
                continue
            state: State = "partial" if errors else "ok"
            heat = row.heat(reading) if self.first.scored else 0.0
            span = row.span(reading)
            standing: Standing = "best" if row.leads[index] else ""
            out.append(Cell(state, reading, standing, heat, span, errors))
        return tuple(out)


@dataclass(frozen=True)
class Report:
    """Everything of one or several runs that a report shows."""

    checkpoints: tuple[Checkpoint, ...]
    columns: tuple[Column, ...]
    commands: tuple[str, ...]
    limited: bool
    problems: tuple[str, ...] = ()
    """What is odd about the results themselves, as sentences."""
    dropped: tuple[Entry, ...] = ()
    """Scored entries in whose place a later one of the same cell is shown."""

    @property
    def scored(self) -> tuple[Column, ...]:
        """The columns that hold scores; the others are diagnoses, which nothing counts or ranks."""
        return tuple(column for column in self.columns if column.first.scored)

    @property
    def summarised(self) -> tuple[Column, ...]:
        """The columns of the summary: the scores, or the diagnoses where there is nothing else."""
        return self.scored or self.columns

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries, by column, checkpoint and seed."""
        return tuple(entry for column in self.columns for entry in column.entries)

    @property
    def warnings(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """What a reader should know of a checkpoint first: that it collapsed, that its heads are a guess."""
        found: dict[tuple[str, ...], list[str]] = {}
        for checkpoint in self.checkpoints:
            notes = list(checkpoint.record.info.notes)
            for column in self.columns:
                notes += [note for note, said_of in column.notes.items() if checkpoint.index in said_of]
            if warnings := tuple(dict.fromkeys(warnings_in(notes))):
                found.setdefault(warnings, []).append(checkpoint.label)
        every = f"all {len(self.checkpoints)} checkpoints"
        return tuple(
            (every if 1 < len(labels) == len(self.checkpoints) else listed(labels), warnings)
            for warnings, labels in found.items()
        )

    @property
    def limits(self) -> tuple[int, ...]:
        """The limits (images a split) that cells ran under."""
        return tuple(sorted({e.result.limit for e in self.entries if e.result.limit is not None}))

    @property
    def failures(self) -> tuple[tuple[Checkpoint, Column, Result], ...]:
        """All failed cells, by checkpoint and column."""
        return tuple(
            (checkpoint, column, entry.result)
            for checkpoint in self.checkpoints
            for column in self.columns
            for entry in column.cells[checkpoint.index]
            if entry.result.status == "failed"
        )

    @property
    def tasks(self) -> dict[str, tuple[Column, ...]]:
        """Columns by task, in order of first appearance, scores before diagnoses."""
        names = dict.fromkeys(c.task for c in sorted(self.columns, key=lambda c: not c.first.scored))
        return {name: tuple(c for c in self.columns if c.task == name) for name in names}

    @property
    def protocols(self) -> tuple[tuple[Column, ...], ...]:
        """Columns by task and protocol: several data sets may share one."""
        groups: dict[str, list[Column]] = {}
        for column in self.columns:
            facts = (column.task, column.first.protocol, sorted(column.first.overrides))
            groups.setdefault(json.dumps(facts, sort_keys=True, default=str), []).append(column)
        return tuple(map(tuple, groups.values()))

    @property
    def phases(self) -> tuple[str, ...]:
        """The names of the timed phases."""
        return tuple(dict.fromkeys(phase for e in self.entries for phase in e.result.seconds))

    @property
    def data_sets(self) -> tuple[DataRecord, ...]:
        """The distinct data sets as scored."""
        return tuple({e.result.data.model_dump_json(): e.result.data for e in self.entries}.values())

    @property
    def environments(self) -> tuple[tuple[Environment, int], ...]:
        """The distinct environments, and how many cells ran in each."""
        found = [e.result.environment for e in self.entries]
        distinct = {environment.model_dump_json(): environment for environment in found}
        return tuple((environment, found.count(environment)) for environment in distinct.values())

    @property
    def finished(self) -> str:
        """When the last cell ended, to the minute; as it is recorded where that is no ISO 8601."""
        last = max((e.result.finished for e in self.entries), default="")
        try:
            moment = datetime.fromisoformat(last.replace("Z", "+00:00"))
        except ValueError:
            return last
        return f"{moment:%Y-%m-%d %H:%M}" + (" UTC" if moment.utcoffset() == timedelta(0) else "")


def reason(result: Result) -> str:
    """Why a cell failed."""
    return result.error or "no reason was recorded"


def read_report(folders: Sequence[Path]) -> Report:
    """The report of run folders. Raises ConfigError or DataError as ``load_run`` does."""
    return make_report([(load_run(folder), folder) for folder in folders])


def make_report(runs: Sequence[tuple[RunFile, Path | None]]) -> Report:
    """The report of runs, each with its folder.

    Where several runs hold the same cell, a scored one beats a failed one, and then the later counts.
    Checkpoints of one label but different weights are kept apart and told by their fingerprints.
    """
    keys: dict[tuple[str, str], CheckpointRecord] = {}
    for run, _ in runs:
        for result in run.results:
            keys.setdefault(_checkpoint_key(result), result.checkpoint)
    labels = [label for label, _ in keys]
    checkpoints = tuple(
        Checkpoint(i, label if labels.count(label) == 1 else f"{label} ({fingerprint[:8]})", record)
        for i, ((label, fingerprint), record) in enumerate(keys.items())
    )
    entries = [Entry(result, folder) for run, folder in runs for result in run.results]
    columns = _columns(entries, list(keys))
    problems = [
        f"{e.result.cell} was scored, but its headline metric {e.result.headline} is not among its scores"
        for column in columns
        for e in column.entries
        if e.result.status == "ok" and e.result.score(e.result.headline) is None
    ]
    commands = tuple(dict.fromkeys(run.command for run, _ in runs))
    limited = any(run.limited or any(r.limit is not None for r in run.results) for run, _ in runs)
    shown = {id(entry) for column in columns for entry in column.entries}
    dropped = tuple(e for e in entries if e.result.status == "ok" and id(e) not in shown)
    return Report(checkpoints, columns, commands, limited, tuple(problems), dropped)


def _checkpoint_key(result: Result) -> tuple[str, str]:
    return result.checkpoint.label, result.checkpoint.fingerprint


def _columns(entries: Sequence[Entry], keys: Sequence[tuple[str, str]]) -> tuple[Column, ...]:
    groups: dict[str, dict[str, list[Entry]]] = {}
    for entry in entries:
        groups.setdefault(entry.result.task, {}).setdefault(entry.result.data.name, []).append(entry)
    columns: list[Column] = []
    for group in (group for by_data in groups.values() for group in by_data.values()):
        variants = _variants(group)
        for members in variants:
            first = next((e.result for e in members if e.result.status == "ok"), members[0].result)
            cells = tuple(_by_seed(members, key) for key in keys)
            rows = metric_rows(first, [[e.result for e in cell] for cell in cells])
            variant = _difference(first, [v[0].result for v in variants])
            columns.append(Column(f"column-{len(columns) + 1}", first, variant, cells, rows))
    return tuple(columns)


def _by_seed(entries: Sequence[Entry], key: tuple[str, str]) -> tuple[Entry, ...]:
    kept: dict[int, Entry] = {}
    for entry in entries:
        if _checkpoint_key(entry.result) != key:
            continue
        seed, rank = entry.result.seed, (entry.result.status == "ok", entry.result.finished)
        old = kept.get(seed)
        if old is None or rank >= (old.result.status == "ok", old.result.finished):
            kept[seed] = entry
    return tuple(kept[seed] for seed in sorted(kept))


def _content(result: Result) -> str:
    return result.data.fingerprint.split(":limit=")[0]


def _facts(result: Result) -> dict[str, Any]:
    """What must agree for numbers to be compared. The mark of a limited data set also holds the seed that
    chose it, which need not agree, so the limit stands by itself.
    """
    return {
        **result.protocol,
        "task version": result.task_version,
        "features version": result.features_version,
        "limit": result.limit,
        "data": _content(result),
        "broken images left out": sorted(result.data.skipped),
    }


def _variants(group: Sequence[Entry]) -> list[list[Entry]]:
    """Entries of one task and data set, parted by what must agree."""
    variants: dict[str, list[Entry]] = {}
    for entry in sorted(group, key=lambda e: e.result.status != "ok"):
        facts = _facts(entry.result)
        key = json.dumps(facts, sort_keys=True, default=str)
        if entry.result.status == "failed" and key not in variants:
            # A cell may fail before its data was hashed: that alone does not make it another protocol.
            del facts["data"]
            alike = (k for k, v in variants.items() if facts.items() <= _facts(v[0].result).items())
            key = next(alike, key)
        variants.setdefault(key, []).append(entry)
    return list(variants.values())


def _difference(result: Result, variants: Sequence[Result]) -> str:
    mine, others = _facts(result), [_facts(other) for other in variants]
    names = [name for name in mine if any(other.get(name) != mine[name] for other in others)]
    return ", ".join(f"{name} = {show(mine[name])[:40]}" for name in names)
