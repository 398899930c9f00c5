from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from lmim_bench.bench.errors import TaskError
from lmim_bench.bench.stats import score
from lmim_bench.tasks._math import few_shot
from lmim_bench.tasks._math.selection import random_rank
from lmim_bench.tasks.few_shot import TASK, FewShotConfig

FAST: dict[str, Any] = {"draws": 3, "episodes": 0}


def unit(x: Any) -> Any:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def supports(context: Any, labels: Any, shot: int, draws: int) -> Any:
    """The support positions of every draw, written out."""
    for draw in range(draws):
        rank = random_rank(labels, context.rng("draw", draw))
        yield [i for i in range(len(labels)) if rank[i] < shot]


def test_nearest_class_mean_equals_an_explicit_loop(toy: ModuleType) -> None:
    train, test = toy.blobs(20, 7, spread=4), toy.blobs(25, 7, spread=4, seed=1)
    context = toy.toy_context(train, test)
    found = context.run(TASK, **FAST, classifiers=("ncm",))
    x, q = unit(train[0].astype(np.float64)), unit(test[0].astype(np.float64))
    for shot in (1, 2, 5, 10):
        items = found[f"ncm@shots={shot}"].items
        for draw, support in enumerate(supports(context, train[1], shot, 3)):
            assert np.bincount(train[1][support]).tolist() == [shot] * 7
            for i, query in enumerate(q):
                scores = []
                for c in range(7):
                    mean = np.mean([x[s] for s in support if train[1][s] == c], axis=0)
                    scores.append(query @ mean / np.linalg.norm(mean))
                assert items[draw, i] == (np.argmax(scores) == test[1][i])
    assert toy.value(found["ncm@shots=1"]) < toy.value(found["ncm@shots=10"]) < 1


def test_classifiers_equal_scikit_learns_on_the_same_support(toy: ModuleType) -> None:
    train, test = toy.blobs(12, 6, spread=4), toy.blobs(50, 6, spread=4, seed=1)
    context = toy.toy_context(train, test)
    found = context.run(TASK, **FAST, shots=(5,))
    x, q = unit(train[0].astype(np.float64)), unit(test[0].astype(np.float64))
    for draw, support in enumerate(supports(context, train[1], 5, 3)):
        a, y = x[support], train[1][support]
        nearest = KNeighborsClassifier(1).fit(a, y).predict(q)
        np.testing.assert_array_equal(found["knn@shots=5"].items[draw], nearest == test[1])
        regression = LogisticRegression(C=10, fit_intercept=False, tol=1e-9, max_iter=5000).fit(a, y)
        assert np.mean(found["logreg@shots=5"].items[draw] != (regression.predict(q) == test[1])) <= 0.01
        means = unit(NearestCentroid().fit(a, y).centroids_)
        by_mean = (q @ means.T).argmax(axis=1)
        np.testing.assert_array_equal(found["ncm@shots=5"].items[draw], by_mean == test[1])


def test_at_one_shot_the_nearest_mean_is_the_nearest_image(toy: ModuleType) -> None:
    train, test = toy.blobs(12, 6, spread=4), toy.blobs(50, 6, spread=4, seed=1)
    found = toy.toy_context(train, test).run(TASK, **FAST, shots=(1,))
    np.testing.assert_array_equal(found["ncm@shots=1"].items, found["knn@shots=1"].items)


def test_support_sets_of_a_draw_are_nested_and_draws_differ(toy: ModuleType) -> None:
    labels = toy.blobs(12, 6)[1]
    context = toy.toy_context(toy.blobs(2, 2), toy.blobs(2, 2))
    sets = {k: [set(s) for s in supports(context, labels, k, 3)] for k in (1, 2, 5)}
    for one, two, five in zip(*sets.values(), strict=True):
        assert one < two < five
    assert sets[5][0] != sets[5][1]


