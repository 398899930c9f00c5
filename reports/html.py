"""``report.html``: one self-contained page from run folders. Nothing on it is loaded from anywhere.

Labels, class names, paths, notes and errors come from outside and are data: the templates escape all of
them, and the page forbids by its own policy any script but the one that it carries.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .. import __version__
from ..bench.atomic import atomic_write
from ..bench.comparison import p_text
from ..bench.results import RunFile, load_run
from .exhibits import Bars, Curve, Exhibits, Gallery, Strip, collect
from .figures import draw_bars, draw_curve, draw_points, draw_ranks
from .model import Report, make_report, reason
from .pictures import BUDGET as PICTURES
from .pictures import Album, load_album
from .progression import progression
from .published import published_for
from .readings import clean, format_value, interval_text, listed, show
from .remarks import alike, arithmetic
from .resemblance import resemblances
from .similarity import load_similarities
from .style import COLOURS, PAGE, Drawing, shape, style
from .svg import to_svg
from .tradeoffs import tradeoffs
from .verdicts import Pairings, ranking

GALLERIES_SHOWN = 3
"""Galleries of a column that are open at once; the others unfold."""
COMPARISONS_SHOWN = 3
"""Comparisons that are open as a whole; of more of them only what is clear."""


def build_report(
    folder: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    baseline: str | None = None,
    *,
    published: bool = False,
    keep_current: bool = False,
) -> Path:
    """Write the report of a run folder, or of several runs side by side, as one HTML file.

    Args:
        folder: run folder, or several.
        out: where to write; by default ``report.html`` in the (first) folder.
        baseline: label of the checkpoint that the others are compared with; see ``verdicts.comparisons``.
        published: whether numbers that others publish stand in a section of their own.
        keep_current: whether a page that this version made of the same results in the same way is kept.

    Returns:
        The path of the page. The same results give the same bytes.

    Raises:
        ConfigError: a folder holds no run, or none of the checkpoints is called as the baseline.
        DataError: a result file is not valid, or names a picture outside of its folder.
    """
    folders = [Path(f) for f in ([folder] if isinstance(folder, (str, Path)) else folder)]
    path = Path(out) if out is not None else folders[0] / "report.html"
    runs = [load_run(each) for each in folders]
    report = make_report(list(zip(runs, folders, strict=True)))
    source = _source(runs, baseline, published)
    if keep_current and _is_of(path, source):
        return path
    page = render(report, baseline, published=published, source=source)
    with atomic_write(path) as stream:
        stream.write(page)
    return path


def _source(runs: Sequence[RunFile], baseline: str | None, published: bool) -> str:
    """What a page was made of, as a hash: version, choices, and the results of every run."""
    made_of = hashlib.sha256(repr((__version__, baseline, published)).encode())
    for run in runs:
        made_of.update(hashlib.sha256(run.model_dump_json().encode()).digest())
    return made_of.hexdigest()


def _is_of(path: Path, source: str) -> bool:
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as stream:
        return f'<meta name="source" content="{source}">' in stream.read(4096)


def render(report: Report, baseline: str | None = None, *, published: bool = False, source: str = "") -> str:
    """The page as text. Raises DataError where a picture's path leads out of its run folder."""
    from jinja2 import Environment as Jinja
    from jinja2 import FunctionLoader, StrictUndefined
    from markupsafe import Markup

    exhibits = {column.id: collect(column) for column in report.columns}
    strips = _strips(report, exhibits)
    similarities, unread, unanswering = load_similarities(strips)
    spent = sum(len(pair) for found in similarities.values() for pair in found.pairs)
    wanted = [(strip.folder, file) for strip in strips for file in strip.files]
    album = load_album(wanted, PICTURES - spent * 3 // 4)
    likeness = {column.id: resemblances(column) for column in report.columns}
    script = _template("report.js")
    labels = [checkpoint.label for checkpoint in report.checkpoints]

    def inline(drawings: Sequence[Drawing], prefix: str) -> list[tuple[Drawing, Markup]]:
        return [(d, Markup(to_svg(d, f"{prefix}-{number}", labels))) for number, d in enumerate(drawings)]

    ranked = ranking(report)
    pairings = Pairings(report)
    compared = pairings.against(baseline)
    summaries = [pairings.summary(column) for column in report.summarised]
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
        "comparisons_shown": COMPARISONS_SHOWN,
        "interval": interval_text,
        "reason": reason,
        "curve_figures": lambda curve, prefix: inline(draw_curve(curve, labels), prefix),
        "bars_figures": lambda bars, prefix: inline(draw_bars(bars, labels), prefix),
        "points_figures": lambda points, prefix: inline(draw_points(points, labels), prefix),
        "curve_table": curve_table,
        "bars_order": bars_order,
        "picture": lambda strip, file: album.pictures[strip.folder, file],
        "similarities": lambda strip: similarities.get((strip.folder, strip.similarity)),
        "p_text": p_text,
        "prose": prose,
        "shape": shape,
    }
    with style(PAGE):
        costs = tradeoffs(report)
        return jinja.get_template("report.html.j2").render(
            report=report,
            source=source,
            exhibits=exhibits,
            likeness={name: found for name, (found, _) in likeness.items()},
            notes=[note for note in (album.note, unanswering) if note],
            css=Markup(_template("report.css")),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            icon=quote(_ICON),
            many_seeds=any(len(column.seeds) > 1 for column in report.columns),
            problems=[
                *report.problems,
                *(p for e in exhibits.values() for p in e.problems),
                *(p for _, found in likeness.values() for p in found),
                *unread,
                *_gaps(album),
            ],
            remarks=alike(report) + arithmetic(report),
            lead=lead(pairings),
            summaries=summaries,
            standings={cell.standing for cells in summaries for cell in cells},
            comparisons=[c for c in compared if c.verdicts or c.gaps],
            ranking=None if ranked is None else ranked[0],
            ranks=[] if ranked is None else inline([draw_ranks(ranked[0], labels)], "ranks"),
            tradeoffs=[
                (cost, inline([drawing for _, drawing in figures], name)) for name, cost, figures in costs
            ],
            costed=sorted(
                {i for _, _, figures in costs for _, drawing in figures for i in drawing.checkpoints}
            ),
            progression=progression(report),
            published=published_for(report) if published else (),
        )


