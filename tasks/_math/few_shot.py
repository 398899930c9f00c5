"""Nearest class mean over many support sets at once, and N-way K-shot episodes without a loop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...bench.types import Array
from .normalise import unit_rows

_BLOCK_ELEMENTS = 16_000_000


def class_means(rows: Array, labels: Array) -> Array:
    """Mean of the rows of each class that occurs, by rising class index, at unit length, float64 (C', D)."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    # The sum points where the mean points, and only the direction is kept.
    return unit_rows(np.add.reduceat(rows[order], starts, axis=0, dtype=np.float64), np.float64)


def _apart(means: Array) -> Array:
    """Unit means (..., C, D) less the mean of the set, float32: that moves no argmax over its classes, and
    where all nearly coincide the products with queries are not of their rounding errors.
    """
    return np.asarray(means - means.mean(axis=-2, keepdims=True), dtype=np.float32)


def nearest_mean(rows: Array, means: Array) -> Array:
    """Index of the class mean of largest cosine, for every support set at once.

    Args:
        rows: unit features (N, D).
        means: unit class means of R support sets, (R, C, D).

    Returns:
        Positions in 0..C-1, int64 (R, N).
    """
    sets, classes, width = means.shape
    flat = _apart(means).reshape(sets * classes, width).T
    found = np.empty((sets, len(rows)), dtype=np.int64)
    block = max(1, _BLOCK_ELEMENTS // (sets * classes))
    for start in range(0, len(rows), block):
        similarity = (rows[start : start + block] @ flat).reshape(-1, sets, classes)
        found[:, start : start + block] = similarity.argmax(axis=2).T
    return found


def draw_distinct(sizes: Array, count: int, rng: np.random.Generator) -> Array:
    """For each m, ``count`` different numbers below sizes[m], in random order, int64 (M, count).

    All ordered samples are equally likely. The j-th number is drawn among those that are left and
    shifted past the ones that were drawn before it, so that nothing of size ``sizes`` is ever built.

    Raises:
        ValueError: a size is below ``count``.
    """
    if len(sizes) and int(sizes.min()) < count:
        raise ValueError(f"cannot draw {count} different items from {int(sizes.min())}")
    drawn = np.empty((len(sizes), count), dtype=np.int64)
    taken = np.empty((len(sizes), 0), dtype=np.int64)
    for j in range(count):
        number = rng.integers(0, sizes - j)
        for t in range(j):  # ascending, so one comparison with each taken number is enough
            number += number >= taken[:, t]
        drawn[:, j] = number
        taken = np.sort(np.column_stack([taken, number]), axis=1)
    return drawn


@dataclass(frozen=True)
class EpisodePlan:
    """What a split has images for: ``way`` of the ``classes``, ``shot`` + ``query`` images of each."""

    classes: Array
    way: int
    shot: int
    query: int


def plan_episodes(counts: Array, way: int, shot: int, query: int) -> EpisodePlan | None:
    """The largest episode within what is asked: first fewer queries, then fewer ways; None below two ways.

    Args:
        counts: images of each class, (C,).
        way: classes an episode.
        shot: support images a class.
        query: query images a class.
    """
    for fewer in range(query, 0, -1):
        classes = np.flatnonzero(counts >= shot + fewer)
        if len(classes) >= way:
            return EpisodePlan(classes, way, shot, fewer)
    classes = np.flatnonzero(counts > shot)
    if len(classes) < 2:
        return None
    return EpisodePlan(classes, len(classes), shot, min(query, int(counts[classes].min()) - shot))


def sample_episodes(labels: Array, plan: EpisodePlan, episodes: int, rng: np.random.Generator) -> Array:
    """Row positions of every episode, (E, way, shot + query): support first, all different.

    Classes are drawn without replacement in each episode, and so are the images of a class.
    """
    by_class = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    starts = np.cumsum(counts) - counts
    sizes = np.full(episodes, len(plan.classes))
    chosen = plan.classes[draw_distinct(sizes, plan.way, rng)]
    within = draw_distinct(counts[chosen].ravel(), plan.shot + plan.query, rng)
    return np.asarray(by_class[starts[chosen][..., None] + within.reshape(*chosen.shape, -1)])


def episode_hits(rows: Array, picks: Array, shot: int) -> Array:
    """Whether nearest class mean (cosine) is right on each query of each episode, bool (E, way, query).

    Args:
        rows: unit features (N, D).
        picks: row positions (E, way, shot + query), support first.
        shot: support images a class.
    """
    episodes, way, images = picks.shape
    hits = np.empty((episodes, way, images - shot), dtype=bool)
    truth = np.arange(way)[:, None]
    block = max(1, _BLOCK_ELEMENTS // (way * images * rows.shape[1]))
    for start in range(0, episodes, block):
        part = picks[start : start + block]
        means = rows[part[:, :, :shot]].sum(axis=2, dtype=np.float64)  # (e, way, D)
        # Means of one length each, since a query compares them; its own length moves no argmax.
        means = _apart(unit_rows(means.reshape(-1, rows.shape[1]), np.float64).reshape(means.shape))
        queries = rows[part[:, :, shot:].reshape(len(part), -1)]  # (e, way * query, D)
        similarity = queries @ means.transpose(0, 2, 1)  # (e, way * query, way)
        found = similarity.argmax(axis=2).reshape(len(part), way, -1)
        hits[start : start + block] = found == truth
    return hits


def image_terms(hits: Array, picks: Array, images: int) -> Array:
    """Per-image numbers (N,) whose mean is the mean accuracy of episodes, exactly, and whose spread is that
    of it over other images.

    Episodes share their images, so that they are no independent items. An image adds to the value what it
    does as a query, and what the episodes that it supports are better or worse than all: the first-order
    terms of a statistic of samples (Hoeffding 1948). The second part rests on few episodes an image; it is
    scaled down by the share of its variance that comes from that, but for what the episodes' own number
    leaves uncertain in the value.

    Args:
        hits: (E, way, query) as ``episode_hits`` gives them.
        picks: row positions (E, way, shot + query), support first.
        images: N.
    """
    episodes, _, query = hits.shape
    value, accuracy = hits.mean(), hits.mean(axis=(1, 2))

    def summed(places: Array, weights: Array) -> Array:
        """The excess of weights over the value, summed by image."""
        excess = np.broadcast_to(weights - value, places.shape)
        return np.bincount(places.ravel(), weights=excess.ravel(), minlength=images)

    supports = picks[:, :, : picks.shape[2] - query].reshape(episodes, -1)
    asked = summed(picks[:, :, picks.shape[2] - query :], hits) / hits.size
    helped = summed(supports, accuracy[:, None]) / episodes
    chance = (supports.shape[1] - 1) * accuracy.var() / episodes
    spread = np.sum(helped**2)
    kept = np.sqrt(max(0.0, 1 - chance / spread)) if spread > 0 else 0.0
    return np.asarray(value + images * (asked + kept * helped))
