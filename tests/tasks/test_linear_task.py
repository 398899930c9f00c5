from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss, top_k_accuracy_score

from lmim_bench.bench.errors import TaskError
from lmim_bench.bench.stats import score
from lmim_bench.bench.types import Column, Measurement, Tap
from lmim_bench.tasks import _probe
from lmim_bench.tasks._features import mean_class_items
from lmim_bench.tasks._math import logistic
from lmim_bench.tasks._math.logistic import LinearHead, fit_path
from lmim_bench.tasks._math.normalise import Normaliser, unit_rows
from lmim_bench.tasks._math.selection import Trial, best, cross_entropies, label_ranks, stratified_holdout
from lmim_bench.tasks._math.sgd_heads import shuffled_batches, train_heads
from lmim_bench.tasks.linear import TASK, LinearConfig

QUICK: dict[str, Any] = {"features": ("cls",), "c": (1e-3, 1e-2, 0.1, 1.0)}


def test_final_head_is_scikit_learns_at_the_chosen_c(toy: ModuleType) -> None:
    train, test = toy.blobs(40, 6, spread=4), toy.blobs(100, 6, spread=4, seed=1)
    context = toy.toy_context(train, test)
    found = context.run(TASK, **QUICK)
    c = found["top1"].detail["C"]
    mean, std = train[0].mean(0), np.sqrt(train[0].var(0) + 1e-6)
    model = LogisticRegression(C=c, max_iter=1000).fit((train[0] - mean) / std, train[1])
    logits = model.decision_function((test[0] - mean) / std)
    assert abs(toy.value(found["top1"]) - np.mean(logits.argmax(1) == test[1])) < 0.003
    assert abs(toy.value(found["top5"]) - top_k_accuracy_score(test[1], logits, k=5)) < 0.003
    balanced = balanced_accuracy_score(test[1], logits.argmax(1))
    assert abs(toy.value(found["top1_mean_class"]) - balanced) < 0.003
    assert 0.4 < toy.value(found["top1"]) < 0.98


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(("n", "dim"), [(40, 16), (6, 60)])
def test_each_head_of_the_path_is_the_optimum_of_a_cold_start(
    toy: ModuleType, n: int, dim: int, intercept: bool
) -> None:
    x, y = toy.blobs(n, 5, dim=dim, spread=4)
    x[:, 1] = x[:, 0] * (1 + 1e-4 * x[:, 2])  # nearly collinear
    x[:, 3] = 7  # no variance
    q, truth = toy.blobs(200, 5, dim=dim, spread=4, seed=1)
    cs = (1e-3, 0.1, 10.0)
    for c, head in zip(cs, fit_path(x, y, cs, 5, tol=1e-7, intercept=intercept), strict=True):
        cold = LogisticRegression(C=c, max_iter=20_000, tol=1e-8, fit_intercept=intercept)
        cold.fit(x.astype(np.float64), y)

        def objective(weight: Any, logits: Any, c: float = c) -> float:
            penalty = (weight.astype(np.float64) ** 2).sum() / (2 * c * len(y))
            return log_loss(y, softmax(logits, axis=1)) + float(penalty)

        best_possible = objective(cold.coef_, cold.decision_function(x))
        assert objective(head.weight, head.logits(x)) == pytest.approx(best_possible, abs=1e-5)
        assert abs(np.mean(head.logits(q).argmax(1) == truth) - cold.score(q, truth)) <= 0.003
        assert head.converged


def test_collinear_features_at_the_default_tolerance_are_within_a_third_of_a_point(toy: ModuleType) -> None:
    rotation = np.linalg.qr(np.random.default_rng(9).standard_normal((24, 24)))[0]
    mix = (rotation * np.arange(1, 25) ** -2.0).astype(np.float32)  # a steep spectrum, in all coordinates
    (x, y), (q, truth) = (toy.blobs(n, 12, dim=24, spread=3, seed=s) for n, s in ((20, 0), (250, 1)))
    norm = Normaliser.fit("batchnorm", x @ mix)
    x, q = norm(x @ mix), norm(q @ mix)
    cs = (1e-2, 1.0, 100.0)
    for c, head in zip(cs, fit_path(x, y, cs, 12), strict=True):
        exact = LogisticRegression(C=c, max_iter=50_000, tol=1e-8).fit(x.astype(np.float64), y)
        assert abs(np.mean(head.logits(q).argmax(1) == truth) - exact.score(q, truth)) <= 0.003


