"""Artefacts of a column, gathered over checkpoints and seeds by name: curves, bars and galleries. Pure.

Malformed data of an artefact never ends the report: it is left out and named in ``Exhibits.problems``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bench.types import Artefact
from .model import Column

Points = tuple[float | None, ...]


@dataclass(frozen=True)
class Line:
    """One series of one checkpoint: its mean over seeds at each x, and a band where there is one."""

    checkpoint: int
    series: str
    x: tuple[float, ...]
    y: Points
    low: Points
    high: Points


@dataclass(frozen=True)
class Curve:
    """The lines of all checkpoints under one artefact name."""

    name: str
    title: str
    caption: str
    x_label: str
    y_label: str
    unit: str
    log_x: bool
    ticks: tuple[str, ...]
    """Names of the positions 0, 1, 2... where x is not a number; else empty."""
    lines: tuple[Line, ...]

    @property
    def series(self) -> tuple[str, ...]:
        """The names of the series, in order of appearance."""
        return tuple(dict.fromkeys(line.series for line in self.lines))


@dataclass(frozen=True)
class Bars:
    """One value a label and checkpoint (the mean over seeds) under one artefact name."""

    name: str
    title: str
    caption: str
    y_label: str
    unit: str
    labels: tuple[str, ...]
    values: Mapping[int, Points]
    """By checkpoint index, in the order of ``labels``."""

    def mean(self, i: int) -> float:
        """Mean of a label over the checkpoints that have it."""
        found = [v for values in self.values.values() if (v := values[i]) is not None]
        return sum(found) / len(found) if found else 0.0

    def spread(self, i: int) -> float:
        """Largest difference between checkpoints at a label."""
        found = [v for values in self.values.values() if (v := values[i]) is not None]
        return max(found) - min(found) if found else 0.0


@dataclass(frozen=True)
class Strip:
    """The pictures of one checkpoint under one artefact name; the caption is what it alone says."""

    checkpoint: int
    caption: str
    folder: Path
    files: tuple[str, ...]
    similarity: str = ""
    """The file with the similarities of patches, where the pictures are pairs of an image and a map of it."""


@dataclass(frozen=True)
class Gallery:
    """The strips of all checkpoints under one artefact name; of the first seed, where there are several."""

    name: str
    title: str
    caption: str
    strips: tuple[Strip, ...]
    sequence: bool = False
    """Whether the pictures of a strip are frames of a film."""


@dataclass(frozen=True)
class Scatter:
    """Points in the plane under one artefact name, in groups that are the same for all checkpoints."""

    name: str
    title: str
    caption: str
    groups: tuple[str, ...]
    colours: tuple[str, ...]
    """Of the groups, hexadecimal RGB."""
    clouds: Mapping[int, tuple[tuple[float, float, int], ...]]
    """(x, y, group) of each point, by checkpoint index."""


@dataclass(frozen=True)
class Exhibits:
    """All that a column has to draw and to show."""

    curves: tuple[Curve, ...]
    bars: tuple[Bars, ...]
    points: tuple[Scatter, ...]
    galleries: tuple[Gallery, ...]
    problems: tuple[str, ...]


Found = tuple[int, Path | None, Artefact]
"""Checkpoint index, run folder, artefact."""


def collect(column: Column) -> Exhibits:
    """The exhibits of a column, in the order in which the tasks wrote them."""
    groups: dict[tuple[str, str], list[Found]] = {}
    problems: list[str] = []
    for index, entries in enumerate(column.cells):
        for entry in entries:
            for artefact in entry.result.artefacts:
                key = (artefact.kind, artefact.name)
                first_seed = entry.result.seed == entries[0].result.seed
                if artefact.kind == "image":
                    if first_seed and entry.folder is not None:
                        groups.setdefault(key, []).append((index, entry.folder, artefact))
                    continue
                if artefact.kind == "features":  # of all checkpoints at once: resemblance.py
                    continue
                if artefact.kind == "points" and not first_seed:
                    continue
                try:
                    _CHECKS[artefact.kind](artefact.data)
                except (KeyError, TypeError, ValueError) as error:
                    problems.append(
                        f"{entry.result.cell}: {artefact.kind} {artefact.name!r} is left out, its data is "
                        f"malformed ({type(error).__name__}: {error})"
                    )
                    continue
                groups.setdefault(key, []).append((index, entry.folder, artefact))

    def of(kind: str) -> list[tuple[str, list[Found]]]:
        return [(name, found) for (k, name), found in groups.items() if k == kind]

    return Exhibits(
        tuple(_curve(name, found) for name, found in of("curve")),
        tuple(_bars(name, found) for name, found in of("bars")),
        tuple(_scatter(name, found) for name, found in of("points")),
        tuple(_gallery(name, found) for name, found in of("image")),
        tuple(problems),
    )


def _gallery(name: str, found: Sequence[Found]) -> Gallery:
    """One gallery. Titles and captions that differ between checkpoints (scores) stand with their strips."""
    titles, captions = {a.title for _, _, a in found}, {a.caption for _, _, a in found}
    plain = name.replace("-", " ").replace("_", " ").capitalize()
    strips = []
    for index, folder, artefact in found:
        own = (artefact.title if len(titles) > 1 else "", artefact.caption if len(captions) > 1 else "")
        if folder is not None:
            similarity = str(artefact.data.get("similarity", ""))
            strips.append(Strip(index, ". ".join(filter(None, own)), folder, artefact.files, similarity))
    title = titles.pop() if len(titles) == 1 else plain
    caption = captions.pop() if len(captions) == 1 else ""
    return Gallery(name, title, caption, tuple(strips), all(a.data.get("sequence") for _, _, a in found))


# ------------------------------------------------------------------------------------------- numbers


def _number(value: Any) -> float | None:
    """A finite number, or None for a gap."""
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _check_curve(data: Mapping[str, Any]) -> None:
    x, series = list(data["x"]), dict(data["series"])
    if not set(x) or not series:
        raise ValueError("no points")
    for name, values in series.items():
        for points in (values, *(data[band][name] for band in ("low", "high") if name in data.get(band, {}))):
            if len(points) != len(x):
                raise ValueError(f"{len(points)} values of {name!r} for {len(x)} positions")
            _ = [_number(v) for v in points]


def _check_bars(data: Mapping[str, Any]) -> None:
    labels, values = list(data["labels"]), [_number(v) for v in data["values"]]
    if not labels or len(labels) != len(values):
        raise ValueError(f"{len(values)} values for {len(labels)} labels")
    if len(set(map(str, labels))) != len(labels):
        raise ValueError("a label occurs twice")


def _check_points(data: Mapping[str, Any]) -> None:
    groups, colours = list(data["groups"]), list(data["colours"])
    if not data["x"] or not len(data["x"]) == len(data["y"]) == len(data["group"]):
        raise ValueError("no points, or not as many of x, y and group")
    if any(_number(v) is None for v in (*data["x"], *data["y"])):
        raise ValueError("a point is not finite")
    if len(groups) != len(colours) or not all(re.fullmatch("#[0-9a-fA-F]{6}", str(c)) for c in colours):
        raise ValueError("not one #rrggbb colour for each group")
    if not set(data["group"]) <= set(range(len(groups))):
        raise ValueError(f"a group that is not one of the {len(groups)}")


_CHECKS = {"curve": _check_curve, "bars": _check_bars, "points": _check_points}


def _unit(found: Sequence[Found], values: Callable[[Mapping[str, Any]], list[float]]) -> str:
    """``unit`` of the data where it is given; else ``%`` if every value could be a fraction."""
    for _, _, artefact in found:
        if "unit" in artefact.data:
            return "%" if artefact.data["unit"] == "%" else ""
    return "%" if all(-1 <= v <= 1 for _, _, a in found for v in values(a.data)) else ""


def _captions(found: Sequence[Found]) -> str:
    return " ".join(dict.fromkeys(a.caption for _, _, a in found if a.caption))


def _label(text: Any, unit: str) -> str:
    """An axis label that names the unit once."""
    text = str(text or "")
    return text if unit != "%" or "%" in text else f"{text} (%)".strip()


def _mean(values: Sequence[float | None]) -> float | None:
    found = [v for v in values if v is not None]
    return sum(found) / len(found) if found else None


def _curve(name: str, found: Sequence[Found]) -> Curve:
    first = found[0][2]
    positions = list(dict.fromkeys(x for _, _, a in found for x in a.data["x"]))
    numeric = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in positions)
    place = {x: float(x) if numeric else float(i) for i, x in enumerate(positions)}
    samples: dict[tuple[int, str], list[Artefact]] = {}
    for index, _, artefact in found:
        for series in artefact.data["series"]:
            samples.setdefault((index, series), []).append(artefact)
    lines = tuple(_line(i, series, artefacts, place) for (i, series), artefacts in samples.items())
    unit = _unit(
        found, lambda d: [y for ys in d["series"].values() for v in ys if (y := _number(v)) is not None]
    )
    seeds = max(map(len, samples.values()))
    banded = f"Lines are means of {seeds} seeds, bands reach from the lowest to the highest."
    return Curve(
        name,
        first.title,
        f"{_captions(found)} {banded if seeds > 1 else ''}".strip(),
        str(first.data.get("x_label") or ""),
        _label(first.data.get("y_label"), unit),
        unit,
        bool(first.data.get("log_x")) and numeric and min(place.values()) > 0,
        () if numeric else tuple(str(x) for x in positions),
        lines,
    )


def _line(index: int, series: str, artefacts: Sequence[Artefact], place: Mapping[Any, float]) -> Line:
    ys: dict[float, list[float | None]] = {}
    edges: dict[float, list[float]] = {}
    banded = len(artefacts) > 1 or any(series in a.data.get("low", {}) for a in artefacts)
    for data in (a.data for a in artefacts):
        for i, x in enumerate(data["x"]):
            value = _number(data["series"][series][i])
            ys.setdefault(place[x], []).append(value)
            band = [_number(data[key][series][i]) for key in ("low", "high") if series in data.get(key, {})]
            edges.setdefault(place[x], []).extend(v for v in (*band, value) if v is not None)
    x = tuple(sorted(ys))
    low = tuple(min(edges[p]) if edges[p] else None for p in x) if banded else ()
    high = tuple(max(edges[p]) if edges[p] else None for p in x) if banded else ()
    return Line(index, series, x, tuple(_mean(ys[p]) for p in x), low, high)


def _bars(name: str, found: Sequence[Found]) -> Bars:
    labels = tuple(dict.fromkeys(str(label) for _, _, a in found for label in a.data["labels"]))
    table: dict[int, dict[str, list[float | None]]] = {}
    for index, _, artefact in found:
        row = table.setdefault(index, {})
        for label, value in zip(artefact.data["labels"], artefact.data["values"], strict=True):
            row.setdefault(str(label), []).append(_number(value))
    values = {i: tuple(_mean(row.get(label, [])) for label in labels) for i, row in table.items()}
    unit = _unit(found, lambda d: [y for v in d["values"] if (y := _number(v)) is not None])
    first = found[0][2]
    return Bars(
        name, first.title, _captions(found), _label(first.data.get("y_label"), unit), unit, labels, values
    )


def _scatter(name: str, found: Sequence[Found]) -> Scatter:
    """One scatter; a group of the same name keeps one colour, the one that it was first given."""
    colours: dict[str, str] = {}
    for _, _, artefact in found:
        for group, paint in zip(artefact.data["groups"], artefact.data["colours"], strict=True):
            colours.setdefault(str(group), str(paint))
    place = {group: i for i, group in enumerate(colours)}
    clouds = {}
    for index, _, artefact in found:
        data, own = artefact.data, [place[str(group)] for group in artefact.data["groups"]]
        clouds[index] = tuple(
            (float(x), float(y), own[g]) for x, y, g in zip(data["x"], data["y"], data["group"], strict=True)
        )
    first = found[0][2]
    return Scatter(name, first.title, _captions(found), tuple(colours), tuple(colours.values()), clouds)
