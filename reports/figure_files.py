"""The figures of a report as files for papers and slides, each with its own legend."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ..bench.plan import slug
from ..bench.results import atomic_write
from .exhibits import collect
from .figures import draw_bars, draw_curve, draw_points, draw_ranks
from .model import Report
from .progression import progression
from .readings import clean
from .style import DASHES, MARKERS, PAPER, Drawing, colour, ink, style
from .tradeoffs import tradeoffs
from .verdicts import ranking

FileFormat = Literal["svg", "png", "pdf"]
_DPI = 200
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
    for short, _, figures in tradeoffs(report):
        for column_id, drawing in figures:
            yield f"{names[column_id]}-against-{short}", drawing
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
            yield from _numbered(f"{own}-{points.name}", draw_points(points, labels))


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
        drawing.figure.axes[0].set_title(clean(drawing.heading))
    stream = io.BytesIO()
    with warnings.catch_warnings():
        # A label in a script that the font lacks is drawn as boxes; a long one may leave no room.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        drawing.figure.savefig(stream, format=form, dpi=_DPI, metadata=_NO_DATE[form])
    return stream.getvalue()


def _legend(drawing: Drawing, labels: list[str]) -> None:
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=colour(i), marker=MARKERS[i % len(MARKERS)], label=clean(labels[i]))
        for i in drawing.checkpoints
    ]
    lines += [
        Line2D([], [], color=ink("muted"), linestyle=DASHES[number % len(DASHES)], label=clean(name))
        for number, name in enumerate(drawing.dashes)
    ]
    lines += [
        Line2D([], [], color=paint, marker="o", linestyle="", label=clean(name))
        for name, paint in drawing.groups
    ]
    if lines:
        columns = 1 if max(len(str(line.get_label())) for line in lines) > 24 else 2
        drawing.figure.legend(
            handles=lines, loc="outside lower left", ncols=columns, frameon=False, fontsize=7.5
        )
