"""Agglomerative trees of the tokens of one image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Linkage = Literal["ward", "average", "complete"]


def merge_tree(tokens: NDArray[np.floating], method: Linkage = "ward") -> NDArray[np.float64]:
    """Agglomerative tree of tokens (n, D) by Euclidean distance, as scipy's linkage matrix (n - 1, 4)."""
    from scipy.cluster.hierarchy import linkage

    x = np.asarray(tokens, dtype=np.float64)
    if len(x) < 2:
        return np.zeros((0, 4))
    # Distances from one matrix product; about the mean, where the subtraction loses least.
    x = x - x.mean(axis=0)
    square = np.einsum("nd,nd->n", x, x)
    upper = np.triu_indices(len(x), 1)
    squared: NDArray[np.float64] = (square[:, None] + square - 2 * (x @ x.T))[upper]
    return np.asarray(linkage(np.sqrt(np.maximum(squared, 0)), method))


def cut_tree(tree: NDArray[np.float64], clusters: Sequence[int]) -> NDArray[np.int32]:
    """Labels of the leaves when a tree is cut into exactly k clusters, for each k: (len(clusters), n).

    Labels run from 0 in the order in which clusters first appear among the leaves. Asking for more
    clusters than there are leaves gives each its own.
    """
    from scipy.cluster.hierarchy import leaves_list

    n = len(tree) + 1
    leaves = leaves_list(tree) if len(tree) else np.zeros(1, dtype=np.int32)
    sizes = np.concatenate([np.ones(n, dtype=np.int64), tree[:, 3].astype(np.int64)])
    labels = np.empty((len(clusters), n), dtype=np.int32)
    # Node ids grow with the merge height, and the leaves below a node are neighbours in ``leaves``:
    # undoing the highest merge splits one interval in two.
    starts = {2 * n - 2: 0}
    for row in sorted(range(len(clusters)), key=lambda i: clusters[i]):
        while len(starts) < min(clusters[row], n):
            node = max(starts)
            start = starts.pop(node)
            left, right = (int(child) for child in tree[node - n, :2])
            starts[left], starts[right] = start, start + int(sizes[left])
        part = np.empty(n, dtype=np.int64)
        for node, start in starts.items():
            part[leaves[start : start + sizes[node]]] = node
        _, first, inverse = np.unique(part, return_index=True, return_inverse=True)
        labels[row] = np.argsort(np.argsort(first))[inverse]
    return labels