def test_shots_beyond_the_smallest_class_are_left_out_and_the_headline_is_kept(toy: ModuleType) -> None:
    x, y = toy.blobs(12, 4)
    keep = (y != 2) | (np.cumsum(y == 2) <= 3)  # class 2 keeps three images
    context = toy.toy_context((x[keep], y[keep]), toy.blobs(10, 4, seed=1))
    found = context.run(TASK, **FAST)
    assert {m for m in found if m.startswith("ncm")} == {"ncm@shots=1", "ncm@shots=2", "ncm@shots=5"}
    assert any("shots=10 left out" in note and "3 images" in note for note in context.notes)
    assert any(note.startswith("WARNING: few-shot, shots=5: 1 classes have fewer") for note in context.notes)
    assert TASK.headline(FewShotConfig(shots=(1, 10))) == "ncm@shots=1"
    assert TASK.headline(FewShotConfig(classifiers=("knn",))) == "knn@shots=5"


def test_without_shots_only_episodes_of_the_test_split_are_run(toy: ModuleType) -> None:
    train, (x, y) = toy.blobs(12, 4, spread=4), toy.blobs(20, 6, spread=4, seed=1)
    context = toy.toy_context(train, (x, y + 4))
    with pytest.raises(TaskError, match=r"'class 0' ... against 'class 4' .* --set 'few_shot.shots=\[\]"):
        context.run(TASK)
    found = context.run(TASK, shots=(), episodes=200)
    assert set(found) == {"episodic@way=5,shot=1", "episodic@way=5,shot=5"}
    assert context.asked == ["val"]
    assert TASK.headline(FewShotConfig(shots=())) == "episodic@way=5,shot=5"
    beside = toy.toy_context((x, y), (x, y)).run(TASK, draws=2, episodes=200)
    for name, metric in found.items():  # the very episodes that a run with draws has
        np.testing.assert_array_equal(metric.items, beside[name].items)
    centred = context.run(TASK, shots=(), episodes=200, center=True)
    mean = train[0].mean(axis=0)
    moved = toy.toy_context(train, (x - mean, y + 4)).run(TASK, shots=(), episodes=200)
    for name, metric in centred.items():
        np.testing.assert_array_equal(metric.items, moved[name].items)


def test_episodes_alone_keep_their_ways_or_say_what_is_possible(toy: ModuleType) -> None:
    context = toy.toy_context(toy.blobs(3, 2), toy.blobs(8, 3, seed=1))
    with pytest.raises(TaskError, match=r"need 5 test classes of 6 images; toy has 3: set few_shot.way=3"):
        context.run(TASK, shots=())
    assert set(context.run(TASK, shots=(), way=3, episodes=5)) == {
        "episodic@way=3,shot=1",
        "episodic@way=3,shot=5",
    }
    with pytest.raises(TaskError, match=r"need 5 test classes of 9 images; toy has 0$"):
        context.run(TASK, shots=(), episode_shots=(8,))
    for nothing in ({"episodes": 0}, {"episode_shots": ()}):
        with pytest.raises(ValueError, match="nothing is left to measure"):
            FewShotConfig(shots=(), **nothing)


def test_items_are_crossed_and_the_curve_holds_their_means(toy: ModuleType) -> None:
    train, test = toy.blobs(12, 4, spread=4), toy.blobs(10, 4, spread=4, seed=1)
    context = toy.toy_context(train, test)
    found = context.run(TASK, **FAST)
    curve = context.saved["accuracy-over-shots"]
    assert curve["x"] == [1, 2, 5, 10]
    for metric in found.values():
        assert metric.crossed
        assert metric.items.shape == (3, 40)
        assert metric.chance == 0.25
    values = [toy.value(found[f"logreg@shots={k}"]) for k in curve["x"]]
    np.testing.assert_allclose(curve["series"]["logistic regression"], values, atol=1e-5)
    lows, highs = (curve[end]["logistic regression"] for end in ("low", "high"))
    for k, low, high in zip(curve["x"], lows, highs, strict=True):
        told = score(found[f"logreg@shots={k}"], np.random.default_rng(0))
        assert (low, high) == pytest.approx((told.low, told.high), abs=1e-5)


