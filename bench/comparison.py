"""Two encoders on the same items: difference, interval, test, effect size. Several encoders: ranks.

Pure functions of arrays and a generator. Sources: McNemar (1947) in its exact form; Fisher's paired
randomisation test, by whole clusters where items come in groups; Tango (1998) for differences of shares;
Student's test with the error and degrees of freedom of ``stats.crossed_error`` where draws of a training set
are tested on the same items; Cohen (1988) for d_z; Holm (1979); Demsar (2006), "Statistical Comparisons of
Classifiers over Multiple Data Sets", for ranks and critical difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from .stats import (
    CHUNK_ELEMENTS,
    bootstrap,
    by_cluster,
    crossed_error,
    crossed_interval,
    is_binary,
    tango,
)
from .types import Array, mean_statistic

PERMUTATIONS = 9999
_MORE_PERMUTATIONS = 999_999
_RARE = 10
"""So few extreme exchanges among the first ones say little of how rare they are."""
_MOST_EXCHANGED = 20_000_000
"""Groups times exchanges, at most, where more are drawn."""
_MOST_ORDERS = 100_000


@dataclass(frozen=True)
class Difference:
    """What a paired comparison of b with a found; fractions where the metric's unit is ``%``.

    Attributes:
        value: mean of b minus mean of a.
        low, high: 95% interval, None where fewer than two independent items leave nothing to resample.
        p: two-sided p value of the test, None where there is no test.
        least: the least p value that the test can give for so few items or groups, however they differ.
        test: what the p value comes from.
        effect: Cohen's d_z, the mean of the differences over their standard deviation (over clusters, where
            items come in groups); None where the differences do not vary.
        items: number of items that were paired.
        independent: number of independent ones: items, or clusters.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    least: float
    test: str
    effect: float | None
    items: int
    independent: int


