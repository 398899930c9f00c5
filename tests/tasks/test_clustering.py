"""Streamed PCA against scikit-learn, k-means against faiss and scikit-learn, trees against scikit-learn."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import linkage
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.preprocessing import StandardScaler

from lmim_bench.tasks._math import clustering
from lmim_bench.tasks._math.clustering import (
    Lloyd,
    blocks,
    cluster_grid,
    cluster_rows,
    fit_reducer,
    gather,
    kmeans,
)
from lmim_bench.tasks._math.trees import Linkage, cut_tree, merge_tree


def _features(n: int = 3000, dim: int = 24, seed: int = 0) -> np.ndarray:
    """Correlated channels of unlike scale and mean, as patch features have, in overlapping groups."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(12, dim)) * 2
    x = centres[rng.integers(12, size=n)] + rng.normal(size=(n, dim)) @ rng.normal(size=(dim, dim)) / 3
    return (x * rng.uniform(0.1, 20, dim) + rng.uniform(-50, 50, dim)).astype(np.float32)


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "_BLOCK", 700)
    monkeypatch.setattr(blocks, "__defaults__", (700,))


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("standardise", [True, False])
def test_reducer_is_sklearns_scaler_and_pca(standardise: bool) -> None:
    x = _features()
    z = StandardScaler().fit_transform(x.astype(np.float64)) if standardise else x.astype(np.float64)
    expected = PCA(7).fit(z)
    reduce = fit_reducer(x, standardise=standardise, pca_dim=7)
    assert reduce.components is not None
    signs = np.sign((reduce.components * expected.components_.T).sum(axis=0))
    np.testing.assert_allclose(reduce.components * signs, expected.components_.T, atol=2e-5)
    scale = np.abs(expected.transform(z)).max()
    np.testing.assert_allclose(reduce(x) * signs, expected.transform(z), atol=2e-5 * scale)
    np.testing.assert_allclose(reduce.components.T @ reduce.components, np.eye(7), atol=1e-5)


@pytest.mark.usefixtures("_small_blocks")
def test_reducer_without_pca_and_with_constant_channel() -> None:
    x = _features(dim=6)
    x[:, 2] = 1234.5
    reduce = fit_reducer(x, standardise=True, pca_dim=6)
    assert reduce.components is None
    assert np.isfinite(reduce(x)).all()
    np.testing.assert_allclose(reduce(x)[:, 2], 0, atol=1e-3)
    others = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(
        reduce(x)[:, others], StandardScaler().fit_transform(x.astype(np.float64))[:, others], atol=1e-3
    )


def test_reducer_reads_half_precision_and_refuses_nan() -> None:
    x = _features(500).astype(np.float16)
    assert fit_reducer(x, standardise=True, pca_dim=3)(x).dtype == np.float32
    x[7, 3] = np.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        fit_reducer(x, standardise=True, pca_dim=3)


@pytest.mark.usefixtures("_small_blocks")
def test_gather_keeps_the_asked_order() -> None:
    x = _features()
    reduce = fit_reducer(x, standardise=True, pca_dim=5)
    index = np.random.default_rng(0).permutation(len(x))[:2100]
    np.testing.assert_allclose(gather(x, reduce, index), reduce(x)[index], atol=1e-4)


@pytest.mark.parametrize(("seed", "limit"), [(0, 256), (3, 20)])
def test_kmeans_is_faiss_kmeans_bit_for_bit(seed: int, limit: int) -> None:
    x = _features()
    peer = faiss.Kmeans(24, 30, niter=33, nredo=3, seed=seed, max_points_per_centroid=limit)
    peer.train(x)
    index = clustering.sample_rows(len(x), 30, seed, limit)
    assert len(index) == min(len(x), 30 * limit)
    centroids, objective = kmeans(x[index], 30, seed, Lloyd(33, 3, 0.0, limit))
    np.testing.assert_array_equal(centroids, peer.centroids)
    assert objective == pytest.approx(peer.obj[-1])


def test_kmeans_takes_the_seed_of_any_run() -> None:
    points = _features(300)
    centroids, _ = kmeans(points, 5, 20260101 * 1000, Lloyd(niter=5, nredo=2))
    assert np.isfinite(centroids).all()


def test_kmeans_inertia_from_the_same_starts_is_sklearns() -> None:
    x = fit_reducer(_features(4000), standardise=True, pca_dim=10)(_features(4000))
    starts = [x[clustering._permutation(len(x), 1 + redo * 15486557)[:11]] for redo in range(3)]
    expected = min(KMeans(11, init=s, n_init=1, max_iter=100, tol=0).fit(x).inertia_ for s in starts)
    assert kmeans(x, 11, 0, Lloyd(100, 3, 0.0, None))[1] == pytest.approx(expected, rel=1e-4)
    assert kmeans(x, 11, 0, Lloyd(100, 3, 1e-3, None))[1] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("k", [12, 60])
