"""Exact nearest neighbours by inner product, and the votes that are taken over them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ...bench.types import Array
from .normalise import unit_rows

_INDEX_ROWS = 65_536


def cosine_index(rows: Array) -> Any:
    """A faiss flat index over L2-normalised rows (N, D), filled in blocks so that a memory map streams."""
    import faiss

    index = faiss.IndexFlatIP(rows.shape[1])
    for start in range(0, len(rows), _INDEX_ROWS):
        index.add(unit_rows(rows[start : start + _INDEX_ROWS]))
    return index


def neighbours(index: Any, rows: Array, k: int, block: int) -> Iterator[tuple[slice, Array, Array]]:
    """The k nearest of every query, nearest first, in blocks of queries.

    Yields (block, similarity (b, k) float32, position (b, k) int64). Neighbours of equal similarity come
    in the order of their position, so that a vote does not depend on how the search was scheduled.
    """
    for start in range(0, len(rows), block):
        where = slice(start, min(start + block, len(rows)))
        similarity, position = index.search(unit_rows(rows[where]), k)
        order = np.lexsort((position, -similarity), axis=1)
        yield where, np.take_along_axis(similarity, order, 1), np.take_along_axis(position, order, 1)


def without_self(position: Array, own: Array) -> Array:
    """Drop each query's own position from its neighbours, (Q, k) -> (Q, k-1).

    Where exact duplicates pushed the query itself out of the list, the last neighbour is dropped instead.
    """
    keep = position != own[:, None]
    keep[keep.all(axis=1), -1] = False
    others: Array = position[keep].reshape(len(position), -1)
    return others


def exponential_weights(similarity: Array, temperature: float) -> Array:
    """DINO's exp(sim / T) up to a factor a query, which moves no vote and cannot overflow. (Q, k)"""
    similarity = similarity.astype(np.float64)
    return np.asarray(np.exp((similarity - similarity.max(axis=1, keepdims=True)) / temperature))


def class_totals(weights: Array, labels: Array, n_classes: int) -> Array:
    """Total weight of the class that each neighbour belongs to, (Q, k) from weights and labels (Q, k)."""
    cell = labels + n_classes * np.arange(len(labels))[:, None]
    totals = np.bincount(cell.ravel(), weights.ravel(), minlength=n_classes * len(labels))
    return totals[cell]


def true_rank(totals: Array, labels: Array, truth: Array) -> Array:
    """Rank of the true class in the vote, 0 is the winner, int64 (Q,).

    Among classes of equal weight the one with the nearest neighbour comes first. A class without a vote
    is never counted as predicted: its rank is k.
    """
    k = labels.shape[1]
    is_true = labels == truth[:, None]
    nearest_true = is_true.argmax(axis=1)
    own = np.take_along_axis(totals, nearest_true[:, None], 1)
    ahead = (totals > own) | ((totals == own) & (np.arange(k) < nearest_true[:, None]))
    rank = (ahead & _first_of_class(labels)).sum(axis=1)
    return np.asarray(np.where(is_true.any(axis=1), rank, k))


def winner(totals: Array, labels: Array) -> Array:
    """The class with the largest total, ties to the class of the nearest neighbour, (Q,)."""
    # argmax returns the first maximum, and columns are in order of nearness.
    return np.take_along_axis(labels, totals.argmax(axis=1)[:, None], 1)[:, 0]


def _first_of_class(labels: Array) -> Array:
    """True where no nearer neighbour of the same query has the same label, (Q, k)."""
    order = np.argsort(labels, axis=1, kind="stable")
    ordered = np.take_along_axis(labels, order, 1)
    new = np.ones(labels.shape, dtype=bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.empty_like(new)
    np.put_along_axis(first, order, new, 1)
    return first