def test_centring_uses_the_mean_of_train(toy: ModuleType) -> None:
    train, test = toy.blobs(12, 4, spread=4), toy.blobs(30, 4, spread=4, seed=1)
    shifted = toy.toy_context((train[0] + 50, train[1]), (test[0] + 50, test[1]))
    plain = toy.toy_context((train[0] - train[0].mean(0), train[1]), (test[0] - train[0].mean(0), test[1]))
    centred = shifted.run(TASK, draws=3, episodes=20, center=True)
    expected = plain.run(TASK, draws=3, episodes=20)
    for metric in expected:
        assert toy.value(centred[metric]) == pytest.approx(toy.value(expected[metric]), abs=0.01)
    blurred = toy.toy_context((train[0] + 50, train[1]), (test[0] + 50, test[1])).run(TASK, **FAST)
    assert toy.value(blurred["knn@shots=1"]) != toy.value(centred["knn@shots=1"])


def test_results_are_reproducible_and_follow_the_seed(toy: ModuleType) -> None:
    train, test = toy.blobs(12, 4, spread=4), toy.blobs(20, 4, spread=4, seed=1)
    one, same, other = (
        toy.toy_context(train, test, seed=s).run(TASK, draws=2, episodes=30) for s in (0, 0, 1)
    )
    for metric in one:
        np.testing.assert_array_equal(one[metric].items, same[metric].items)
    assert not np.array_equal(one["ncm@shots=1"].items, other["ncm@shots=1"].items)
    assert not np.array_equal(one["episodic@way=4,shot=1"].items, other["episodic@way=4,shot=1"].items)


def test_separated_classes_are_solved_and_random_features_are_near_chance(toy: ModuleType) -> None:
    train, test = toy.blobs(12, 8, spread=0.02), toy.blobs(40, 8, spread=0.02, seed=1)
    found = toy.toy_context(train, test).run(TASK, draws=2, episodes=50)
    assert {toy.value(m) for m in found.values()} == {1.0}
    rng = np.random.default_rng(4)
    noise = [rng.standard_normal((n, 16)).astype(np.float32) for n in (96, 320)]
    random = toy.toy_context((noise[0], train[1]), (noise[1], test[1])).run(TASK, draws=5, episodes=200)
    for metric in random.values():
        # Draws share the test images, so the bound takes the images of one draw for the sample size.
        assert metric.chance is not None
        assert abs(toy.value(metric) - metric.chance) < 4 * np.sqrt(metric.chance * (1 - metric.chance) / 320)


def test_class_means_are_told_apart_where_features_nearly_coincide(toy: ModuleType) -> None:
    rng = np.random.default_rng(0)
    common, classes = rng.normal(size=16), rng.normal(size=(6, 16))

    def drawn(images: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat(np.arange(6), images)
        noise = 0.3 * rng.normal(size=(len(labels), 16))
        return (common + 2e-4 * (classes[labels] + noise)).astype(np.float32), labels

    found = toy.toy_context(drawn(20), drawn(40)).run(TASK, draws=2, episodes=50)
    for name, measured in found.items():
        assert toy.value(measured) > 0.97, name


def test_chance_follows_the_numbers_of_a_support_set_of_unlike_classes(toy: ModuleType) -> None:
    rng = np.random.default_rng(0)
    numbers = [50] * 5 + [1] * 5
    labels = np.repeat(np.arange(10), numbers), np.repeat(np.arange(10), 4 * np.array(numbers))
    train, test = (rng.standard_normal((len(y), 16)).astype(np.float32) for y in labels)
    found = toy.toy_context((train, labels[0]), (test, labels[1])).run(TASK, draws=10, episodes=0)
    share = np.array(numbers) / sum(numbers)
    assert found["ncm@shots=5"].chance == pytest.approx(0.1)
    voted = share @ np.minimum(numbers, 5) / 30
    assert found["knn@shots=5"].chance == pytest.approx(voted)
    assert abs(toy.value(found["knn@shots=5"]) - voted) < 0.03


def test_chance_knows_of_classes_that_train_lacks(toy: ModuleType) -> None:
    rng = np.random.default_rng(0)
    train, test = (rng.standard_normal((n, 16)).astype(np.float32) for n in (40, 300))
    labels = np.repeat([0, 1], 20), np.repeat(np.arange(6), 50)
    found = toy.toy_context((train, labels[0]), (test, labels[1])).run(
        TASK, draws=3, classifiers=("ncm",) * 2
    )
    (ncm,) = [m for name, m in found.items() if name.startswith("ncm@shots=5")]
    assert ncm.chance == pytest.approx(1 / 6)
    assert abs(toy.value(ncm) - 1 / 6) < 0.08


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(0, 99), st.data())
@settings(deadline=None, derandomize=True, max_examples=50)
def test_distinct_draws_are_in_range_and_different(sizes: list[int], seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, min(sizes)))
    drawn = few_shot.draw_distinct(np.array(sizes), count, np.random.default_rng(seed))
    assert drawn.shape == (len(sizes), count)
    for row, size in zip(drawn.tolist(), sizes, strict=True):
        assert len(set(row)) == count
        assert set(row) <= set(range(size))


