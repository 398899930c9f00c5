"""One metric over the checkpoints of a column: values, intervals, which is best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..bench.results import Result
from ..bench.stats import over_seeds
from ..bench.types import Metric, Score

Number = TypeVar("Number", int, float)


def clean(text: str) -> str:
    """Text without control characters and lone surrogates, which neither a page nor a terminal can hold."""

    def harmful(code: int) -> bool:
        return (code < 32 and code not in (9, 10)) or 127 <= code < 160 or 0xD800 <= code < 0xE000

    return "".join("\ufffd" if harmful(ord(c)) else c for c in text)


def format_value(value: float, unit: str) -> str:
    """A number as it is shown: fractions of unit ``%`` times 100 with one decimal, others by their size."""
    if unit == "%":
        digits, value = 1, 100 * value
    else:
        digits = 3 if abs(value) < 100 else 0
    text = f"{value:,.{digits}f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text


def show(value: Any) -> str:
    """A protocol value or a detail as text: lists without brackets, floats short."""
    if isinstance(value, (list, tuple)):
        return ", ".join(show(item) for item in value) or "(empty)"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {show(item)}" for key, item in value.items()) or "(empty)"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: ``a, b and c``."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


@dataclass(frozen=True)
class Reading:
    """One metric of one checkpoint in a column: the mean over its seeds, with an interval for the sampling of
    items as well as of seeds (``stats.over_seeds``).
    """

    value: float
    low: float | None
    high: float | None
    scores: tuple[tuple[int, Score], ...]
    """(seed, score), by seed."""
    metric: Metric

    @property
    def text(self) -> str:
        """The value as shown."""
        return format_value(self.value, self.metric.unit)

    @property
    def interval(self) -> str:
        """The interval as shown, ``[73.9, 75.1]``; empty where there is none."""
        return interval_text(self.low, self.high, self.metric.unit)

    @property
    def chance(self) -> float | None:
        """The chance level, where it is defined; of the first seed."""
        return self.scores[0][1].chance

    @property
    def at_chance(self) -> bool:
        """Whether the interval holds the chance level: no more than a guess."""
        if self.chance is None or self.low is None or self.high is None:
            return False
        return self.low <= self.chance <= self.high

    @property
    def below_chance(self) -> bool:
        """Whether the whole interval is on the wrong side of the chance level."""
        if self.chance is None or self.low is None or self.high is None:
            return False
        return self.high < self.chance if self.metric.higher_is_better else self.low > self.chance

    def overlaps(self, other: Reading) -> bool:
        """Whether the intervals overlap; so taken where one of them is not known."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return True
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Row:
    """One metric of a column over all checkpoints, in the order of the report's checkpoints."""

    id: str
    metric: Metric
    parameters: str
    headline: bool
    readings: tuple[Reading | None, ...]
    leads: tuple[bool, ...]
    """Which show the best number: several where a reader cannot tell them apart, none of one alone."""

    @property
    def found(self) -> list[Reading]:
        """The readings that there are."""
        return [r for r in self.readings if r is not None]

    @property
    def best(self) -> Reading | None:
        """The reading with the best value."""
        return _best(self.readings, self.metric)

    @property
    def label(self) -> str:
        """What an axis of these values is called: title, unit, parameters, and that lower is better."""
        unit = " (%)" if self.metric.unit == "%" and "%" not in self.metric.title else ""
        parameters = f", {self.parameters}" if self.parameters else ""
        better = "" if self.metric.higher_is_better else " ↓ lower is better"
        return f"{self.metric.title}{unit}{parameters}{better}"

    @property
    def n(self) -> str:
        """Number of items behind the scores; a range where cells differ."""
        return _span([score.n for r in self.found for _, score in r.scores], lambda n: f"{n:,}")

    @property
    def chance(self) -> str:
        """Chance level as shown; a range where cells differ, empty where it is not defined."""
        levels = [s.chance for r in self.found for _, s in r.scores if s.chance is not None]
        return _span(levels, lambda level: format_value(level, self.metric.unit))

    @property
    def details(self) -> list[tuple[int, int, dict[str, Any]]]:
        """(checkpoint index, seed, detail) of the scores that carry extra numbers."""
        return [
            (i, seed, s.detail) for i, r in enumerate(self.readings) if r for seed, s in r.scores if s.detail
        ]

    def heat(self, reading: Reading) -> float:
        """0 at the chance level (zero where none is defined), 1 at the best of the row."""
        best, values = self.best, [r.value for r in self.found]
        if best is None or len(values) < 2:
            return 0.0
        sign = 1 if self.metric.higher_is_better else -1
        ground = best.chance if best.chance is not None else min(0.0, *values)
        base = ground if sign > 0 else max(values)
        reach = sign * (best.value - base)
        # Where even the best is not above chance there is nothing to shade.
        return 0.0 if reach <= 0 else max(0.0, sign * (reading.value - base) / reach)

    def span(self, reading: Reading) -> tuple[float, float, float] | None:
        """Low, value and high in percent of the range that all intervals of the row cover together."""
        lows = [r.low for r in self.found if r.low is not None]
        highs = [r.high for r in self.found if r.high is not None]
        if len(lows) < 2 or reading.low is None or reading.high is None or max(highs) <= min(lows):
            return None
        start, width = min(lows), max(highs) - min(lows)
        low, value, high = ((x - start) / width * 100 for x in (reading.low, reading.value, reading.high))
        return low, value, high


