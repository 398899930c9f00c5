"""``report.html``: one self-contained page from run folders. Nothing on it is loaded from anywhere.

Labels, class names, paths, notes and errors come from outside and are data: the templates escape all of
them, and the page forbids by its own policy any script but the one that it carries.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..bench.results import Result, atomic_write
from .exhibits import Bars, Curve, Exhibits, Gallery, collect
from .figures import draw_bars, draw_curve, draw_pareto, draw_ranks
from .model import Report, read_report, reason
from .pictures import Album, load_album
from .progression import progression
from .published import published_for
from .readings import clean, format_value, interval_text, show
from .resemblance import resemblances
from .svg import COLOURS
from .verdicts import comparisons, ranking

GALLERIES_SHOWN = 3
"""Galleries of a column that are open at once; the others unfold."""


def build_report(
    folder: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    baseline: str | None = None,
    *,
    published: bool = False,
) -> Path:
    """Write the report of a run folder, or of several runs side by side, as one HTML file.

    Args:
        folder: run folder, or several.
        out: where to write; by default ``report.html`` in the (first) folder.
        baseline: label of the checkpoint that the others are compared with; see ``verdicts.comparisons``.
        published: whether numbers that others publish stand in a section of their own.

    Returns:
        The path of the page. The same results give the same bytes.

    Raises:
        ConfigError: a folder holds no run, or none of the checkpoints is called as the baseline.
        DataError: a result file is not valid, or names a picture outside of its folder.
    """
    folders = [Path(f) for f in ([folder] if isinstance(folder, (str, Path)) else folder)]
    path = Path(out) if out is not None else folders[0] / "report.html"
    page = render(read_report(folders), baseline, published=published)
    with atomic_write(path) as stream:
        stream.write(page)
    return path


def render(report: Report, baseline: str | None = None, *, published: bool = False) -> str:
    """The page as text. Raises DataError where a picture's path leads out of its run folder."""
    from jinja2 import Environment as Jinja
    from jinja2 import FunctionLoader, StrictUndefined
    from markupsafe import Markup

    exhibits = {column.id: collect(column) for column in report.columns}
    album = load_album(_wanted(report, exhibits))
    likeness = {column.id: resemblances(column) for column in report.columns}
    script = _template("report.js")
    jinja = Jinja(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
    )
    jinja.filters |= {"value": format_value, "show": show, "megabytes": _millions}
    jinja.globals |= {
        "colours": COLOURS,
        "galleries_shown": GALLERIES_SHOWN,
        "interval": interval_text,
        "reason": reason,
        "curve_figures": lambda curve, prefix: [
            Markup(svg) for svg in draw_curve(curve, _labels(report), prefix)
        ],
        "bars_figures": lambda bars, prefix: [
            (heading, Markup(svg)) for heading, svg in draw_bars(bars, _labels(report), prefix)
        ],
        "curve_table": curve_table,
        "bars_order": bars_order,
        "picture": lambda strip, file: album.pictures[strip.folder, file],
        "p_value": lambda p: "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
        "prose": prose,
        "summarise": lambda report: [column.summary() for column in report.summarised],
    }
    return jinja.get_template("report.html.j2").render(
        report=report,
        exhibits=exhibits,
        likeness={name: found for name, (found, _) in likeness.items()},
        album=album,
        css=Markup(_template("report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        icon=quote(_ICON),
        many_seeds=any(len(column.seeds) > 1 for column in report.columns),
        problems=[
            *report.problems,
            *(p for e in exhibits.values() for p in e.problems),
            *(p for _, found in likeness.values() for p in found),
            *_gaps(album),
        ],
        lead=lead(report),
        comparisons=comparisons(report, baseline),
        ranks=_ranks(report),
        pareto=_pareto(report),
        progression=progression(report),
        published=published_for(report) if published else (),
    )


_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><path fill="#2456d6" '
    'd="M1 8h4v7H1zM6 4h4v11H6zM11 1h4v14h-4z"/></svg>'
)


_COSTS: tuple[tuple[str, Callable[[Result], float | None], bool], ...] = (
    ("parameters of the encoder", lambda result: result.checkpoint.info.parameters, False),
    ("FLOPs for an image at the encoder's own size", lambda result: result.checkpoint.flops, False),
    ("images a second, as measured in this run", lambda result: result.images_per_second, True),
)


def _ranks(report: Report) -> tuple[Any, Any] | None:
    """The ranking and its figure, where there are enough checkpoints for one."""
    from markupsafe import Markup

    found = ranking(report)
    if found is None:
        return None
    return found[0], Markup(draw_ranks(found[0], _labels(report), "ranks"))


def _pareto(report: Report) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Scores against each cost, a figure a column, where encoders of different architectures are compared."""
    from markupsafe import Markup

    groups = []
    if len({(c.record.info.parameters, c.record.flops) for c in report.checkpoints}) > 1:
        for number, (cost, of, more_is_cheaper) in enumerate(_COSTS):
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
                svg = draw_pareto(
                    row.metric.title,
                    cost,
                    points,
                    _labels(report),
                    f"cost{number}-{column.id}",
                    unit=row.metric.unit,
                    higher_is_better=row.metric.higher_is_better,
                    more_is_cheaper=more_is_cheaper,
                )
                figures.append((f"{column.task} on {column.data.name}", Markup(svg)))
            if figures:
                groups.append((cost, figures))
    return groups


def _template(name: str) -> str:
    return (files(__package__) / "templates" / name).read_text(encoding="utf-8")


def _labels(report: Report) -> list[str]:
    return [checkpoint.label for checkpoint in report.checkpoints]


def _wanted(report: Report, exhibits: dict[str, Exhibits]) -> list[tuple[Path, str]]:
    """All pictures, the first gallery of every column before the second of any: the budget may run out."""
    columns = [exhibits[column.id].galleries for column in report.columns]
    depth = max(map(len, columns), default=0)
    turns: list[Gallery] = [g[i] for i in range(depth) for g in columns if i < len(g)]
    return [(strip.folder, file) for g in turns for strip in g.strips for file in strip.files]


def _gaps(album: Album) -> list[str]:
    gaps = [f"{file} {p.problem}" for (_, file), p in album.pictures.items() if p.problem and not p.left_out]
    return gaps if len(gaps) <= 10 else [*gaps[:10], f"and {len(gaps) - 10:,} more pictures"]


def lead(report: Report) -> list[str]:
    """What the summary table says, in sentences: how often each checkpoint is best."""
    if len(report.checkpoints) < 2:
        return []
    rows = [row for column in report.scored if (row := column.headline) and len(row.found) > 1]
    wins = [(sum(r.standings[c.index] == "best" for r in rows), c) for c in report.checkpoints]
    out = [
        f"{c.label} is best in {count} of {len(rows)} columns."
        for count, c in sorted(wins, key=lambda win: -win[0])
        if count
    ]
    unclear = sum("close" in row.standings or row.standings.count("best") > 1 for row in rows)
    if rows and unclear:
        out.append(f"In {unclear} of {len(rows)} columns another is not clearly worse than the best.")
    return out


def curve_table(curve: Curve) -> tuple[list[str], list[tuple[int, str, list[str]]]]:
    """The numbers of a curve: head of the columns, then (checkpoint index, series, values) a line."""
    positions = sorted({x for line in curve.lines for x in line.x})
    head = [curve.ticks[int(x)] if curve.ticks else f"{x:g}" for x in positions]
    body = []
    for line in curve.lines:
        at = dict(zip(line.x, line.y, strict=True))
        values = [at.get(x) for x in positions]
        body.append(
            (
                line.checkpoint,
                line.series,
                ["–" if v is None else format_value(v, curve.unit) for v in values],
            )
        )
    return head, body


def bars_order(bars: Bars) -> list[int]:
    """Positions of the labels, highest mean first."""
    return sorted(range(len(bars.labels)), key=lambda i: (-bars.mean(i), bars.labels[i]))


def prose(text: str) -> list[tuple[str, Any]]:
    """Documentation as blocks (element, safe content): paragraphs, and what is indented or listed as it is.

    Words between double backticks become code; nothing else is markup.
    """
    from markupsafe import Markup, escape

    blocks = []
    for block in re.split(r"\n[ \t]*\n", clean(text).strip("\n")):
        if not block.strip():
            continue
        shaped = re.search(r"(?m)^(\s+\S|[-*] |\d+\. )", block) is not None
        words = escape(block if shaped else " ".join(block.split()))
        coded = Markup(re.sub(r"``(.+?)``", r"<code>\1</code>", str(words)))
        blocks.append(("pre" if shaped else "p", coded))
    return blocks


def _millions(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number:,}"
