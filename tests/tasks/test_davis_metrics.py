"""J, F and their statistics against the definitions written out the slow way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.ndimage import distance_transform_edt

from lmim_bench.tasks._math import davis_metrics as dm

CASES = settings(deadline=None, derandomize=True, max_examples=50)


def slow_boundary(mask):
    """Pixel by pixel: differs from the right, lower or lower right neighbour, edges by one neighbour only."""
    height, width = mask.shape
    edge = np.zeros((height, width), dtype=bool)
    for y in range(height):
        for x in range(width):
            last_row, last_column = y == height - 1, x == width - 1
            if not last_row and not last_column:
                others = mask[y, x + 1], mask[y + 1, x], mask[y + 1, x + 1]
                edge[y, x] = any(other != mask[y, x] for other in others)
            elif last_row and not last_column:
                edge[y, x] = mask[y, x + 1] != mask[y, x]
            elif last_column and not last_row:
                edge[y, x] = mask[y + 1, x] != mask[y, x]
    return edge


def slow_f(truth, predicted, edges):
    """Boundary pixels matched within the tolerance, by exact Euclidean distances over the whole frame."""
    radius = np.ceil(0.008 * np.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2))
    a, b = edges(truth), edges(predicted)
    if not a.any() and not b.any():
        return 1.0
    if not a.any() or not b.any():
        return 0.0
    recall = (distance_transform_edt(~b)[a] <= radius).mean()
    precision = (distance_transform_edt(~a)[b] <= radius).mean()
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def slow_j(truth, predicted):
    union = (truth | predicted).sum()
    return 1.0 if union == 0 else (truth & predicted).sum() / union


def check(truth, predicted, objects, edges=slow_boundary):
    j, f = dm.frame_scores(truth, predicted, objects)
    for k, label in enumerate(objects):
        assert j[k] == pytest.approx(slow_j(truth == label, predicted == label), abs=1e-9)
        assert f[k] == pytest.approx(slow_f(truth == label, predicted == label, edges), abs=1e-9)


def blobs(rng, height, width, labels):
    """A label map of overlapping rectangles, some of them reaching over the frame's edge."""
    out = np.zeros((height, width), dtype=np.uint8)
    for label in labels:
        y, x = rng.integers(-3, height), rng.integers(-3, width)
        h, w = rng.integers(1, height), rng.integers(1, width)
        out[max(0, y) : max(0, y + h), max(0, x) : max(0, x + w)] = label
    return out


@CASES
@given(
    maps=npst.arrays(
        np.uint8,
        st.tuples(st.just(2), st.integers(1, 24), st.integers(1, 24)),
        elements=st.sampled_from([0, 1, 2, 3, 255]),
    )
)
def test_noise_of_any_size(maps):
    check(maps[0], maps[1], (1, 2, 3))


@CASES
@given(mask=npst.arrays(np.bool_, st.tuples(st.integers(1, 24), st.integers(1, 24))))
def test_boundary_map_is_the_rule_pixel_by_pixel(mask):
    assert np.array_equal(dm.boundary_map(mask), slow_boundary(mask))


@CASES
@given(seed=st.integers(0, 10_000))
def test_rectangles_at_and_over_the_edge(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 90, size=2)
    truth = blobs(rng, height, width, rng.permutation([1, 2, 3, 7]))
    check(truth, blobs(rng, height, width, [1, 2, 3, 7]), (1, 2, 3, 7))


@pytest.mark.parametrize("seed", range(4))
def test_frames_of_the_size_of_davis(seed):
    """Objects that reach over several words of bits, at, over and away from the frame's edge."""
    rng = np.random.default_rng(seed)
    height, width = [(480, 854), (480, 910), (481, 961), (300, 448)][seed]
    truth = blobs(rng, height, width, rng.permutation([1, 2, 3]))
    predicted = np.roll(truth, rng.integers(-12, 12, size=2), axis=(0, 1))
    check(truth, predicted, (1, 2, 3), edges=dm.boundary_map)


