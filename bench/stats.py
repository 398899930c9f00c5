"""Intervals over the items that a metric was measured on.

The bias-corrected and accelerated bootstrap (Efron 1987, "Better Bootstrap Confidence Intervals"; Efron and
Tibshirani 1993, chapter 14), and Wilson's score interval for shares of independent 0/1 outcomes, which holds
its level where all outcomes are alike (Brown, Cai and DasGupta 2001). Few independent items make a bootstrap
too narrow, as a normal quantile in place of Student's would: its levels are widened to match (Hesterberg
2015, "What Teachers Should Know About the Bootstrap"). Pure functions of arrays and a generator.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from .types import Array, Measurement, Score, Statistic, mean_statistic

LEVEL = 0.95
RESAMPLES = 2000
_CHUNK_ELEMENTS = 4_000_000


def score(measurement: Measurement, rng: np.random.Generator) -> Score:
    """The value of a measurement, its 95% interval and the number of items behind it.

    Raises:
        ValueError: no items, or items that are not finite.
    """
    items = np.asarray(measurement.items, dtype=np.float64)
    if items.size == 0 or not np.isfinite(items).all():
        raise ValueError(f"{measurement.metric} was measured on no items, or on items that are not finite")
    if measurement.crossed:
        value = float(items.mean())
        interval = crossed_bootstrap(items, rng)
        n = int(items.shape[1])
    else:
        rows = items[:, None] if items.ndim == 1 else items.reshape(len(items), -1)
        value = float(measurement.statistic(rows.mean(axis=0)[None])[0])
        n = len(rows)
        if measurement.clusters is None and items.ndim == 1 and is_plain(measurement) and _binary(items):
            interval = wilson(int(items.sum()), n) if n > 1 else None
        else:
            interval = bootstrap(rows, measurement.statistic, rng, clusters=measurement.clusters)
    low, high = interval if interval is not None else (None, None)
    return Score(
        metric=measurement.metric,
        value=value,
        low=low,
        high=high,
        n=n,
        chance=None if measurement.chance is None else float(measurement.chance),
        detail=dict(measurement.detail),
    )


def is_plain(measurement: Measurement) -> bool:
    """Whether the value is the mean of the items, so that items of two encoders can be subtracted."""
    return measurement.statistic is mean_statistic


def terms(measurement: Measurement) -> Array:
    """Per-item numbers (N,) whose mean is the measurement's value, exactly, and whose spread is its spread.

    For a mean they are the items. For another statistic they are its value plus the jackknife's influence of
    each item (Efron 1982): to first order the statistic is their mean, so that two encoders can be compared
    item by item without the statistic at hand.
    """
    items = np.asarray(measurement.items, dtype=np.float64)
    if is_plain(measurement):
        return items
    rows = items[:, None] if items.ndim == 1 else items.reshape(len(items), -1)
    n, total = len(rows), rows.sum(axis=0)
    value = float(measurement.statistic((total / n)[None])[0])
    if n == 1:
        return np.array([value])
    left_out = np.concatenate(
        [measurement.statistic((total - part) / (n - 1)) for part in np.array_split(rows, _parts(rows))]
    )
    influence = (n - 1) * (value - left_out)
    return np.asarray(value + influence - influence.mean())


def _parts(rows: Array) -> int:
    return max(1, rows.size // _CHUNK_ELEMENTS)


def wilson(hits: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a share ``hits / n``."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, weight = hits / n, z * z / n
    centre = (share + weight / 2) / (1 + weight)
    reach = z * ((share * (1 - share) + weight / 4) / n) ** 0.5 / (1 + weight)
    # At either end the sum is the end itself, but for rounding.
    return (0.0 if hits == 0 else max(0.0, centre - reach)), (1.0 if hits == n else min(1.0, centre + reach))


def _binary(items: Array) -> bool:
    return bool(((items == 0) | (items == 1)).all())


def bootstrap(
    rows: Array,
    statistic: Statistic,
    rng: np.random.Generator,
    *,
    clusters: Array | None = None,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[float, float] | None:
    """BCa interval of ``statistic(mean of rows)``.

    Args:
        rows: (N, F) per-item numbers.
        statistic: from means (R, F) to values (R,).
        rng: source of the resamples.
        clusters: (N,) group ids; whole groups are resampled (a resample's mean weighs every item alike).
        resamples: number of bootstrap samples.
        level: nominal coverage.

    Returns:
        The interval, or None where fewer than two independent items leave nothing to resample.
    """
    sums, sizes = _by_cluster(rows, clusters)
    groups = len(sums)
    if groups < 2:
        return None
    # Equal rows are exchangeable: drawing how often each distinct row comes up is the same resample,
    # and for 0/1 outcomes it turns N draws into one binomial.
    table, inverse, counts = np.unique(
        np.column_stack([sums, sizes]), axis=0, return_inverse=True, return_counts=True
    )
    del inverse
    values = np.empty(resamples)
    chunk = max(1, _CHUNK_ELEMENTS // len(table))
    for start in range(0, resamples, chunk):
        stop = min(resamples, start + chunk)
        weights = rng.multinomial(groups, counts / groups, size=stop - start)
        totals = weights @ table
        values[start:stop] = statistic(totals[:, :-1] / totals[:, -1:])
    total = counts @ table
    value = float(statistic((total[:-1] / total[-1])[None])[0])
    left_out = total[None] - table
    jackknife = statistic(left_out[:, :-1] / left_out[:, -1:])
    return _bca(value, values, jackknife, counts, _reach(level, groups - 1, groups))


def crossed_bootstrap(
    table: Array, rng: np.random.Generator, *, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[float, float] | None:
    """Percentile interval of the mean of an (A, N) table whose rows and columns are both samples.

    Rows (draws of a training set) and columns (test items) are resampled independently, which is the
    conservative "pigeonhole" bootstrap of Owen (2007) for two crossed random effects.

    Returns:
        The interval, or None where either axis has fewer than two entries.
    """
    if min(table.shape) < 2:
        return None
    return crossed_interval(table, crossed_bootstrap_values(table, rng, resamples), level)


def crossed_interval(table: Array, values: Array, level: float = LEVEL) -> tuple[float, float]:
    """The interval of a crossed table's mean from its resampled means.

    The few draws weigh in by Satterthwaite's degrees of freedom: as much as they make up of the variance.
    """
    parts = [table.mean(axis=1 - axis).var(ddof=1) / table.shape[axis] for axis in (0, 1)]
    whole = sum(parts)
    if whole <= 0:
        return _percentiles(values, NormalDist().inv_cdf((1 + level) / 2))
    spread = sum(part**2 / (n - 1) for part, n in zip(parts, table.shape, strict=True))
    freedom = whole**2 / spread
    return _percentiles(values, _reach(level, freedom, freedom + 1))


def crossed_bootstrap_values(table: Array, rng: np.random.Generator, resamples: int = RESAMPLES) -> Array:
    """The resampled means (R,) behind ``crossed_bootstrap``."""
    draws, items = table.shape
    # Equal columns are exchangeable, as equal rows are above: ten draws of 0/1 outcomes have 1024 at most.
    columns, counts = np.unique(table, axis=1, return_counts=True)
    values = np.empty(resamples)
    chunk = max(1, _CHUNK_ELEMENTS // len(counts))
    for start in range(0, resamples, chunk):
        stop = min(resamples, start + chunk)
        by_row = rng.multinomial(draws, np.full(draws, 1 / draws), size=stop - start)
        by_column = rng.multinomial(items, counts / items, size=stop - start)
        values[start:stop] = np.einsum("ra,ra->r", by_row, by_column @ columns.T) / (draws * items)
    return values


def _percentiles(values: Array, reach: float) -> tuple[float, float]:
    """The interval between two quantiles of resampled values, ``reach`` normal deviations apart each."""
    tail = NormalDist().cdf(-reach)
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _reach(level: float, freedom: float, groups: float) -> float:
    """How many normal deviations the ends of an interval lie out, for so few independent items."""
    from scipy.special import stdtrit

    return float((groups / (groups - 1)) ** 0.5 * stdtrit(freedom, (1 + level) / 2))


def _by_cluster(rows: Array, clusters: Array | None) -> tuple[Array, Array]:
    if clusters is None:
        return rows, np.ones(len(rows))
    _, ids, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    sums = np.zeros((len(sizes), rows.shape[1]))
    np.add.at(sums, ids, rows)
    return sums, sizes.astype(np.float64)


def _bca(value: float, values: Array, jackknife: Array, counts: Array, reach: float) -> tuple[float, float]:
    normal = NormalDist()
    below = (np.count_nonzero(values < value) + 0.5 * np.count_nonzero(values == value)) / len(values)
    if below in (0.0, 1.0):  # every resample on one side: the correction is infinite, so leave it out
        return _percentiles(values, reach)
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
