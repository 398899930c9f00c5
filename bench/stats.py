"""Intervals over the items that a metric was measured on.

The bias-corrected and accelerated bootstrap (Efron 1987, "Better Bootstrap Confidence Intervals"; Efron and
Tibshirani 1993, chapter 14), and score intervals for shares of independent 0/1 outcomes and for differences
of two of them (Wilson's and Tango's), which hold their level where all outcomes are alike (Brown, Cai and
DasGupta 2001). Few independent items make a bootstrap too narrow, as a normal quantile in place of Student's
would: its levels are widened to match (Hesterberg 2015, "What Teachers Should Know About the Bootstrap"). A
resample never leaves the range of the items, so that with very few of them, and over draws of a training
set, it is Student's interval itself; so it is where nearly all resamples lie on one side of the value
(classes of a mean IoU that only one image has).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from .atomic import plain_json
from .types import Array, Measurement, Score, Statistic, mean_statistic

LEVEL = 0.95
RESAMPLES = 2000
_MOST, _DRAWS = 20_000, 400_000
"""Resamples of few items cost little, and their quantiles would else move with the draws."""
CHUNK_ELEMENTS = 4_000_000
_FEW = 8
"""Fewer independent items than this get Student's interval."""
_OTHERS = 5
"""Fewer groups than this that are not all 0, or not all 1, say little of how many such there are."""
_BESIDE = 1e-12
_LOPSIDED = 0.1
"""So do values with fewer than this share of the resamples below or above them."""


def score(measurement: Measurement, rng: np.random.Generator) -> Score:
    """The value of a measurement, its 95% interval and the number of items behind it.

    Raises:
        ValueError: no items, or items that are not finite.
    """
    items = np.asarray(measurement.items, dtype=np.float64)
    if items.size == 0 or not np.isfinite(items).all():
        raise ValueError(f"{measurement.metric} was measured on no items, or on items that are not finite")
    leading = 2 if measurement.crossed else 1
    if not leading <= items.ndim <= leading + (not is_plain(measurement)):
        shape = "(A, N)" if measurement.crossed else "(N,)"
        raise ValueError(
            f"items of shape {items.shape} are not {shape}; several numbers an item need a statistic"
        )
    if measurement.clusters is not None and len(measurement.clusters) != items.shape[leading - 1]:
        raise ValueError(f"{len(measurement.clusters)} clusters for {items.shape[leading - 1]} items")
    value = value_of(measurement)
    n = items.shape[1] if measurement.crossed else len(items)
    interval: tuple[float, float] | None
    if measurement.crossed:
        table = terms(measurement)
        interval = crossed_interval(table)
        if not is_plain(measurement) and np.ptp(table.mean(axis=0)) == 0:
            interval = None  # no item makes a difference of its own
    else:
        rows = _rows(items)
        if measurement.clusters is None and items.ndim == 1 and is_plain(measurement) and is_binary(items):
            interval = wilson(int(items.sum()), n) if n > 1 else None
        else:
            interval = bootstrap(rows, measurement.statistic, rng, clusters=measurement.clusters)
    shares = _is_share(measurement, items)
    if interval is not None and shares:
        interval = _beside_an_end(interval, value, items, measurement.clusters)
    low, high = interval if interval is not None else (None, None)
    bounds = (0.0, 1.0) if shares else measurement.bounds
    if low is not None and high is not None and bounds is not None:
        low, high = max(bounds[0], low), min(bounds[1], high)
    return Score(
        metric=measurement.metric,
        value=value,
        low=low,
        high=high,
        n=n,
        chance=None if measurement.chance is None else float(measurement.chance),
        detail=json.loads(json.dumps(dict(measurement.detail), default=plain_json)),
    )


def _beside_an_end(
    interval: tuple[float, float], value: float, items: Array, clusters: Array | None
) -> tuple[float, float]:
    """An interval of a mean of shares, as wide as Wilson's at least where hardly any group is not all 0 or
    all 1: what does not vary among so few is no certainty for that.
    """
    columns = items.reshape(-1, items.shape[-1])
    sums, sizes = by_cluster(columns.T, clusters)
    means = sums.mean(axis=1) / sizes
    if min(np.count_nonzero(means != end) for end in (0, 1)) >= _OTHERS:
        return interval
    low, high = wilson(value * len(means), len(means))
    return min(interval[0], low), max(interval[1], high)


def is_plain(measurement: Measurement) -> bool:
    """Whether the value is the mean of the items, so that items of two encoders can be subtracted."""
    return measurement.statistic is mean_statistic


def value_of(measurement: Measurement) -> float:
    """The value: the statistic of the items' mean; with ``crossed`` its mean over the draws."""
    items = np.asarray(measurement.items, dtype=np.float64)
    means = items.mean(axis=1) if measurement.crossed else items.mean(axis=0)[None]
    return float(np.mean(measurement.statistic(means.reshape(len(means), -1))))


