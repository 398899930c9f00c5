from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity

from lmim_bench.bench.errors import TaskError
from lmim_bench.bench.types import EncoderSpec
from lmim_bench.tasks._math import knn
from lmim_bench.tasks._math.normalise import unit_rows
from lmim_bench.tasks.knn import TASK, KnnConfig
from lmim_bench.tasks.linear import TASK as LINEAR


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def dense_vote(train, labels, test, k, temperature, n_classes):
    """DINO's vote written out: every similarity, a full sort, one sum a class. (N, C) scores."""
    similarity = unit(test.astype(np.float64)) @ unit(train.astype(np.float64)).T
    scores = np.zeros((len(test), n_classes))
    for i, row in enumerate(similarity):
        for j in np.argsort(-row)[:k]:
            scores[i, labels[j]] += np.exp(row[j] / temperature) if temperature else 1
    return scores


def test_weighted_vote_equals_a_dense_computation_at_every_k(toy: ModuleType) -> None:
    train, test = toy.blobs(20, 8, spread=4), toy.blobs(15, 8, spread=4, seed=1)
    found = toy.toy_context(train, test).run(TASK, k=(1, 5, 20, 50), block=17)
    for k in (1, 5, 20, 50):
        scores = dense_vote(*train, test[0], k, 0.07, 8)
        order = np.argsort(-scores, axis=1)
        np.testing.assert_array_equal(found[f"top1@k={k}"].items, order[:, 0] == test[1])
        if k >= 5:
            voted = np.take_along_axis(scores, order[:, :5], 1) > 0
            hit = ((order[:, :5] == test[1][:, None]) & voted).any(axis=1)
            np.testing.assert_array_equal(found[f"top5@k={k}"].items, hit)
    assert 0.3 < toy.value(found["top1@k=20"]) < 0.98


def test_classes_without_any_of_test_are_refused(toy: ModuleType) -> None:
    x, y = toy.blobs(6, 3)
    context = toy.toy_context((x, y), (x, y + 3))
    for task in (TASK, LINEAR):
        with pytest.raises(TaskError, match=r"train of toy has no class of its test split \('class 0' ..."):
            context.run(task)
    assert "top1@k=1" in toy.toy_context((x, y), (x, y + 2)).run(TASK, k=(1,))


def test_votes_equal_scikit_learn(toy: ModuleType) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    train, test = toy.blobs(30, 6, spread=4), toy.blobs(30, 6, spread=4, seed=1)
    found = toy.toy_context(train, test).run(TASK, k=(7,), temperature=0.2)
    x, q = unit(train[0].astype(np.float64)), unit(test[0].astype(np.float64))
    # On the unit sphere the squared distance is 2 - 2 sim.
    weighted = KNeighborsClassifier(7, weights=lambda d: np.exp((1 - d**2 / 2) / 0.2), algorithm="brute")
    predicted = weighted.fit(x, train[1]).predict(q)
    np.testing.assert_array_equal(found["top1@k=7"].items, predicted == test[1])

    majority = KNeighborsClassifier(7, algorithm="brute").fit(x, train[1])
    counts = np.sort(majority.predict_proba(q), axis=1)
    clear = counts[:, -1] > counts[:, -2]  # scikit-learn breaks ties by class number, we by nearness
    assert 0.5 < clear.mean() < 1
    np.testing.assert_array_equal(
        found["top1_majority@k=7"].items[clear], (majority.predict(q) == test[1])[clear]
    )


def test_a_row_of_zeros_is_like_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    bank, queries = (
        rng.normal(0.5, 1, size=(60, 5)).astype(np.float32),
        rng.normal(size=(7, 5)).astype(np.float32),
    )
    bank[[3, 41]] = queries[2] = 0
    for rows in (25, 1000):
        monkeypatch.setattr(knn, "_TILE_ROWS", rows)
        similarity, position = knn.search(bank, queries, 60, 3)
        exact = cosine_similarity(queries, bank)
        np.testing.assert_allclose(np.take_along_axis(exact, position, 1), similarity, atol=1e-6)
        np.testing.assert_allclose(np.sort(exact, axis=1)[:, ::-1], similarity, atol=1e-6)


