"""Figures, drawn by matplotlib: curves over checkpoints, bars by class or sequence, ranks, scores by size."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..bench.comparison import Ranking
from .exhibits import Bars, Curve, Line, Points, Scatter
from .readings import Reading, Row, clean, format_value
from .style import DASHES, Drawing, colour, ink, mark, marker, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OVERLAY = 3
"""Up to this many series share one panel, told apart by their dashes; more get a panel each, and so do
series with bands, which would cover one another."""
_SHOWN = 15
"""Labels in one panel of bars, where there are too many for all to be legible."""
_MARKED = 24
"""Up to this many points of a line have a marker each; of more every n-th has."""
_LANE = 0.055
"""Inches between the dots of two checkpoints on one row: most of a dot."""


def draw_curve(curve: Curve, labels: Sequence[str]) -> list[Drawing]:
    """All series together where they are few, else a panel a series.

    Args:
        curve: what to draw.
        labels: name of each checkpoint, by index, for the description.
    """
    drawn = sorted({line.checkpoint for line in curve.lines})
    crowded = len(drawn) > 1 and any(line.low for line in curve.lines)
    together = len(curve.series) <= (1 if crowded else _OVERLAY)
    panels = [curve.series] if together else [(name,) for name in curve.series]
    out = []
    for series in panels:
        figure, axes = _figure(4.3, 3.0)
        shown = [line for line in curve.lines if line.series in series]
        for line in shown:
            _draw_line(axes, line, curve.unit, DASHES[series.index(line.series) % len(DASHES)])
        _curve_axes(axes, curve, sorted({x for line in shown for x in line.x}))
        title = series[0] if len(panels) > 1 else ""
        if title:
            axes.set_title(short(title, 44))
        here = sorted({line.checkpoint for line in shown})
        names = ", ".join(labels[i] for i in here)
        what = (
            f"{curve.title}{f', {title}' if title else ''}: {curve.y_label} over {curve.x_label} for {names}."
        )
        seen = f"{what} The numbers are in the table below the figure."
        out.append(Drawing(figure, seen, title, here, series if len(series) > 1 else ()))
    return out


def draw_bars(bars: Bars, labels: Sequence[str]) -> list[Drawing]:
    """All labels where they are few, else a panel each of those that tell most."""
    order = sorted(range(len(bars.labels)), key=lambda i: (-bars.mean(i), bars.labels[i]))
    if len(order) <= 2 * _SHOWN:
        panels = [("", order)]
    elif len(bars.values) > 1:
        spread = set(sorted(order, key=lambda i: -bars.spread(i))[:_SHOWN])
        panels = [
            (f"{_SHOWN} with the largest differences", [i for i in order if i in spread]),
            (f"{_SHOWN} with the lowest mean", order[-_SHOWN:]),
        ]
    else:
        panels = [(f"{_SHOWN} highest", order[:_SHOWN]), (f"{_SHOWN} lowest", order[-_SHOWN:])]
    names = ", ".join(labels[i] for i in bars.values)
    return [
        Drawing(
            _draw_panel(bars, shown),
            f"{bars.title}{f', {heading}' if heading else ''}: {bars.y_label} for {names}. "
            "The numbers are in the table below the figure.",
            heading,
            tuple(bars.values),
        )
        for heading, shown in panels
    ]


def draw_points(scatter: Scatter, labels: Sequence[str]) -> list[Drawing]:
    """A panel a checkpoint; positions have no scale, so the axes have none."""
    drawings = []
    for checkpoint, cloud in scatter.clouds.items():
        figure, axes = _figure(3.1, 3.1)
        for group, paint in enumerate(scatter.colours):
            places = [(x, y) for x, y, g in cloud if g == group]
            axes.plot(
                [x for x, _ in places], [y for _, y in places], linestyle="", marker="o", markersize=2.6,
                color=paint, markeredgewidth=0,
            )  # fmt: skip
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_axis_off()
        what = f"{scatter.title} of {labels[checkpoint]}: {len(cloud)} points. {scatter.caption}"
        key = tuple(zip(scatter.groups, scatter.colours, strict=True))
        drawings.append(Drawing(figure, what, labels[checkpoint], (checkpoint,), groups=key))
    return drawings


def _scale(values: Points, unit: str) -> list[float]:
    factor = 100.0 if unit == "%" else 1.0
    return [float("nan") if v is None else factor * v for v in values]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _draw_line(axes: Axes, line: Line, unit: str, dash: Any) -> None:
    paint, y = colour(line.checkpoint), _scale(line.y, unit)
    if line.low:
        low, high = _scale(line.low, unit), _scale(line.high, unit)
        axes.fill_between(line.x, low, high, color=paint, alpha=0.14, linewidth=0, gid=mark(line.checkpoint))
    every = 1 if len(line.x) <= _MARKED else len(line.x) // 8
    axes.plot(
        line.x, y, color=paint, linestyle=dash, marker=marker(line.checkpoint), markevery=every,
        markersize=size(line.checkpoint, 4.5),
        markeredgecolor=ink("surface"), markeredgewidth=0.8, gid=mark(line.checkpoint),
    )  # fmt: skip


def _curve_axes(axes: Axes, curve: Curve, positions: list[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if curve.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=7))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _power(x)))
        axes.xaxis.set_minor_locator(NullLocator())
    if curve.ticks:
        axes.set_xticks(range(len(curve.ticks)), [short(t, 14) for t in curve.ticks])
        if sum(map(len, curve.ticks)) > 40:
            axes.tick_params(axis="x", rotation=30)
    elif len(positions) <= 8:
        axes.set_xticks(positions, [f"{x:g}" for x in positions])
    axes.grid(axis="y")
    axes.margins(x=0.04, y=0.1)
    low, high = axes.get_ylim()
    if curve.unit == "%" and high - low < 1:  # a point: less is no difference to zoom into
        axes.set_ylim((low + high - 1) / 2, (low + high + 1) / 2)
    axes.set_xlabel(folded(curve.x_label, 50))
    axes.set_ylabel(folded(curve.y_label, 32))


def _draw_panel(bars: Bars, shown: Sequence[int]) -> Figure:
    """Bars for one checkpoint; for several a dot each, one above the other on a band from the least to the
    greatest, so that equal values hide none.
    """
    height = max(0.2, 0.12 + _LANE * len(bars.values))
    figure, axes = _figure(4.3, 0.75 + height * len(shown))
    rows = range(len(shown))
    columns = {i: [_scale(values, bars.unit)[j] for j in shown] for i, values in bars.values.items()}
    if len(columns) == 1:
        ((checkpoint, widths),) = columns.items()
        axes.barh(rows, widths, color=colour(checkpoint), height=0.62)
        for y, width in zip(rows, widths, strict=True):
            if math.isfinite(width):
                text = format_value(width / 100 if bars.unit == "%" else width, bars.unit)
                axes.annotate(
                    text, (max(width, 0), y), (3, 0), textcoords="offset points", va="center", fontsize=7.5
                )
        axes.margins(x=0.12)
    else:
        axes.use_sticky_edges = False
        for y, here in enumerate(zip(*columns.values(), strict=True)):
            found = [v for v in here if math.isfinite(v)]
            if found:
                span = max(found) - min(found)
                axes.barh(y, span, left=min(found), color=ink("rule"), alpha=0.5, height=0.7, zorder=1)
        for lane, (checkpoint, values) in enumerate(columns.items()):
            place = (lane - (len(columns) - 1) / 2) * _LANE / height
            axes.plot(
                values, [y + place for y in rows], linestyle="", color=colour(checkpoint),
                marker=marker(checkpoint), markersize=size(checkpoint, 5.5), markeredgecolor=ink("surface"),
                markeredgewidth=0.6, gid=mark(checkpoint),
            )  # fmt: skip
    axes.set_yticks(rows, [short(bars.labels[j], 26) for j in shown])
    axes.tick_params(axis="y", labelcolor=ink("text"))
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(folded(bars.y_label, 50))
    return figure


def _power(x: float) -> str:
    """A tick of a logarithmic axis: 0.01, 1, 1000 as they are, 10⁻⁶ beyond."""
    exponent = round(math.log10(x))
    if -3 <= exponent <= 3:
        return f"{x:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def short(text: str, width: int) -> str:
    """A text on one line of at most so many characters."""
    text = " ".join(clean(text).split())
    return text if len(text) <= width else text[: width - 1] + "…"


def folded(text: str, width: int) -> str:
    """A text on at most two lines of so many characters."""
    return "\n".join(textwrap.wrap(short(text, 2 * width), width, max_lines=2, placeholder="…"))


def draw_ranks(ranking: Ranking, labels: Sequence[str]) -> Drawing:
    """Average ranks on one line, the best at the left; a bar joins those that are not told apart."""
    order = sorted(range(len(labels)), key=lambda i: ranking.ranks[i])
    figure, axes = _figure(6.4, 0.9 + 0.26 * len(order))
    for row, i in enumerate(order):
        place = ranking.ranks[i]
        right = place <= (len(order) + 1) / 2
        axes.plot([place, place], [0, -row - 1], color=ink("rule"), linewidth=1, zorder=1, gid=mark(i))
        axes.plot(
            place, 0, color=colour(i), marker=marker(i), markersize=size(i, 7), linestyle="", zorder=3,
            gid=mark(i),
        )  # fmt: skip
        axes.annotate(
            f"{short(labels[i], 40)}  {place:.2f}",
            (place, -row - 1),
            (4 if right else -4, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            fontsize=8,
            gid=mark(i),
            bbox={"facecolor": ink("surface"), "edgecolor": "none", "pad": 1},
        )
    if ranking.critical_difference is not None:
        for row, group in enumerate(_groups(sorted(ranking.ranks), ranking.critical_difference)):
            axes.plot(group, [0.35 + 0.3 * row] * 2, color=ink("text"), linewidth=2.5, solid_capstyle="butt")
    axes.set_xlim(0.8, len(labels) + 0.2)
    axes.set_ylim(bottom=-len(order) - 0.7)
    axes.set_yticks([])
    columns = "1 column" if ranking.columns == 1 else f"{ranking.columns} columns"
    sets = "1 data set" if ranking.data_sets == 1 else f"{ranking.data_sets} data sets"
    axes.set_xlabel(f"average rank over {columns} of {sets}; 1 is the best")
    axes.spines["left"].set_visible(False)
    names = ", ".join(f"{labels[i]} {ranking.ranks[i]:.2f}" for i in order)
    return Drawing(figure, f"Average ranks: {names}.")


def _groups(ranks: Sequence[float], critical: float) -> list[tuple[float, float]]:
    """The longest runs of ranks that differ by less than the critical difference."""
    spans: list[tuple[int, int]] = []
    for start in range(len(ranks)):
        stop = max(i for i in range(start, len(ranks)) if ranks[i] - ranks[start] < critical)
        if stop > start and not any(a <= start and stop <= b for a, b in spans):
            spans.append((start, stop))
    return [(ranks[a], ranks[b]) for a, b in spans]


def draw_pareto(
    title: str,
    row: Row,
    cost: str,
    points: Sequence[tuple[float, Reading, int]],
    labels: Sequence[str],
    *,
    more_is_cheaper: bool = False,
) -> Drawing:
    """A score against a cost; a line joins what no encoder at the same cost or less reaches.

    Args:
        title: the heading of the figure.
        row: whose values the scores are.
        cost: what the cost is called, with its unit.
        points: (cost, score, index of the checkpoint); the cost is positive.
        labels: name of each checkpoint, by index.
        more_is_cheaper: whether the cost is a speed, of which more is better.
    """
    figure, axes = _figure(4.3, 3.0)
    _cost_axis(axes, [x for x, _, _ in points])
    metric = row.metric
    front = _front([(x, r.value, i) for x, r, i in points], metric.higher_is_better, more_is_cheaper)
    axes.plot(
        [x for x, _ in front],
        _scale(tuple(y for _, y in front), metric.unit),
        color=ink("muted"),
        linewidth=1.2,
        zorder=1,
    )
    for x, reading, i in points:
        if reading.low is not None and reading.high is not None:
            ends = _scale((reading.low, reading.high), metric.unit)
            axes.plot([x, x], ends, color=colour(i), linewidth=1, alpha=0.45, zorder=1, gid=mark(i))
        axes.plot(
            x, _scale((reading.value,), metric.unit), linestyle="", color=colour(i), marker=marker(i),
            markersize=size(i, 7), markeredgecolor=ink("surface"), markeredgewidth=0.8, gid=mark(i),
        )  # fmt: skip
    axes.grid(axis="y")
    axes.margins(x=0.08, y=0.12)
    axes.set_xlabel(cost)
    axes.set_ylabel(folded(row.label, 32))
    described = ", ".join(f"{labels[i]} {r.text} {r.interval} at {_engineering(x)}" for x, r, i in points)
    what = f"{title}, {row.label} against {cost}: {described}."
    return Drawing(figure, what, title, [i for _, _, i in points])


def _cost_axis(axes: Axes, costs: Sequence[float]) -> None:
    """A logarithmic axis with a few ticks whatever it spans, in thousands, millions and so on."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    span = max(costs) / min(costs)
    steps = (1, 1.5, 2, 3, 5, 7) if span < 4 else (1, 2, 5) if span < 30 else (1, 3) if span < 1000 else (1,)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _engineering(x)))
    axes.xaxis.set_minor_locator(NullLocator())


def _engineering(x: float) -> str:
    from matplotlib.ticker import EngFormatter

    # Matplotlib 3.9 leaves the space where there is no prefix.
    return str(EngFormatter(sep="\N{NO-BREAK SPACE}").format_eng(float(f"{x:.3g}"))).strip()


def _front(
    points: Sequence[tuple[float, float, int]], higher_is_better: bool, more_is_cheaper: bool
) -> list[tuple[float, float]]:
    """The points that no other one beats in score at the same cost or less, from the cheapest on."""
    front: list[tuple[float, float]] = []
    for x, y, _ in sorted(
        points, key=lambda p: (-p[0] if more_is_cheaper else p[0], -p[1] if higher_is_better else p[1])
    ):
        if not front or (y > front[-1][1] if higher_is_better else y < front[-1][1]):
            front.append((x, y))
    return front
