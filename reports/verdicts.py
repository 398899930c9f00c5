"""Is the difference more than noise? Paired comparisons of the checkpoints of a report, and their ranks.

Two checkpoints are compared on the items that both were measured on, column by column, in the headline
metric. Columns hold only what may be compared: one protocol, data fingerprint, task version and limit.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from ..bench.comparison import Difference, Ranking, compare, holm, rank, sentence
from ..bench.errors import ConfigError, did_you_mean
from ..bench.types import Array, DataKind
from .model import Cell, Checkpoint, Column, Entry, Report, Standing
from .readings import Row, listed

LEVEL = 0.05
_NOUNS: dict[DataKind, tuple[str, str]] = {
    "classification": ("test images", "groups"),
    "segmentation": ("test images", "groups"),
    "video": ("objects", "sequences"),
}
"""What the items of a metric are, and what they come in."""


@dataclass(frozen=True)
class Verdict:
    """One column of a comparison: the difference of ``challenger`` to ``reference``."""

    column: Column
    row: Row
    reference: Checkpoint
    challenger: Checkpoint
    found: Difference
    p: float | None
    """Corrected by Holm over all tests of a section; None where there is no test, or none that could find
    anything among so few independent items.
    """

    @property
    def clear(self) -> bool:
        """Whether the difference is more than noise at the 5% level, after correction."""
        return self.p is not None and self.p < LEVEL

    @property
    def better(self) -> Checkpoint:
        """The checkpoint with the better value."""
        ahead = self.found.value >= 0
        return self.challenger if ahead == self.row.metric.higher_is_better else self.reference

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        said = sentence(
            self.reference.label,
            self.challenger.label,
            self.found,
            self.p,
            self.row.metric.unit,
            self.row.metric.higher_is_better,
            *_NOUNS[self.column.data.kind],
        )
        one, two = (
            {entry.result.seed for entry in self.column.cells[c.index] if entry.result.status == "ok"}
            for c in (self.reference, self.challenger)
        )
        if one == two:
            return said
        shared = listed([str(seed) for seed in sorted(one & two)])
        return f"{said}, over the seed{'s' * (len(one & two) > 1)} that both have ({shared})"


class Tally(NamedTuple):
    """Numbers of the columns in which a checkpoint is clearly better and worse, not told apart, and in which
    too few items leave nothing to test.
    """

    better: int
    worse: int
    open: int
    untested: int


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints on all columns that they share."""

    reference: Checkpoint
    challenger: Checkpoint
    verdicts: tuple[Verdict, ...]
    gaps: tuple[str, ...]
    """What could not be compared, and why."""

    @property
    def summary(self) -> str:
        """How often each is clearly better."""
        if not self.verdicts:
            both = f"{self.challenger.label} and {self.reference.label}"
            return f"{both} share nothing that can be compared."
        better, worse, rest, untested = self.tally
        columns = "column" if len(self.verdicts) == 1 else "columns"
        return (
            f"{self.challenger.label} against {self.reference.label} in {len(self.verdicts)} {columns}: "
            f"clearly better in {better}, clearly worse in {worse}"
            + (f"; {rest} cannot be told apart" if rest else "")
            + (f"; {untested} with too few items to test" if untested else "")
            + "."
        )

    @property
    def tally(self) -> Tally:
        """The outcomes for the challenger, counted."""
        tested = [verdict for verdict in self.verdicts if verdict.p is not None]
        better, worse = (sum(v.clear and v.better is c for v in tested) for c in self.pair)
        return Tally(better, worse, len(tested) - better - worse, len(self.verdicts) - len(tested))

    @property
    def tested(self) -> int:
        """The number of its tests, which p values are corrected for together with those of the others."""
        return sum(verdict.found.p is not None for verdict in self.verdicts)

    @property
    def pair(self) -> tuple[Checkpoint, Checkpoint]:
        """Both, the challenger first."""
        return self.challenger, self.reference


