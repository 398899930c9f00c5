import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmim_bench.pretrain.recipe import OptimConfig, TargetConfig, load_recipe
from lmim_bench.pretrain.schedules import between, learning_rate, milestones, momentum, weight_decay

CASES = settings(deadline=None, derandomize=True, max_examples=50)
share = st.floats(0, 1)


@CASES
@given(st.floats(-5, 5), st.floats(-5, 5), share)
def test_curves_equal_their_formulas(start, end, done):
    assert between(start, end, done, "constant") == start
    assert between(start, end, done, "linear") == pytest.approx(start + done * (end - start), abs=1e-9)
    expected = end + (start - end) * (1 + math.cos(math.pi * done)) / 2
    assert between(start, end, done, "cosine") == pytest.approx(expected, abs=1e-9)


@CASES
@given(st.floats(-5, 5), st.floats(-5, 5), share, st.sampled_from(["cosine", "linear", "constant"]))
def test_curves_stay_between_their_ends(start, end, done, curve):
    assert min(start, end) - 1e-9 <= between(start, end, done, curve) <= max(start, end) + 1e-9
    assert between(start, end, 0.0, curve) == pytest.approx(start)
    assert between(start, end, 1.0, curve) == pytest.approx(start if curve == "constant" else end)


@CASES
@given(done=share, warmup=st.floats(0, 0.9), origin=share, floor=share)
def test_learning_rate_warms_up_linearly_and_falls_on_half_a_cosine(done, warmup, origin, floor):
    config = OptimConfig(warmup=warmup, warmup_from=origin, floor=floor)
    if done < warmup:
        expected = 3 * (origin + (1 - origin) * done / warmup)
    else:
        angle = math.pi * (done - warmup) / (1 - warmup)
        expected = 3 * (floor + (1 - floor) * 0.5 * (1 + math.cos(angle)))
    assert learning_rate(config, 3.0, done) == pytest.approx(expected, abs=1e-9)
    assert 0 <= learning_rate(config, 3.0, done) <= 3 + 1e-9


def test_learning_rate_at_its_corners():
    config = OptimConfig(warmup=0.1, warmup_from=0.25, floor=0.2)
    assert learning_rate(config, 2.0, 0.0) == pytest.approx(0.5)
    assert learning_rate(config, 2.0, 0.1) == pytest.approx(2.0)
    assert learning_rate(config, 2.0, 0.1 - 1e-9) == pytest.approx(2.0)
    assert learning_rate(config, 2.0, 1.0) == pytest.approx(0.4)
    assert learning_rate(OptimConfig(warmup=0.0), 2.0, 0.0) == 2.0


def test_mae_and_latent_mim_follow_their_official_rates():
    """MAE (util/lr_sched.py): lr * epoch / warmup_epochs, then half a cosine to min_lr 0, of 800 epochs."""
    mae = load_recipe("mae")
    assert mae.learning_rate == pytest.approx(1.5e-4 * 4096 / 256)
    for epoch in (0, 7, 39.5, 40, 333, 800):
        expected = mae.learning_rate * epoch / 40
        if epoch >= 40:
            expected = mae.learning_rate * 0.5 * (1 + math.cos(math.pi * (epoch - 40) / 760))
        found = learning_rate(mae.optim, mae.learning_rate, epoch / 800)
        assert found == pytest.approx(expected, abs=1e-12)
    latent = load_recipe("latent-mim")
    assert learning_rate(latent.optim, 1.0, 0.0) == learning_rate(latent.optim, 1.0, 1.0) == 0.25


@CASES
@given(share, share)
def test_momentum_of_the_official_code(start, done):
    """m = 1 - (1 - m0) * (1 + cos(pi t)) / 2, on the way to 1."""
    config = TargetConfig(momentum=start, momentum_end=1.0, momentum_curve="cosine")
    expected = 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * done))
    assert momentum(config, done) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("done", [0.0, 0.25, 0.5, 1.0])
def test_momentum_may_also_be_linear_or_constant(done):
    linear = TargetConfig(momentum=0.996, momentum_end=1.0, momentum_curve="linear")
    assert momentum(linear, done) == pytest.approx(0.996 + done * 0.004)
    constant = TargetConfig(momentum=0.996, momentum_end=1.0, momentum_curve="constant")
    assert momentum(constant, done) == 0.996


@CASES
@given(share)
def test_weight_decay_is_constant_or_on_a_cosine(done):
    assert weight_decay(OptimConfig(weight_decay=0.05), done) == 0.05
    moving = OptimConfig(weight_decay=0.04, weight_decay_end=0.4)
    expected = 0.4 + (0.04 - 0.4) * 0.5 * (1 + math.cos(math.pi * done))
    assert weight_decay(moving, done) == pytest.approx(expected, abs=1e-12)


def test_weight_decay_may_end_at_nothing():
    assert weight_decay(OptimConfig(weight_decay=0.05, weight_decay_end=0.0), 1.0) == pytest.approx(0)


@pytest.mark.parametrize("total", [1, 2, 3, 4, 7, 10, 11, 39, 1000])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 64])
def test_milestones_are_as_many_as_asked_evenly_spread_and_end_with_the_last_step(total, count):
    found = sorted(milestones(total, count))
    assert len(found) == min(total, count)
    assert not found or found[-1] == total
    gaps = np.diff([0, *found])
    assert not len(gaps) or max(gaps) - min(gaps) <= 1
    assert all(gap > 0 for gap in gaps)