def test_a_tie_goes_to_the_class_of_the_nearest_neighbour() -> None:
    labels = np.array([[3, 1, 1, 3, 2], [2, 0, 0, 1, 1]])
    totals = knn.class_totals(np.ones((2, 5)), labels, 4)
    np.testing.assert_array_equal(totals, [[2, 2, 2, 2, 1], [1, 2, 2, 2, 2]])
    np.testing.assert_array_equal(knn.winner(totals, labels), [3, 0])
    for truth, ranks in ((3, [0, knn.UNSEEN]), (1, [1, 1]), (2, [2, 2]), (0, [knn.UNSEEN, 0])):
        found = knn.true_ranks(np.ones((2, 5)), labels, np.full(2, truth), (5,))
        np.testing.assert_array_equal(found, [ranks])


@st.composite
def ballots(draw):
    queries, k, classes = draw(st.integers(1, 6)), draw(st.integers(1, 9)), draw(st.integers(1, 5))
    cell = st.integers(0, classes - 1)
    labels = draw(st.lists(st.lists(cell, min_size=k, max_size=k), min_size=queries, max_size=queries))
    steps = draw(st.lists(st.integers(0, 4), min_size=queries * k, max_size=queries * k))
    weights = -np.cumsum(np.array(steps).reshape(queries, k), axis=1) / 8  # falling, with ties
    return np.array(labels), weights, classes


@given(ballots(), st.booleans())
@settings(deadline=None, derandomize=True, max_examples=50)
def test_ranks_agree_with_a_plain_loop(ballot, weighted: bool) -> None:
    labels, similarity, n_classes = ballot
    votes = np.exp2(np.round(similarity * 8)) if weighted else np.ones(labels.shape)  # sums are exact
    ks = range(1, labels.shape[1] + 1)
    by_truth = [knn.true_ranks(votes, labels, np.full(len(labels), c), ks) for c in range(n_classes)]
    for at, k in enumerate(ks):
        winners = knn.winner(knn.class_totals(votes[:, :k], labels[:, :k], n_classes), labels[:, :k])
        for row in range(len(labels)):
            sums, first = {}, {}
            for j, c in enumerate(labels[row, :k].tolist()):
                sums[c] = sums.get(c, 0) + votes[row, j]
                first.setdefault(c, j)
            order = sorted(sums, key=lambda c: (-sums[c], first[c]))
            for truth, ranks in enumerate(by_truth):
                assert ranks[at, row] == (order.index(truth) if truth in order else knn.UNSEEN)
            assert winners[row] == order[0]


def test_weights_are_softmax_up_to_a_factor_and_never_overflow() -> None:
    similarity = np.array([[0.9, 0.5, -0.2]], dtype=np.float32)
    weights = knn.exponential_weights(similarity, 0.07)
    direct = np.exp(similarity.astype(np.float64) / 0.07)
    np.testing.assert_allclose(weights / weights.sum(), direct / direct.sum(), rtol=1e-12)
    assert np.isfinite(knn.exponential_weights(similarity, 1e-4)).all()


def test_leave_one_out_equals_brute_force_on_raw_patch_means(toy: ModuleType) -> None:
    train, test = toy.blobs(5, 4), toy.blobs(30, 4, spread=5, seed=1)
    raw = toy.blobs(30, 4, spread=3, seed=2)[0]
    context = toy.toy_context(train, test, columns={"mean@-1:raw": (train[0], raw)})
    found = context.run(TASK, block=7)
    similarity = unit(raw.astype(np.float64)) @ unit(raw.astype(np.float64)).T
    np.fill_diagonal(similarity, -np.inf)
    np.testing.assert_array_equal(found["nn1_loo"].items, test[1][similarity.argmax(axis=1)] == test[1])
    assert any("50.1" in note for note in context.notes)


def test_leave_one_out_never_finds_the_query_itself_among_duplicates(toy: ModuleType) -> None:
    one, other = np.eye(16, dtype=np.float32)[:2]
    # Four equal images: the query may be missing from its own two nearest. All but one share a label.
    features = np.stack([one, one, one, one, other, other])
    labels = np.array([0, 0, 0, 0, 1, 2])
    found = toy.toy_context((features, labels), (features, labels)).run(TASK, k=(1,))
    np.testing.assert_array_equal(found["nn1_loo"].items, [1, 1, 1, 1, 0, 0])


def test_without_self_drops_the_last_where_the_query_is_absent() -> None:
    position = np.array([[4, 7, 9], [1, 5, 2], [8, 3, 2]])
    np.testing.assert_array_equal(knn.without_self(position, np.array([4, 6, 2])), [[7, 9], [1, 5], [8, 3]])