def compare(
    a: Array,
    b: Array,
    rng: np.random.Generator,
    *,
    clusters: Array | None = None,
    crossed: bool = False,
) -> Difference:
    """Compare two encoders measured on the same items.

    Args:
        a: per-item numbers of the first, (N,), whose mean is its value; with ``crossed`` (A, N).
        b: those of the second, in the same order.
        rng: source of resamples and permutations.
        clusters: (N,) ids of items that belong together.
        crossed: draws of a training set, or seeds (rows), by test items (columns): both are samples.

    Raises:
        ValueError: the two were not measured on the same items.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"items of shape {a.shape} and {b.shape} cannot be paired")
    difference = b - a
    value = float(difference.mean())
    if crossed:
        shares = all(bool(((x >= 0) & (x <= 1)).all()) for x in (a, b))
        return _crossed(difference, value, clusters, 1.0 if shares else math.inf)
    sums, sizes = by_cluster(difference[:, None], clusters)
    groups = sums[:, 0]
    answers = clusters is None and len(groups) > 1 and is_binary(a) and is_binary(b)
    if answers:
        interval: tuple[float, float] | None = tango(int(np.sum(a > b)), int(np.sum(b > a)), len(groups))
    else:
        interval = bootstrap(difference[:, None], mean_statistic, rng, clusters=clusters)
    low, high = interval if interval is not None else (None, None)
    p: float | None
    least = 2.0 ** (1 - len(groups))
    if len(groups) < 2:
        p, test = None, "none: a single independent item"
    elif answers:
        p, test = mcnemar(a, b), "McNemar's exact test"
    else:
        p, test = sign_flips(groups, rng)
        if 2 ** len(groups) > PERMUTATIONS:
            least = max(least, 1 / (1 + _most_exchanges(len(groups))))
    return Difference(value, low, high, p, least, test, _effect(groups / sizes), len(difference), len(groups))


def _crossed(difference: Array, value: float, clusters: Array | None, reach: float) -> Difference:
    """``reach``: how far apart two values can be."""
    from scipy.special import stdtr

    items = difference.shape[1]
    # Groups of items as columns, of which each has its share in the mean.
    sums, sizes = by_cluster(difference.T, clusters)
    groups = len(sums)
    table = sums.T * (groups / items)
    interval = crossed_interval(table)
    if interval is None:
        return Difference(value, None, None, None, 0.0, "none: a single draw or item", None, items, groups)
    error, freedom = crossed_error(table)
    # Of all exchanges of the two, item by item, two are as far apart: so few items say no more, however
    # little they happen to vary.
    least = 2.0 ** (1 - groups)
    p = max(least, 2 * float(stdtr(freedom, -abs(value) / error))) if error else (least if value else 1.0)
    test = f"Student's t over draws and items, {freedom:.1f} degrees of freedom"
    effect = _effect((sums / sizes[:, None]).mean(axis=1))
    low, high = (max(-reach, min(reach, end)) for end in interval)
    return Difference(value, low, high, p, least, test, effect, items, groups)


def mcnemar(a: Array, b: Array) -> float:
    """Exact two-sided p value that 0/1 outcomes of two encoders on the same items differ by chance."""
    from scipy.stats import binomtest

    only_a, only_b = int(np.sum(a > b)), int(np.sum(b > a))
    return 1.0 if only_a + only_b == 0 else float(binomtest(only_a, only_a + only_b, 0.5).pvalue)


def sign_flips(groups: Array, rng: np.random.Generator) -> tuple[float, str]:
    """Two-sided p value of paired differences (G,) by exchanging the two encoders in whole groups.

    Every exchange is tried where there are few of them; else ``PERMUTATIONS`` drawn ones, and up to a million
    where hardly any of those is as extreme, with the observed one counted among them.
    """
    groups = groups[groups != 0]
    if len(groups) == 0:
        return 1.0, "paired permutation test"
    observed = abs(groups.sum()) * (1 - 1e-12)
    if 2 ** len(groups) <= PERMUTATIONS:
        bits = np.arange(2 ** len(groups))[:, None] >> np.arange(len(groups)) & 1
        return float((np.abs((1 - 2 * bits) @ groups) >= observed).mean()), "exact paired permutation test"
    extreme, drawn, wanted = 0, 0, PERMUTATIONS
    chunk = max(1, CHUNK_ELEMENTS // len(groups))
    while drawn < wanted:
        signs = rng.integers(0, 2, size=(min(chunk, wanted - drawn), len(groups)), dtype=np.int8)
        extreme += int((np.abs((1.0 - 2.0 * signs) @ groups) >= observed).sum())
        drawn += len(signs)
        if drawn == PERMUTATIONS and extreme < _RARE:
            wanted = _most_exchanges(len(groups))
    return (1 + extreme) / (1 + drawn), f"paired permutation test, {drawn:,} exchanges"


def _most_exchanges(groups: int) -> int:
    return max(PERMUTATIONS, min(_MORE_PERMUTATIONS, _MOST_EXCHANGED // groups))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for being several, in the given order: the family-wise error stays at the level."""
    order = np.argsort(p_values, kind="stable")
    corrected, highest = np.empty(len(order)), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = highest
    return [float(p) for p in corrected]


@dataclass(frozen=True)
class Ranking:
    """Average ranks of encoders over columns, 1 the best; equal values share their mean rank.

    Attributes:
        ranks: (M,) average rank of each encoder.
        critical_difference: encoders whose ranks differ by less are not told apart (Nemenyi, 5%); None
            for fewer than two data sets.
        p: Friedman's test that all are alike: exact, over all orders of every data set, where these are few;
            else in Iman and Davenport's form, corrected for ties. None where it is not defined.
        columns: number of columns ranked over.
        data_sets: number of data sets that they come from.
    """

    ranks: tuple[float, ...]
    critical_difference: float | None
    p: float | None
    columns: int
    data_sets: int


def rank(table: Array, higher_is_better: Sequence[bool], data: Sequence[str], level: float = 0.05) -> Ranking:
    """Rank encoders over columns, and average over those of one data set, which are no independent evidence.

    Args:
        table: (columns, M) values without gaps.
        higher_is_better: for each column.
        data: name of the data set of each column.
        level: of the critical difference.

    Raises:
        ValueError: fewer than two encoders, or no column.
    """
    from scipy.stats import rankdata, studentized_range

    columns, encoders = np.shape(table)
    if encoders < 2 or columns < 1:
        raise ValueError("ranks need two encoders and a column")
    signs = np.where(higher_is_better, -1.0, 1.0)[:, None]
    by_column = rankdata(signs * table, axis=1)
    names = np.asarray(data)
    ranks = np.stack([by_column[names == name].mean(axis=0) for name in dict.fromkeys(data)])
    mean, sets = tuple(map(float, ranks.mean(axis=0))), len(ranks)
    if sets < 2:
        return Ranking(mean, None, None, columns, sets)
    quantile = float(studentized_range.ppf(1 - level, encoders, np.inf)) / math.sqrt(2)
    critical = quantile * math.sqrt(encoders * (encoders + 1) / (6 * sets))
    return Ranking(mean, critical, _friedman(ranks), columns, sets)