def test_every_ordered_sample_is_equally_likely() -> None:
    drawn = few_shot.draw_distinct(np.full(24_000, 4), 3, np.random.default_rng(0))
    codes = drawn @ [16, 4, 1]
    counts = np.unique(codes, return_counts=True)[1]
    assert len(counts) == 24
    assert chisquare(counts).pvalue > 1e-3
    with pytest.raises(ValueError, match="cannot draw 3"):
        few_shot.draw_distinct(np.array([5, 2]), 3, np.random.default_rng(0))


def test_episodes_never_repeat_an_image_or_a_class() -> None:
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(9), 20))
    plan = few_shot.plan_episodes(np.bincount(labels), 5, 4, 15)
    assert plan is not None
    picks = few_shot.sample_episodes(labels, plan, 200, np.random.default_rng(0))
    assert picks.shape == (200, 5, 19)
    for episode in picks:
        classes = labels[episode]
        assert (classes == classes[:, :1]).all()
        assert len(set(classes[:, 0])) == 5
        assert len(np.unique(episode)) == 5 * 19  # so no query is in the support
    assert set(np.unique(picks)) == set(range(180))


def test_episodes_equal_an_explicit_loop(monkeypatch: pytest.MonkeyPatch, toy: ModuleType) -> None:
    x, labels = toy.blobs(12, 6, spread=4)
    rows = unit(x).astype(np.float32)
    plan = few_shot.plan_episodes(np.bincount(labels), 4, 3, 5)
    assert plan is not None
    picks = few_shot.sample_episodes(labels, plan, 40, np.random.default_rng(0))
    monkeypatch.setattr(few_shot, "_BLOCK_ELEMENTS", 3000)  # several blocks, the last one short
    hits = few_shot.episode_hits(rows, picks, 3)
    for e, episode in enumerate(picks):
        means = [rows[images[:3]].mean(0) for images in episode]
        for true, images in enumerate(episode):
            for q, image in enumerate(images[3:]):
                cosine = [rows[image] @ mean / np.linalg.norm(mean) for mean in means]
                assert hits[e, true, q] == (np.argmax(cosine) == true)
    assert 0.3 < hits.mean() < 1


@pytest.mark.parametrize("shot", [1, 5])
def test_the_spread_of_episodes_is_that_of_their_images(shot: int) -> None:
    rng = np.random.default_rng(0)
    classes, labels = rng.normal(size=(8, 16)), np.repeat(np.arange(8), 40)
    plan = few_shot.plan_episodes(np.bincount(labels), 5, shot, 10)
    assert plan is not None
    values, errors, naive = [], [], []
    for _ in range(40):  # test splits of one population
        rows = unit(classes[labels] + 3 * rng.normal(size=(len(labels), 16))).astype(np.float32)
        picks = few_shot.sample_episodes(labels, plan, 300, rng)
        hits = few_shot.episode_hits(rows, picks, shot)
        terms = few_shot.image_terms(hits, picks, len(labels))
        assert terms.mean() == pytest.approx(hits.mean(), abs=1e-12)
        values.append(hits.mean())
        errors.append(terms.std(ddof=1) / len(terms) ** 0.5)
        naive.append(hits.mean(axis=(1, 2)).std(ddof=1) / len(hits) ** 0.5)
    truth = np.std(values, ddof=1)
    assert 0.9 < np.mean(errors) / truth < 1.8  # to the safe side where an image is drawn often
    assert np.mean(naive) < 0.6 * truth, "what an interval over episodes would say"