def test_weak_features_are_fitted_and_not_left_at_zero() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 40)
    rows = (1e-3 * (rng.normal(size=(10, 32))[labels] + rng.normal(size=(400, 32)))).astype(np.float32)
    (head,) = fit_path(rows, labels, (1e-2,), 10)
    exact = LogisticRegression(C=1e-2, tol=1e-14, max_iter=10_000).fit(rows.astype(np.float64), labels)
    assert head.converged
    np.testing.assert_allclose(head.weight, exact.coef_, atol=0.02 * np.abs(exact.coef_).max())


@pytest.mark.parametrize("strength", [0.1, 10.0])
def test_a_fit_that_ends_far_from_where_it_began_ends_at_the_minimum(strength: float) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 91)
    rows = (50 * (0.3 * rng.normal(size=(5, 47))[labels] + rng.normal(size=(91, 47)))).astype(np.float32)

    def objective(head: Any) -> float:
        logits = head.logits(rows).astype(np.float64)
        own = logits[np.arange(91), labels]
        loss = logsumexp(logits, axis=1) - own
        return float(loss.mean() + np.square(head.weight).sum() / (2 * strength * 91))

    (head,) = fit_path(rows, labels, (strength,), 5)
    (exact,) = fit_path(rows, labels, (strength,), 5, tol=1e-13, max_iter=10_000)
    assert head.converged
    assert objective(head) <= objective(exact) * (1 + 1e-3)


def test_a_path_in_any_order_and_with_gaps_ends_at_the_same_heads(toy: ModuleType) -> None:
    x, y = toy.blobs(40, 5, spread=4)
    cs = (
        1e-5,
        1e-4,
        10.0,
        1e-3,
        0.1,
        0.11,
    )  # what is foreseen from the last two is far off at 10 and at 1e-3
    for c, head in zip(cs, fit_path(x, y, cs, 5, tol=1e-7), strict=True):
        (alone,) = fit_path(x, y, (c,), 5, tol=1e-7)
        assert head.converged
        assert alone.converged
        np.testing.assert_allclose(head.logits(x), alone.logits(x), atol=0.02 * np.abs(alone.logits(x)).max())


def test_a_fit_from_a_near_head_ends_where_a_cold_start_ends(toy: ModuleType) -> None:
    x, y = toy.blobs(40, 5, spread=4)
    x, fewer = x + 3, y != 4
    (near,) = fit_path(x[fewer], y[fewer], (0.1,), 5)  # class 4 is unknown to it
    (warm,) = fit_path(x, y, (0.1,), 5, tol=1e-8, start=near)
    (cold,) = fit_path(x, y, (0.1,), 5, tol=1e-8)
    np.testing.assert_allclose(warm.logits(x), cold.logits(x), atol=0.02)
    (done,) = fit_path(x, y, (0.1,), 5, tol=1e-7, start=cold, max_iter=1)
    assert done.converged  # it began at the minimum, in the same variables


