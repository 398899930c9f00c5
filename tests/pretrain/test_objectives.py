import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmim_bench.pretrain import objectives
from lmim_bench.pretrain.objectives import mean_cosine, reconstruction_loss, similarity_constraint
from lmim_bench.pretrain.sections import ObjectiveConfig

CASES = settings(deadline=None, derandomize=True, max_examples=25)


def arrays(seed=0, shape=(2, 4, 5)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator), 1.5 * torch.randn(*shape, generator=generator) + 0.3


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def patches_of(x):
    return [patch for image in x.tolist() for patch in image]


def by_channel(predictions, targets, loss):
    """The mean of a function of the difference, over all numbers."""
    pairs = zip(patches_of(predictions), patches_of(targets), strict=True)
    values = [loss(p - t) for mine, other in pairs for p, t in zip(mine, other, strict=True)]
    return sum(values) / len(values)


@CASES
@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
def test_mse_equals_a_loop(seed, b, t, d):
    predictions, targets = arrays(seed, (b, t, d))
    found = reconstruction_loss(predictions, targets, ObjectiveConfig(loss="mse"))
    assert found.item() == pytest.approx(by_channel(predictions, targets, lambda x: x * x), rel=1e-5)


@CASES
@given(st.integers(0, 999), st.sampled_from([0.1, 1.0, 2.0]))
def test_smooth_l1_equals_a_loop(seed, beta):
    predictions, targets = arrays(seed)
    found = reconstruction_loss(predictions, targets, ObjectiveConfig(loss="smooth_l1", beta=beta))

    def huber(x):
        return 0.5 * x * x / beta if abs(x) < beta else abs(x) - 0.5 * beta

    assert found.item() == pytest.approx(by_channel(predictions, targets, huber), rel=1e-5)


@CASES
@given(st.integers(0, 999))
def test_norm_l2_standardises_the_target_over_its_channels(seed):
    predictions, targets = arrays(seed)
    found = reconstruction_loss(predictions, targets, ObjectiveConfig(loss="norm_l2"))
    standard = torch.empty_like(targets)
    for b in range(2):
        for t in range(4):
            row = targets[b, t].tolist()
            mean = sum(row) / 5
            variance = sum((x - mean) ** 2 for x in row) / 4
            standard[b, t] = torch.tensor([(x - mean) / math.sqrt(variance + 1e-6) for x in row])
    assert found.item() == pytest.approx(by_channel(predictions, standard, lambda x: x * x), rel=1e-4)


@CASES
@given(st.integers(0, 999))
def test_cosine_equals_a_loop(seed):
    predictions, targets = arrays(seed)
    found = reconstruction_loss(predictions, targets, ObjectiveConfig(loss="cosine"))
    pairs = list(zip(patches_of(predictions), patches_of(targets), strict=True))
    expected = sum(2 - 2 * cosine(p, t) for p, t in pairs) / len(pairs)
    assert found.item() == pytest.approx(expected, abs=1e-5)


def info_nce(predictions, targets, tau, standardise, negatives, number):
    """Patch by patch: - log of the share of the own target among it and its negatives, times 2 tau."""
    images = []
    for image in predictions.double().tolist():
        count = len(image)
        if standardise:
            columns = []
            for channel in zip(*image, strict=True):
                mean = sum(channel) / count
                spread = 1.0
                if count > 1:
                    spread = math.sqrt(sum((x - mean) ** 2 for x in channel) / (count - 1))
                columns.append([(x - mean) / (spread + 1e-4) for x in channel])
            image = [list(row) for row in zip(*columns, strict=True)]
        images.append(image)
    answers = [list(image) for image in targets.double().tolist()]
    if negatives == "batch":
        images, answers = ([[image[t] for t in range(len(x[0])) for image in x]] for x in (images, answers))
    losses = []
    for image, others in zip(images, answers, strict=True):
        count = len(image)
        for i, prediction in enumerate(image):
            rivals = [(i + ahead) % count for ahead in range(1, min(number or count, count - 1) + 1)]
            own = math.exp(cosine(prediction, others[i]) / tau)
            rest = sum(math.exp(cosine(prediction, others[j]) / tau) for j in rivals)
            losses.append(-math.log(own / (own + rest)))
    return 2 * tau * sum(losses) / len(losses)