def terms(measurement: Measurement) -> Array:
    """Per-item numbers (N,) whose mean is the measurement's value, exactly, and whose spread is its spread;
    with ``crossed`` those of every draw, (A, N).

    For a mean they are the items. For another statistic they are its value plus the jackknife's influence of
    each item (Efron 1982): to first order the statistic is their mean, so that two encoders can be compared
    item by item without the statistic at hand.
    """
    items = np.asarray(measurement.items, dtype=np.float64)
    if is_plain(measurement):
        return items
    if measurement.crossed:
        return np.stack([_influences(_rows(draw), measurement.statistic) for draw in items])
    return _influences(_rows(items), measurement.statistic)


def _rows(items: Array) -> Array:
    return items.reshape(len(items), -1)


def _influences(rows: Array, statistic: Statistic) -> Array:
    """The first-order terms (N,) of a statistic of the mean of rows (N, F)."""
    n, total = len(rows), rows.sum(axis=0)
    value = float(statistic((total / n)[None])[0])
    if n == 1:
        return np.array([value])
    left_out = np.concatenate(
        [statistic((total - part) / (n - 1)) for part in np.array_split(rows, _parts(rows))]
    )
    influence = (n - 1) * (value - left_out)
    return np.asarray(value + influence - influence.mean())


def _parts(rows: Array) -> int:
    return max(1, rows.size // CHUNK_ELEMENTS)


def wilson(hits: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a share ``hits / n``."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, weight = hits / n, z * z / n
    centre = (share + weight / 2) / (1 + weight)
    reach = z * ((share * (1 - share) + weight / 4) / n) ** 0.5 / (1 + weight)
    # At either end the sum is the end itself, but for rounding.
    return (0.0 if hits == 0 else max(0.0, centre - reach)), (1.0 if hits == n else min(1.0, centre + reach))


def tango(only_a: int, only_b: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Score interval of the difference b - a of two shares of the same ``n`` items (Tango, Statistics in
    Medicine 1998): the differences that McNemar's score test does not reject.

    It holds its level where few items differ, and has a width where none does.

    Args:
        only_a, only_b: items that a alone has right, and that b alone has right.
        n: all items.
        level: nominal coverage.
    """
    from scipy.optimize import brentq

    z = NormalDist().inv_cdf((1 + level) / 2)
    value = (only_b - only_a) / n

    def excess(difference: float) -> float:
        # The likeliest share of a alone where b is ahead by so much: the root of a square equation.
        linear = (2 * n - only_b + only_a) * difference - only_b - only_a
        product = -only_a * difference * (1 - difference)
        share = (max(0.0, linear**2 - 8 * n * product) ** 0.5 - linear) / (4 * n)
        variance = n * (2 * share + difference * (1 - difference))
        return float((n * (value - difference)) ** 2 - z * z * variance)

    # The value itself, where the variance may be 0, is a root that is not meant.
    low = -1.0 if value == -1 else float(brentq(excess, -1.0, value - _BESIDE))
    high = 1.0 if value == 1 else float(brentq(excess, value + _BESIDE, 1.0))
    return low, high


def is_binary(items: Array) -> bool:
    """Whether there is nothing but 0 and 1."""
    return bool(((items == 0) | (items == 1)).all())


def _is_share(measurement: Measurement, items: Array) -> bool:
    """Whether the value is a mean of numbers from 0 to 1, which an interval has no reason to leave."""
    return is_plain(measurement) and bool(((items >= 0) & (items <= 1)).all())


def bootstrap(
    rows: Array,
    statistic: Statistic,
    rng: np.random.Generator,
    *,
    clusters: Array | None = None,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[float, float] | None:
    """BCa interval of ``statistic(mean of rows)``. Student's, by the jackknife's error, of very few groups,
    and where so many resamples lie on one side of the value that BCa's correction may end beyond it.

    Args:
        rows: (N, F) per-item numbers.
        statistic: from means (R, F) to values (R,).
        rng: source of the resamples.
        clusters: (N,) group ids; whole groups are resampled (a resample's mean weighs every item alike).
        resamples: number of bootstrap samples.
        level: nominal coverage.

    Returns:
        The interval, or None where fewer than two independent items leave nothing to resample, or where
        the resamples differ and no item makes a difference of its own.
    """
    sums, sizes = by_cluster(rows, clusters)
    groups = len(sums)
    if groups < 2:
        return None
    # Equal rows are exchangeable: drawing how often each distinct row comes up is the same resample,
    # and for 0/1 outcomes it turns N draws into one binomial.
    table, counts = np.unique(np.column_stack([sums, sizes]), axis=0, return_counts=True)
    total = counts @ table
    value = float(statistic((total[:-1] / total[-1])[None])[0])
    left_out = total[None] - table
    jackknife = statistic(left_out[:, :-1] / left_out[:, -1:])
    if groups < _FEW:
        return _student(value, jackknife, counts, level)
    resamples = max(resamples, min(_MOST, _DRAWS // len(table)))
    values = np.empty(resamples)
    chunk = max(1, CHUNK_ELEMENTS // len(table))
    for start in range(0, resamples, chunk):
        stop = min(resamples, start + chunk)
        weights = rng.multinomial(groups, counts / groups, size=stop - start)
        totals = weights @ table
        values[start:stop] = statistic(totals[:, :-1] / totals[:, -1:])
    below = (np.count_nonzero(values < value) + 0.5 * np.count_nonzero(values == value)) / resamples
    if not _LOPSIDED <= below <= 1 - _LOPSIDED:
        low, high = _student(value, jackknife, counts, level)
        return (low, high) if high > low else None
    return _bca(below, values, jackknife, counts, _reach(level, groups - 1, groups))


def over_seeds(scores: Sequence[tuple[float, float, float]], level: float = LEVEL) -> tuple[float, float]:
    """Interval of the mean of several seeds' values, from each one's (value, low, high) on the same items.

    The sampling of items is common to all seeds, so that more of them do not make it less; the variance of
    their mean is added to it. The degrees of freedom are Satterthwaite's, as in ``crossed_error``. Seeds that
    agree leave their own interval.
    """
    from scipy.special import stdtrit

    values, lows, highs = np.array(scores, dtype=np.float64).T
    n, mean, normal = len(values), float(values.mean()), NormalDist().inv_cdf((1 + level) / 2)
    seeds = float(values.var(ddof=1)) / n if n > 1 else 0.0
    ends = []
    for reach in (lows - values, highs - values):
        whole = float(np.mean((reach / normal) ** 2)) + seeds
        freedom = (n - 1) * (whole / seeds) ** 2 if seeds else np.inf
        ends.append(float(stdtrit(freedom, (1 + level) / 2)) * whole**0.5)
    return mean - ends[0], mean + ends[1]


def crossed_interval(table: Array, level: float = LEVEL) -> tuple[float, float] | None:
    """Student's interval of the mean of an (A, N) table whose rows and columns are both samples.

    Returns:
        The interval, or None where either axis has fewer than two entries.
    """
    if min(table.shape) < 2:
        return None
    error, freedom = crossed_error(table)
    return _around(float(table.mean()), error, freedom, level)


def crossed_error(table: Array) -> tuple[float, float]:
    """Standard error of the mean of an (A, N) table, and its degrees of freedom.

    Rows (draws of a training set) and columns (test items) are both random. The variances of the mean that
    either brings about add up, which counts what is particular to one cell twice: resampling both of them
    does so as well (Owen 2007, "The pigeonhole bootstrap"), and it errs to the safe side. The degrees of
    freedom are Satterthwaite's (1946): few draws weigh in as much as they make up of the variance.
    """
    parts = [float(table.mean(axis=1 - axis).var(ddof=1)) / table.shape[axis] for axis in (0, 1)]
    whole = sum(parts)
    if whole <= 0:
        return 0.0, float(max(table.shape) - 1)
    spread = sum(part**2 / (n - 1) for part, n in zip(parts, table.shape, strict=True))
    return whole**0.5, whole**2 / spread


def _student(value: float, jackknife: Array, counts: Array, level: float) -> tuple[float, float]:
    freedom = int(counts.sum()) - 1
    centre = np.average(jackknife, weights=counts)
    variance = float(np.average((jackknife - centre) ** 2, weights=counts))
    return _around(value, (freedom * variance) ** 0.5, freedom, level)


def _around(value: float, error: float, freedom: float, level: float) -> tuple[float, float]:
    from scipy.special import stdtrit

    reach = error * float(stdtrit(freedom, (1 + level) / 2))
    return value - reach, value + reach


def _reach(level: float, freedom: float, groups: float) -> float:
    """How many normal deviations the ends of an interval lie out, for so few independent items."""
    from scipy.special import stdtrit

    return float((groups / (groups - 1)) ** 0.5 * stdtrit(freedom, (1 + level) / 2))


def by_cluster(rows: Array, clusters: Array | None) -> tuple[Array, Array]:
    """Rows (N, F) summed within each cluster, (G, F), and how many rows each has, float64 (G,)."""
    if clusters is None:
        return rows, np.ones(len(rows))
    _, ids, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    sums = np.zeros((len(sizes), rows.shape[1]))
    np.add.at(sums, ids, rows)
    return sums, sizes.astype(np.float64)


def _bca(below: float, values: Array, jackknife: Array, counts: Array, reach: float) -> tuple[float, float]:
    normal = NormalDist()
    bias = normal.inv_cdf(below)
    centre = np.average(jackknife, weights=counts)
    spread = np.sum(counts * (centre - jackknife) ** 2)
    skew = np.sum(counts * (centre - jackknife) ** 3)
    acceleration = skew / (6 * spread**1.5) if spread > 0 else 0.0
    bounds = []
    for z in (-reach, reach):
        shifted = bias + z
        bounds.append(normal.cdf(bias + shifted / (1 - acceleration * shifted)))
    low, high = np.quantile(values, bounds)
    return float(low), float(high)