def test_equal_similarities_come_in_order_of_position() -> None:
    rows = np.repeat(np.eye(4, dtype=np.float32)[:1], 6, axis=0)
    _, position = knn.search(rows, rows[:1], 4, 8)
    assert (np.diff(position[0]) > 0).all()


@pytest.mark.parametrize("others", [1, 7, 100, 400])
def test_who_is_among_the_nearest_does_not_depend_on_how_many_are_asked_for(others: int) -> None:
    rng = np.random.default_rng(0)
    bank = np.repeat(rng.normal(size=(20, 8)), 25, axis=0).astype(np.float32)
    order = rng.permutation(len(bank))
    _, position = knn.search(bank[order], bank[::25], 10 + others, 8)
    for group, found in enumerate(position[:, :10]):
        # 25 rows are as near as can be: the first ten of them in the order of the data set.
        np.testing.assert_array_equal(found, np.flatnonzero(order // 25 == group)[:10])


def test_of_very_many_equal_rows_some_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "_MOST_TIED", 12)
    similarity, position = knn.search(np.ones((40, 4)), np.ones((3, 4)), 5, 2)
    np.testing.assert_allclose(similarity, 1)
    assert all(len(set(row)) == 5 for row in position.tolist())


@pytest.mark.parametrize("block", [3, 4096])
def test_neighbours_are_told_apart_where_features_nearly_coincide(block: int) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=64) + 3e-4 * rng.normal(size=(300, 64))
    bank, queries = rows[:200].astype(np.float32), rows[200:].astype(np.float32)
    similarity, position = knn.search(bank, queries, 5, block)
    exact = unit_rows(queries, np.float64) @ unit_rows(bank, np.float64).T
    np.testing.assert_array_equal(position, np.argsort(-exact, axis=1, kind="stable")[:, :5])
    found = np.take_along_axis(exact, position, 1)
    np.testing.assert_allclose(1 - similarity, 1 - found, rtol=1e-2)


@pytest.mark.parametrize(("tile", "block"), [(1, 3), (7, 4), (40, 11), (64, 64)])
def test_a_search_in_tiles_equals_a_full_sort(monkeypatch: pytest.MonkeyPatch, tile: int, block: int) -> None:
    rng = np.random.default_rng(0)
    # Signs make many exact ties of similarity.
    bank = np.sign(rng.normal(size=(64, 16))).astype(np.float16)
    queries = np.sign(rng.normal(size=(23, 16))).astype(np.float16)
    monkeypatch.setattr(knn, "_TILE_ROWS", tile)
    steps: list[int] = []
    similarity, position = knn.search(bank, queries, 9, block, advance=steps.append)
    assert sum(steps) == knn.passes(len(bank)) * len(queries)
    dense = queries.astype(np.float64) @ bank.astype(np.float64).T / 16
    expected = -np.sort(-dense, axis=1)[:, :9]
    np.testing.assert_allclose(similarity, expected, atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(dense, position, 1), expected)
    assert all(len(set(row)) == 9 for row in position.tolist())
    tied = np.diff(expected, axis=1) == 0
    assert tied.any()
    assert (np.diff(position, axis=1)[tied] > 0).all()


def test_k_beyond_train_uses_all_of_it_and_says_so(toy: ModuleType) -> None:
    train, test = toy.blobs(3, 5), toy.blobs(4, 5, seed=1)
    context = toy.toy_context(train, test)
    found = context.run(TASK, k=(15, 200))
    assert found["top1@k=200"].detail["neighbours"] == 15
    np.testing.assert_array_equal(found["top1@k=200"].items, found["top1@k=15"].items)
    assert any("k=200" in note and "15 images" in note for note in context.notes)


def test_the_block_size_moves_no_number(toy: ModuleType) -> None:
    train, test = toy.blobs(10, 6, spread=4), toy.blobs(10, 6, spread=4, seed=1)
    one, other = (toy.toy_context(train, test).run(TASK, block=block) for block in (1, 1024))
    assert one.keys() == other.keys()
    for metric in one:
        np.testing.assert_array_equal(one[metric].items, other[metric].items)