@CASES
@given(
    seed=st.integers(0, 999),
    batch=st.integers(1, 3),
    patches=st.integers(2, 5),
    tau=st.sampled_from([0.07, 0.2, 1.0]),
    standardise=st.booleans(),
    negatives=st.sampled_from(["image", "batch"]),
    number=st.sampled_from([None, 1, 2, 3, 100]),
)
def test_patch_discrimination_equals_a_loop(seed, batch, patches, tau, standardise, negatives, number):
    predictions, targets = arrays(seed, (batch, patches, 6))
    config = ObjectiveConfig(tau=tau, standardise=standardise, negatives=negatives, num_negatives=number)
    found = reconstruction_loss(predictions, targets, config)
    expected = info_nce(predictions, targets, tau, standardise, negatives, number)
    assert found.item() == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_one_patch_has_nothing_to_be_told_apart_from():
    predictions, targets = arrays(shape=(2, 1, 5))
    predictions.requires_grad_()
    loss = reconstruction_loss(predictions, targets, ObjectiveConfig())
    loss.backward()
    assert loss.item() == 0
    assert predictions.grad.abs().max() == 0


def test_equal_predictions_have_a_finite_gradient():
    predictions, targets = arrays()
    predictions = predictions[:, :1].expand(-1, 4, -1).clone().requires_grad_()
    reconstruction_loss(predictions, targets, ObjectiveConfig()).backward()
    assert predictions.grad.isfinite().all()


@pytest.mark.parametrize("loss", ["mse", "norm_l2", "smooth_l1", "cosine", "infonce"])
def test_losses_are_taken_in_single_precision(loss):
    predictions, targets = arrays()
    config = ObjectiveConfig(loss=loss, standardise=False)
    found = reconstruction_loss(predictions.bfloat16(), targets.bfloat16(), config)
    assert found.dtype == torch.float32
    exact = reconstruction_loss(predictions.bfloat16().float(), targets.bfloat16().float(), config)
    assert torch.equal(found, exact)


@CASES
@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 5))
def test_mean_cosine_is_over_all_pairs_each_with_itself(seed, batch, patches):
    x, _ = arrays(seed, (batch, patches, 4))
    per_image = []
    for image in x.double().tolist():
        values = [cosine(a, b) for a in image for b in image]
        per_image.append(sum(values) / patches**2)
    assert mean_cosine(x).item() == pytest.approx(sum(per_image) / batch, abs=1e-5)


def test_mean_cosine_of_equal_and_of_orthogonal_patches():
    assert mean_cosine(torch.ones(2, 3, 4)).item() == pytest.approx(1)
    assert mean_cosine(torch.eye(4)[None]).item() == pytest.approx(1 / 4)


def test_similarity_constraint_equals_the_formula():
    found = similarity_constraint([torch.tensor(0.9), torch.tensor(0.1)], 0.75)
    assert found.item() == pytest.approx((0.9 - 0.75) ** 2 + (0.1 - 0.75) ** 2)


def test_similarity_constraint_over_processes_is_that_of_the_mean(monkeypatch):
    """Two processes: the value is common, and the mean of their gradients is the gradient of the whole."""
    first, second = torch.tensor(0.9, requires_grad=True), torch.tensor(0.2, requires_grad=True)
    monkeypatch.setattr(objectives.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(objectives.dist, "get_world_size", lambda: 2)
    losses = []
    for own, other in ((first, second), (second, first)):
        value = other.detach().clone()
        monkeypatch.setattr(objectives.dist, "all_reduce", lambda total, value=value: total.add_(value))
        losses.append(similarity_constraint([own], 0.75))
    whole_first, whole_second = (x.detach().clone().requires_grad_() for x in (first, second))
    whole = ((whole_first + whole_second) / 2 - 0.75) ** 2
    whole.backward()
    for loss in losses:
        assert loss.item() == pytest.approx(whole.item())
        loss.backward()
    assert first.grad.item() / 2 == pytest.approx(whole_first.grad.item())
    assert second.grad.item() / 2 == pytest.approx(whole_second.grad.item())


@pytest.mark.parametrize("loss", ["mse", "norm_l2", "smooth_l1", "cosine", "infonce"])
def test_losses_are_fp32_under_autocast_too(loss):
    predictions, targets = arrays()
    config = ObjectiveConfig(loss=loss)
    with torch.autocast("cpu", torch.bfloat16):
        found = reconstruction_loss(predictions, targets, config)
    assert found.dtype == torch.float32
    assert found.item() == reconstruction_loss(predictions, targets, config).item()