@dataclass(frozen=True)
class Pairings:
    """The paired comparisons of a report, each made when it is first asked for."""

    report: Report
    """Columns and checkpoints, with the run folders that their items lie in."""
    _made: dict[frozenset[int], Comparison] = field(default_factory=dict)
    """By pair, p values not corrected."""

    def against(self, baseline: str | None = None) -> tuple[Comparison, ...]:
        """Each checkpoint against the baseline.

        Args:
            baseline: label of the checkpoint that the others are compared with; by default the first that
                has no random weights.

        Raises:
            ConfigError: there is no such label.
        """
        checkpoints = self.report.checkpoints
        if len(checkpoints) < 2:
            return ()
        base = _baseline(self.report, baseline)
        return _corrected([self._compare(base, other) for other in checkpoints if other is not base])

    def _compare(self, base: Checkpoint, other: Checkpoint) -> Comparison:
        pair = frozenset((base.index, other.index))
        made = self._made.get(pair)
        if made is None or made.reference is not base:
            made = self._made[pair] = _compare(self.report, base, other)
        return made

    def summary(self, column: Column) -> tuple[Cell, ...]:
        """The summary cells of a column, with those marked that are not told apart from its best one.

        The test is that of the comparison of the two, corrected for the columns and, since which one is the
        best is known from the same items, for the number of pairs. Where it cannot be made, those are marked
        as untested whose intervals overlap.
        """
        cells = column.summary()
        row = column.headline
        best = row.best if row else None
        if row is None or best is None or not any(row.leads):
            return cells
        leader = self.report.checkpoints[row.readings.index(best)]
        marked = []
        for checkpoint, cell in zip(self.report.checkpoints, cells, strict=True):
            if cell.reading is not None and checkpoint is not leader:
                standing = self._standing(column, leader, checkpoint)
                # Numbers that look alike are both the best, unless it is known which one is.
                if not (cell.standing == "best" and standing):
                    cell = replace(cell, standing=standing)
            marked.append(cell)
        return tuple(marked)

    def _standing(self, column: Column, leader: Checkpoint, other: Checkpoint) -> Standing:
        made = self._made.get(frozenset((leader.index, other.index))) or self._compare(leader, other)
        rows = [row for scored in self.report.scored if (row := scored.headline)]
        # Never less than the correction of ``against``: whatever is clear here is clear there.
        tests = sum(math.comb(len(row.found), 2) for row in rows) if len(self.report.checkpoints) > 2 else 0
        for verdict in _corrected([made], tests)[0].verdicts:
            if verdict.column is column and verdict.p is not None:
                # On the seeds that both have, the other may be the better one.
                return "" if verdict.clear and verdict.better is leader else "close"
        one, two = (column.summary()[c.index].reading for c in (leader, other))
        return "untested" if one is not None and two is not None and one.overlaps(two) else ""


def comparisons(report: Report, baseline: str | None = None) -> tuple[Comparison, ...]:
    """Each checkpoint against the baseline: ``Pairings.against``."""
    return Pairings(report).against(baseline)


def ranking(report: Report) -> tuple[Ranking, tuple[Checkpoint, ...]] | None:
    """Average ranks over the columns that every checkpoint of three or more was scored on; data sets of one
    content are one, whatever they are called.
    """
    full = [(column, row) for column in report.scored if (row := column.headline) and all(row.readings)]
    if len(report.checkpoints) < 3 or not full:
        return None
    rows = [row for _, row in full]
    table = np.array([[reading.value for reading in row.readings if reading] for row in rows])
    higher = [row.metric.higher_is_better for row in rows]
    data = [column.content or column.data.name for column, _ in full]
    return rank(table, higher, data), report.checkpoints


def _baseline(report: Report, label: str | None) -> Checkpoint:
    if label is None:
        trained = [c for c in report.checkpoints if not c.record.info.random_weights]
        return (trained or list(report.checkpoints))[0]
    for checkpoint in report.checkpoints:
        if checkpoint.label == label:
            return checkpoint
    if namesakes := [repr(c.label) for c in report.checkpoints if c.record.label == label]:
        raise ConfigError(
            f"{len(namesakes)} checkpoints with different weights are called {label!r} in these runs; give "
            f"one of them: --baseline {' or '.join(namesakes)}"
        )
    labels = [checkpoint.label for checkpoint in report.checkpoints]
    raise ConfigError(f"there is no checkpoint {label!r} in these runs. {did_you_mean(label, labels)}")


def _compare(report: Report, base: Checkpoint, other: Checkpoint) -> Comparison:
    verdicts: list[Verdict] = []
    gaps: list[str] = []
    lone = [c for c in report.scored if bool(c.cells[base.index]) != bool(c.cells[other.index])]
    for column in report.scored:
        mine, theirs = column.cells[base.index], column.cells[other.index]
        if not mine or not theirs:
            continue
        row = column.headline
        if row is None or row.readings[base.index] is None or row.readings[other.index] is None:
            gaps.append(f"{column.name}: {_lacking(column, (base, other))}")
            continue
        try:
            # The same draws and the same order whichever of the two is the reference and whatever else the
            # report holds, and so the same interval and p value.
            turned = base.record.fingerprint > other.record.fingerprint
            pair = (theirs, mine) if turned else (mine, theirs)
            found = _difference(*pair, row.id, "/".join([column.task, column.content, row.id]))
            found = _mirrored(found) if turned else found
        except _NotPairedError as error:
            gaps.append(f"{column.name}: {error}")
            continue
        verdicts.append(Verdict(column, row, base, other, found, None))
    gaps += dict.fromkeys(_apart(column, lone, base, other) for column in lone)
    return Comparison(base, other, tuple(verdicts), tuple(gaps))


def _apart(column: Column, lone: Sequence[Column], base: Checkpoint, other: Checkpoint) -> str:
    """Why a column that only one of two checkpoints has is not compared; ``lone`` are all such columns."""
    has, lacks = (base, other) if column.cells[base.index] else (other, base)
    rivals = [rival for rival in lone if rival.task == column.task and rival.cells[lacks.index]]
    if namesakes := [rival for rival in rivals if rival.data.name == column.data.name]:
        pair = (column, namesakes[0]) if has is base else (namesakes[0], column)
        what = "protocol" if pair[0].content == pair[1].content else "data"
        differs = " against ".join(one.variant for one in pair if one.variant)
        return f"{column.task} on {column.data.name}: not the same {what}: {differs}"
    for rival in rivals:
        if column.content and rival.content == column.content:
            names = " and ".join(sorted((column.data.name, rival.data.name)))
            return f"{column.task}: the same data under the names {names}"
    return f"{column.name}: {_lacking(column, (base, other))}"