def degenerate():
    empty = np.zeros((60, 90), dtype=np.uint8)
    cases = {"empty": empty, "full": empty + 1}
    spots = {"pixel": (30, 40), "corner": (59, 89), "origin": (0, 0), "last row": (59, slice(None))}
    spots |= {"last column": (slice(None), 89), "first row": (0, slice(None)), "half": (slice(30, None),)}
    for name, where in spots.items():
        cases[name] = empty.copy()
        cases[name][where] = 1
    return cases


@pytest.mark.parametrize("truth", degenerate())
@pytest.mark.parametrize("predicted", degenerate())
def test_degenerate_masks(truth, predicted):
    check(degenerate()[truth], degenerate()[predicted], (1,))


def test_empty_means_one_and_missing_means_zero():
    truth = np.zeros((20, 20), dtype=np.uint8)
    truth[5:9, 5:9] = 2
    j, f = dm.frame_scores(truth, np.zeros_like(truth), (1, 2))
    assert j.tolist() == [1, 0]
    assert f.tolist() == [1, 0]


def test_void_and_foreign_labels_are_background():
    truth = np.full((20, 20), 255, dtype=np.uint8)
    truth[4:12, 4:12] = 1
    predicted = np.full((20, 20), 9, dtype=np.uint8)
    predicted[4:12, 4:12] = 1
    assert [v.tolist() for v in dm.frame_scores(truth, predicted, (1,))] == [[1.0], [1.0]]


def test_maps_of_different_size_are_refused():
    with pytest.raises(ValueError, match="one size"):
        dm.frame_scores(np.zeros((4, 4), np.uint8), np.zeros((4, 5), np.uint8), (1,))


def test_objects_are_those_of_the_first_frame():
    first = np.array([[0, 1, 255], [4, 4, 0]], dtype=np.uint8)
    assert dm.object_ids(first) == (1, 4)
    assert dm.object_ids(np.zeros((3, 3), dtype=np.uint8)) == ()


def test_first_and_last_frame_do_not_count():
    rng = np.random.default_rng(0)
    truth = np.stack([blobs(rng, 40, 50, [1, 2]) for _ in range(5)])
    truth[0, :2, :2] = [[1, 2], [1, 2]]
    predicted = truth.copy()
    predicted[0], predicted[-1] = 0, 0
    j, f = dm.sequence_scores(truth, predicted)
    assert j.shape == f.shape == (2, 3)
    assert (j == 1).all()
    assert (f == 1).all()


def test_tolerance_at_the_sizes_of_davis():
    assert [dm.tolerance(480, width) for width in (854, 910, 1152)] == [8, 9, 10]


def slow_decay(values):
    """The official rule: five ends, rounded with halves upwards, quarters that include both ends."""
    n = len(values)
    ends = [int(np.floor(1 + q * (n - 1) / 4 + 0.5 + 1e-9)) - 1 for q in range(5)]
    return np.mean(values[ends[0] : ends[1] + 1]) - np.mean(values[ends[3] : ends[4] + 1])


@CASES
@given(values=npst.arrays(np.float64, st.integers(1, 400), elements=st.floats(0, 1)))
def test_statistics(values):
    found = dm.statistics(np.stack([values, values[::-1]]))
    assert found.mean[0] == pytest.approx(np.mean(values), abs=1e-12)
    assert found.recall[0] == pytest.approx(sum(v > 0.5 for v in values) / len(values), abs=1e-12)
    assert found.decay[0] == pytest.approx(slow_decay(values), abs=1e-12)
    assert found.decay[1] == pytest.approx(slow_decay(values[::-1]), abs=1e-12)


def test_decay_of_a_long_sequence_looks_at_its_end():
    values = np.ones((1, 400))
    values[:, 300:] = 0
    assert dm.statistics(values).decay[0] == pytest.approx(1, abs=0.02)


def test_statistics_of_nothing_are_refused():
    with pytest.raises(ValueError, match="per-frame values"):
        dm.statistics(np.empty((2, 0)))
