"""Paired comparisons against scipy, against the definitions written out, and against simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from lmim_bench.bench import comparison
from lmim_bench.bench.comparison import (
    Difference,
    compare,
    holm,
    mcnemar,
    p_text,
    rank,
    sentence,
    sign_flips,
)
from lmim_bench.bench.stats import bootstrap, tango, terms, wilson
from lmim_bench.bench.types import Measurement

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def few_exchanges(monkeypatch):
    """Simulations need many tests, each of which can do with fewer exchanges."""
    monkeypatch.setattr(comparison, "PERMUTATIONS", 499)


# ------------------------------------------------------------------------------------------- tests


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_is_the_sum_of_binomial_tails(outcomes):
    a, b = np.array(outcomes, dtype=float).T
    n, low = int((a != b).sum()), int(min((a > b).sum(), (b > a).sum()))
    tail = sum(math.comb(n, k) for k in range(low + 1)) / 2**n
    assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail))


def test_few_exchanges_are_all_tried_as_scipy_does():
    d = rng(1).normal(0.4, 1, size=10)
    p, test = sign_flips(d, rng())
    theirs = scipy.stats.permutation_test(
        (d, np.zeros(10)), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    )
    assert p == pytest.approx(theirs.pvalue)
    assert test == "exact paired permutation test"


def test_many_exchanges_are_drawn_and_agree_with_the_t_test():
    d = rng(2).normal(0.15, 1, size=300)
    p, _ = sign_flips(d, rng(3))
    assert p == pytest.approx(scipy.stats.ttest_1samp(d, 0).pvalue, abs=0.01)


def test_no_difference_at_all_is_no_evidence():
    found = compare(np.ones(20), np.ones(20), rng())
    assert (found.value, found.p, found.effect) == (0, 1.0, None)
    assert sign_flips(np.zeros(5), rng())[0] == 1.0


@pytest.mark.parametrize("clustered", [False, True])
def test_the_level_of_the_permutation_test_holds(clustered, few_exchanges):
    false_alarms, trials = 0, 300
    groups = np.repeat(np.arange(30), 4) if clustered else np.arange(60)
    for i in range(trials):
        random = rng(i)
        d = random.exponential(size=groups[-1] + 1)[groups] * random.choice([-1, 1], groups[-1] + 1)[groups]
        d = d + (0.1 * random.normal(size=len(groups)) if clustered else 0)
        found = compare(np.zeros(len(d)), d, random, clusters=groups if clustered else None)
        false_alarms += found.p < 0.05
    assert 0.02 <= false_alarms / trials <= 0.09


def test_the_level_of_the_exact_test_is_not_exceeded():
    alarms = 0
    for i in range(400):
        random = rng(i)
        a, b = (random.random((2, 80)) < 0.7).astype(float)
        alarms += mcnemar(a, b) < 0.05
    assert alarms / 400 <= 0.06


# ------------------------------------------------------------------------------------------- intervals


def test_the_interval_of_a_difference_covers_it(few_exchanges):
    hits = 0
    for i in range(300):
        random = rng(i)
        skill = random.normal(size=80)
        a = skill + random.normal(size=80)
        b = skill + 0.5 + random.exponential(size=80) - 1
        found = compare(a, b, random)
        hits += found.low <= 0.5 <= found.high
    assert 0.92 <= hits / 300 <= 0.98


def _log_likelihood(only_a: float, difference: float, counts: tuple[int, int, int]) -> float:
    shares = only_a, only_a + difference, 1 - 2 * only_a - difference
    if min(shares) < 0:
        return -math.inf
    return sum(
        n * math.log(share) if share else -math.inf for n, share in zip(counts, shares, strict=True) if n
    )


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 300))
def test_the_ends_of_tangos_interval_are_where_the_score_test_rejects(only_a, only_b, rest):
    n = only_a + only_b + rest
    if not n:
        return
    low, high = tango(only_a, only_b, n)
    value = (only_b - only_a) / n
    assert -1 <= low <= value <= high <= 1
    for end in (low, high):
        if abs(end) == 1:
            continue
        # The likeliest share of items that a alone has right, where the difference is the end: by search.
        ends = max(0.0, -end), (1 - end) / 2
        counts = only_a, only_b, rest
        found = scipy.optimize.minimize_scalar(
            lambda share, end=end, counts=counts: -_log_likelihood(share, end, counts),
            bounds=ends,
            method="bounded",
            options={"xatol": 1e-13},
        )
        share = max((found.x, *ends), key=lambda x, end=end, counts=counts: _log_likelihood(x, end, counts))
        variance = (2 * share + end - end**2) / n
        assert (value - end) ** 2 / variance == pytest.approx(scipy.stats.chi2(1).ppf(0.95), rel=1e-4)


@pytest.mark.parametrize(("n", "differ"), [(60, 0.05), (200, 0.02), (1000, 0.005), (1000, 0.3)])
def test_the_interval_of_right_answers_covers_where_few_differ(n, differ):
    hits = 0
    for i in range(600):
        only_a, only_b, _ = rng(i).multinomial(n, [differ / 2, differ / 2, 1 - differ])
        low, high = tango(only_a, only_b, n)
        hits += low <= 0 <= high
    assert 0.93 <= hits / 600 <= 0.99


def test_right_answers_that_are_all_alike_have_an_interval():
    found = compare(np.ones(50), np.ones(50), rng())
    assert found.low == pytest.approx(-0.0713, abs=1e-4)
    assert found.high == pytest.approx(0.0713, abs=1e-4)
    three = compare(np.zeros(60), np.r_[np.ones(3), np.zeros(57)], rng())
    assert three.low < 0 < three.high
    assert three.p == 0.25


def test_pairing_is_narrower_than_two_intervals():
    skill = rng(1).normal(size=200)
    a, b = skill + 0.1 * rng(2).normal(size=200), skill + 0.1 * rng(3).normal(size=200) + 0.1
    found = compare(a, b, rng())
    alone = bootstrap(a[:, None], lambda m: m[:, 0], rng())
    assert found.high - found.low < 0.2 * (alone[1] - alone[0])
    assert found.p < 0.001


def test_clusters_count_as_one():
    groups = np.repeat(np.arange(12), 20)
    d = np.repeat(rng(5).normal(0.3, 1, size=12), 20)
    apart, together = compare(d * 0, d, rng()), compare(d * 0, d, rng(), clusters=groups)
    assert together.independent == 12
    assert together.items == 240
    assert together.p > apart.p
    assert together.high - together.low > 3 * (apart.high - apart.low)


def test_crossed_draws_widen_the_interval():
    random = rng(6)
    table = random.normal(size=(5, 1)) * 0.1 + random.normal(size=(5, 400)) + 0.05
    crossed = compare(np.zeros_like(table), table, rng(), crossed=True)
    plain = compare(np.zeros(400), table.mean(axis=0), rng())
    assert crossed.high - crossed.low > plain.high - plain.low
    assert crossed.p > plain.p
    assert compare(np.zeros((1, 9)), np.ones((1, 9)), rng(), crossed=True).p is None
    assert compare(np.zeros((2, 9)), np.zeros((2, 9)), rng(), crossed=True).p == 1


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(2, 12), st.floats(-0.3, 0.3), st.integers(0, 999))
def test_the_crossed_p_value_says_what_its_interval_says(draws, shift, seed):
    random = rng(seed)
    table = 0.1 * random.normal(size=(draws, 1)) + random.normal(size=(draws, 60)) + shift
    found = compare(np.zeros_like(table), table, rng(), crossed=True)
    assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


@pytest.mark.slow
@pytest.mark.parametrize("draws", [3, 5, 10])
def test_equal_encoders_are_told_apart_at_the_stated_rate_where_draws_decide(draws):
    told = 0
    for i in range(800):
        table = 0.1 * rng(i).normal(size=(draws, 1)) + 0.05 * rng(i + 1000).normal(size=(draws, 200))
        told += compare(np.zeros_like(table), table, rng(), crossed=True).p < 0.05
    assert 0.03 <= told / 800 <= 0.07


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 400), st.integers(2, 400))
def test_wilson_agrees_with_scipy(hits, n):
    hits = min(hits, n)
    theirs = scipy.stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n)[0] <= hits / n <= wilson(hits, n)[1], "inside, whatever is rounded"
    assert wilson(hits, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize(("share", "n"), [(0.5, 50), (0.9, 200), (0.97, 400), (0.2, 100)])
def test_wilson_covers_at_its_level(share, n):
    k = np.arange(n + 1)
    weight = scipy.stats.binom.pmf(k, n, share)
    covered = [wilson(int(i), n)[0] <= share <= wilson(int(i), n)[1] for i in k]
    assert 0.93 <= float(weight @ covered) <= 0.97


# ------------------------------------------------------------------------------------------- terms


def ratio(means):
    return means[:, 0] / means[:, 1]


def test_terms_have_the_value_as_their_mean_and_its_bootstrap_spread():
    random = rng(7)
    rows = np.column_stack([random.random(300), 1 + random.random(300)])
    t = terms(Measurement("m", rows, ratio))
    assert t.mean() == pytest.approx(rows[:, 0].sum() / rows[:, 1].sum(), abs=1e-12)
    theirs = scipy.stats.bootstrap(
        (rows[:, 0], rows[:, 1]), lambda x, y, axis: x.sum(axis) / y.sum(axis), paired=True, rng=rng(8)
    ).standard_error
    assert t.std(ddof=1) / math.sqrt(300) == pytest.approx(theirs, rel=0.05)


def test_terms_of_a_mean_are_the_items():
    x = rng(9).random(20)
    np.testing.assert_array_equal(terms(Measurement("m", x)), x)


def test_a_paired_difference_of_ratios_by_terms_agrees_with_the_bootstrap_of_the_ratios():
    random = rng(10)
    size = 1 + random.random(250)
    a = np.column_stack([size * random.random(250), size])
    b = np.column_stack([np.minimum(size, a[:, 0] + 0.05 * random.random(250)), size])
    found = compare(terms(Measurement("m", a, ratio)), terms(Measurement("m", b, ratio)), rng())
    both = bootstrap(np.hstack([a, b]), lambda m: ratio(m[:, 2:]) - ratio(m[:, :2]), rng())
    assert (found.low, found.high) == pytest.approx(both, abs=1.5e-3)


# ------------------------------------------------------------------------------------------- several


@settings(deadline=None, derandomize=True)
@given(P_VALUES)
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values):
    corrected = holm(p_values)
    for level in (0.01, 0.05, 0.2):
        rejected, order = set(), sorted(range(len(p_values)), key=lambda i: p_values[i])
        for position, i in enumerate(order):
            if min(1.0, p_values[i] * (len(order) - position)) > level:
                break
            rejected.add(i)
        assert {i for i, p in enumerate(corrected) if p <= level} == rejected


def ranked(table, higher):
    """Ranks over columns that are each of a data set of its own."""
    return rank(table, higher, [f"set {i}" for i in range(len(table))])


def test_ranks_as_in_demsar():
    table = rng(11).random((14, 4))
    found = ranked(table, [True] * 14)
    assert sum(found.ranks) == pytest.approx(10)
    assert found.critical_difference == pytest.approx(2.569 * math.sqrt(4 * 5 / (6 * 14)), abs=1e-3)
    chi2 = scipy.stats.friedmanchisquare(*table.T).statistic
    statistic = 13 * chi2 / (14 * 3 - chi2)
    assert found.p == pytest.approx(scipy.stats.f.sf(statistic, 3, 39))


def test_ranks_follow_the_direction_of_each_metric_and_share_ties():
    found = ranked(np.array([[0.9, 0.5], [0.1, 0.4], [0.3, 0.3]]), [True, False, True])
    assert found.ranks == pytest.approx((7 / 6, 11 / 6))
    assert ranked(np.array([[1.0, 2.0]]), [True]).critical_difference is None


def test_tasks_on_one_data_set_are_one_piece_of_evidence():
    table = np.array([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0], [3.0, 2.0, 1.0]])
    found = rank(table, [True] * 3, ["a", "a", "b"])
    assert (found.columns, found.data_sets) == (3, 2)
    assert found.ranks == (1.0, 2.25, 2.75)
    apart = ranked(np.repeat(table[:1], 2, axis=0), [True] * 2)
    assert found.critical_difference == apart.critical_difference
    alone = rank(table, [True] * 3, ["a"] * 3)
    assert (alone.critical_difference, alone.p) == (None, None)


def test_few_columns_that_agree_are_no_certainty():
    assert ranked(np.array([[3.0, 2.0, 1.0]] * 2), [True] * 2).p == pytest.approx(1 / 6)
    assert ranked(np.array([[3.0, 2.0, 1.0]] * 6), [True] * 6).p == pytest.approx(1 / 6**5)
    assert ranked(np.array([[2.0, 1.0]] * 3), [True] * 3).p == pytest.approx(1 / 4)
    assert ranked(np.arange(7.0)[None].repeat(6, axis=0), [True] * 6).p == 0.0


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.integers(0, 999), st.integers(2, 3), st.integers(2, 4))
def test_the_p_value_of_ranks_is_the_share_of_all_orders(seed, encoders, columns):
    table = rng(seed).integers(0, 3, (columns, encoders)).astype(float)
    ranks = scipy.stats.rankdata(-table, axis=1)
    orders = [list(itertools.permutations(row)) for row in ranks]
    spreads = [np.square(np.sum(chosen, axis=0)).sum() for chosen in itertools.product(*orders)]
    expected = np.mean(np.array(spreads) >= np.square(ranks.sum(axis=0)).sum() - 1e-9)
    assert ranked(table, [True] * columns).p == pytest.approx(expected)


def test_ties_are_corrected_for_where_orders_are_many():
    table = rng(3).integers(0, 3, (14, 4)).astype(float)
    chi2 = scipy.stats.friedmanchisquare(*table.T).statistic
    assert ranked(table, [True] * 14).p == pytest.approx(scipy.stats.f.sf(13 * chi2 / (42 - chi2), 3, 39))
    assert ranked(np.ones((14, 4)), [True] * 14).p == 1


def test_differences_without_spread_are_no_certainty_over_draws():
    assert compare(np.zeros((10, 12)), np.ones((10, 12)), rng(), crossed=True).p == 2.0**-11
    assert compare(np.ones((10, 12)), np.ones((10, 12)), rng(), crossed=True).p == 1


def test_differences_that_vary_by_rounding_alone_have_no_effect_size():
    a = np.linspace(0.1, 0.9, 50)
    assert compare(a, a + 0.1, rng()).effect is None


# ------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("value", "p", "higher", "words"),
    [
        (0.041, 0.0001, True, "B is better than A by 4.1 points (3.2 to 5.0), p < 0.001, on 2,640 items"),
        (0.041, 0.0001, False, "A is better than B by 4.1 points (3.2 to 5.0), p < 0.001, on 2,640 items"),
        (0.041, 0.2, True, "B and A are not told apart: 4.1 points (3.2 to 5.0), p = 0.200, on 2,640 items"),
    ],
)
def test_the_sentence(value, p, higher, words):
    found = Difference(value, 0.032, 0.050, p, 0.0, "", 1.0, 2640, 2640)
    assert sentence("A", "B", found, p, "%", higher) == words


def test_the_sentence_turns_with_the_winner_and_names_groups():
    found = Difference(-0.041, -0.05, -0.032, 0.01, 0.0, "", 1.0, 61, 20)
    text = sentence("A", "B", found, 0.01, "%", True)
    assert text == "A is better than B by 4.1 points (3.2 to 5.0), p = 0.010, on 61 items in 20 groups"
    alone = Difference(0.1, None, None, None, 0.0, "", None, 3, 1)
    assert "too few groups for a test" in sentence("A", "B", alone, None, "%", True)


def test_next_to_the_level_a_p_value_shows_its_side_and_no_difference_reads_as_none():
    assert [p_text(p) for p in (0.0004, 0.012, 0.0497, 0.0503, 0.05)] == [
        *("< 0.001", "0.012", "0.0497", "0.0503", "0.050")
    ]
    found = Difference(0.0003, 0.0001, 0.0005, 0.01, 0.0, "", 1.0, 99, 99)
    assert "better than A by 0.03 points (0.01 to 0.05)" in sentence("A", "B", found, 0.01, "%", True)


def test_items_that_are_not_the_same_are_refused():
    with pytest.raises(ValueError, match="cannot be paired"):
        compare(np.zeros(3), np.zeros(4), rng())


def test_drawing_in_chunks_changes_nothing_but_memory(monkeypatch):
    d = rng(12).normal(0.2, 1, size=50)
    whole = sign_flips(d, rng(1))[0]
    monkeypatch.setattr(comparison, "CHUNK_ELEMENTS", 50 * 100)
    assert sign_flips(d, rng(1))[0] == pytest.approx(whole, abs=0.02)


def test_seeds_are_samples_as_the_items_are():
    """The same encoder with other seeds: what the seeds bring about is in the test, at its level."""
    wrong, runs, draws = [0, 0], 400, rng(17)
    for _ in range(runs):
        items = draws.normal(size=200)
        a, b = (items + draws.normal(0, 0.2, (5, 1)) + draws.normal(0, 0.5, (5, 200)) for _ in range(2))
        wrong[0] += compare(a, b, draws, crossed=True).p < 0.05
        wrong[1] += compare(a.mean(0), b.mean(0), draws).p < 0.05
    assert wrong[0] <= 0.08 * runs
    assert wrong[1] >= 0.3 * runs


def test_items_in_groups_count_by_groups_over_seeds():
    table = rng(2).normal(0.2, 1.0, (4, 30))
    clusters = np.repeat(np.arange(6), (1, 3, 5, 6, 7, 8))
    found = compare(np.zeros((4, 30)), table, rng(), clusters=clusters, crossed=True)
    assert found.value == pytest.approx(table.mean())
    assert (found.items, found.independent) == (30, 6)
    sums = np.array([[row[clusters == c].sum() for c in range(6)] for row in table]) * 6 / 30
    alone = compare(np.zeros((4, 6)), sums, rng(), crossed=True)
    assert (found.low, found.high, found.p) == pytest.approx((alone.low, alone.high, alone.p))


def test_the_least_p_value_of_few_groups():
    clusters = np.repeat(np.arange(5), 4)
    found = compare(np.zeros(20), rng(0).uniform(0.3, 0.4, 20), rng(), clusters=clusters)
    assert found.p == found.least == 2**-4
    assert compare(np.zeros(20), np.ones(20), rng()).least == 2**-19
    many = compare(np.zeros(50), rng(0).uniform(0.3, 0.4, 50), rng())
    assert many.p == many.least > 2**-49  # no test of drawn exchanges says more than that none was as extreme


def test_rare_exchanges_are_drawn_until_they_are_counted():
    items = rng(1).uniform(-0.2, 1, 20)
    rare, test = sign_flips(items, rng())
    bits = np.arange(2**20)[:, None] >> np.arange(20) & 1
    exact = np.mean(np.abs((1 - 2 * bits) @ items) >= abs(items.sum()) - 1e-12)
    assert exact < 1e-3
    assert rare == pytest.approx(exact, rel=0.25)
    assert test == "paired permutation test, 999,999 exchanges"


def test_of_few_images_draws_say_no_more_than_the_images():
    a, b = np.zeros((10, 3)), np.ones((10, 3))
    all_right = compare(a, b, rng(), crossed=True)
    b[0, 0] = 0
    found = compare(a, b, rng(), crossed=True)
    assert found.p == all_right.p == found.least == 0.25
    assert found.high == 1  # two shares cannot be further apart


def test_a_difference_that_groups_share_has_no_effect_size():
    clusters = np.repeat(np.arange(5), (1, 2, 3, 4, 5))
    assert compare(np.zeros(15), np.full(15, 0.1), rng(), clusters=clusters).effect is None
