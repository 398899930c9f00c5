"""Scores against what an encoder costs: its parameters, its arithmetic, its speed."""

from __future__ import annotations

from collections.abc import Callable

from ..bench.results import Result
from .figures import draw_pareto
from .model import Report
from .style import Drawing

_COSTS: tuple[tuple[str, str, Callable[[Result], float | None]], ...] = (
    ("parameters", "parameters of the encoder", lambda result: result.checkpoint.info.parameters),
    ("flops", "FLOPs for an image at the encoder's own size", lambda result: result.checkpoint.flops),
    ("speed", "images a second, as measured in this run", lambda result: result.images_per_second),
)


def tradeoffs(report: Report) -> list[tuple[str, str, list[tuple[str, Drawing]]]]:
    """(short name, cost, figures by column id) of each cost that is known of two checkpoints or more.

    There are none where all encoders have one architecture, and none of a column in which all cost the same.
    Speeds are compared on one device at one precision alone. The heading of a figure names its column.
    """
    if len({(c.record.info.parameters, c.record.flops) for c in report.checkpoints}) < 2:
        return []
    labels = [checkpoint.label for checkpoint in report.checkpoints]
    groups = []
    for name, cost, of in _COSTS:
        figures = []
        for column in report.scored:
            row = column.headline
            points = [
                (found, reading, i)
                for i, entries in enumerate(column.cells)
                if row and (reading := row.readings[i]) and (found := of(entries[0].result))
            ]
            if row is None or len({point[0] for point in points}) < 2:
                continue
            measured = name == "speed"
            if measured and len({_machine(column.cells[i][0].result) for _, _, i in points}) > 1:
                continue
            drawing = draw_pareto(column.name, row, cost, points, labels, more_is_cheaper=measured)
            figures.append((column.id, drawing))
        if figures:
            groups.append((name, cost, figures))
    return groups


def _machine(result: Result) -> tuple[str, str]:
    return result.environment.device, result.environment.precision