def test_separated_classes_are_solved_and_shuffled_labels_are_near_chance(toy: ModuleType) -> None:
    train, test = toy.blobs(30, 10, spread=0.05), toy.blobs(60, 10, spread=0.05, seed=1)
    found = toy.toy_context(train, test).run(TASK)
    assert toy.value(found["top1@k=20"]) == toy.value(found["nn1_loo"]) == 1
    assert found["top1@k=20"].chance == pytest.approx(0.1)
    assert found["top5@k=20"].chance == pytest.approx(0.5, abs=0.001)
    rng = np.random.default_rng(3)
    noise = [rng.standard_normal((n, 16)).astype(np.float32) for n in (300, 600)]
    random = toy.toy_context((noise[0], train[1]), (noise[1], test[1])).run(TASK)
    assert abs(toy.value(random["top1@k=20"]) - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 600)


def test_a_class_that_no_neighbour_has_is_not_among_five_of_three(toy: ModuleType) -> None:
    votes, labels = np.ones((1, 3)), np.array([[0, 1, 2]])
    (rank,) = knn.true_ranks(votes, labels, np.array([4]), (3,))
    assert rank[0] >= 5


def test_few_classes_have_no_top5(toy: ModuleType) -> None:
    found = toy.toy_context(toy.blobs(10, 3), toy.blobs(10, 3, seed=1)).run(TASK)
    assert not any(metric.startswith("top5") for metric in found)


@pytest.mark.parametrize("collapsed", [False, True])
def test_chance_is_what_features_without_information_reach(toy: ModuleType, collapsed: bool) -> None:
    rng = np.random.default_rng(0)
    train, test = (
        (
            rng.standard_normal((n, 8)).astype(np.float32) ** (0 if collapsed else 1),
            rng.choice(8, n, p=(0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05)),
        )
        for n in (1500, 6000)
    )
    found = toy.toy_context(train, test).run(TASK, k=(1, 5, 20))
    shares = [np.bincount(y, minlength=8) / len(y) for _, y in (train, test)]
    assert found["top1@k=1"].chance == pytest.approx(shares[0] @ shares[1], abs=0.01)
    if collapsed:  # all have the same neighbours: what they reach is the lot of a few labels
        return
    for name, measured in found.items():
        error = np.sqrt(measured.chance * (1 - measured.chance) / len(measured.items))
        assert toy.value(measured) == pytest.approx(measured.chance, abs=5 * error), name
    assert found["top1@k=20"].chance < shares[1].max()


def test_chance_hardly_depends_on_the_seed_or_on_how_few_are_tested(toy: ModuleType) -> None:
    train, test = toy.blobs(30, 2), toy.blobs(4, 2, seed=1)
    chances = [toy.toy_context(train, test, seed=s).run(TASK, k=(5,))["top1@k=5"].chance for s in range(5)]
    assert chances == pytest.approx([0.5] * 5)
    uneven = (test[0][:6], test[1][:6])  # classes 4 to 2, or 3 to 3, as the blobs come
    share = np.bincount(uneven[1]) / 6
    chances = [toy.toy_context(train, uneven, seed=s).run(TASK, k=(5,))["top1@k=5"].chance for s in range(5)]
    assert chances == pytest.approx([share.mean()] * 5, abs=0.02)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 3))
def test_rates_of_blind_votes_are_those_of_every_class_in_turn(seed: int, width: int, top: int) -> None:
    rng = np.random.default_rng(seed)
    labels, share = rng.integers(0, 4, (9, width)), rng.dirichlet(np.ones(4))
    weights = np.sort(rng.random((9, width)))[:, ::-1]
    ks = tuple(range(1, width + 1))
    expected = sum(
        share[c] * (knn.true_ranks(weights, labels, np.full(9, c), ks) < top).mean(axis=1) for c in range(4)
    )
    np.testing.assert_allclose(knn.blind_rates(weights, labels, share, ks, top), expected)


def test_artefacts_curve_bars_and_gallery(toy: ModuleType) -> None:
    train, test = toy.blobs(10, 4, spread=4), toy.blobs(20, 4, spread=4, seed=1)
    context = toy.toy_context(train, test)
    found = context.run(TASK, k=(1, 5, 20))
    curve, bars = context.saved["accuracy-over-k"], context.saved["per-class"]
    assert curve["x"] == [1, 5, 20]
    assert curve["series"]["exp(sim/T) vote"][2] == pytest.approx(toy.value(found["top1@k=20"]), abs=1e-5)
    assert bars["labels"] == ["class 0", "class 1", "class 2", "class 3"]
    assert np.mean(bars["values"]) == pytest.approx(toy.value(found["top1@k=20"]), abs=1e-4)
    assert len(context.images) == 6
    assert {len(strip) for strip in context.images.values()} == {6}
    assert {f"neighbours-{i}" for i in range(1, 7)} <= set(context.images)


