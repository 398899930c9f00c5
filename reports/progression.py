"""Scores over the course of a training, where a report holds several checkpoints of one. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from .exhibits import Curve, Line
from .model import Checkpoint, Column, Report


def trainings(report: Report) -> list[tuple[Checkpoint, ...]]:
    """The checkpoints of each training of which there are two or more, by epoch."""
    runs: dict[str, dict[float, Checkpoint]] = {}
    for checkpoint in report.checkpoints:
        point = checkpoint.record.info.training
        if point is not None:
            runs.setdefault(point.run, {}).setdefault(point.epoch, checkpoint)
    return [tuple(run[epoch] for epoch in sorted(run)) for run in runs.values() if len(run) > 1]


def progression(report: Report) -> list[Curve]:
    """The headline metric of each column over epochs, a line a training, under its last checkpoint's name."""
    runs = trainings(report)
    curves = [_curve(column, runs) for column in report.columns]
    return [curve for curve in curves if curve is not None]


def _curve(column: Column, runs: Sequence[Sequence[Checkpoint]]) -> Curve | None:
    row = column.headline
    if row is None:
        return None
    lines = []
    for run in runs:
        found = [(c, reading) for c in run if (reading := row.readings[c.index]) is not None]
        if len(found) < 2:
            continue
        whole = all(r.low is not None and r.high is not None for _, r in found)
        lines.append(
            Line(
                checkpoint=run[-1].index,
                series=row.metric.title,
                x=tuple(c.record.info.training.epoch for c, _ in found if c.record.info.training),
                y=tuple(r.value for _, r in found),
                low=tuple(r.low for _, r in found) if whole else (),
                high=tuple(r.high for _, r in found) if whole else (),
            )
        )
    if not lines:
        return None
    return Curve(
        name=f"training-{column.id}",
        title=f"{column.first.task_title} on {column.data.name}",
        caption=column.variant,
        x_label="epoch",
        y_label=row.label,
        unit=row.metric.unit,
        log_x=False,
        ticks=(),
        lines=tuple(lines),
    )