def _friedman(ranks: Array) -> float:
    """The p value for the ranks on each data set, (data sets, M)."""
    from scipy.stats import f

    columns, encoders = ranks.shape
    orders = math.factorial(encoders)
    if orders ** (columns - 1) <= _MOST_ORDERS:
        sums = ranks[:1]  # which encoder is called which does not matter, so one column may stand still
        shuffles = np.array(list(permutations(range(encoders))))
        for column in ranks[1:]:
            sums = (sums[:, None] + column[shuffles]).reshape(-1, encoders)
        spread = np.sum(sums**2, axis=1)
        return float(np.mean(spread >= np.sum(ranks.sum(axis=0) ** 2) - 1e-9))
    middle = (encoders + 1) / 2
    within = float(np.sum((ranks - middle) ** 2))
    if within == 0:
        return 1.0
    chi2 = (encoders - 1) * float(np.sum((ranks.sum(axis=0) - columns * middle) ** 2)) / within
    rest = columns * (encoders - 1) - chi2
    if rest <= 1e-12:
        return 0.0
    return float(f.sf((columns - 1) * chi2 / rest, encoders - 1, (encoders - 1) * (columns - 1)))


def sentence(
    first: str,
    second: str,
    found: Difference,
    p: float | None,
    unit: str,
    better_is_higher: bool,
    items: str = "items",
    groups: str = "groups",
) -> str:
    """A comparison in words: "B is better by 4.1 points (3.2 to 5.0), p < 0.001, on 2,640 items".

    Args:
        first, second: names of a and b.
        found: the difference of b to a.
        p: the p value to print, corrected where several are compared; None where there is no test that
            could find anything.
        unit: of the metric.
        better_is_higher: whether greater values are better.
        items, groups: what the items are, and what they come in, in the plural.
    """
    scale, points, digits = (100, " points", 1) if unit == "%" else (1, "", 3)
    signed = found.value if better_is_higher else -found.value
    winner, loser = (second, first) if signed >= 0 else (first, second)
    if 0 < scale * abs(found.value) < 0.5 * 10**-digits:
        digits += 1  # or a difference would read as none
    size = f"{scale * abs(found.value):.{digits}f}{points}"
    interval = ""
    if found.low is not None and found.high is not None:
        ends = sorted(scale * (x if found.value >= 0 else -x) for x in (found.low, found.high))
        interval = f" ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})"
    by = f"{found.items:,} {items}" + (
        f" in {found.independent:,} {groups}" if found.independent != found.items else ""
    )
    if p is None:
        few = groups if found.independent != found.items else f"independent {items}"
        test = "a test at 5%" if found.p is None or found.least >= 0.05 else "so many tests at 5%"
        ahead = f"{winner} leads {loser} by {size}" if found.value else f"{winner} and {loser} are equal"
        return f"{ahead}{interval} on {by}; too few {few} for {test}"
    shown = f"p {p_text(p)}" if p < 0.001 else f"p = {p_text(p)}"
    if p < 0.05:
        return f"{winner} is better than {loser} by {size}{interval}, {shown}, on {by}"
    return f"{winner} and {loser} are not told apart: {size}{interval}, {shown}, on {by}"


def p_text(p: float) -> str:
    """A p value as it is shown: three decimals, four next to the level of 0.05, and nothing below 0.001."""
    if p < 0.001:
        return "< 0.001"
    text = f"{p:.3f}"
    return f"{p:.4f}" if text == "0.050" and p != 0.05 else text


def _effect(groups: Array) -> float | None:
    spread = float(groups.std(ddof=1)) if len(groups) > 1 else 0.0
    # Differences that vary by their rounding alone do not vary.
    return float(groups.mean()) / spread if spread > 1e-9 * float(np.abs(groups).max()) else None