@pytest.mark.parametrize("tol", [0.0, 1e-3])
def test_kmeans_inertia_within_a_percent_of_sklearns_best(k: int, tol: float) -> None:
    # A continuum, as patch features are: in tight separate groups random starts lose to k-means++.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 12)) * np.geomspace(4, 0.5, 12)
    x = (x + 0.3 * np.square(x[:, ::-1])).astype(np.float32)
    expected = KMeans(k, n_init=10, random_state=0).fit(x).inertia_
    centroids, _ = kmeans(x, k, 0, Lloyd(100, 5, tol, None))
    ids = clustering.assign(x, centroids)
    assert float(np.square(x - centroids[ids]).sum()) <= 1.01 * expected
    distance = np.square(x[:, None] - centroids).sum(-1)
    np.testing.assert_allclose(distance[np.arange(len(x)), ids], distance.min(axis=1), rtol=1e-4, atol=1e-4)


def test_kmeans_restarts_lower_the_objective_and_tolerance_saves_work() -> None:
    x = _features(2000)
    one = kmeans(x, 25, 0, Lloyd(50, 1, 0.0, None))[1]
    best = kmeans(x, 25, 0, Lloyd(50, 6, 0.0, None))[1]
    loose = kmeans(x, 25, 0, Lloyd(50, 6, 0.5, None))[1]
    assert best < one
    assert best <= loose < 1.2 * best


@pytest.mark.usefixtures("_small_blocks")
def test_cluster_rows_equals_one_pass_in_memory_and_repeats() -> None:
    x = _features()
    reduce = fit_reducer(x, standardise=True, pca_dim=8)
    how = Lloyd(20, 2, 0.0, 30)
    found = cluster_rows(x, reduce, [5, 40], 1, [how] * 2)
    again = cluster_rows(x, reduce, [5, 40], 1, [how] * 2)
    for k, ids, repeat in zip((5, 40), found, again, strict=True):
        np.testing.assert_array_equal(ids, repeat)
        points = reduce(x)[clustering.sample_rows(len(x), k, 1, 30)]
        expected = clustering.assign(reduce(x), kmeans(points, k, 1, how)[0])
        assert adjusted_rand_score(expected, ids) > 0.99  # blocks may round a product differently
    assert (cluster_rows(x, reduce, [5], 2, [how])[0] != found[0]).any()


def test_cluster_grid_covers_the_grid_in_compact_clusters() -> None:
    ids = cluster_grid((6, 8), 4, 0, Lloyd())
    assert sorted(set(ids.tolist())) == [0, 1, 2, 3]
    assert ids.reshape(6, 8)[0, 0] != ids.reshape(6, 8)[-1, -1]
    np.testing.assert_array_equal(cluster_grid((2, 3), 500, 0, Lloyd()), np.arange(6))


@pytest.mark.parametrize("method", ["ward", "average", "complete"])
def test_tree_is_sklearns_agglomerative_clustering(method: Linkage) -> None:
    x = _features(60, 8)
    labels = cut_tree(merge_tree(x, method), [1, 7, 3, 60])
    for k, found in zip((1, 7, 3, 60), labels, strict=True):
        expected = AgglomerativeClustering(k, linkage=method).fit_predict(x)
        assert adjusted_rand_score(expected, found) == 1
    np.testing.assert_allclose(
        merge_tree(x, method)[:, 2],
        linkage(x.astype(np.float64), method)[:, 2],
        rtol=1e-6,
    )


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(2, 25), st.integers(1, 30), st.integers(0, 2**31), st.booleans())
def test_cut_gives_exactly_k_clusters_numbered_by_appearance(n: int, k: int, seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(2, size=(n, 2)).astype(float) if ties else rng.normal(size=(n, 4))
    tree = merge_tree(x)
    labels = cut_tree(tree, [k])[0]
    _, first = np.unique(labels, return_index=True)
    assert len(first) == min(k, n)
    assert (np.diff(first) > 0).all()

    # The obvious way: do the first n - k merges of the tree.
    parts = {i: {i} for i in range(n)}
    for step, (a, b) in enumerate(tree[: max(n - k, 0), :2].astype(int)):
        parts[n + step] = parts.pop(a) | parts.pop(b)
    assert {frozenset(np.flatnonzero(labels == c).tolist()) for c in range(len(first))} == {
        frozenset(p) for p in parts.values()
    }


def test_a_tree_of_one_token_is_its_leaf():
    assert cut_tree(merge_tree(np.ones((1, 3))), [1, 4]).tolist() == [[0], [0]]
