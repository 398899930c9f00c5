import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmim_bench.pretrain.masking import GROUP, block_cover, draw_masks, random_masks, visible_runs
from lmim_bench.pretrain.recipe import make_recipe

CASES = settings(deadline=None, derandomize=True, max_examples=30)


def recipe_of(kind, grid=7, **masking):
    target = {"sees": "all"} if kind == "multiblock" else {}
    return make_recipe(
        {
            "model": {"patch_size": 4},
            "data": {"image_size": 4 * grid},
            "target": target,
            "masking": {"kind": kind, **masking},
            "objective": {"loss": "mse"},  # others want more than one hidden patch
        }
    )


def drawn(recipe, batch, seed=0, part=None):
    part = slice(0, batch) if part is None else part
    return draw_masks(recipe, batch, part, torch.Generator().manual_seed(seed))


def is_rectangle(cells, grid):
    """Whether cells, counted row by row, fill a rectangle, each once; its (top, left, height, width)."""
    rows, columns = [c // grid for c in cells], [c % grid for c in cells]
    height, width = max(rows) - min(rows) + 1, max(columns) - min(columns) + 1
    whole = {
        r * grid + c
        for r in range(min(rows), min(rows) + height)
        for c in range(min(columns), min(columns) + width)
    }
    assert set(cells) == whole
    assert len(cells) == height * width
    return min(rows), min(columns), height, width


@CASES
@given(
    kind=st.sampled_from(["random", "block"]),
    grid=st.integers(2, 8),
    batch=st.integers(1, 4),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_the_exact_number_is_seen_and_the_rest_is_hidden(kind, grid, batch, seed, data):
    visible = data.draw(st.integers(1, grid**2 - 1))
    masks = drawn(recipe_of(kind, grid, visible=visible), batch, seed)
    assert masks.visible.shape == (batch, visible)
    assert masks.hidden.shape == (batch, 1, grid**2 - visible)
    assert masks.visible.dtype == masks.hidden.dtype == torch.int64
    for seen, hidden in zip(masks.visible.tolist(), masks.hidden.tolist(), strict=True):
        assert sorted(seen + hidden[0]) == list(range(grid**2))


def test_visible_patches_are_those_of_lowest_noise():
    masks = random_masks(torch.tensor([[0.4, 0.1, 0.9, 0.2]]), 2)
    assert masks.visible.tolist() == [[1, 3]]
    assert masks.hidden.tolist() == [[[0, 2]]]


def test_random_masks_are_uniform_over_patches_and_pairs():
    batch, total, visible = 6000, 16, 4
    masks = drawn(recipe_of("random", 4, visible=visible), batch)
    seen = torch.zeros(batch, total).scatter_(1, masks.visible, 1.0)
    share = visible / total
    spread = (share * (1 - share) / batch) ** 0.5
    assert (seen.mean(0) - share).abs().max() < 4.5 * spread
    pairs = (seen.T @ seen / batch)[~torch.eye(total, dtype=torch.bool)]
    together = share * (visible - 1) / (total - 1)
    assert (pairs - together).abs().max() < 5 * (together * (1 - together) / batch) ** 0.5
    first = torch.bincount(masks.hidden[:, 0, 0], minlength=total) / batch
    assert (first - 1 / total).abs().max() < 4.5 * (1 / total / batch) ** 0.5


def distance(a, b, grid):
    return abs(a // grid - b // grid) + abs(a % grid - b % grid)


@pytest.mark.parametrize("kind", ["random", "block"])
def test_hidden_patches_are_listed_in_random_order(kind):
    """Neighbours in the list are no nearer in the image than any two; ``num_negatives`` counts on it."""
    grid = 8
    masks = drawn(recipe_of(kind, grid, visible=24), 200)
    listed, any_two = [], []
    for hidden in masks.hidden[:, 0].tolist():
        listed += [distance(a, b, grid) for a, b in itertools.pairwise(hidden)]
        any_two += [distance(a, b, grid) for a, b in itertools.combinations(hidden, 2)]
    ratio = (sum(listed) / len(listed)) / (sum(any_two) / len(any_two))
    assert ratio == pytest.approx(1, abs=0.03)


@CASES
@given(grid=st.integers(3, 10), seed=st.integers(0, 999), data=st.data())
def test_block_cover_is_made_of_rectangles(grid, seed, data):
    visible = data.draw(st.integers(1, grid**2 - 1))
    cover = block_cover(grid, 3, visible, torch.Generator().manual_seed(seed))
    for ranks in cover.tolist():
        top = max(ranks)
        is_rectangle([i for i, rank in enumerate(ranks) if rank == top], grid)
        for level in set(ranks) - {0.0}:
            cells = [i for i, rank in enumerate(ranks) if rank == level]
            rows, columns = {c // grid for c in cells}, {c % grid for c in cells}
            for r in range(min(rows), max(rows) + 1):
                for c in range(min(columns), max(columns) + 1):
                    assert ranks[r * grid + c] >= level, "an earlier rectangle may lie on top, nothing else"


def test_first_rectangles_have_the_size_and_aspect_of_beit():
    grid, visible = 14, 76
    cover = block_cover(grid, 500, visible, torch.Generator().manual_seed(0))
    areas = []
    for ranks in cover.tolist():
        cells = [i for i, rank in enumerate(ranks) if rank == max(ranks)]
        _, _, height, width = is_rectangle(cells, grid)
        areas.append(height * width)
        if max(height, width) < grid:
            assert 0.3 / 1.5 < height / width < 1.5 / 0.3
    assert min(areas) >= 12  # 16, sides rounded
    assert max(areas) <= 132  # 120, sides rounded
    assert 50 < sum(areas) / len(areas) < 75  # uniform over 16 to 120, the widest clamped to the grid


def test_block_masks_hide_whole_rectangles_but_the_last():
    recipe = recipe_of("block", 8, visible=24)
    masks = drawn(recipe, 50, seed=3)
    again = torch.Generator().manual_seed(3)
    torch.rand(50, 64, generator=again)
    cover = block_cover(8, 50, 24, again)
    for ranks, seen, hidden in zip(cover, masks.visible, masks.hidden[:, 0], strict=True):
        assert ranks[hidden].min() >= ranks[seen].max()


def test_block_masks_are_more_contiguous_than_random_ones():
    def joined(kind):
        masks = drawn(recipe_of(kind, 8, visible=32), 100)
        count = 0
        for hidden in masks.hidden[:, 0].tolist():
            count += sum(distance(a, b, 8) == 1 for a, b in itertools.combinations(hidden, 2))
        return count

    assert joined("block") > 1.2 * joined("random")


@CASES
@given(grid=st.integers(4, 14), batch=st.integers(1, 5), blocks=st.integers(1, 5), seed=st.integers(0, 999))
def test_multiblock_targets_are_rectangles_of_one_size_inside_the_grid(grid, batch, blocks, seed):
    masks = drawn(recipe_of("multiblock", grid, blocks=blocks), batch, seed)
    assert masks.hidden.shape[:2] == (batch, blocks)
    assert masks.hidden.min() >= 0
    assert masks.hidden.max() < grid**2
    sizes = {is_rectangle(cells, grid)[2:] for image in masks.hidden.tolist() for cells in image}
    assert len(sizes) == 1
    for seen in masks.visible.tolist():
        assert len(set(seen)) == len(seen) > 0


@pytest.mark.parametrize("seed", range(5))
def test_multiblock_context_never_overlaps_targets_unless_relaxed(seed):
    masks = drawn(recipe_of("multiblock", 14), 16, seed)
    assert masks.visible.shape[1] > 10
    for seen, hidden in zip(masks.visible.tolist(), masks.hidden.tolist(), strict=True):
        assert not set(seen) & {cell for block in hidden for cell in block}


def test_multiblock_sizes_follow_the_scales_and_aspects():
    sizes = set()
    for seed in range(200):
        masks = drawn(recipe_of("multiblock", 14), 1, seed)
        sizes.add(is_rectangle(masks.hidden[0, 0].tolist(), 14)[2:])
    for height, width in sizes:
        assert 0.15 * 196 - 5 <= height * width <= 0.2 * 196 + 5
        assert 0.75 / 1.2 <= height / width <= 1.5 * 1.2
    assert len(sizes) > 5


def test_multiblock_relaxes_the_last_targets_first():
    """With more context wanted than all blocks leave, what overlaps is the last block, not the first."""
    overlaps = torch.zeros(4)
    for seed in range(20):
        recipe = recipe_of("multiblock", 10, min_context=50)
        masks = drawn(recipe, 8, seed)
        assert masks.visible.shape[1] > 50
        for seen, hidden in zip(masks.visible.tolist(), masks.hidden.tolist(), strict=True):
            hit = [bool(set(seen) & set(block)) for block in hidden]
            overlaps += torch.tensor(hit).float()
    assert overlaps[0] < overlaps[3]
    assert overlaps[3] > 20


def test_multiblock_looks_for_a_free_place_before_it_relaxes():
    """A context of 3 x 3 is wanted whole: 20 tries find a place where many are free."""
    places = [(top, left) for top in range(7) for left in range(7)]
    blocks_of = {(t, x): {(t + i) * 10 + x + j for i in range(3) for j in range(3)} for t, x in places}
    roomy = 0
    for seed in range(10):
        recipe = recipe_of("multiblock", 10, blocks=2, context_scale=(0.1, 0.1), min_context=8)
        masks = drawn(recipe, 10, seed)
        for seen, hidden in zip(masks.visible.tolist(), masks.hidden.tolist(), strict=True):
            assert is_rectangle(seen, 10)[2:] == (3, 3)
            covered = {cell for block in hidden for cell in block}
            free = sum(not cells & covered for cells in blocks_of.values()) / len(places)
            roomy += free > 0.3
            assert free <= 0.3 or not set(seen) & covered
    assert roomy > 20


def test_multiblock_with_an_unreachable_minimum_keeps_the_whole_context():
    masks = drawn(recipe_of("multiblock", 8, min_context=1000), 6)
    for seen in masks.visible.tolist():
        is_rectangle(seen, 8)


def test_multiblock_keeps_as_many_patches_as_the_poorest_of_a_group():
    """Not of the batch, which would see fewer the larger it is; officially 128 are what a process has."""
    recipe, batch = recipe_of("multiblock", 14), 3 * GROUP - 100
    masks = drawn(recipe, batch)
    runs = visible_runs(masks.visible)
    assert [images for images, _ in runs] == [128, 128, 28]
    assert masks.visible.shape[1] == max(seen for _, seen in runs)
    alone = [drawn(recipe, batch, part=slice(first, first + 128)) for first in (0, 128, 256)]
    assert [part.visible.shape[1] for part in alone] == [seen for _, seen in runs]
    for seen, image in zip([n for images, n in runs for _ in range(images)], masks.visible, strict=True):
        assert len(set(image[:seen].tolist())) == seen
        assert bool((image[:seen] >= 0).all() and (image[seen:] == -1).all())


@CASES
@given(
    kind=st.sampled_from(["random", "block", "multiblock"]),
    batch=st.integers(1, 3).map(lambda n: 4 * n),
    cuts=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 999),
)
def test_parts_of_a_draw_agree_with_the_whole(kind, batch, cuts, seed):
    recipe = recipe_of(kind, 6, visible=9)
    whole = drawn(recipe, batch, seed)
    size = batch // cuts
    found = [drawn(recipe, batch, seed, slice(i * size, (i + 1) * size)) for i in range(cuts)]
    assert torch.equal(torch.cat([part.visible for part in found]), whole.visible)
    assert torch.equal(torch.cat([part.hidden for part in found]), whole.hidden)


@pytest.mark.parametrize("kind", ["random", "block", "multiblock"])
def test_masks_depend_on_the_generator_alone(kind):
    recipe = recipe_of(kind, 8, visible=20)
    state = torch.get_rng_state()
    first, again, other = drawn(recipe, 4, 1), drawn(recipe, 4, 1), drawn(recipe, 4, 2)
    assert torch.equal(first.visible, again.visible)
    assert torch.equal(first.hidden, again.hidden)
    assert first.hidden.shape != other.hidden.shape or not torch.equal(first.hidden, other.hidden)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["random", "block", "multiblock"])
def test_masks_lie_in_memory_without_holes(kind):
    """A copy of anything else to a GPU waits."""
    for part in (None, slice(2, 5)):
        masks = drawn(recipe_of(kind, visible=9), 6, part=part)
        assert all(mask.is_contiguous() for mask in masks)
