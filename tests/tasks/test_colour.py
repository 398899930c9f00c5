"""Palettes, PCA colours and overlays."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from lmim_bench.tasks._math import colour


def test_oklab_of_known_colours() -> None:
    # Published reference: white is (1, 0, 0), sRGB red is (0.628, 0.225, 0.126).
    lab = colour.oklab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]], dtype=np.uint8))
    np.testing.assert_allclose(lab, [[1, 0, 0], [0, 0, 0], [0.62796, 0.22486, 0.12585]], atol=2e-4)


@pytest.mark.parametrize("n", [1, 12, 150])
def test_palette_is_distinct_and_a_prefix_of_longer_ones(n: int) -> None:
    colours = colour.distinct_colours(n)
    assert colours.shape == (n, 3)
    assert colours.dtype == np.uint8
    assert len(np.unique(colours, axis=0)) == n
    np.testing.assert_array_equal(colours, colour.distinct_colours(200)[:n])


def test_first_colours_are_far_apart() -> None:
    lab = colour.oklab(colour.distinct_colours(12))
    distance = np.linalg.norm(lab[:, None] - lab, axis=-1) + 10 * np.eye(12)
    assert distance.min() > 0.12  # a just noticeable difference is near 0.02


def test_pca_colours_follow_the_components_with_a_fixed_sign() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 6, 10)) * np.array([9, 5, 3, *[0.1] * 7]) + 1
    found = colour.pca_colours(x)
    assert found.shape == (2, 5, 6, 3)
    np.testing.assert_array_equal(found, colour.pca_colours(x.copy()))

    unit = x.reshape(-1, 10) / np.linalg.norm(x.reshape(-1, 10), axis=1, keepdims=True)
    pca = PCA(3).fit(unit)
    scores = pca.transform(unit)
    top = np.abs(pca.components_).argmax(axis=1)
    scores = scores * np.sign(pca.components_[np.arange(3), top])
    low, high = np.percentile(scores, [2, 98], axis=0)
    expected = np.clip((scores - low) / (high - low), 0, 1) * 255
    np.testing.assert_allclose(found.reshape(-1, 3), expected, atol=1)
    assert found.min() == 0
    assert found.max() == 255


def test_pca_colours_ignore_scale_and_survive_constant_or_narrow_features() -> None:
    x = np.random.default_rng(1).normal(size=(1, 4, 4, 6))
    np.testing.assert_array_equal(colour.pca_colours(x), colour.pca_colours(x * 7))
    assert colour.pca_colours(np.ones((1, 4, 4, 6))).shape == (1, 4, 4, 3)
    narrow = colour.pca_colours(x[..., :2])
    assert narrow.shape == (1, 4, 4, 3)
    assert (narrow[..., 2] == narrow[0, 0, 0, 2]).all()


def test_enlarge_repeats_cells() -> None:
    grid = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(colour.enlarge(grid, (4, 6)), grid.repeat(2, axis=0).repeat(2, axis=1))
    assert colour.enlarge(np.zeros((2, 3, 3), dtype=np.uint8), (5, 7)).shape == (5, 7, 3)


def test_overlay_paints_labels_and_darkens_void() -> None:
    image = np.full((1, 2, 3), 200, dtype=np.uint8)
    red = np.array([[255, 0, 0]], dtype=np.uint8)
    painted = colour.overlay(image, np.array([[0, -1]]), red, alpha=0.5)
    np.testing.assert_array_equal(painted, [[[228, 100, 100], [70, 70, 70]]])


def test_strip_has_a_panel_for_each_view_of_the_size_of_the_image() -> None:
    rng = np.random.default_rng(2)
    image = rng.integers(256, size=(30, 40, 3)).astype(np.uint8)
    truth = np.array([[0, -1], [1, 2]])
    predicted, parts = np.array([[0, 1], [2, -1]]), np.array([[1, 1], [0, 0]])
    features = rng.integers(256, size=(2, 2, 3)).astype(np.uint8)
    panels = colour.strip(image, truth, predicted, features, parts)
    assert [p.shape for p in panels] == [(30, 40, 3)] * 5
    np.testing.assert_array_equal(panels[0], image)
    np.testing.assert_array_equal(panels[3][0, 0], features[0, 0])
    # The class has the same colour in the truth and in the prediction, at the same pixel.
    np.testing.assert_array_equal(panels[1][0, 0], panels[2][0, 0])
    assert len(colour.strip(image, truth, predicted, features, None)) == 4
