"""Figures as inline SVG in the colours of the page.

Text stays text, in the font of the page. Labels come from outside: nothing in them is read as markup.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from xml.etree import ElementTree

from .readings import clean
from .style import VARIABLES, Drawing

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


def to_svg(drawing: Drawing, prefix: str, labels: Sequence[str]) -> str:
    """A drawing in the palette ``PAGE`` as an ``svg`` element that is safe to stand inside a page.

    Args:
        drawing: its legend is left to the page.
        prefix: start of every id inside, unique on the page.
        labels: name of each checkpoint, shown on hover over what is marked as its own.
    """
    stream = io.StringIO()
    silent = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():
        # The browser has the glyphs that matplotlib's own font lacks; and a long label may leave no room.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        drawing.figure.savefig(stream, format="svg", transparent=True, metadata=silent)
    return _inline(stream.getvalue(), prefix, drawing.description, labels)


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
    return re.sub(r"#0[ab]000\d", lambda m: f"var({VARIABLES[m[0]]})", style)


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