def test_products_in_float32_end_at_the_heads_of_double_precision(
    toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = toy.blobs(60, 5, dim=40, spread=4)
    cs = (1e-3, 1e-2, 0.1)
    double = list(fit_path(x, y, cs, 5, tol=1e-6))
    monkeypatch.setattr(logistic, "_DOUBLE", 0)
    for exact, head in zip(double, fit_path(x, y, cs, 5, tol=1e-6), strict=True):
        assert head.converged
        largest = np.abs(exact.logits(x)).max()
        np.testing.assert_allclose(head.logits(x), exact.logits(x), atol=0.01 * largest)


def test_asking_for_more_than_rounding_allows_ends_and_says_so(
    toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = toy.blobs(40, 5, spread=4)
    monkeypatch.setattr(logistic, "_DOUBLE", 0)
    (head,) = fit_path(x, y, (0.1,), 5, tol=1e-16, max_iter=100_000)
    (close,) = fit_path(x, y, (0.1,), 5, tol=1e-7)
    assert not head.converged
    np.testing.assert_allclose(head.logits(x), close.logits(x), atol=0.05)


def test_two_classes_are_scikit_learns_at_twice_the_c(toy: ModuleType) -> None:
    x, y = toy.blobs(40, 2, spread=4)
    (head,) = fit_path(x, y, (0.1,), 2, tol=1e-9)
    cold = LogisticRegression(C=0.2, max_iter=5000, tol=1e-9).fit(x.astype(np.float64), y)
    logits = head.logits(x)
    np.testing.assert_allclose(logits[:, 1] - logits[:, 0], cold.decision_function(x), atol=2e-3)


@pytest.mark.slow
def test_sgd_comes_within_a_third_of_a_point_of_unregularised_logistic_regression(toy: ModuleType) -> None:
    x, y = toy.blobs(400, 4, dim=8, spread=3)
    q, truth = toy.blobs(1000, 4, dim=8, spread=3, seed=1)
    exact = LogisticRegression(C=1e6, max_iter=5000).fit(x, y).score(q, truth)
    context = toy.toy_context((x, y), (q, truth), spec=toy.toy_spec(embed_dim=8))
    found = context.run(TASK, features=("cls",), solver="sgd", steps=3000, batch=256, lr=(1e-3, 1e-2, 0.1))
    assert abs(toy.value(found["top1"]) - exact) < 0.003
    assert found["top1"].detail["solver"] == "sgd"
    assert 0.6 < exact < 0.95


def test_many_heads_in_one_pass_equal_torch_sgd_one_by_one() -> None:
    import torch

    rng = np.random.default_rng(0)
    features = [rng.standard_normal((30, width)).astype(np.float32) for width in (4, 7)]
    labels, rates, steps = rng.integers(0, 3, 30), (0.05, 0.5), 12
    heads = train_heads(
        lambda rows: [torch.from_numpy(f[rows]) for f in features],
        labels,
        rates,
        3,
        steps=steps,
        batch=8,
        momentum=0.9,
        rng=np.random.default_rng(5),
        device="cpu",
        advance=lambda n: None,
    )
    replay = np.random.default_rng(5)
    initial = [replay.normal(0, 0.01, (f.shape[1], 6)).astype(np.float32) for f in features]
    batches = list(shuffled_batches(30, 8, steps, replay))
    for s, f in enumerate(features):
        for h, rate in enumerate(rates):
            layer = torch.nn.Linear(f.shape[1], 3)
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(initial[s][:, 3 * h : 3 * h + 3].T))
                layer.bias.zero_()
            optimiser = torch.optim.SGD(layer.parameters(), rate * 8 / 256, momentum=0.9)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
            for rows in batches:
                optimiser.zero_grad()
                logits = layer(torch.from_numpy(f[rows]))
                torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[rows])).backward()
                optimiser.step()
                schedule.step()
            np.testing.assert_allclose(heads[s][h].weight, layer.weight.detach().numpy(), atol=1e-5)
            np.testing.assert_allclose(heads[s][h].bias, layer.bias.detach().numpy(), atol=1e-5)


def test_batches_use_every_image_before_any_comes_again() -> None:
    batches = list(shuffled_batches(10, 5, 6, np.random.default_rng(0)))
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert sorted([*first, *second]) == list(range(10))
    assert [len(b) for b in shuffled_batches(3, 8, 2, np.random.default_rng(0))] == [3, 3]


@pytest.mark.parametrize("solver", [{"solver": "lbfgs"}, {"solver": "sgd", "steps": 20, "lr": (0.1, 1.0)}])
def test_nothing_of_test_reaches_the_choice(toy: ModuleType, solver: dict[str, Any]) -> None:
    train, (x, y) = toy.blobs(20, 4, spread=4), toy.blobs(20, 4, spread=4, seed=1)
    options = {**QUICK, **solver, "features": ("cls", "4xcls", "cls+mean")}
    plain = toy.toy_context(train, (x, y))
    detail = plain.run(TASK, **options)["top1"].detail
    poisoned = toy.toy_context(train, (1e3 * np.ones_like(x), np.roll(y, 7)))
    assert poisoned.run(TASK, **options)["top1"].detail == detail
    assert plain.saved["choice"] == poisoned.saved["choice"]
    assert plain.asked == ["train", "val"]  # test is opened once, after everything else


