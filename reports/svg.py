"""Figures as inline SVG in the colours of the page.

Every colour is drawn as a stand-in and replaced by a CSS variable, so that one figure serves light, dark and
print. Text stays text, in the font of the page. Labels come from outside: nothing in them is read as
mathematics or as markup.
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from xml.etree import ElementTree

from .readings import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Arguments = ParamSpec("Arguments")
Drawn = TypeVar("Drawn")

COLOURS = 8
"""Number of checkpoint colours of the page (CSS variables ``--c0`` to ``--c7``)."""
TEXT, MUTED, RULE, SURFACE = "#0a0001", "#0a0002", "#0a0003", "#0a0004"
"""Stand-ins for colours of the page; ``colour`` gives those of the checkpoints."""
_VARIABLES = {TEXT: "--text", MUTED: "--muted", RULE: "--rule", SURFACE: "--surface"} | {
    f"#0b000{i}": f"--c{i}" for i in range(COLOURS)
}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"

_STYLE: dict[Any, Any] = {
    "text.usetex": False,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "lmim-bench",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": TEXT,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.unicode_minus": True,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "text.color": TEXT,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


def styled(draw: Callable[Arguments, Drawn]) -> Callable[Arguments, Drawn]:
    """Draw under this module's style. Texts take the style when they are made, so it spans the drawing."""

    @functools.wraps(draw)
    def within(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Drawn:
        import matplotlib as mpl

        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return within


def colour(checkpoint: int) -> str:
    """The stand-in for the colour of a checkpoint."""
    return f"#0b000{checkpoint % COLOURS}"


def mark(checkpoint: int) -> str:
    """The ``gid`` of an artist that belongs to a checkpoint: the page can hide it, and names it on hover."""
    return f"checkpoint-{checkpoint}"


def to_svg(figure: Figure, prefix: str, description: str, labels: Sequence[str] = ()) -> str:
    """The figure as an ``svg`` element that is safe to stand inside a page.

    Args:
        figure: drawn under ``styled``.
        prefix: start of every id inside, unique on the page.
        description: what a reader who cannot see it is told.
        labels: name of each checkpoint, shown on hover over what is marked as its own.
    """
    stream = io.StringIO()
    silent = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():
        # The browser has the glyphs that matplotlib's own font lacks; and a long label may leave no room.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        figure.savefig(stream, format="svg", transparent=True, metadata=silent)
    return _inline(stream.getvalue(), prefix, description, labels)


def _inline(text: str, prefix: str, description: str, labels: Sequence[str]) -> str:
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            # matplotlib's style sheet would apply to the whole page, and its metadata names nothing.
            if child.tag in (f"{{{_SVG}}}style", f"{{{_SVG}}}metadata"):
                parent.remove(child)
    used = set(re.findall(r"#([\w-]+)", " ".join(_references(root))))
    for element in list(root.iter()):
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        for name, value in list(element.attrib.items()):
            if name == "id":  # a reference is kept, under a name that no other figure has
                del element.attrib[name]
                if found := re.fullmatch(r"checkpoint-(\d+)", value):
                    element.set("data-c", found[1])
                    if int(found[1]) < len(labels):
                        title = ElementTree.Element("title")
                        title.text = clean(labels[int(found[1])])
                        element.insert(0, title)
                elif value in used:
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