@pytest.mark.parametrize(
    ("counts", "asked", "given"),
    [
        ([30, 30, 30], (3, 5, 15), (3, 15, 3)),
        ([30, 12, 11], (3, 5, 15), (3, 6, 3)),  # fewer queries for the third class
        ([30, 12, 3], (3, 5, 15), (2, 7, 2)),  # then fewer ways
        ([30, 30, 5], (5, 5, 15), (2, 15, 2)),
        ([30, 5, 5], (2, 5, 15), None),
    ],
)
def test_small_classes_take_queries_first_and_then_ways(counts: Any, asked: Any, given: Any) -> None:
    way, shot, query = asked
    plan = few_shot.plan_episodes(np.array(counts), way, shot, query)
    assert (None if plan is None else (plan.way, plan.query, len(plan.classes))) == given


def test_reduced_and_impossible_episodes_are_noted_and_named_by_what_was_run(toy: ModuleType) -> None:
    context = toy.toy_context(toy.blobs(12, 3), toy.blobs(4, 3, seed=1))
    found = context.run(TASK, draws=2, episodes=20)
    assert "episodic@way=3,shot=1" in found
    assert not any("shot=5" in m for m in found if m.startswith("episodic"))
    assert any("3 ways and 3 queries" in note for note in context.notes)
    assert any("episodes of 5 shots left out" in note for note in context.notes)
    assert found["episodic@way=3,shot=1"].items.shape == (12,)
    assert found["episodic@way=3,shot=1"].detail["episodes"] == 20
    assert found["episodic@way=3,shot=1"].chance == pytest.approx(1 / 3)


def test_a_class_without_train_images_is_never_predicted_and_noted(toy: ModuleType) -> None:
    train, test = toy.blobs(12, 4, spread=0.02), toy.blobs(10, 4, spread=0.02, seed=1)
    seen = train[1] != 1
    context = toy.toy_context((train[0][seen], train[1][seen]), test, n_classes=4)
    found = context.run(TASK, **FAST)
    for name in ("ncm", "logreg", "knn"):
        np.testing.assert_array_equal(found[f"{name}@shots=5"].items, np.tile(test[1] != 1, (3, 1)))
    assert any("1 classes of test have no train image" in note for note in context.notes)


def test_one_image_of_many_classes_is_no_warning(toy: ModuleType) -> None:
    context = toy.toy_context(toy.blobs(1, 40), toy.blobs(2, 40, seed=1))
    found = context.run(TASK, **FAST, shots=(1,))
    assert toy.value(found["logreg@shots=1"]) > 0.5


def test_failed_regressions_are_noted(toy: ModuleType) -> None:
    context = toy.toy_context(toy.blobs(12, 4), toy.blobs(10, 4, seed=1))
    context.run(TASK, **FAST, logreg_max_iter=1)
    assert any("12 logistic regressions did not converge" in note for note in context.notes)


def test_broken_inputs_are_refused(toy: ModuleType) -> None:
    x, y = toy.blobs(6, 3)
    holed = x.copy()
    holed[4] = np.nan
    for train, test, message in (
        ((x, y * 0), (x, y), "needs two classes"),
        ((holed, y), (x, y), "train/0004.png hold NaN"),
        ((x, None), (x, y), "no class labels"),
    ):
        with pytest.raises(TaskError, match=message):
            toy.toy_context(train, test, n_classes=3).run(TASK, **FAST)
    for bad in ({"shots": (0, 1)}, {"way": 1}, {"classifiers": ("svm",)}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            FewShotConfig(**bad)
