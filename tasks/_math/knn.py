"""Exact nearest neighbours by inner product, and the votes that are taken over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...bench.types import Array
from .normalise import Rows, unit_rows

_TILE_ROWS = 65_536
_MOST_TIED = 4096
_TIED_ELEMENTS = 4_000_000
_BLOCK_ROWS = 4096
UNSEEN = np.iinfo(np.int32).max
"""The rank of a class without a vote."""


def passes(bank_rows: int) -> int:
    """How often ``search`` goes over the queries: once for every tile of the bank."""
    return -(-bank_rows // _TILE_ROWS)


def search(
    bank: Rows,
    queries: Rows,
    k: int,
    block: int,
    *,
    advance: Callable[[int], Any] = lambda done: None,
) -> tuple[Array, Array]:
    """The k rows of ``bank`` of largest cosine with every query, nearest first, by faiss's exact search.

    Both may be memory maps: rows are read and brought to unit length tile by tile and block by block. The
    search is for the smallest distances of unit rows from which one common vector was taken, the mean of the
    bank's first tile: the same order, but cosines next to 1 are told apart, as those of an encoder whose
    features nearly coincide, where float32 rounds all inner products to the same few numbers. The cosine of a
    row of zeros with any other is 0.

    Neighbours of equal similarity come in the order of their position, so that a vote does not depend on
    how the search was scheduled; of more than ``_MOST_TIED`` equal ones, those that faiss found.

    Args:
        bank: (N, D), N at least k.
        queries: (Q, D).
        k: neighbours.
        block: queries at once.
        advance: called with the number of queries after each block, ``passes(N) * Q`` in all.

    Returns:
        Similarity float64 (Q, k) and position int64 (Q, k).
    """
    distance = np.empty((len(queries), k), dtype=np.float32)
    position = np.empty((len(queries), k), dtype=np.int64)
    sample = min(_TILE_ROWS, len(bank))
    blocks = (bank[i : min(i + _BLOCK_ROWS, sample)] for i in range(0, sample, _BLOCK_ROWS))
    common = sum(unit_rows(rows, np.float64).sum(axis=0) for rows in blocks) / sample
    for start in range(0, len(bank), _TILE_ROWS):
        tile, empty = _directions(bank[start : start + _TILE_ROWS], common)
        held = min(k, start)  # neighbours known from earlier tiles
        for first in range(0, len(queries), block):
            rows = slice(first, min(first + block, len(queries)))
            asking, blank = _directions(queries[rows], common)
            best, index = _nearest(*_at_right_angles(asking, blank, tile, empty), min(k, len(tile)))
            found = np.concatenate([distance[rows, :held], best], axis=1)
            where = np.concatenate([position[rows, :held], index + start], axis=1)
            order = np.lexsort((where, found), axis=1)[:, :k]
            kept = order.shape[1]
            distance[rows, :kept] = np.take_along_axis(found, order, 1)
            position[rows, :kept] = np.take_along_axis(where, order, 1)
            advance(len(best))
        del tile  # or the next one would be made beside it
    return 1 - distance.astype(np.float64) / 2, position


def _directions(rows: Array, common: Array) -> tuple[Array, Array]:
    """Unit rows less a common vector, float32 (N, D), by blocks in float64, and which are zero (N,)."""
    out, zero = np.empty(rows.shape, dtype=np.float32), np.empty(len(rows), dtype=bool)
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        unit = unit_rows(rows[block], np.float64)
        zero[block] = ~unit.any(axis=1)
        out[block] = unit - common
    return out, zero


def _at_right_angles(queries: Array, blank: Array, tile: Array, empty: Array) -> tuple[Array, Array]:
    """Queries and tile, their rows of zeros moved by 1 into two further dimensions: the cosine of such a row
    with any other one is 0.
    """
    if not blank.any() and not empty.any():
        return queries, tile
    none, nowhere = np.zeros(len(queries), bool), np.zeros(len(tile), bool)
    moved = (np.column_stack([queries, blank, none]), np.column_stack([tile, nowhere, empty]))
    return moved[0].astype(np.float32), moved[1].astype(np.float32)


def _nearest(queries: Array, tile: Array, k: int) -> tuple[Array, Array]:
    """The k rows of smallest squared distance, ties in the order of their position."""
    import faiss

    asked = min(k + 1, len(tile))
    distance, index = faiss.knn(queries, tile, asked)
    order = np.lexsort((index, distance), axis=1)[:, :k]
    best, where = (np.take_along_axis(found, order, 1) for found in (distance, index))
    # What comes after the last one may be as near, and faiss keeps any of these.
    tied = np.flatnonzero((distance[:, -1] == best[:, -1]) & (asked > k))
    if len(tied) and k < min(_MOST_TIED, len(tile)):
        wider = min(2 * asked, _MOST_TIED, len(tile))
        step = max(1, _TIED_ELEMENTS // wider)
        for part in np.split(tied, range(step, len(tied), step)):
            best[part], where[part] = (found[:, :k] for found in _nearest(queries[part], tile, wider))
    return best, where


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


def true_ranks(weights: Array, labels: Array, truth: Array, ks: Sequence[int]) -> Array:
    """Rank of the true class in the vote of the nearest k, for every k, int64 (len(ks), Q); 0 is the winner.

    Among classes of equal weight the one with the nearest neighbour comes first. A class without a vote
    is never counted as predicted: its rank is ``UNSEEN``.

    Args:
        weights, labels: of the neighbours, nearest first, (Q, k) with k at least ``max(ks)``.
        truth: class of each query, (Q,).
        ks: numbers of neighbours.
    """
    queries, width = labels.shape
    # One candidate for each class that occurs among a query's neighbours, numbered by query and class.
    order = np.argsort(labels, axis=1, kind="stable")
    ordered = np.take_along_axis(labels, order, 1)
    new = np.ones(labels.shape, dtype=bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    candidate = np.empty(labels.shape, dtype=np.int64)
    np.put_along_axis(candidate, order, np.cumsum(new).reshape(labels.shape) - 1, 1)
    query = np.nonzero(new)[0]
    nearest, owner = order[new], ordered[new]  # a stable sort leaves the nearest of a class in front
    own = np.full(queries, -1)
    own[query[owner == truth[query]]] = np.flatnonzero(owner == truth[query])
    nearest_own = np.where(own < 0, width, nearest[own])

    ranks = np.empty((len(ks), queries), dtype=np.int64)
    for rank, k in zip(ranks, ks, strict=True):
        totals = np.bincount(candidate[:, :k].ravel(), weights[:, :k].ravel(), minlength=len(query))
        theirs = totals[own][query]
        ahead = (totals > theirs) | ((totals == theirs) & (nearest < nearest_own[query]))
        ahead &= nearest < k
        rank[:] = np.where(nearest_own < k, np.bincount(query[ahead], minlength=queries), UNSEEN)
    return ranks


def blind_rates(weights: Array, labels: Array, share: Array, ks: Sequence[int], top: int = 1) -> list[float]:
    """How often the class of a query is among the first ``top`` where labels know nothing of it, by k.

    Args:
        weights: of the neighbours, nearest first, (Q, k).
        labels: of the neighbours, (Q, k), drawn without regard to the queries.
        share: of each class among the queries, (C,).
        ks: numbers of neighbours.
    """
    rates = []
    first = np.zeros(labels.shape, dtype=bool)  # a class stands where its nearest neighbour does
    order = np.argsort(labels, axis=1, kind="stable")
    ordered = np.take_along_axis(labels, order, 1)
    np.put_along_axis(first, order, np.diff(ordered, axis=1, prepend=-1) != 0, 1)
    for k in ks:
        totals = class_totals(weights[:, :k], labels[:, :k], len(share))
        totals = np.where(first[:, :k], totals, -1.0)
        best = np.argsort(-totals, axis=1, kind="stable")[:, :top]
        voted = np.take_along_axis(first[:, :k], best, 1)
        rates.append(float((share[np.take_along_axis(labels[:, :k], best, 1)] * voted).sum(axis=1).mean()))
    return rates


def winner(totals: Array, labels: Array) -> Array:
    """The class with the largest total, ties to the class of the nearest neighbour, (Q,)."""
    # argmax returns the first maximum, and columns are in order of nearness.
    return np.take_along_axis(labels, totals.argmax(axis=1)[:, None], 1)[:, 0]
