"""Label counts, matchings and scores against explicit loops over pixels and permutations."""

from __future__ import annotations

from itertools import permutations
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lmim_bench.bench.errors import TaskError
from lmim_bench.tasks._math import segmentation as seg

EXAMPLES = settings(deadline=None, derandomize=True, max_examples=50)
VOID = 255


def _masks(
    rng: np.random.Generator, n: int, classes: int, shape: tuple[int, int] = (9, 14)
) -> list[np.ndarray]:
    values = np.array([*range(classes), VOID])
    return [rng.choice(values, size=shape).astype(np.uint8) for _ in range(n)]


def _count(
    masks: list[np.ndarray], grid: tuple[int, int], classes: int, eval_size: int = 0
) -> seg.PatchLabels:
    table = seg.label_table(classes, [VOID])
    named = [(f"{i}.png", mask) for i, mask in enumerate(masks)]
    return seg.count_labels(named, grid, table, eval_size=eval_size, input_size=32)


def _upsample(ids: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Cluster ids (h, w) on pixels, one at a time, by the rule floor(i * h / H)."""
    out = np.empty(shape, dtype=int)
    for y in range(shape[0]):
        for x in range(shape[1]):
            out[y, x] = ids[y * ids.shape[0] // shape[0], x * ids.shape[1] // shape[1]]
    return out


@EXAMPLES
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6))
def test_counts_equal_loops_over_pixels(seed: int, images: int, classes: int, clusters: int) -> None:
    rng = np.random.default_rng(seed)
    masks, grid = _masks(rng, images, classes), (3, 4)
    labels = _count(masks, grid, classes)
    ids = rng.integers(clusters, size=(images, *grid))
    match = rng.integers(-1, classes, size=clusters)
    confusion = np.zeros((images, clusters, classes), dtype=int)
    counts = np.zeros((images, classes, 3), dtype=int)
    for n in range(images):
        pixels = _upsample(ids[n], masks[n].shape)
        for cluster, truth in zip(pixels.ravel(), masks[n].ravel(), strict=True):
            if truth == VOID:
                continue
            confusion[n, cluster, truth] += 1
            guess = match[cluster]
            counts[n, truth, 2] += 1
            if guess >= 0:
                counts[n, guess, 1] += 1
                counts[n, guess, 0] += int(guess == truth)
    np.testing.assert_array_equal(labels.confusion(ids, clusters), confusion.sum(axis=0))
    np.testing.assert_array_equal(labels.confusion_per_image(ids, clusters), confusion)
    np.testing.assert_array_equal(labels.class_counts(match[ids]), counts)


def test_masks_reach_the_evaluation_size_as_pillow_then_pytorch_do() -> None:
    import torch

    rng = np.random.default_rng(0)
    mask = rng.integers(6, size=(37, 53)).astype(np.uint8)
    through = np.asarray(Image.fromarray(mask).resize((32, 32), Image.Resampling.NEAREST))
    tensor = torch.from_numpy(through.astype(np.float32))[None, None]
    expected = torch.nn.functional.interpolate(tensor, size=(20, 20), mode="nearest")[0, 0].numpy()
    ids = np.arange(16).reshape(1, 4, 4)
    grid = torch.from_numpy(ids[None].astype(np.float32))
    pixels = torch.nn.functional.interpolate(grid, size=(20, 20), mode="nearest")[0, 0].numpy()
    confusion = np.zeros((16, 6), dtype=int)
    np.add.at(confusion, (pixels.astype(int), expected.astype(int)), 1)
    labels = _count([mask], (4, 4), 6, eval_size=20)
    np.testing.assert_array_equal(labels.confusion(ids, 16), confusion)


@pytest.mark.parametrize(("source", "target"), [(28, 100), (448, 100), (32, 100), (14, 100), (7, 3)])
def test_nearest_agrees_with_pytorch(source: int, target: int) -> None:
    import torch

    line = torch.arange(source, dtype=torch.float32)[None, None]
    expected = torch.nn.functional.interpolate(line, size=target, mode="nearest")[0, 0].numpy()
    np.testing.assert_array_equal(seg.nearest(source, target), expected)


def test_void_and_ignored_labels_are_in_no_count() -> None:
    table = seg.label_table(3, [VOID, 1])
    assert table[[0, 1, 2, 3, VOID]].tolist() == [0, seg.VOID, 1, seg.UNKNOWN, seg.VOID]
    assert seg.names_kept(("sky", "road", "tree"), table) == ("sky", "tree")
    mask = np.array([[0, 1], [VOID, 2]], dtype=np.uint8)
    labels = seg.count_labels([("a", mask)], (1, 1), table, eval_size=0, input_size=16)
    assert labels.confusion(np.zeros((1, 1), dtype=int), 1).tolist() == [[1, 1]]


def test_unknown_label_names_the_image() -> None:
    with pytest.raises(TaskError, match=r"street/7\.png holds the label 9"):
        seg.count_labels(
            [("street/7.png", np.array([[0, 9]], dtype=np.uint8))],
            (1, 1),
            seg.label_table(3, [VOID]),
            eval_size=0,
            input_size=16,
        )


@EXAMPLES
@given(st.integers(0, 2**31), st.integers(1, 6), st.sampled_from(["iou", "count"]))
def test_hungarian_equals_brute_force_over_permutations(
    seed: int, k: int, by: Literal["iou", "count"]
) -> None:
    rng = np.random.default_rng(seed)
    confusion = rng.integers(0, 30, size=(k, k)) * rng.integers(0, 2, size=(k, k))
    value = seg.iou_matrix(confusion) if by == "iou" else confusion
    best = max(sum(value[i, c] for i, c in enumerate(p)) for p in permutations(range(k)))
    match = seg.hungarian(confusion, by)
    assert sorted(match.tolist()) == list(range(k))
    assert value[np.arange(k), match].sum() == pytest.approx(best)
    if by == "iou":  # the matched mean IoU is then the best that any assignment reaches
        merged = np.stack(
            [np.bincount(match, weights=confusion[:, c], minlength=k) for c in range(k)], axis=1
        )
        counts = np.stack([np.diag(merged), merged.sum(1), merged.sum(0)], axis=-1)
        assert seg.class_iou(counts).mean() == pytest.approx(best / k)


def test_the_two_matchings_can_differ() -> None:
    confusion = np.array([[110, 50], [50, 0]])
    # Pixels: 110 + 0 against 50 + 50. IoU: 110/210 + 0 against 50/160 + 50/160.
    assert seg.hungarian(confusion, "count").tolist() == [0, 1]
    assert seg.hungarian(confusion, "iou").tolist() == [1, 0]


def test_clusters_left_over_predict_no_class() -> None:
    match = seg.hungarian(np.array([[5, 0], [0, 7], [3, 3]]), "iou")
    assert match.tolist() == [0, 1, -1]
    assert seg.hungarian(np.array([[0, 5, 2]]), "iou").tolist() == [1]


@EXAMPLES
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 5))
def test_majority_is_the_matching_by_precision(seed: int, clusters: int, classes: int) -> None:
    confusion = np.random.default_rng(seed).integers(0, 6, size=(clusters, classes))
    for cluster, found in enumerate(seg.majority(confusion)):
        best, chosen = -1.0, -1
        for c in range(classes):
            precision = confusion[cluster, c] / max(confusion[cluster].sum(), 1)
            if precision > best:
                best, chosen = precision, c
        assert found == chosen


@EXAMPLES
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_statistics_equal_explicit_means(seed: int, classes: int, runs: int, skip: bool) -> None:
    rng = np.random.default_rng(seed)
    true = rng.integers(0, 3, size=(4, classes)) * rng.integers(0, 2, size=classes)
    counts = []
    for _ in range(runs):
        inter = rng.integers(0, true + 1)
        counts.append(np.stack([inter, inter + rng.integers(0, 5, size=true.shape), true], axis=-1))
    by_run = []
    for run in counts:
        inter, predicted, truth = run.sum(axis=0).T
        ious = []
        for c in range(classes):
            union = predicted[c] + truth[c] - inter[c]
            if truth[c] > 0 or not skip:
                ious.append(inter[c] / union if union else 0.0)
        by_run.append(np.mean(ious) if ious else 0.0)
    means = np.stack([seg.iou_items(run).mean(axis=0) for run in counts])
    np.testing.assert_allclose(seg.MeanIoU(classes, "skip" if skip else "zero")(means), by_run)
    if true.sum():
        accuracy = [run[..., 0].sum() / run[..., 2].sum() for run in counts]
        means = np.stack([seg.accuracy_items(run).mean(axis=0) for run in counts])
        np.testing.assert_allclose(seg.pixel_accuracy(means), accuracy)


@EXAMPLES
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 4))
def test_best_overlap_equals_a_loop_over_segments(seed: int, clusters: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    masks, grid = _masks(rng, 3, classes, (6, 8)), (3, 4)
    masks[1][:] = VOID
    ids = rng.integers(clusters, size=(3, *grid))
    found = seg.best_overlap(_count(masks, grid, classes).confusion_per_image(ids, clusters))
    for n, mask in enumerate(masks):
        pixels, valid = _upsample(ids[n], mask.shape), mask != VOID
        overlaps = []
        for c in range(classes):
            segment = mask == c
            if segment.any():
                parts = [(pixels == k) & valid for k in range(clusters)]
                overlaps.append(max((segment & p).sum() / (segment | p).sum() for p in parts))
        if overlaps:
            assert found[n] == pytest.approx(np.mean(overlaps))
        else:
            assert np.isnan(found[n])


def test_mean_iou_per_image_counts_the_classes_that_are_there() -> None:
    counts = np.array([[[4, 5, 6], [0, 3, 0]], [[0, 0, 0], [0, 2, 0]]])
    np.testing.assert_allclose(seg.mean_iou_per_image(counts), [4 / 7, np.nan])


@EXAMPLES
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 5))
def test_the_majority_class_of_a_patch_equals_a_count_of_its_pixels(
    seed: int, images: int, classes: int
) -> None:
    rng = np.random.default_rng(seed)
    masks, grid = _masks(rng, images, classes), (3, 4)
    patches = np.arange(12).reshape(grid)
    expected = {}
    for i, mask in enumerate(masks):
        under = _upsample(patches, mask.shape)
        for patch in range(12):
            counts = np.bincount(mask[(under == patch) & (mask != VOID)], minlength=classes)
            if counts.any():
                expected[12 * i + patch] = int(counts.argmax())
    place, label = _count(masks, grid, classes).majority()
    assert dict(zip(place.tolist(), label.tolist(), strict=True)) == expected
    assert (np.diff(place) > 0).all()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40))
def test_a_smaller_mask_takes_the_label_under_each_new_pixel_centre(source: int, target: int) -> None:
    # Pixel r of the small map covers r/target .. (r+1)/target; its centre lies in this one of the large map.
    expected = [(2 * r + 1) * source // (2 * target) for r in range(target)]
    assert seg.nearest_centre(source, target).tolist() == expected
    assert seg.nearest_centre(source, source).tolist() == list(range(source))
