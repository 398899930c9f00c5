"""Exhibits as inline SVG, drawn by matplotlib without a display and coloured by the page.

Every colour is drawn as a stand-in and replaced by a CSS variable, so that one figure serves light, dark
and print. Text stays text. Labels come from outside: nothing in them is read as mathematics or as markup.
"""

from __future__ import annotations

import functools
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from xml.etree import ElementTree

from .exhibits import Bars, Curve, Line, Points
from .readings import clean, format_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Arguments = ParamSpec("Arguments")
Drawn = TypeVar("Drawn")

COLOURS = 8
"""Number of checkpoint colours of the page (CSS variables ``--c0`` to ``--c7``)."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_TEXT, _MUTED, _RULE, _SURFACE = "#0a0001", "#0a0002", "#0a0003", "#0a0004"
_VARIABLES = {_TEXT: "--text", _MUTED: "--muted", _RULE: "--rule", _SURFACE: "--surface"} | {
    f"#0b000{i}": f"--c{i}" for i in range(COLOURS)
}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_OVERLAY = 3
"""Up to this many series share one panel, told apart by their dashes; more get a panel each."""
_SHOWN = 15
"""Labels in one panel of bars, where there are too many for all to be legible."""

_STYLE: dict[Any, Any] = {
    "text.usetex": False,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "lmim-bench",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _MUTED,
    "axes.titlecolor": _TEXT,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.unicode_minus": True,
    "axes.axisbelow": True,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "grid.color": _RULE,
    "grid.linewidth": 0.7,
    "text.color": _TEXT,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


def _styled(draw: Callable[Arguments, Drawn]) -> Callable[Arguments, Drawn]:
    """Draw under this module's style. Texts take the style when they are made, so it spans the drawing."""

    @functools.wraps(draw)
    def styled(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Drawn:
        import matplotlib as mpl

        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


@_styled
def draw_curve(curve: Curve, labels: Sequence[str], prefix: str) -> list[str]:
    """One SVG a panel: all series together where they are few, else a panel a series.

    Args:
        curve: what to draw.
        labels: name of each checkpoint, by index, for the description.
        prefix: start of every id inside, unique on the page.
    """
    panels = [curve.series] if len(curve.series) <= _OVERLAY else [(name,) for name in curve.series]
    drawn = sorted({line.checkpoint for line in curve.lines})
    out = []
    for number, series in enumerate(panels):
        figure, axes = _figure(4.3, 2.8)
        shown = [line for line in curve.lines if line.series in series]
        for line in shown:
            _draw_line(axes, line, curve.unit, _DASHES[series.index(line.series) % len(_DASHES)])
        _curve_axes(axes, curve, sorted({x for line in shown for x in line.x}))
        title = series[0] if len(panels) > 1 else ""
        if title:
            axes.set_title(_short(title, 44))
        names = ", ".join(labels[i] for i in drawn)
        what = (
            f"{curve.title}{f', {title}' if title else ''}: {curve.y_label} over {curve.x_label} for {names}."
        )
        out.append(
            _svg(figure, f"{prefix}-{number}", f"{what} The numbers are in the table below the figure.")
        )
    return out


@_styled
def draw_bars(bars: Bars, labels: Sequence[str], prefix: str) -> list[tuple[str, str]]:
    """(heading, SVG) of each panel: all labels where they are few, else those that tell most."""
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
        (
            heading,
            _svg(
                _draw_panel(bars, shown),
                f"{prefix}-{number}",
                f"{bars.title}{f', {heading}' if heading else ''}: {bars.y_label} for {names}. "
                "The numbers are in the table below the figure.",
            ),
        )
        for number, (heading, shown) in enumerate(panels)
    ]


def _scale(values: Points, unit: str) -> list[float]:
    factor = 100.0 if unit == "%" else 1.0
    return [float("nan") if v is None else factor * v for v in values]


def _colour(checkpoint: int) -> str:
    return f"#0b000{checkpoint % COLOURS}"


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _draw_line(axes: Axes, line: Line, unit: str, dash: Any) -> None:
    colour, y = _colour(line.checkpoint), _scale(line.y, unit)
    if line.low:
        low, high = _scale(line.low, unit), _scale(line.high, unit)
        axes.fill_between(line.x, low, high, color=colour, alpha=0.14, linewidth=0)
    marker = MARKERS[line.checkpoint % len(MARKERS)] if len(line.x) <= 24 else ""
    axes.plot(
        line.x, y, color=colour, linestyle=dash, marker=marker, markeredgecolor=_SURFACE, markeredgewidth=0.8
    )


