"""Masks as bits against the same operations pixel by pixel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmim_bench.tasks._math import bitmaps
from lmim_bench.tasks._math.davis_metrics import boundary_map

CASES = settings(deadline=None, derandomize=True, max_examples=40)
WIDTHS = st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129, 150])


def noise(seed, height, width, share):
    return np.random.default_rng(seed).random((2, height, width)) < share


def packed(masks):
    columns = bitmaps.words_across(masks.shape[2]) * bitmaps.WORD
    wide = np.zeros((*masks.shape[:2], columns), dtype=bool)
    wide[..., : masks.shape[2]] = masks
    return bitmaps.pack(wide)


def unpacked(words, width):
    octets = np.ascontiguousarray(words).astype("<u8").view(np.uint8)
    return np.unpackbits(octets, axis=-1, bitorder="little")[..., :width].astype(bool)


def slow_dilate(mask, radius):
    """Every pixel with a set one at most so far away, by all the distances."""
    out = np.zeros_like(mask)
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]]
    for row, column in np.argwhere(mask):
        out |= (y - row) ** 2 + (x - column) ** 2 <= radius * radius
    return out


@CASES
@given(seed=st.integers(0, 1000), height=st.integers(1, 9), width=WIDTHS)
def test_bits_keep_every_pixel(seed, height, width):
    masks = noise(seed, height, width, 0.5)
    words = packed(masks)
    assert words.dtype.itemsize == 8
    assert np.array_equal(unpacked(words, width), masks)
    assert bitmaps.count(words) == masks.sum()
    assert bitmaps.count(words[:, ::2]) == masks[:, ::2].sum(), "words that do not lie side by side"


@CASES
@given(
    seed=st.integers(0, 1000),
    height=st.integers(1, 40),
    width=WIDTHS,
    share=st.sampled_from([0, 0.001, 0.02, 0.5, 1]),
    radius=st.sampled_from([1, 2, 3, 8, 9, 10, 18, 63, 64, 71]),
)
def test_dilation_reaches_exactly_the_radius(seed, height, width, share, radius):
    masks = noise(seed, height, width, share)
    found = unpacked(bitmaps.dilate(packed(masks), radius), width)
    assert np.array_equal(found, [slow_dilate(mask, radius) for mask in masks])


def test_one_pixel_grows_to_a_disk_within_its_own_mask():
    masks = np.zeros((2, 200, 260), dtype=bool)
    masks[0, 100, 130] = True
    for radius in range(1, 90):
        found = unpacked(bitmaps.dilate(packed(masks), radius), 260)
        assert np.array_equal(found[0], slow_dilate(masks[0], radius))
        assert not found[1].any()


@CASES
@given(
    seed=st.integers(0, 1000),
    height=st.integers(1, 30),
    width=WIDTHS,
    share=st.sampled_from([0.05, 0.5, 0.97, 1]),
)
def test_boundaries_follow_the_rule_at_the_border(seed, height, width, share):
    masks = noise(seed, height, width, share)
    found = bitmaps.boundaries(packed(masks), width)
    assert bitmaps.count(found) == unpacked(found, width).sum(), "nothing is set beyond the last column"
    assert np.array_equal(unpacked(found, width), [boundary_map(mask) for mask in masks])


def test_boundaries_of_words_cut_out_of_a_wider_frame():
    masks = np.zeros((1, 12, 300), dtype=bool)
    masks[0, 3:9, 70:128] = True  # to the last column of its word, which is not the last of the frame
    whole = np.array([boundary_map(mask) for mask in masks])
    found = bitmaps.boundaries(packed(masks)[:, :, :2], 300)
    assert np.array_equal(unpacked(found, 128), whole[:, :, :128])


@pytest.mark.parametrize(
    ("where", "box"),
    [
        ((slice(4, 6), slice(70, 71)), (slice(4, 6), slice(1, 2))),
        ((slice(0, 10), slice(63, 65)), (slice(0, 10), slice(0, 2))),
        ((slice(9, 10), slice(149, 150)), (slice(9, 10), slice(2, 3))),
        ((slice(0, 0), slice(0, 0)), None),
    ],
)
def test_the_box_is_in_rows_and_words(where, box):
    mask = np.zeros((1, 10, 150), dtype=bool)
    mask[0][where] = True
    assert bitmaps.bounding_box(packed(mask)[0]) == box