def test_the_held_out_part_is_never_fitted_on(toy: ModuleType) -> None:
    # Random labels: only a head that saw the held-out images could do well on them.
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((200, 150)).astype(np.float32), rng.permutation(np.arange(200) % 2)
    context = toy.toy_context((x, y), (x, y))
    found = context.run(TASK, **{**QUICK, "c": (1e3,), "holdout": 0.4})
    assert found["top1"].detail["heldout_accuracy"] < 0.7
    assert toy.value(found["top1"]) == 1  # and the final head is fitted on all of train


def test_the_chosen_feature_is_the_informative_one(toy: ModuleType) -> None:
    train, test = toy.blobs(30, 4), toy.blobs(30, 4, seed=1)
    rng = np.random.default_rng(0)
    noise = tuple(rng.standard_normal(part[0].shape).astype(np.float32) for part in (train, test))
    context = toy.toy_context(train, test, columns={"cls@-1": noise})
    found = context.run(TASK, **{**QUICK, "features": ("cls", "mean")})
    assert found["top1"].detail["feature"] == "mean"
    assert toy.value(found["top1"]) > 0.9


def test_feature_choices_follow_the_encoder(toy: ModuleType) -> None:
    def columns(spec: Any, **options: Any) -> list[str]:
        data = toy.toy_context(toy.blobs(2, 2), toy.blobs(2, 2)).data
        (request,) = TASK.features(LinearConfig(**options), spec, data)
        return [c.id for c in request.columns]

    spec = toy.toy_spec()
    assert columns(spec, features=("4xcls+mean",)) == ["cls@-4", "cls@-3", "cls@-2", "cls@-1", "mean@-1"]
    assert columns(spec, features=("cls+mean",), layer=-2, final_norm="off") == ["cls@-2:raw", "mean@-2:raw"]
    no_cls = toy.toy_spec(has_cls=False, pooling="mean")
    assert columns(no_cls) == ["mean@-1", "mean@-4", "mean@-3", "mean@-2"]
    assert columns(toy.toy_spec(depth=2)) == ["cls@-1", "mean@-1"]
    with pytest.raises(TaskError, match="add mean"):
        columns(no_cls, features=("cls", "4xcls"))


def test_left_out_features_and_the_edge_of_the_grid_are_noted(toy: ModuleType) -> None:
    spec = toy.toy_spec(has_cls=False, pooling="mean")
    context = toy.toy_context(toy.blobs(20, 4), toy.blobs(20, 4, seed=1), spec=spec)
    context.run(TASK, c=(1e-9, 1e-8))
    assert any("4xcls" in note and "left out" in note for note in context.notes)
    assert any("edge of the grid" in note for note in context.notes)


def test_a_fit_that_does_not_converge_is_a_note_and_not_a_warning(toy: ModuleType) -> None:
    context = toy.toy_context(toy.blobs(30, 4, spread=4), toy.blobs(20, 4, seed=1))
    found = context.run(TASK, **QUICK, max_iter=2)
    assert not found["top1"].detail["converged"]
    assert any("final fit did not converge" in note for note in context.notes)
    assert any("fits of the grid did not converge" in note for note in context.notes)


def test_two_runs_are_equal_and_another_seed_holds_out_other_images(toy: ModuleType) -> None:
    train, test = toy.blobs(20, 4, spread=4), toy.blobs(20, 4, spread=4, seed=1)
    one, same, other = (toy.toy_context(train, test, seed=s) for s in (0, 0, 1))
    results = [c.run(TASK, **QUICK) for c in (one, same, other)]
    np.testing.assert_array_equal(results[0]["top1"].items, results[1]["top1"].items)
    assert one.saved["choice"] == same.saved["choice"] != other.saved["choice"]


