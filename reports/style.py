"""How figures look: one style, in the colours of the page or in those of paper.

For the page every colour is a stand-in that ``svg.py`` replaces by a CSS variable, so that one figure serves
light, dark and print. Labels come from outside: nothing in them is read as mathematics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = 8
"""Number of checkpoint colours (CSS variables ``--c0`` to ``--c7`` on the page)."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))

_RC: dict[str, Any] = {
    "text.usetex": False,
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "lmim-bench",
    "pdf.fonttype": 42,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.unicode_minus": True,
    "axes.axisbelow": True,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


@dataclass(frozen=True)
class Palette:
    """Colours of a figure, as hexadecimal RGB; ``checkpoints`` has ``COLOURS`` of them."""

    text: str
    muted: str
    rule: str
    surface: str
    checkpoints: tuple[str, ...]


PAGE = Palette("#0a0001", "#0a0002", "#0a0003", "#0a0004", tuple(f"#0b000{i}" for i in range(COLOURS)))
"""Stand-ins, which are no colours that anything else has."""
VARIABLES = {
    PAGE.text: "--text",
    PAGE.muted: "--muted",
    PAGE.rule: "--rule",
    PAGE.surface: "--surface",
    **{stand_in: f"--c{i}" for i, stand_in in enumerate(PAGE.checkpoints)},
}
"""The CSS variable of each stand-in."""
PAPER = Palette(
    "#000000",
    "#444444",
    "#cccccc",
    "#ffffff",
    ("#1d5fd0", "#c2480b", "#0a7a5c", "#9a2bb0", "#8a6500", "#0b7285", "#c0264f", "#5b5f68"),
)
"""The same colours as the printed page."""


_PALETTE: ContextVar[Palette] = ContextVar("palette", default=PAPER)


@contextmanager
def style(palette: Palette) -> Iterator[None]:
    """Draw and write in this style: some of it is taken when an artist is made, some when it is written."""
    import matplotlib as mpl

    colours: dict[Any, Any] = {
        "text.color": palette.text,
        "axes.titlecolor": palette.text,
        "axes.labelcolor": palette.muted,
        "xtick.color": palette.muted,
        "ytick.color": palette.muted,
        "axes.edgecolor": palette.rule,
        "grid.color": palette.rule,
    }
    token = _PALETTE.set(palette)
    try:
        with mpl.rc_context(_RC | colours):
            yield
    finally:
        _PALETTE.reset(token)


def colour(checkpoint: int) -> str:
    """The colour of a checkpoint in the style at hand."""
    return _PALETTE.get().checkpoints[checkpoint % COLOURS]


def shape(checkpoint: int) -> int:
    """The place of a checkpoint's marker in ``MARKERS``: another one whenever the colours begin anew."""
    return (checkpoint + checkpoint // COLOURS) % len(MARKERS)


def marker(checkpoint: int) -> str:
    """The marker of a checkpoint; with its colour it tells 64 of them apart."""
    return MARKERS[shape(checkpoint)]


def size(checkpoint: int, points: float) -> float:
    """The size of a marker that looks as large as the others: a star and a cross fill less of theirs."""
    return points * {"*": 1.7, "P": 1.15, "X": 1.15}.get(marker(checkpoint), 1.0)


def ink(part: Literal["text", "muted", "rule", "surface"]) -> str:
    """The colour of texts, rules or the surface in the style at hand."""
    found: str = getattr(_PALETTE.get(), part)
    return found


def mark(checkpoint: int) -> str:
    """The ``gid`` of an artist that belongs to a checkpoint: the page can hide it, and names it on hover."""
    return f"checkpoint-{checkpoint}"


@dataclass(frozen=True)
class Drawing:
    """A figure before it is written.

    Attributes:
        figure: drawn under ``style``, and to be written under the same one.
        description: what a reader who cannot see it is told.
        heading: what tells it from the other panels of its kind; empty where there is one.
        checkpoints: indices of those in it that a legend has to name.
        dashes: series that dashes tell apart, in the order of ``DASHES``.
        groups: (name, colour) of what colours tell apart where they are not checkpoints'.
    """

    figure: Figure
    description: str
    heading: str = ""
    checkpoints: Sequence[int] = ()
    dashes: Sequence[str] = ()
    groups: Sequence[tuple[str, str]] = ()
