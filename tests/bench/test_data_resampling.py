"""Resizing as matrix products: equal to Pillow's to the bit, and batches that a device resizes."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmim_bench.bench.data import loading, resampling, workers
from lmim_bench.bench.data.loading import iterate_batches
from lmim_bench.bench.data.slots import Slots
from lmim_bench.bench.data.splits import ArraySplit
from lmim_bench.bench.data.views import view_pixels
from lmim_bench.bench.errors import DataError
from lmim_bench.bench.types import View

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def picture(height: int, width: int, kind: str = "noise", seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "black and white":  # where a cubic filter overshoots most
        pixels = np.where(pixels < 128, 0, 255).astype(np.uint8)
    return pixels


def resampled(images: list[np.ndarray], view: View) -> torch.Tensor:
    way = loading._Resampled(view)
    slots = Slots(1, way.most_bytes * len(images), shared=False)
    slot = slots.empty(0)
    rest = way.put_rest([way.put(image, slot) for image in images], slot)
    return way.finish(slots.filled(0, slot.used), rest)


def by_pillow(images: list[np.ndarray], view: View) -> torch.Tensor:
    return torch.stack([torch.from_numpy(view_pixels(i, view).copy()).permute(2, 0, 1) for i in images])


SIDES = st.integers(1, 120)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=4),
    size=st.integers(1, 50),
    margin=st.integers(-2, 9),
    mode=st.sampled_from(["crop", "squash"]),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    kind=st.sampled_from(["noise", "black and white"]),
)
def test_pixels_equal_those_of_pillow(sizes, size, margin, mode, interpolation, kind):
    view = View(mode, size, max(1, size + margin), interpolation, MEAN, STD)
    images = [picture(*each, kind, seed) for seed, each in enumerate(sizes)]
    found = resampled(images, view)
    assert found.dtype == torch.uint8
    assert torch.equal(found, by_pillow(images, view))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_photographs_of_several_shapes_are_resized_as_products(interpolation, monkeypatch):
    def refuse(*_):
        raise AssertionError("resized by Pillow")

    view = View("crop", 64, 73, interpolation, MEAN, STD)
    images = [picture(*each) for each in [(107, 143), (143, 107), (95, 143), (64, 64), (73, 73), (40, 50)]]
    expected = by_pillow(images, view)
    monkeypatch.setattr(loading, "view_pixels", refuse)
    assert torch.equal(resampled(images, view), expected)


def test_tall_images_among_others_keep_pillows_order():
    """Pillow 13 begins with the rows of the tall ones."""
    view = View("squash", 24, 24, "bicubic", MEAN, STD)
    images = [picture(*each, seed=7) for each in [(50, 50), (60, 25), (50, 55), (59, 24)]]
    way = loading._Resampled(view)
    flags = [way.cut(image).rows_first for image in images]
    assert flags == [False, resampling._ROWS_FIRST, False, resampling._ROWS_FIRST]
    assert torch.equal(resampled(images, view), by_pillow(images, view))


@pytest.mark.parametrize(
    ("shape", "view"),
    [
        ((200, 60), View("crop", 20, 20, "bicubic", MEAN, STD)),
        ((30, 400), View("squash", 20, 20, "bicubic", MEAN, STD)),
        ((8, 30), View("crop", 20, 12, "bicubic", MEAN, STD)),
        ((25, 30), View("crop", 20, 19, "bicubic", MEAN, STD)),
        ((42, 40), View("crop", 20, 19, "bicubic", MEAN, STD)),
        ((362, 3), View("squash", 20, 20, "bicubic", MEAN, STD)),
    ],
    ids=["long", "more taps than are exact", "black around", "black below", "black beside", "very tall"],
)
def test_what_is_not_resized_as_products_is_by_pillow(shape, view):
    image = picture(*shape)
    assert loading._Resampled(view).cut(image).pixels.shape == (20, 20, 3)
    assert torch.equal(resampled([image], view), by_pillow([image], view))


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    side=st.integers(1, 300),
    target=st.integers(1, 300),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)
def test_both_parts_of_a_weight_are_exact_in_tf32(side, target, interpolation):
    """It has 11 significant bits, and sums below 2^24 are exact in whatever order."""
    taps = resampling._taps(side, target, 0, target, interpolation)
    if taps.weights.shape[1] > resampling.MOST_TAPS:
        return
    weights = torch.from_numpy(taps.weights)[None]
    parts = resampling._matrices(torch.from_numpy(taps.first)[None], weights, side)
    for part, unit in zip(parts, (1, 2**12), strict=True):
        units = part.double() * unit
        assert part.shape == (1, target, side)
        assert torch.equal(units, units.round())
        assert units.abs().max() <= 2**11
        assert 255 * units.abs().sum(-1).max() < 2**24 - 2**9
    together = (parts[0].double() + parts[1].double()) * 2**12
    assert (together.sum(-1) - 2**22).abs().max() <= taps.weights.shape[1]
    assert torch.equal(together.sum(-1), weights.double().sum(-1))


def test_it_is_tried_whether_the_installed_pillow_resizes_like_this(monkeypatch):
    assert resampling.equals_pillow("cpu")
    resampling.equals_pillow.cache_clear()
    try:
        monkeypatch.setattr(resampling, "_ROWS_FIRST", not resampling._ROWS_FIRST)
        assert not resampling.equals_pillow("cpu")
    finally:
        resampling.equals_pillow.cache_clear()


def test_it_is_tried_on_the_device_and_a_device_that_rounds_leaves_it_to_pillow(pretended, monkeypatch):
    """As one does that keeps ten bits of every product."""
    view = View("squash", 8, 8, "bilinear", MEAN, STD)
    bmm = torch.bmm
    with pretended.pretended_gpu():
        assert isinstance(loading._way(view, "cuda:0", 4, 2), loading._Resampled)
        resampling.equals_pillow.cache_clear()
        try:
            monkeypatch.setattr(torch, "bmm", lambda a, b: (bmm(a, b) / 4).round() * 4)
            assert isinstance(loading._way(view, "cuda:0", 4, 2), loading._Resized)
        finally:
            resampling.equals_pillow.cache_clear()


def test_who_resizes(monkeypatch):
    monkeypatch.setattr(resampling, "equals_pillow", lambda device: True)
    view = View("squash", 8, 8, "bilinear", MEAN, STD)
    assert isinstance(loading._way(view, "cpu", 4, 2), loading._Resized)
    assert isinstance(loading._way(view, "cuda:0", 4, 2), loading._Resampled)
    nearest = View("squash", 8, 8, "nearest", MEAN, STD)
    assert isinstance(loading._way(nearest, "cuda:0", 4, 2), loading._Resized)
    # Docker's 64 MB: whole images of this size would leave room for 2 processes of 15.
    monkeypatch.setattr(workers, "shared_room", lambda: 64 * 2**20)
    large = View("crop", 518, 592, "bicubic", MEAN, STD)
    assert isinstance(loading._way(large, "cuda:0", 48, 15), loading._Resized)


@pytest.mark.parametrize("before", ["none", "ieee", "tf32", "allowed", "high"])
def test_products_are_in_tf32_meanwhile_and_as_before_afterwards(before, monkeypatch):
    matmul = torch.backends.cuda.matmul

    def state():
        return matmul.fp32_precision, matmul.allow_tf32, torch.get_float32_matmul_precision()

    fresh = state()
    seen = []
    side_by_side = resampling._side_by_side
    monkeypatch.setattr(resampling, "_side_by_side", lambda x: seen.append(state()) or side_by_side(x))
    view = View("crop", 16, 18, "bicubic", MEAN, STD)
    images = [picture(30, 40)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the older ways to say it
            if before == "allowed":
                matmul.allow_tf32 = True
            elif before == "high":
                torch.set_float32_matmul_precision("high")
            elif before == "ieee":
                matmul.fp32_precision = before
            elif before == "tf32":
                torch.set_float32_matmul_precision("high")
                matmul.fp32_precision = before
        expected = state()
        assert torch.equal(resampled(images, view), by_pillow(images, view))
        assert state() == expected
        assert seen == [("tf32", True, "high")]
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = fresh[0]
    assert state() == fresh


def test_autocast_does_not_round_pixels():
    view = View("crop", 32, 36, "bicubic", MEAN, STD)
    images = [picture(60, 80)]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resampled(images, view), by_pillow(images, view))


class Pictures(ArraySplit):
    """Pictures of several shapes, of which two are broken."""

    def __init__(self, count: int, broken: tuple[int, ...] = ()) -> None:
        super().__init__(np.zeros((count, 1, 1, 3), np.uint8), [str(i) for i in range(count)], None)
        self.broken = broken

    def image(self, i):
        if i in self.broken:
            raise DataError(f"{i} is broken")
        return picture(20 + 3 * i, 50 - i, seed=i)


@pytest.mark.parametrize("processes", [0, 2])
def test_batches_that_a_device_resizes_are_the_same(processes, monkeypatch):
    view = View("crop", 16, 18, "bicubic", MEAN, STD)
    split = Pictures(23, broken=(3, 4, 22))
    expected = list(iterate_batches(split, view, 5, 0, skip_broken=True))
    monkeypatch.setattr(loading, "_way", lambda view, *_: loading._Resampled(view))
    found = list(iterate_batches(split, view, 5, processes, skip_broken=True))
    assert len(found) == len(expected) == 5
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.positions.tolist() == theirs.positions.tolist()
        assert ours.broken == theirs.broken
        assert torch.equal(ours.images, theirs.images)
    with pytest.raises(DataError, match="3 is broken; --skip-broken leaves"):
        list(iterate_batches(split, view, 5, processes))


def test_a_batch_of_broken_images_alone_is_empty(monkeypatch):
    monkeypatch.setattr(loading, "_way", lambda view, *_: loading._Resampled(view))
    view = View("squash", 9, 9, "bilinear", MEAN, STD)
    (batch,) = iterate_batches(Pictures(2, broken=(0, 1)), view, 2, skip_broken=True)
    assert batch.images.shape == (0, 3, 9, 9)
    assert batch.broken == ["0", "1"]