def test_separated_classes_are_solved_and_random_features_are_near_chance(toy: ModuleType) -> None:
    train, test = toy.blobs(30, 5, spread=0.05), toy.blobs(100, 5, spread=0.05, seed=1)
    found = toy.toy_context(train, test).run(TASK, **QUICK)
    assert {m: toy.value(found[m]) for m in found} == {"top1": 1, "top5": 1, "top1_mean_class": 1}
    rng = np.random.default_rng(2)
    noise = [rng.standard_normal((n, 16)).astype(np.float32) for n in (150, 500)]
    random = toy.toy_context((noise[0], train[1]), (noise[1], test[1])).run(TASK, **QUICK)
    assert abs(toy.value(random["top1"]) - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 500)
    assert random["top1"].chance == random["top1_mean_class"].chance == pytest.approx(0.2)


def test_two_classes_and_classes_absent_from_train(toy: ModuleType) -> None:
    train, test = toy.blobs(20, 2, spread=0.1), toy.blobs(20, 2, spread=0.1, seed=1)
    found = toy.toy_context(train, test).run(TASK, **QUICK)
    assert toy.value(found["top1"]) == 1
    assert "top5" not in found

    train, test = toy.blobs(20, 6, spread=0.1), toy.blobs(20, 6, spread=0.1, seed=1)
    seen = train[1] % 3 > 0
    context = toy.toy_context((train[0][seen], train[1][seen]), test, n_classes=6)
    found = context.run(TASK, **QUICK)
    np.testing.assert_array_equal(found["top1"].items, test[1] % 3 > 0)
    np.testing.assert_array_equal(found["top5"].items, test[1] % 3 > 0)
    assert any("2 of 6 classes have no train image" in note for note in context.notes)


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_a_class_that_train_lacks_is_in_no_top_five_and_in_no_chance(toy: ModuleType, solver: str) -> None:
    train, test = toy.blobs(20, 8, spread=0.1), toy.blobs(20, 8, spread=0.1, seed=1)
    seen = train[1] < 3
    context = toy.toy_context((train[0][seen], train[1][seen]), test, n_classes=8)
    found = context.run(TASK, features=("cls",), solver=solver, steps=200, c=(0.1,), lr=(0.1,))
    assert not found["top5"].items[test[1] >= 3].any()
    assert found["top5"].items[test[1] < 3].all()
    assert found["top1"].chance == pytest.approx(1 / 8)
    assert found["top5"].chance == pytest.approx(3 / 8)


def test_broken_inputs_are_refused(toy: ModuleType) -> None:
    x, y = toy.blobs(4, 3)
    holed = x.copy()
    holed[3] = np.inf
    for train, test, message in (
        ((x, y * 0), (x, y), "needs two classes"),
        ((x[:3], np.arange(3)), (x, y), "no class has two images"),
        ((holed, y), (x, y), "train/0003.png hold NaN"),
        ((x, y), (holed, y), "val/0003.png hold NaN"),
        ((x, y), (x, None), "no class labels"),
    ):
        with pytest.raises(TaskError, match=message):
            toy.toy_context(train, test, n_classes=3).run(TASK, **QUICK)


def test_divergence_is_an_error_with_the_mend(toy: ModuleType) -> None:
    x, y = toy.blobs(10, 3)
    context = toy.toy_context((x, y), (x, y))
    with pytest.raises(TaskError, match="diverged at learning rate"), np.errstate(all="ignore"):
        context.run(TASK, features=("cls",), solver="sgd", normalise="none", lr=(1e38,), steps=5)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=60), st.floats(0.05, 0.9), st.integers(0, 99))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_the_holdout_is_a_stratified_partition(labels: list[int], fraction: float, seed: int) -> None:
    y = np.array(labels)
    counts = np.bincount(y)
    if counts.max() < 2:
        with pytest.raises(ValueError, match="two images"):
            stratified_holdout(y, fraction, np.random.default_rng(seed))
        return
    kept, held = stratified_holdout(y, fraction, np.random.default_rng(seed))
    assert sorted([*kept, *held]) == list(range(len(y)))
    for c in np.flatnonzero(counts):
        out = int((y[held] == c).sum())
        assert out == min(max(round(fraction * int(counts[c])), 1), counts[c] - 1)


