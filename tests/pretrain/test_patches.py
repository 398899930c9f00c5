import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmim_bench.pretrain.patches import cut_patches, draw_offsets, sincos_positions, standardise, take

CASES = settings(deadline=None, derandomize=True, max_examples=25)


@CASES
@given(st.sampled_from([4, 8, 12, 16]), st.integers(1, 5), st.sampled_from(["sincos", "latent_mim"]))
def test_sincos_positions_equal_the_formula(dim, grid, style):
    table = sincos_positions(dim, grid, style)
    assert table.shape == (grid * grid, dim)
    assert table.dtype == torch.float32
    places = list(range(grid)) if style == "sincos" else np.linspace(0, grid, grid).tolist()
    for row in range(grid):
        for column in range(grid):
            expected = [0.0] * dim
            for i in range(dim // 4):
                frequency = 1 / 10000 ** (i / (dim / 4))
                expected[i] = math.sin(places[column] * frequency)
                expected[dim // 4 + i] = math.cos(places[column] * frequency)
                expected[dim // 2 + i] = math.sin(places[row] * frequency)
                expected[3 * dim // 4 + i] = math.cos(places[row] * frequency)
            assert table[row * grid + column].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dim", [1, 6, 15, 30])
def test_sincos_positions_refuse_a_width_that_does_not_split(dim):
    with pytest.raises(ValueError, match=f"multiple of 4, got {dim}"):
        sincos_positions(dim, 2)


@CASES
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_patches_that_tile_list_pixels_in_row_column_channel_order(batch, rows, columns, patch):
    images = torch.arange(batch * 3 * rows * columns * patch**2, dtype=torch.float32)
    images = images.reshape(batch, 3, rows * patch, columns * patch)
    found = cut_patches(images, patch)
    assert found.shape == (batch, rows * columns, patch * patch * 3)
    for b in range(batch):
        for cell in range(rows * columns):
            top, left = cell // columns * patch, cell % columns * patch
            expected = [
                images[b, c, top + y, left + x].item()
                for y in range(patch)
                for x in range(patch)
                for c in range(3)
            ]
            assert found[b, cell].tolist() == expected


@CASES
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 999))
def test_with_a_gap_every_patch_is_the_window_at_its_cell_plus_its_offset(batch, grid, patch, gap, seed):
    generator = torch.Generator().manual_seed(seed)
    side = grid * (patch + gap)
    images = torch.randn(batch, 3, side, side, generator=generator)
    offsets = draw_offsets(torch.rand(batch, grid**2, 2, generator=generator), gap)
    found = cut_patches(images, patch, offsets)
    assert found.shape == (batch, grid**2, patch * patch * 3)
    for b in range(batch):
        for cell in range(grid**2):
            top = cell // grid * (patch + gap) + offsets[b, cell, 0].item()
            left = cell % grid * (patch + gap) + offsets[b, cell, 1].item()
            window = images[b, :, top : top + patch, left : left + patch]
            assert window.shape == (3, patch, patch)
            assert torch.equal(found[b, cell], window.permute(1, 2, 0).reshape(-1))


@CASES
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
def test_a_gap_of_nothing_is_the_plain_tiling(batch, grid, patch):
    images = torch.randn(batch, 3, grid * patch, grid * patch, generator=torch.Generator().manual_seed(0))
    offsets = torch.zeros(batch, grid**2, 2, dtype=torch.int64)
    assert torch.equal(cut_patches(images, patch, offsets), cut_patches(images, patch))


def test_with_the_smallest_offsets_neighbours_are_a_gap_apart():
    gap, patch, grid = 2, 3, 2
    marks = torch.zeros(1, 3, 10, 10)
    cut = cut_patches(marks.requires_grad_(), patch, torch.zeros(1, grid**2, 2, dtype=torch.int64))
    cut.sum().backward()
    seen = marks.grad[0, 0].nonzero()
    assert sorted({row for row, _ in seen.tolist()}) == [0, 1, 2, 5, 6, 7]
    assert len(seen) == grid**2 * patch**2
    assert patch + gap == 5


@pytest.mark.parametrize("gap", range(1, 40))
def test_offsets_stay_below_the_gap_for_the_extreme_noise(gap):
    extremes = torch.tensor([0.0, 1 - 2**-24])
    assert draw_offsets(extremes, gap).tolist() == [0, gap - 1]


def test_offsets_are_uniform():
    noise = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    found = draw_offsets(noise, 4)
    assert found.dtype == torch.int64
    assert torch.bincount(found).tolist() == pytest.approx([10_000] * 4, rel=0.04)


@CASES
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 999))
def test_take_equals_a_loop_and_so_does_its_gradient(batch, rows, taken, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, rows, 2, generator=generator, requires_grad=True)
    index = torch.randint(rows, (batch, taken), generator=generator)
    weights = torch.randn(batch, taken, 2, generator=generator)
    found = take(x, index)
    (found * weights).sum().backward()
    gradient = torch.zeros_like(x)
    for b in range(batch):
        for m in range(taken):
            assert torch.equal(found[b, m], x[b, index[b, m]])
            gradient[b, index[b, m]] += weights[b, m]
    torch.testing.assert_close(x.grad, gradient)


def test_standardise_equals_a_loop():
    x = 3 + 2 * torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = standardise(x)
    for b in range(2):
        for t in range(3):
            row = x[b, t].tolist()
            mean = sum(row) / 7
            variance = sum((v - mean) ** 2 for v in row) / 6
            expected = [(v - mean) / math.sqrt(variance + 1e-6) for v in row]
            assert found[b, t].tolist() == pytest.approx(expected, abs=1e-12)


def test_standardise_of_a_flat_patch_is_zero():
    assert standardise(torch.full((1, 2, 12), 0.5)).abs().max() == 0
