"""Scores against what an encoder costs: its parameters, its arithmetic, its speed."""

from __future__ import annotations

from collections.abc import Callable

from ..bench.results import Result
from .figures import draw_pareto
from .model import Report
from .style import Drawing

_COSTS: tuple[tuple[str, str, Callable[[Result], float | None], bool], ...] = (
    ("parameters", "parameters of the encoder", lambda result: result.checkpoint.info.parameters, False),
    ("flops", "FLOPs for an image at the encoder's own size", lambda result: result.checkpoint.flops, False),
    ("speed", "images a second, as measured in this run", lambda result: result.images_per_second, True),
)


def tradeoffs(report: Report) -> list[tuple[str, str, list[tuple[str, Drawing]]]]:
    """(short name, cost, figures by column id) of each cost that is known of two checkpoints or more.

    There are none where all encoders have one architecture. The heading of a figure names task and data set.
    """
    if len({(c.record.info.parameters, c.record.flops) for c in report.checkpoints}) < 2:
        return []
    labels = [checkpoint.label for checkpoint in report.checkpoints]
    groups = []
    for name, cost, of, more_is_cheaper in _COSTS:
        figures = []
        for column in report.scored:
            row = column.headline
            points = [
                (found, reading.value, i)
                for i, entries in enumerate(column.cells)
                if row and (reading := row.readings[i]) and (found := of(entries[0].result))
            ]
            if row is None or len(points) < 2:
                continue
            drawing = draw_pareto(
                f"{column.task} on {column.data.name}",
                row.metric,
                cost,
                points,
                labels,
                more_is_cheaper=more_is_cheaper,
            )
            figures.append((column.id, drawing))
        if figures:
            groups.append((name, cost, figures))
    return groups
