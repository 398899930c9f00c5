"""Windowed propagation against the dense computation that the protocol describes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lmim_bench.tasks._math import propagation

CASES = settings(deadline=None, derandomize=True, max_examples=50)


def dense(queries, keys, labels, window, radius, topk, temperature, unwindowed=0):
    """All pairs: exp(similarity / T), masked, all but the k largest dropped, divided by the sum."""
    n, h, w, _ = keys.shape
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    dy, dx = (y[:, None] - y).abs(), (x[:, None] - x).abs()
    inside = torch.ones(h * w, h * w, dtype=torch.bool)
    if window == "square" and radius:
        inside = (dy <= radius) & (dx <= radius)
    elif window == "circle" and radius:
        inside = dy**2 + dx**2 <= radius**2
    inside = torch.stack([torch.ones_like(inside) if i < unwindowed else inside for i in range(n)], dim=1)
    similarity = queries.flatten(0, 1).double() @ keys.flatten(0, 2).double().T
    affinity = torch.exp(similarity / temperature) * inside.flatten(1)
    k = min(topk, affinity.shape[1])
    least = affinity.topk(k, dim=1).values[:, -1:]
    affinity[affinity < least] = 0
    affinity /= affinity.sum(dim=1, keepdim=True)
    return (affinity @ labels.flatten(0, 2).double()).view(h, w, -1).float()


def video(seed, frames, h, w, channels=3, width=8):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn((frames, h, w, width), generator=generator)
    labels = torch.rand((frames, h, w, channels), generator=generator)
    return features, labels


@CASES
@given(
    seed=st.integers(0, 1000),
    frames=st.integers(1, 4),
    h=st.integers(1, 14),
    w=st.integers(1, 14),
    window=st.sampled_from(["square", "circle", "none"]),
    radius=st.sampled_from([0, 1, 2, 2.5, 3, 12]),
    topk=st.sampled_from([1, 5, 40]),
    unwindowed=st.integers(0, 1),
    side=st.sampled_from([1, 3, 8]),
)
def test_equal_to_dense(seed, frames, h, w, window, radius, topk, unwindowed, side):
    features, labels = video(seed, frames + 1, h, w)
    features = F.normalize(features, dim=-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(propagation._TILE_SIDE, "cpu", side)
        found = propagation.propagate(
            features[0],
            features[1:],
            labels[1:],
            window=window,
            radius=radius,
            topk=topk,
            temperature=0.1,
            unwindowed=unwindowed,
        )
    expected = dense(features[0], features[1:], labels[1:], window, radius, topk, 0.1, unwindowed)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_memory_bound_shrinks_the_tiles(monkeypatch):
    features, labels = video(3, 4, 9, 11)
    features = F.normalize(features, dim=-1)
    arguments = {"window": "none", "radius": 0, "topk": 5, "temperature": 0.1}
    whole = propagation.propagate(features[0], features[1:], labels[1:], **arguments)
    monkeypatch.setattr(propagation, "_TILE_PAIRS", 4 * 3 * 99)
    sizes = []
    best = propagation._best
    monkeypatch.setattr(propagation, "_best", lambda t, *rest: sizes.append(len(t)) or best(t, *rest))
    parts = propagation.propagate(features[0], features[1:], labels[1:], **arguments)
    assert max(sizes) == 4
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("length", "side", "parts"),
    [
        (30, 24, [15, 15]),
        (52, 24, [18, 18, 16]),
        (104, 24, [21, 21, 21, 21, 20]),
        (30, 8, [8, 8, 8, 6]),
        (33, 8, [7, 7, 7, 7, 5]),
        (8, 8, [8]),
        (1, 8, [1]),
    ],
)
def test_tiles_are_alike_in_size(length, side, parts):
    found = list(propagation._cut(length, side))
    assert [part.stop - part.start for part in found] == parts
    assert [part.start for part in found] == np.cumsum([0, *parts[:-1]]).tolist()


@pytest.fixture
def made(monkeypatch):
    """The sizes of the masks that were made."""
    sizes = []
    outside = propagation._outside

    def recorded(*arguments):
        mask = outside(*arguments)
        sizes.append(mask.numel())
        return mask

    monkeypatch.setattr(propagation, "_outside", recorded)
    return sizes


@pytest.mark.parametrize("window", ["square", "circle"])
def test_masks_are_made_for_the_first_frame_and_shared_by_alike_tiles(made, window):
    """70 rows are 9 tiles; the inner ones see 3 rows on either side, the outer ones do not."""
    features, labels = video(5, 4, 70, 5)
    tracker = propagation.Propagator(features[0], labels[0], window=window, radius=3)
    for frame in features[1:]:
        tracker.step(frame)
    assert len(made) == 3


def test_masks_that_do_not_fit_are_made_again(made, monkeypatch):
    features, labels = video(5, 3, 20, 5)
    whole = propagation.Propagator(features[0], labels[0], radius=3)
    expected = [whole.step(frame) for frame in features[1:]]
    first, second, third = made
    made.clear()
    tracker = propagation.Propagator(features[0], labels[0], radius=3)
    monkeypatch.setattr(tracker._masks, "_room", first + third)
    found = [tracker.step(frame) for frame in features[1:]]
    assert made == [first, second, third, second]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("context", [0, 1, 3, 20])
@pytest.mark.parametrize("first_frame", [True, False])
@pytest.mark.parametrize("first_frame_window", [True, False])
def test_the_right_frames_are_looked_at(context, first_frame, first_frame_window):
    """Frame by frame against the dense computation on an explicit list of context frames."""
    if context == 0 and not first_frame:
        with pytest.raises(ValueError, match="first frame"):
            propagation.Propagator(torch.ones(2, 2, 3), torch.ones(2, 2, 2), context=0, first_frame=False)
        return
    features, labels = video(11, 7, 6, 7)
    tracker = propagation.Propagator(
        features[0],
        labels[0],
        context=context,
        first_frame=first_frame,
        first_frame_window=first_frame_window,
        window="square",
        radius=2,
        topk=5,
        temperature=0.1,
    )
    unit = F.normalize(features, dim=-1)
    known = [labels[0]]
    for t in range(1, len(features)):
        chosen = [0] * first_frame + list(range(max(int(first_frame), t - context), t))
        expected = dense(
            unit[t],
            unit[chosen],
            torch.stack([known[i] for i in chosen]),
            "square",
            2,
            5,
            0.1,
            unwindowed=int(first_frame and not first_frame_window),
        )
        found = tracker.step(features[t])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        known.append(found)


def test_one_hot_labels_stay_a_distribution():
    features, _ = video(5, 4, 8, 9)
    labels = torch.eye(3)[torch.randint(0, 3, (8, 9), generator=torch.Generator().manual_seed(0))]
    tracker = propagation.Propagator(features[0], labels)
    for frame in features[1:]:
        torch.testing.assert_close(tracker.step(frame).sum(dim=-1), torch.ones(8, 9))


def test_harden_enlarges_bilinearly_and_stretches_each_label():
    soft = torch.zeros(4, 5, 3)
    soft[..., 0] = 0.9
    soft[1, 2, 1] = 0.2  # faint, but the strongest of its map
    soft[1, 2, 0] = 0.8
    assert (propagation.harden(soft, normalise=False) == 0).all()
    found = propagation.harden(soft).numpy()
    assert np.argwhere(found == 1).tolist() == [[1, 2]]
    assert (found != 2).all(), "a label that is nowhere wins nowhere"
    enlarged = propagation.harden(soft, scale=4)
    maps = F.interpolate(soft.permute(2, 0, 1)[None], size=(16, 20), mode="bilinear", align_corners=False)[0]
    maps[:2] = (maps[:2] - maps[:2].amin((1, 2), True)) / (
        maps[:2].amax((1, 2), True) - maps[:2].amin((1, 2), True)
    )
    assert enlarged.dtype == torch.uint8
    assert torch.equal(enlarged, maps.argmax(dim=0).to(torch.uint8))


def test_a_label_everywhere_alike_wins_everywhere():
    soft = torch.zeros(3, 3, 2)
    soft[..., 1] = 1
    assert (propagation.harden(soft, scale=2) == 1).all()


def test_rounding_is_not_stretched():
    soft = torch.zeros(4, 6, 2)
    soft[..., 1] = 1 + torch.linspace(-3e-7, 3e-7, 24).view(4, 6)  # sums of weights, as they come out
    assert (propagation.harden(soft) == 1).all()
    soft[0, 0] = torch.tensor([1e-3, 1 - 1e-3])  # a faint label is still one
    assert propagation.harden(soft).flatten().tolist() == [0] + [1] * 23