def interval_text(low: float | None, high: float | None, unit: str) -> str:
    """An interval as shown; empty where there is none."""
    return "" if low is None or high is None else f"[{format_value(low, unit)}, {format_value(high, unit)}]"


def metric_rows(first: Result, cells: Sequence[Sequence[Result]]) -> tuple[Row, ...]:
    """The rows of a column.

    Args:
        first: the result whose declarations (metric families, headline) stand for the column.
        cells: the results of each checkpoint, one a seed.
    """
    ids = dict.fromkeys(score.metric for results in cells for r in results for score in r.scores)
    rows = []
    for family in dict.fromkeys(metric_id.split("@")[0] for metric_id in ids):
        metric = declared(first, family)
        for metric_id in (i for i in ids if i.split("@")[0] == family):
            readings = tuple(_reading(results, metric_id, metric) for results in cells)
            parameters = metric_id.partition("@")[2]
            headline = metric_id == first.headline
            leads = _leads(readings, metric) if first.scored else (False,) * len(readings)
            rows.append(Row(metric_id, metric, parameters, headline, readings, leads))
    return tuple(rows)


def declared(result: Result, family: str) -> Metric:
    """A metric family as a result declares it; called by its id where it does not."""
    fields = result.metrics.get(family, {})
    known: dict[str, Any] = {k: fields[k] for k in ("title", "unit", "higher_is_better") if k in fields}
    known.setdefault("title", family)
    return Metric(id=family, **known)


def _reading(results: Sequence[Result], metric_id: str, metric: Metric) -> Reading | None:
    found = [(r.seed, s) for r in results if (s := r.score(metric_id)) is not None]
    if not found:
        return None
    low, high = found[0][1].low, found[0][1].high
    if len(found) > 1:
        whole = [(s.value, s.low, s.high) for _, s in found if s.low is not None and s.high is not None]
        low, high = over_seeds(whole) if len(whole) == len(found) else (None, None)
        shares = all(0 <= low <= high <= 1 for _, low, high in whole)  # which a decay is not
        if low is not None and high is not None and metric.unit == "%" and shares:
            low, high = max(0.0, low), min(1.0, high)
    return Reading(sum(s.value for _, s in found) / len(found), low, high, tuple(found), metric)


def _best(readings: Sequence[Reading | None], metric: Metric) -> Reading | None:
    found = [r for r in readings if r is not None]
    pick = max if metric.higher_is_better else min
    return pick(found, key=lambda r: r.value) if found else None


def _leads(readings: Sequence[Reading | None], metric: Metric) -> tuple[bool, ...]:
    best = _best(readings, metric)
    if best is None or sum(r is not None for r in readings) < 2:
        return (False,) * len(readings)
    return tuple(r is not None and r.text == best.text for r in readings)


def _span(values: Sequence[Number], text: Callable[[Number], str]) -> str:
    if not values:
        return ""
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low}–{high}"