def test_the_best_trial_breaks_ties_by_loss() -> None:
    trials = [
        Trial("a", 1, 0.5, 2.0),
        Trial("b", 1, 0.6, 3.0),
        Trial("b", 2, 0.6, 1.0),
        Trial("c", 1, 0.1, 0),
    ]
    assert best(trials) is trials[2]


def test_ranks_and_cross_entropies_equal_scikit_learn() -> None:
    import torch

    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((50, 7)) * 5, rng.integers(0, 7, 50)
    order = np.argsort(-logits, axis=1)
    given = torch.from_numpy(logits), torch.from_numpy(labels)
    np.testing.assert_array_equal(label_ranks(*given), (order == labels[:, None]).argmax(1))
    expected = log_loss(labels, softmax(logits, axis=1), labels=range(7))
    assert cross_entropies(*given).mean() == pytest.approx(expected)
    ties = torch.tensor([[2.0, 1.0, 2.0, 2.0]]).expand(4, -1)
    assert label_ranks(ties, torch.arange(4)).tolist() == [0, 3, 1, 2]
    unknown, last = torch.tensor([[0.0, 1.0, -torch.inf]]), torch.tensor([2])
    assert label_ranks(unknown, last).item() == 3
    assert label_ranks(torch.full((1, 3), torch.nan), last).item() == 3
    assert cross_entropies(unknown, last).item() == pytest.approx(-np.log(1e-30))


def test_normalisers_do_what_they_are_named_after() -> None:
    import torch

    x = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32) * [1, 10, 0.1, 3, 0] + 7
    x = x.astype(np.float32)
    norm = torch.nn.BatchNorm1d(5, eps=1e-6, affine=False).train()
    ours = Normaliser.fit("batchnorm", x)
    np.testing.assert_allclose(ours(x), norm(torch.from_numpy(x)).numpy(), atol=2e-5)
    expected = torch.nn.functional.normalize(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(Normaliser.fit("l2", x)(x), expected, atol=1e-6)
    np.testing.assert_array_equal(Normaliser.fit("none", x)(x), x)
    assert not np.shares_memory(Normaliser.fit("none", x)(x), x)
    assert np.isfinite(unit_rows(np.full((1, 3), 6e4, dtype=np.float16))).all()
    np.testing.assert_array_equal(unit_rows(np.zeros((2, 3))), np.zeros((2, 3)))


@pytest.mark.parametrize("kind", ["batchnorm", "l2", "none"])
def test_normalisers_do_the_same_to_tensors(kind: Any) -> None:
    import torch

    x = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32) * 3 + 7
    x[7] = 0
    ours = Normaliser.fit(kind, x)
    np.testing.assert_allclose(ours.on("cpu")(torch.from_numpy(x.copy())).numpy(), ours(x), atol=1e-6)


@pytest.mark.parametrize("kind", ["batchnorm", "l2", "none"])
def test_statistics_of_columns_side_by_side_are_those_of_their_rows(kind: Any) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((30, width)).astype(np.float32) * 5 + 2 for width in (3, 1, 4)]
    whole = np.concatenate(parts, axis=1)
    joined = Normaliser.beside([Normaliser.fit(kind, part) for part in parts])
    np.testing.assert_array_equal(joined(whole), Normaliser.fit(kind, whole)(whole))