def _lacking(column: Column, pair: Sequence[Checkpoint]) -> str:
    """Who of two has no headline in a column, and why: ``a and b failed``."""
    reasons: dict[str, list[str]] = {}
    for checkpoint, cell in ((c, column.summary()[c.index]) for c in pair):
        if cell.state == "failed":
            reasons.setdefault("failed", []).append(checkpoint.label)
        elif not column.cells[checkpoint.index]:
            reasons.setdefault("was not scored", []).append(checkpoint.label)
        elif cell.reading is None:
            reasons.setdefault(f"without {column.first.headline}", []).append(checkpoint.label)
    return ", ".join(f"{listed(labels)} {reason}" for reason, labels in reasons.items())


def _corrected(made: Sequence[Comparison], tests: int = 0) -> tuple[Comparison, ...]:
    """Comparisons with the p values of all their tests corrected together by Holm, or for ``tests`` tests."""
    alone = [v.found.p for comparison in made for v in comparison.verdicts if v.found.p is not None]
    together = iter([min(1.0, tests * p) for p in alone] if tests else holm(alone))

    def correct(verdict: Verdict) -> Verdict:
        if verdict.found.p is None:
            return verdict
        p = next(together)
        # However great its difference, a test of few groups may stay above the level: with the least p that
        # it can have, it comes after those that are smaller still.
        least = verdict.found.least
        least *= tests or len(alone) - sum(other < least for other in alone)
        return replace(verdict, p=None if p >= LEVEL and least >= LEVEL else p)

    return tuple(replace(c, verdicts=tuple(correct(v) for v in c.verdicts)) for c in made)


class _NotPairedError(Exception):
    """Two cells whose items cannot be paired; the text says why."""


def _difference(mine: Sequence[Entry], theirs: Sequence[Entry], metric: str, name: str) -> Difference:
    """The difference of theirs to mine, over the seeds that both have: they are samples as the items are, but
    for seeds that change nothing.
    """
    by_seed = {entry.result.seed: entry for entry in theirs}
    pairs = [(entry, by_seed[entry.result.seed]) for entry in mine if entry.result.seed in by_seed]
    if not pairs:
        raise _NotPairedError("they share no seed")
    first, second = [], []
    clusters: Array | None = None
    for a, b in pairs:
        terms_a, clusters = _terms(a, metric)
        terms_b, _ = _terms(b, metric)
        if terms_a.shape != terms_b.shape:
            raise _NotPairedError(f"{terms_a.shape[-1]:,} items against {terms_b.shape[-1]:,}")
        first.append(terms_a)
        second.append(terms_b)
    if len({terms.shape for terms in first}) > 1:
        raise _NotPairedError("their seeds were measured on different numbers of items")
    # The draws follow from what is compared, so that the same runs give the same page.
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if (
        all(np.array_equal(terms, each[0]) for each in (first, second) for terms in each)
        and first[0].ndim == 1
    ):
        return compare(first[0], second[0], rng, clusters=clusters)
    join = np.concatenate if first[0].ndim == 2 else np.stack
    return compare(join(first), join(second), rng, clusters=clusters, crossed=True)


def _mirrored(found: Difference) -> Difference:
    low, high = found.low, found.high
    return replace(
        found,
        value=-found.value,
        low=None if high is None else -high,
        high=None if low is None else -low,
        effect=None if found.effect is None else -found.effect,
    )


def _terms(entry: Entry, metric: str) -> tuple[Array, Array | None]:
    """Per-item numbers whose mean is the metric's value, and the clusters that the items come in."""
    if entry.folder is None:
        raise _NotPairedError("the per-item numbers are not at hand")
    path = Path(entry.folder) / "items" / f"{entry.result.cell}.npz"
    try:
        with path.open("rb") as stream, np.load(stream) as arrays:
            first_order = arrays.get(f"{metric}/terms")
            items = arrays[metric] if first_order is None else first_order
            clusters = arrays.get(f"{metric}/clusters")
    except (FileNotFoundError, KeyError) as error:
        raise _NotPairedError(f"{path.name} holds no per-item numbers of {metric}") from error
    except (BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
        reason = f"its items {path.name} are damaged; score it again (--overwrite always)"
        raise _NotPairedError(reason) from error
    if items.ndim == 2 and not _is_crossed(entry, metric, items):
        raise _NotPairedError(f"{path.name} is of an earlier version; score the cells again")
    return items, clusters


def _is_crossed(entry: Entry, metric: str, items: Array) -> bool:
    """Whether two axes are draws by items, whose mean is the value; else they are sums for a statistic."""
    score = entry.result.score(metric)
    return score is not None and bool(np.isclose(items.mean(), score.value, rtol=1e-5, atol=1e-7))
