"""The figures of a report as files for papers and slides, each with its own legend."""

from __future__ import annotations

import io
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ..bench.atomic import atomic_write
from ..bench.names import slug
from .exhibits import collect
from .figures import draw_bars, draw_curve, draw_points, draw_ranks, folded, short
from .model import Report
from .progression import progression
from .style import DASHES, PAPER, Drawing, colour, ink, marker, style
from .tradeoffs import tradeoffs
from .verdicts import ranking

FileFormat = Literal["svg", "png", "pdf"]
_DPI = 200
_LEGEND_LINE = 0.16
"""Inches."""
_NO_DATE = {
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def write_figures(report: Report, out: Path, form: FileFormat) -> list[Path]:
    """Write every figure of the report on white paper, and return the files.

    They are named after column and artefact; a name that was written before is replaced. The same results
    give the same bytes.
    """
    labels = [checkpoint.label for checkpoint in report.checkpoints]
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with style(PAPER):
        for name, drawing in _drawings(report, labels):
            path = out / f"{slug(name)}.{form}"
            with atomic_write(path, "wb") as stream:
                stream.write(_bytes(drawing, labels, form))
            written.append(path)
    return written


def _drawings(report: Report, labels: list[str]) -> Iterator[tuple[str, Drawing]]:
    names = _column_names(report)
    found = ranking(report)
    if found is not None:
        yield "ranks", draw_ranks(found[0], labels)
    for cost, _, figures in tradeoffs(report):
        for column_id, drawing in figures:
            yield f"{names[column_id]}-against-{cost}", drawing
    for curve in progression(report):
        yield from _numbered(curve.name, draw_curve(curve, labels))
    for column in report.columns:
        own = names[column.id]
        exhibits = collect(column)
        for curve in exhibits.curves:
            yield from _numbered(f"{own}-{curve.name}", draw_curve(curve, labels))
        for bars in exhibits.bars:
            yield from _numbered(f"{own}-{bars.name}", draw_bars(bars, labels))
        for points in exhibits.points:
            for drawing in draw_points(points, labels):
                yield f"{own}-{points.name}-{drawing.heading}", drawing


def _column_names(report: Report) -> dict[str, str]:
    """Task and data set of each column by its id, with a number where several columns have the same."""
    counts: Counter[str] = Counter()
    names = {}
    for column in report.columns:
        name = f"{column.task}-{column.data.name}"
        counts[name] += 1
        names[column.id] = name if counts[name] == 1 else f"{name}-{counts[name]}"
    return names


def _numbered(name: str, drawings: list[Drawing]) -> Iterator[tuple[str, Drawing]]:
    for number, drawing in enumerate(drawings, 1):
        yield name if len(drawings) == 1 else f"{name}-{number}", drawing


def _bytes(drawing: Drawing, labels: list[str], form: FileFormat) -> bytes:
    _legend(drawing, labels)
    if drawing.heading and not drawing.figure.axes[0].get_title(loc="left"):
        drawing.figure.axes[0].set_title(folded(drawing.heading, _letters(drawing, 9)))
    stream = io.BytesIO()
    with warnings.catch_warnings():
        # A label in a script that the font lacks is drawn as boxes; a long one may leave no room.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        drawing.figure.savefig(stream, format=form, dpi=_DPI, metadata=_NO_DATE[form])
    return stream.getvalue()


def _letters(drawing: Drawing, an_inch: int) -> int:
    """Letters that a line of text has room for in a figure."""
    return int(an_inch * drawing.figure.get_figwidth())


def _legend(drawing: Drawing, labels: list[str]) -> None:
    """Name what is drawn; a figure of groups has its checkpoint for a heading."""
    from matplotlib.lines import Line2D

    width = _letters(drawing, 11)
    lines = [
        Line2D([], [], color=colour(i), marker=marker(i), label=short(labels[i], width))
        for i in (() if drawing.groups else drawing.checkpoints)
    ]
    lines += [
        Line2D([], [], color=ink("muted"), linestyle=DASHES[number % len(DASHES)], label=short(name, width))
        for number, name in enumerate(drawing.dashes)
    ]
    lines += [
        Line2D([], [], color=paint, marker="o", linestyle="", label=short(name, width))
        for name, paint in drawing.groups
    ]
    if lines:
        columns = 1 if max(len(str(line.get_label())) for line in lines) > width // 2 else 2
        # The page has its legends beside the figures: here they must not take the room of the axes.
        room = _LEGEND_LINE * math.ceil(len(lines) / columns)
        drawing.figure.set_figheight(drawing.figure.get_figheight() + room)
        drawing.figure.legend(
            handles=lines, loc="outside lower left", ncols=columns, frameon=False, fontsize=7.5
        )
