"""Batches of pixels: equal to torchvision's transforms, in order, with broken images named."""

import errno
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from lmim_bench.bench.data import load_data, loading
from lmim_bench.bench.data.loading import iterate_batches
from lmim_bench.bench.data.splits import FileSplit
from lmim_bench.bench.data.views import apply_view, normalise
from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.errors import DataError
from lmim_bench.bench.types import View

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MODES = {
    "bicubic": InterpolationMode.BICUBIC,
    "bilinear": InterpolationMode.BILINEAR,
    "nearest": InterpolationMode.NEAREST,
}


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    height=st.integers(5, 90),
    width=st.integers(5, 90),
    size=st.integers(4, 40),
    margin=st.integers(0, 9),
    interpolation=st.sampled_from(sorted(MODES)),
)
def test_crop_equals_torchvision_to_the_bit(height, width, size, margin, interpolation):
    image = noise(height, width)
    theirs = transforms.Compose(
        [
            transforms.Resize(size + margin, MODES[interpolation]),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )(image)
    ours = apply_view(np.asarray(image), View("crop", size, size + margin, interpolation, MEAN, STD))
    assert ours.shape == (3, size, size)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(height=st.integers(5, 90), width=st.integers(5, 90), size=st.integers(4, 60))
def test_squash_equals_torchvision_to_the_bit(height, width, size):
    image = noise(height, width)
    theirs = transforms.Compose(
        [
            transforms.Resize((size, size), InterpolationMode.BILINEAR),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )(image)
    assert torch.equal(
        apply_view(np.asarray(image), View("squash", size, size, "bilinear", MEAN, STD)), theirs
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    for split, count in (("train", 1), ("val", 13)):
        for name in ("a", "b"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(count):
                noise(20 + i, 30, seed=i).save(tmp_path / "set" / split / name / f"{i:02d}.png")
    return tmp_path / "set"


VIEW = View("crop", 16, 18, "bicubic", MEAN, STD)


def split_of(folder: Path):
    return load_data(str(folder), cache_dir=folder.parent / "cache").splits["val"]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_split_in_order(folder, workers):
    split = split_of(folder)
    batches = list(iterate_batches(split, VIEW, 4, workers))
    assert [len(b.positions) for b in batches] == [4, 4, 4, 4, 4, 4, 2]
    assert np.concatenate([b.positions for b in batches]).tolist() == list(range(26))
    assert not any(b.broken for b in batches)
    images = torch.cat([b.images for b in batches])
    assert images.dtype == torch.uint8
    for i in range(len(split)):
        assert torch.equal(normalise(images[i : i + 1], VIEW)[0], apply_view(split.image(i), VIEW))


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_image_stops_with_one_line_that_names_it(folder, workers):
    (folder / "val" / "a" / "05.png").write_bytes(b"no image")
    seen = []
    batches = iterate_batches(split_of(folder), VIEW, 4, workers)
    with pytest.raises(DataError, match=r"val/a/05\.png is broken") as caught:
        seen.extend(batch.positions.tolist() for batch in batches)
    assert "\n" not in str(caught.value)
    assert seen == [[0, 1, 2, 3]]


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_broken_counts_and_names_them(folder, workers):
    for name in ("a/00", "a/01", "b/12"):
        (folder / "val" / f"{name}.png").write_bytes(b"")
    split = split_of(folder)
    batches = list(iterate_batches(split, VIEW, 2, workers, skip_broken=True))
    assert [i for b in batches for i in b.broken] == ["val/a/00.png", "val/a/01.png", "val/b/12.png"]
    assert np.concatenate([b.positions for b in batches]).tolist() == list(range(2, 25))
    assert batches[0].images.shape == (0, 3, 16, 16), "a batch of broken images alone"
    assert all(len(b.images) == len(b.positions) for b in batches)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("skip_broken", [False, True])
def test_an_image_that_cannot_be_read_now_is_never_left_out(folder, monkeypatch, workers, skip_broken):
    """A disk that fails must not make a smaller data set, with or without broken images in it."""
    (folder / "val" / "a" / "00.png").write_bytes(b"")
    unreadable = folder / "val" / "a" / "06.png"
    split = split_of(folder).subset(np.arange(0 if skip_broken else 1, 26))
    whole = Path.read_bytes

    def read_bytes(path):
        if path == unreadable:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(DataError, match=r"val/a/06\.png cannot be read: Input/output error$"):
        list(iterate_batches(split, VIEW, 4, workers, skip_broken))


def places(steps, wanted):
    return [i for i, step in enumerate(steps) if step == wanted]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_pixels_go_to_a_gpu_through_pinned_memory(folder, monkeypatch, workers, device):
    """That they arrive there takes one."""
    steps = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: steps.append("pinned") or x.clone())
    monkeypatch.setattr(torch.Tensor, "to", lambda x, where, non_blocking: steps.append(where) or x)
    monkeypatch.setattr(loading, "_way", lambda view, *_: loading._Resized(view))
    batches = list(iterate_batches(split_of(folder), VIEW, 8, workers, device=device))
    assert [step for step in steps if step != "pinned"] == [device] * 4
    assert steps.count("pinned") == (0 if device == "cpu" else 4)
    assert all(steps[: i + 1].count("pinned") >= n for n, i in enumerate(places(steps, "cuda:0"), 1))
    expected = list(iterate_batches(split_of(folder), VIEW, 8))
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, expected, strict=True))


def test_the_strides_of_pixels_change_no_number_and_no_strides_of_the_outcome():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 7, 9, 3), dtype=np.uint8))
    view = pixels.permute(0, 3, 1, 2)
    found = normalise(view, VIEW)
    assert found.is_contiguous()
    assert torch.equal(found, normalise(view.contiguous(), VIEW))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    assert torch.equal(found, (view.float() / 255 - mean) / std)