_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><path fill="#2456d6" '
    'd="M1 8h4v7H1zM6 4h4v11H6zM11 1h4v14h-4z"/></svg>'
)


def _template(name: str) -> str:
    return (files(__package__) / "templates" / name).read_text(encoding="utf-8")


def _strips(report: Report, exhibits: dict[str, Exhibits]) -> list[Strip]:
    """All strips, the first gallery of every column before the second of any: the budget may run out."""
    columns = [exhibits[column.id].galleries for column in report.columns]
    depth = max(map(len, columns), default=0)
    turns: list[Gallery] = [g[i] for i in range(depth) for g in columns if i < len(g)]
    return [strip for gallery in turns for strip in gallery.strips]


def _gaps(album: Album) -> list[str]:
    gaps = [f"{file} {p.problem}" for (_, file), p in album.pictures.items() if p.problem and not p.left_out]
    return gaps if len(gaps) <= 10 else [*gaps[:10], f"and {len(gaps) - 10:,} more pictures"]


def lead(pairings: Pairings) -> list[str]:
    """What the summary table says, in sentences: how often each checkpoint is best."""
    report = pairings.report
    if len(report.checkpoints) < 2:
        return []
    columns = [column for column in report.scored if column.headline]
    summaries = [pairings.summary(column) for column in columns]
    standings = [[cell.standing for cell in cells] for cells in summaries]
    winners: dict[int, list[str]] = {}
    for checkpoint in report.checkpoints:
        count = sum(row[checkpoint.index] == "best" for row in standings)
        winners.setdefault(count, []).append(checkpoint.label)
    of = f"of {len(columns)} {'column' if len(columns) == 1 else 'columns'}"
    out = [
        f"{listed(labels)} {'is' if len(labels) == 1 else 'are each'} best in {count} {of}."
        for count, labels in sorted(winners.items(), reverse=True)
        if count
    ]
    chance = sum(
        any(c.standing == "best" and c.reading and c.reading.at_chance for c in cells) for cells in summaries
    )
    if chance:
        out.append(f"In {chance} {of} even the best is at chance.")
    if unclear := sum("close" in row or row.count("best") > 1 for row in standings):
        out.append(f"In {unclear} {of} another is not told apart from the best.")
    if untested := sum("untested" in row for row in standings):
        out.append(f"In {untested} {of} another was not tested against the best; their intervals overlap.")
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
