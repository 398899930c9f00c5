"""What a reader has to know beside the numbers, in one wording for the terminal and for every table."""

from __future__ import annotations

from ..bench.results import Result
from ..bench.types import ignored_files
from .model import Column, Report
from .readings import listed, show


def changed(report: Report) -> list[str]:
    """The protocol fields in the summary that are not at their defaults: ``vos: size = 240 (default 480)``.

    A task is named alone where all its columns agree, else the columns that a line is about.
    """
    tasks: dict[str, dict[str, list[Column]]] = {}
    for column in report.summarised:
        tasks.setdefault(column.task, {}).setdefault(_fields(column.first), []).append(column)
    return [
        f"{task if len(texts) == 1 else ', '.join(column.name for column in columns)}: {fields}"
        for task, texts in tasks.items()
        for fields, columns in texts.items()
        if fields
    ]


def _fields(result: Result) -> str:
    return ", ".join(
        f"{name} = {show(result.protocol.get(name))} "
        + (f"(default {show(result.defaults[name])})" if name in result.defaults else "(not the default)")
        for name in result.overrides
    )


def arithmetic(report: Report) -> list[str]:
    """That the summary holds results of several precisions, or holds one of two of a cell, where it does."""
    results = [entry.result for column in report.summarised for entry in column.entries]
    shown = {(r.cell, r.checkpoint.fingerprint): r.environment.precision for r in results if r.status == "ok"}
    remarks = []
    if len(names := list(dict.fromkeys(shown.values()))) > 1:
        remarks.append(
            f"Computed in {listed(names)}: small differences between checkpoints may be those of arithmetic"
        )
    for result in (entry.result for entry in report.dropped):
        kept = shown.get((result.cell, result.checkpoint.fingerprint))
        if kept not in (None, result.environment.precision):
            remarks.append(
                f"{result.cell} was scored in {result.environment.precision} and in {kept}, and the later is "
                "shown; give one of them another label"
            )
    return remarks


def alike(report: Report) -> list[str]:
    """Which labels stand for the same weights."""
    labels: dict[str, list[str]] = {}
    for checkpoint in report.checkpoints:
        labels.setdefault(checkpoint.record.fingerprint, []).append(checkpoint.label)
    return [f"{listed(same)} hold the same weights" for same in labels.values() if len(same) > 1]


def left_out(report: Report) -> list[str]:
    """What of each data set was not scored: broken images, and images of types that are not read."""
    broken: dict[str, dict[str, None]] = {}
    ignored: dict[str, None] = {}
    for data in report.data_sets:
        broken.setdefault(data.name, {}).update(dict.fromkeys(data.skipped))
        if data.ignored:
            ignored[f"{data.name}: {ignored_files(data.ignored)}"] = None
    return [
        *(
            f"{len(ids)} broken image{'s' if len(ids) > 1 else ''} left out of {name}, first {ids[0]}"
            for name, ids in ((name, list(found)) for name, found in broken.items())
            if ids
        ),
        *ignored,
    ]