def test_an_image_too_long_to_resize_is_named_and_can_be_left_out(tmp_path):
    for name, shape in (("a", (8, 8)), ("long", (1, 60_000))):
        Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(tmp_path / f"{name}.png")
    split = FileSplit(tmp_path, ["a.png", "long.png"], None)
    view = View("crop", 224, 256, "bicubic", (0, 0, 0), (1, 1, 1))
    with pytest.raises(DataError, match=r"long\.png is 60000x1 pixels, .* 256 are 15360000x256: too many"):
        list(iterate_batches(split, view, 2))
    (batch,) = iterate_batches(split, view, 2, skip_broken=True)
    assert len(batch.images) == 1


@pytest.mark.parametrize("size", [224, 256, 288, 384])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 0.965, 1.0, 224 / 232, 224 / 235, 224 / 256])
def test_the_short_side_is_the_one_that_timm_resizes_to(size, crop_pct):
    made = create_transform((3, size, size), crop_pct=crop_pct, interpolation="bicubic")
    theirs = made.transforms[0].size
    spec = load_encoder("pixels").spec.model_copy(update={"crop_pct": crop_pct})
    assert View.crop(spec, size).resize == (theirs if isinstance(theirs, int) else theirs[0])


def test_leaving_early_leaves_no_worker_behind(folder):
    import multiprocessing

    batches = iterate_batches(split_of(folder), VIEW, 2, 2)
    next(batches)
    batches.close()
    assert multiprocessing.active_children() == []


def test_global_random_state_is_not_touched(folder):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(iterate_batches(split_of(folder), VIEW, 8, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_bugs_keep_their_traceback(folder):
    class Faulty:
        ids = ("x",)
        labels = None

        def __len__(self):
            return 1

        def image(self, i):
            raise KeyError("a bug, not a broken image")

        def mask(self, i): ...

        def subset(self, index): ...

    with pytest.raises(KeyError):
        list(iterate_batches(Faulty(), VIEW, 1, 0, skip_broken=True))