def _curve_axes(axes: Axes, curve: Curve, positions: list[float]) -> None:
    from matplotlib.ticker import NullLocator

    if curve.log_x:
        axes.set_xscale("log")
    if curve.ticks:
        axes.set_xticks(range(len(curve.ticks)), [_short(t, 14) for t in curve.ticks])
        if sum(map(len, curve.ticks)) > 40:
            axes.tick_params(axis="x", rotation=30)
    elif len(positions) <= 8:
        axes.set_xticks(positions, [f"{x:g}" for x in positions])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y")
    axes.margins(x=0.04, y=0.1)
    axes.set_xlabel(_short(curve.x_label, 60))
    axes.set_ylabel(_short(curve.y_label, 40))


def _draw_panel(bars: Bars, shown: Sequence[int]) -> Figure:
    """Bars for one checkpoint; for several a dot each, joined by a rule, which stays legible."""
    figure, axes = _figure(4.3, 0.75 + 0.2 * len(shown))
    rows = range(len(shown))
    columns = {i: [_scale(values, bars.unit)[j] for j in shown] for i, values in bars.values.items()}
    if len(columns) == 1:
        ((checkpoint, widths),) = columns.items()
        axes.barh(rows, widths, color=_colour(checkpoint), height=0.62)
        for y, width in zip(rows, widths, strict=True):
            if math.isfinite(width):
                text = format_value(width / 100 if bars.unit == "%" else width, bars.unit)
                axes.annotate(
                    text, (max(width, 0), y), (3, 0), textcoords="offset points", va="center", fontsize=7.5
                )
        axes.margins(x=0.12)
    else:
        for y, here in enumerate(zip(*columns.values(), strict=True)):
            found = [v for v in here if math.isfinite(v)]
            if found:
                axes.plot([min(found), max(found)], [y, y], color=_RULE, linewidth=3, zorder=1)
        for checkpoint, values in columns.items():
            axes.plot(
                values,
                rows,
                linestyle="",
                color=_colour(checkpoint),
                marker=MARKERS[checkpoint % len(MARKERS)],
                markersize=6,
                markeredgecolor=_SURFACE,
                markeredgewidth=0.8,
            )
    axes.set_yticks(rows, [_short(bars.labels[j], 26) for j in shown])
    axes.tick_params(axis="y", labelcolor=_TEXT)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(_short(bars.y_label, 60))
    return figure


def _short(text: str, width: int) -> str:
    text = " ".join(clean(text).split())
    return text if len(text) <= width else text[: width - 1] + "…"


# ------------------------------------------------------------------------------------------- SVG


def _svg(figure: Figure, prefix: str, description: str) -> str:
    """The figure as an ``svg`` element that is safe to stand inside a page."""
    stream = io.StringIO()
    silent = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():
        # The browser has the glyphs that matplotlib's own font lacks; and a long label may leave no room.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        figure.savefig(stream, format="svg", transparent=True, metadata=silent)
    return _inline(stream.getvalue(), prefix, description)


def _inline(text: str, prefix: str, description: str) -> str:
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            # matplotlib's style sheet would apply to the whole page, and its metadata names nothing.
            if child.tag in (f"{{{_SVG}}}style", f"{{{_SVG}}}metadata"):
                parent.remove(child)
    used = set(re.findall(r"#([\w-]+)", " ".join(_references(root))))
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        for name, value in list(element.attrib.items()):
            if name == "id":  # a reference is kept, under a name that no other figure has
                del element.attrib[name]
                if value in used:
                    element.set("id", f"{prefix}-{value}")
            elif name == f"{{{_XLINK}}}href":
                del element.attrib[name]
                element.set("href", value.replace("#", f"#{prefix}-"))
            elif name == "clip-path":
                element.set(name, value.replace("#", f"#{prefix}-"))
            elif name == "transform" and value.startswith("rotate(-0 "):
                del element.attrib[name]
            elif name == "style":
                element.set(name, _paint(value))
    _prune(root)
    box = root.get("viewBox", "")
    width = float(box.split()[2])
    root.attrib.clear()
    root.attrib.update({"viewBox": box, "role": "img", "aria-label": clean(description)})
    root.set("style", f"max-width:{width * 96 / 72:.0f}px")
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _references(root: ElementTree.Element) -> list[str]:
    return [
        value
        for element in root.iter()
        for name, value in element.attrib.items()
        if name in ("clip-path", f"{{{_XLINK}}}href")
    ]


def _paint(style: str) -> str:
    """A style with the page's colours and font."""
    style = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", re.sub(r"font-family:[^;]*;?", "", style))
    return re.sub(r"#0[ab]000\d", lambda m: f"var({_VARIABLES[m[0]]})", style)


def _prune(element: ElementTree.Element) -> None:
    """Drop empty groups, groups that say nothing, and the white space between elements."""
    children: list[ElementTree.Element] = []
    for child in element:
        _prune(child)
        child.tail = None
        plain = child.tag in ("g", "defs") and not child.attrib
        if not plain or (len(child) and child.tag == "defs"):
            children.append(child)
        elif plain:
            children.extend(child)
    if len(element):
        element.text = None
    element[:] = children