def test_headline_is_the_k_nearest_to_twenty() -> None:
    assert TASK.headline(KnnConfig()) == "top1@k=20"
    assert TASK.headline(KnnConfig(k=(200, 1, 10))) == "top1@k=10"
    assert TASK.headline(KnnConfig(k=(10, 30))) == "top1@k=10"


def test_pooling_and_norm_follow_the_checkpoint_unless_given(toy: ModuleType) -> None:
    def columns(spec: EncoderSpec, **options: object) -> list[str]:
        data = toy.toy_context(toy.blobs(2, 2), toy.blobs(2, 2), spec=spec).data
        return [c.id for c in TASK.features(KnnConfig(**options), spec, data)[0].columns]

    mean = toy.toy_spec(pooling="mean", final_norm=False)
    assert columns(mean) == ["mean@-1:raw"]
    assert columns(mean, final_norm="on", pooling="cls+mean", layer=-2) == ["cls@-2", "mean@-2"]
    assert columns(toy.toy_spec()) == ["cls@-1"]


def test_leave_one_out_asks_for_raw_patch_means_of_the_test_split_only(toy: ModuleType) -> None:
    context = toy.toy_context(toy.blobs(2, 2), toy.blobs(2, 2))
    _, loo = TASK.features(KnnConfig(), context.spec, context.data)
    assert (loo.splits, [c.id for c in loo.columns]) == (("val",), ["mean@-1:raw"])
    assert len(TASK.features(KnnConfig(leave_one_out=False), context.spec, context.data)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": -7}, "6 blocks"),
        ({"size": 40}, "use size=32"),
        ({"pooling": "cls"}, "use mean"),
    ],
)
def test_what_the_encoder_cannot_do_is_refused_with_the_mend(toy: ModuleType, options, message) -> None:
    spec = toy.toy_spec(has_cls=False, pooling="mean")
    context = toy.toy_context(toy.blobs(2, 2), toy.blobs(2, 2), spec=spec)
    with pytest.raises(TaskError, match=message):
        TASK.features(KnnConfig(**options), context.spec, context.data)


@pytest.mark.parametrize("k", [(), (0, 5)])
def test_bad_k_is_refused(k) -> None:
    with pytest.raises(ValueError, match="k"):
        KnnConfig(k=k)


def test_broken_banks_are_refused_by_name(toy: ModuleType) -> None:
    x, y = toy.blobs(4, 3)
    holed = x.copy()
    holed[5, 2] = np.nan
    empty = (x[:0], y[:0])
    for train, test, message in (
        ((x, None), (x, y), "train split of toy has no class labels"),
        ((x, y), empty, "val split of toy holds no image"),
        ((x, y), (x, y + 1), "labels outside"),
        ((holed, y), (x, y), "train/0005.png hold NaN"),
        ((x, y), (holed, y), "val/0005.png hold NaN"),
    ):
        with pytest.raises(TaskError, match=message):
            toy.toy_context(train, test, n_classes=3).run(TASK)


def test_a_feature_of_zeros_and_a_single_test_image_are_scored(toy: ModuleType) -> None:
    x, y = toy.blobs(4, 3)
    context = toy.toy_context((x * 0, y), (x[:1] * 0, y[:1]))
    found = context.run(TASK)
    assert "nn1_loo" not in found
    assert np.isfinite(found["top1@k=20"].items).all()
    assert any("left out" in note for note in context.notes)


def test_mutual_neighbours_are_one_group(toy: ModuleType) -> None:
    x = np.array([[0.0, 1], [0.1, 1], [1, 0], [1, 0.1], [1, 0.25]], dtype=np.float32)
    test = np.pad(x, ((0, 0), (0, 14))), np.array([0, 1, 1, 1, 0])
    found = toy.toy_context(toy.blobs(12, 2), test).run(TASK, k=(1,))["nn1_loo"]
    assert found.items.tolist() == [0, 0, 1, 1, 0]
    assert found.clusters is not None
    assert found.clusters.tolist() == [0, 0, 2, 2, 4]