def test_heads_are_judged_on_the_held_out_rows_alone_and_all_at_once(
    toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    (x, y), rng = toy.blobs(30, 4, spread=4), np.random.default_rng(0)
    bank = toy.toy_context((x, y), (x, y)).banks["train"]
    choice = _probe.FeatureChoice("cls+mean", (Column("cls", Tap()), Column("mean", Tap())))
    train = _probe.TrainSplit(bank, y, np.arange(0, 120, 2), np.arange(1, 120, 2), 4)
    wide = np.concatenate([x, x], axis=1)
    heads = [
        LinearHead(rng.normal(0, 0.3, (4, 32)).astype(np.float32), rng.normal(0, 1, 4).astype(np.float32))
        for _ in range(3)
    ]
    heads[1].bias[2] = np.nan
    normaliser = Normaliser.fit("batchnorm", wide[train.kept])
    fitted = _probe.Fitted(choice, normaliser, (0.1, 1.0, 10.0), heads)
    monkeypatch.setattr(_probe, "_LOGITS", 7 * 12)  # blocks of seven rows
    trials = _probe.judge(fitted, train, "cpu")
    assert [(t.feature, t.strength) for t in trials] == [("cls+mean", c) for c in (0.1, 1.0, 10.0)]
    assert (trials[1].accuracy, trials[1].loss, trials[1].converged) == (0.0, float("inf"), False)
    for trial, head in ((trials[0], heads[0]), (trials[2], heads[2])):
        logits = head.logits(normaliser(wide[train.held]))
        assert trial.accuracy == pytest.approx(np.mean(logits.argmax(1) == y[train.held]))
        assert trial.loss == pytest.approx(log_loss(y[train.held], softmax(logits, axis=1)), rel=1e-5)


def test_items_of_the_class_mean_carry_its_value_and_its_spread() -> None:
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat(np.arange(5), (400, 100, 60, 40, 20)))
    hits = (rng.random(len(y)) < np.array([0.9, 0.8, 0.5, 0.6, 0.3])[y]).astype(np.float32)
    items = mean_class_items(hits, y)
    assert items.mean() == pytest.approx(np.mean([hits[y == c].mean() for c in range(5)]))
    resampled = []
    for _ in range(3000):
        pick = rng.integers(0, len(y), len(y))
        resampled.append(np.mean([hits[pick][y[pick] == c].mean() for c in range(5)]))
    assert items.std() / np.sqrt(len(y)) == pytest.approx(np.std(resampled), rel=0.08)


@pytest.mark.parametrize("images", [1, 2, 3, 10])
def test_the_interval_of_the_class_mean_holds_its_level_for_small_classes(images: int) -> None:
    rng, held, runs = np.random.default_rng(1), 0, 300
    y, chances = np.repeat(np.arange(50), images), np.full(50, 0.3)
    for _ in range(runs):
        hits = (rng.random(len(y)) < chances[y]).astype(np.float32)
        found = score(Measurement("top1_mean_class", mean_class_items(hits, y)), rng)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.3 <= found.high
    assert held >= 0.91 * runs


def test_auto_takes_lbfgs_for_small_sets_and_sgd_above(toy: ModuleType) -> None:
    data = toy.blobs(10, 3), toy.blobs(10, 3, seed=1)
    config = LinearConfig(**QUICK, steps=5, lr=(0.1,), lbfgs_max_train=29)
    found = {m.metric: m for m in TASK.run(toy.toy_context(*data), config)}
    assert found["top1"].detail["solver"] == "sgd"
    config = config.model_copy(update={"lbfgs_max_train": 30})
    found = {m.metric: m for m in TASK.run(toy.toy_context(*data), config)}
    assert found["top1"].detail["solver"] == "lbfgs"


@pytest.mark.parametrize(
    "bad", [{"c": (0.0, 1.0)}, {"features": ()}, {"features": ("2xcls",)}, {"holdout": 1}]
)
def test_bad_options_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        LinearConfig(**bad)


def test_read_only_banks_are_enough(toy: ModuleType) -> None:
    context = toy.toy_context(toy.blobs(10, 3), toy.blobs(10, 3, seed=1))
    for name, bank in context.banks.items():
        columns = {key: value.copy() for key, value in bank.columns.items()}
        labels = bank.labels.copy()
        for array in (*columns.values(), labels):
            array.setflags(write=False)
        context.banks[name] = replace(bank, columns=columns, labels=labels)
    context.run(TASK, **QUICK)
    context.saved.clear()
    context.run(TASK, features=("cls",), solver="sgd", steps=5, lr=(0.1,))


def test_a_feature_that_is_named_twice_is_read_once():
    assert LinearConfig(features=("cls", "mean", "cls")).features == ("cls", "mean")
