import errno
import pickle
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lmim_bench.bench import claims, room
from lmim_bench.bench.errors import ConfigError, DataError
from lmim_bench.bench.progress import Reporter
from lmim_bench.pretrain import pixels as pixels_module
from lmim_bench.pretrain.batches import draw_part, epoch_order, generator, parts, plan_steps, to_images
from lmim_bench.pretrain.crops import CROP_NOISE, crop_and_resize, draw_crops
from lmim_bench.pretrain.masking import draw_masks
from lmim_bench.pretrain.pixels import CachedPixels, DecodedPixels, Stored, open_pixels, stored_sides
from lmim_bench.pretrain.recipe import Recipe

CASES = settings(deadline=None, derandomize=True, max_examples=15)
IMAGES = 13


def stored(gap=0, **fields):
    """A recipe of these fields of ``data``."""
    return Recipe.model_validate({"data": fields, "masking": {"visible": 0.5, "gap": gap}})


class NumberedPixels:
    """Image i has the colour i all over and its own size."""

    def __len__(self):
        return IMAGES

    def read(self, index):
        index = torch.as_tensor(np.asarray(index))
        pixels = index[:, None, None, None].expand(-1, 3, 10, 10).to(torch.uint8)
        return Stored(pixels, torch.stack([20 + index, 30 - index], dim=1))


class Photos:
    """A split of noise images in the given sizes (width, height); those of ``broken`` do not decode."""

    labels = None

    def __init__(self, sizes, broken=()):
        self.sizes, self.broken = sizes, broken
        self.ids = [f"photos/{i:03d}.png" for i in range(len(sizes))]

    def __len__(self):
        return len(self.sizes)

    def image(self, i):
        if i in self.broken:
            raise DataError(f"cannot decode {self.ids[i]}: truncated")
        width, height = self.sizes[i]
        noise = np.random.default_rng(i).integers(0, 256, (height, width, 3))
        return noise.astype(np.uint8)


def flat(part):
    offsets = () if part.offsets is None else (part.offsets,)
    return [part.pixels, part.crops.boxes, part.crops.flips, *offsets, part.masks.visible, part.masks.hidden]


def fed(recipe, processes, start=0, workers=0):
    """For each step the fields of its images, over all processes and parts in turn."""
    schedule = plan_steps(recipe, IMAGES, processes)
    feeds = [
        list(parts(recipe, schedule, NumberedPixels(), start=start, process=p, workers=workers, pin=False))
        for p in range(processes)
    ]
    steps = []
    for step in range(schedule.total - start):
        mine = [
            flat(part) for feed in feeds for part in feed[step * schedule.parts : (step + 1) * schedule.parts]
        ]
        assert all(len(fields[0]) == schedule.part_size for fields in mine)
        steps.append([torch.cat(column) for column in zip(*mine, strict=True)])
    return steps


def drawn(recipe, step):
    """The whole of a step."""
    share = slice(0, recipe.optim.batch_size)
    return draw_part(recipe, plan_steps(recipe, IMAGES, 1), step, share, NumberedPixels())


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["latent-mim", "i-jepa", "data2vec", "mae"])
@pytest.mark.parametrize(("processes", "accumulate"), [(1, 2), (2, 1), (2, 3), (3, 1), (6, 2)])
def test_processes_and_accumulation_share_the_same_step(tiny, name, processes, accumulate):
    sets = ["optim.batch_size=12", "optim.steps=3"]
    alone = fed(tiny(name, *sets), 1)
    assert_same(fed(tiny(name, *sets, f"engine.accumulate={accumulate}"), processes), alone)


def test_a_training_goes_on_with_what_it_would_have_seen(tiny):
    recipe = tiny("latent-mim", "optim.batch_size=4", "optim.steps=7")
    assert_same(fed(recipe, 1, start=5), fed(recipe, 1)[5:])


def test_worker_processes_change_nothing(tiny):
    recipe = tiny("latent-mim", "optim.batch_size=4", "optim.steps=2")
    assert_same(fed(recipe, 1, workers=1), fed(recipe, 1))


def test_a_part_is_made_of_the_draws_of_its_step(tiny):
    recipe = tiny("latent-mim", "optim.batch_size=5", "seed=3")
    schedule = plan_steps(recipe, IMAGES, 1)
    step, share = 3, slice(1, 4)  # the second step of the second epoch
    part = draw_part(recipe, schedule, step, share, NumberedPixels())
    index = epoch_order(3, 1, IMAGES)[5:10][share]
    assert part.pixels[:, 0, 0, 0].tolist() == index.tolist()
    noise = torch.rand(5, CROP_NOISE, generator=generator(3, "crops", step))[share]
    sizes = torch.stack([20 + index, 30 - index], dim=1)
    crops = draw_crops(sizes, 0.2, recipe.data.aspect, True, noise)
    assert torch.equal(part.crops.boxes, crops.boxes)
    assert torch.equal(part.crops.flips, crops.flips)
    masks = draw_masks(recipe, 5, share, generator(3, "masks", step))
    assert torch.equal(part.masks.hidden, masks.hidden)
    assert part.offsets.shape == (3, 16, 2)
    assert 0 <= part.offsets.min() < part.offsets.max() < recipe.masking.gap


@CASES
@given(seed=st.integers(0, 9999), step=st.integers(0, 50))
def test_a_part_depends_on_the_seed_and_the_step_only(tiny, seed, step):
    recipe = tiny("latent-mim", f"seed={seed}", "optim.batch_size=4")
    first = drawn(recipe, step)
    torch.rand(3)
    state = torch.get_rng_state()
    assert_same([flat(first)], [flat(drawn(recipe, step))])
    assert torch.equal(torch.get_rng_state(), state)
    for other in (
        drawn(recipe, step + 1),
        drawn(recipe.model_copy(update={"seed": seed + 1}), step),
    ):
        assert not torch.equal(other.crops.boxes, first.crops.boxes)
        assert not torch.equal(other.offsets, first.offsets)


def test_contiguous_patches_lie_at_the_corners_of_their_cells(tiny):
    recipe = tiny("latent-mim", "masking.placement=contiguous", "optim.batch_size=4")
    assert drawn(recipe, 0).offsets.abs().max() == 0
    assert drawn(tiny("mae", "optim.batch_size=4"), 0).offsets is None


@CASES
@given(seed=st.integers(0, 999), epoch=st.integers(0, 99), images=st.integers(1, 50))
def test_the_order_of_an_epoch_is_a_permutation(seed, epoch, images):
    order = epoch_order(seed, epoch, images)
    assert sorted(order.tolist()) == list(range(images))


def test_orders_differ_between_epochs_and_seeds():
    orders = [tuple(epoch_order(s, e, 30).tolist()) for s in range(3) for e in range(3)]
    assert len(set(orders)) == 9


def test_no_image_comes_twice_in_an_epoch(tiny):
    steps = fed(tiny("mae", "optim.batch_size=4", "optim.epochs=3"), 1)
    assert len(steps) == 9
    for epoch in range(3):
        seen = torch.cat([step[0][:, 0, 0, 0] for step in steps[3 * epoch : 3 * epoch + 3]]).tolist()
        assert len(set(seen)) == len(seen) == 12


def test_feeding_leaves_the_global_random_state_alone(tiny):
    state = torch.get_rng_state()
    fed(tiny("i-jepa", "optim.batch_size=4", "optim.steps=2"), 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_generators_depend_on_seed_and_purpose():
    names = [(0, "crops", 1), (0, "crops", 2), (0, "masks", 1), (1, "crops", 1), (0, "crops", 11)]
    assert len({generator(*name).initial_seed() for name in names}) == 5
    assert generator(0, "x").initial_seed() == generator(0, "x").initial_seed()


@pytest.mark.parametrize(
    ("images", "processes", "sets", "steps"),
    [
        (100, 1, ["optim.batch_size=10", "optim.epochs=3"], (10, 30)),
        (105, 1, ["optim.batch_size=10", "optim.epochs=2.5"], (10, 25)),
        (100, 1, ["optim.batch_size=10", "optim.epochs=0.01"], (10, 1)),
        (100, 5, ["optim.batch_size=20", "optim.steps=7", "engine.accumulate=2"], (5, 7)),
        (10, 1, ["optim.batch_size=10", "optim.epochs=1"], (1, 1)),
    ],
)
def test_steps_are_planned(tiny, images, processes, sets, steps):
    schedule = plan_steps(tiny("mae", *sets), images, processes)
    assert (schedule.per_epoch, schedule.total) == steps
    assert schedule.part_size * schedule.parts * schedule.processes == schedule.batch


def test_batches_that_cannot_be_shared_are_refused(tiny):
    recipe = tiny("mae", "optim.batch_size=12", "engine.accumulate=5")
    with pytest.raises(ConfigError, match=r"12 cannot be shared by 2 processes x engine\.accumulate 5"):
        plan_steps(recipe, 100, 2)
    with pytest.raises(
        ConfigError, match=r"12 is more than the 11 images .*--set optim\.batch_size=10 at most$"
    ):
        plan_steps(recipe, 11, 1)


def test_images_are_normalised_crops(tiny):
    recipe = tiny("latent-mim", "optim.batch_size=4")
    part = drawn(recipe, 0)
    found = to_images(part.to(torch.device("cpu")), recipe)
    assert found.shape == (4, 3, recipe.crop_size, recipe.crop_size)
    assert found.dtype == torch.float32
    crops = crop_and_resize(part.pixels, part.crops, recipe.crop_size)
    for channel, (mean, std) in enumerate(zip(recipe.data.mean, recipe.data.std, strict=True)):
        torch.testing.assert_close(found[:, channel], (crops[:, channel] - mean) / std)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_ends_the_feed_with_its_name(tiny, workers):
    source = DecodedPixels(Photos([(9, 9)] * IMAGES, broken=(4,)), 8)
    recipe = tiny("mae", "optim.batch_size=4", "optim.epochs=2")
    schedule = plan_steps(recipe, IMAGES, 1)
    with pytest.raises(DataError, match=r"photos/004\.png"):
        list(parts(recipe, schedule, source, start=0, process=0, workers=workers, pin=False))


SIZES = [(20 + i % 7, 15 + i % 5) for i in range(70)]


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_pixels_equal_decoded_ones_and_survive_pickling(tmp_path, workers):
    split = Photos(SIZES)
    state = torch.get_rng_state()
    config = stored(store_size=12, cache="always")
    cached = open_pixels(split, "abc", config, tmp_path, workers, Reporter())
    assert torch.equal(torch.get_rng_state(), state)
    decoded = open_pixels(split, "abc", stored(store_size=12, cache="never"), tmp_path, 0, Reporter())
    assert isinstance(cached, CachedPixels)
    assert isinstance(decoded, DecodedPixels)
    assert len(cached) == len(decoded) == 70
    for source in (cached, pickle.loads(pickle.dumps(cached)), pickle.loads(pickle.dumps(decoded))):
        found = source.read(np.array([69, 0, 3, 3]))
        for i, pixels, size in zip([69, 0, 3, 3], *found, strict=True):
            squashed = Image.fromarray(split.image(i)).resize((12, 12), Image.Resampling.BICUBIC)
            assert np.array_equal(pixels.numpy(), np.asarray(squashed).transpose(2, 0, 1))
            assert size.tolist() == [SIZES[i][1], SIZES[i][0]]
        assert found.pixels.dtype == torch.uint8
        found.pixels.zero_()  # a copy: the cache itself stays as it is
    assert cached.read(np.array([0])).pixels.max() > 0
    hidden = [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert hidden == [f".{cached.folder.name}.lock"]


def test_the_cache_is_filled_once_and_by_content_and_size(tmp_path, monkeypatch):
    split = Photos(SIZES[:5])

    def opened(fingerprint, size):
        config = stored(store_size=size)
        return open_pixels(split, fingerprint, config, tmp_path, 0, Reporter()).folder

    first = opened("abc", 8)
    monkeypatch.setattr(pixels_module, "squash", lambda *_: pytest.fail("decoded again"))
    assert opened("abc", 8) == first
    monkeypatch.undo()
    assert len({first, opened("abd", 8), opened("abc", 9)}) == 3


def test_a_broken_image_leaves_nothing_half_written(tmp_path):
    split = Photos(SIZES, broken=(66,))
    with pytest.raises(DataError, match=r"photos/066\.png"):
        open_pixels(split, "abc", stored(store_size=8), tmp_path / "pixels", 0, Reporter())
    assert [p.suffix for p in (tmp_path / "pixels").iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["pixels.npy", "sizes.npy"])
@pytest.mark.parametrize("left", [0, 10, 100])
def test_a_damaged_cache_is_filled_again(tmp_path, name, left):
    split, config = Photos(SIZES[:5]), stored(store_size=8)
    first = open_pixels(split, "abc", config, tmp_path, 0, Reporter())
    expected = first.read(np.arange(5))
    path = first.folder / name
    path.write_bytes(path.read_bytes()[:left])
    again = open_pixels(split, "abc", config, tmp_path, 0, Reporter())
    assert_same([again.read(np.arange(5))], [expected])
    path.unlink()
    assert_same([open_pixels(split, "abc", config, tmp_path, 0, Reporter()).read(np.arange(5))], [expected])


def test_room_that_another_process_takes_meanwhile_is_one_line(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(room.os, "posix_fallocate", full)
    with pytest.raises(
        DataError, match=r"decoded images need 0\.0 MB below .* are free; --set data\.cache=never"
    ):
        open_pixels(Photos(SIZES[:5]), "abc", stored(store_size=8), tmp_path / "pixels", 0, Reporter())
    assert [p.suffix for p in (tmp_path / "pixels").iterdir()] == [".lock"]


WAITING = "waiting for another process, which makes"


def test_only_those_who_make_the_same_wait_for_each_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claims, "_PATIENCE", 0.05)
    split, config = Photos(SIZES[:5]), stored(store_size=8)
    folder = open_pixels(split, "abc", config, tmp_path, 0, Reporter()).folder
    shutil.rmtree(folder)
    with ThreadPoolExecutor(1) as pool:
        with claims.in_turn(folder, Reporter()):
            open_pixels(split, "another", config, tmp_path, 0, Reporter())
            assert WAITING not in capsys.readouterr().err
            reporter, said = Reporter(), threading.Event()
            monkeypatch.setattr(reporter, "line", lambda line: WAITING in line and said.set())
            same = pool.submit(open_pixels, split, "abc", config, tmp_path, 0, reporter)
            assert said.wait(60)
            assert not same.done()
        assert same.result().folder == folder


def test_those_who_begin_together_decode_once(tmp_path, monkeypatch):
    split, decoded = Photos(SIZES[:5]), []
    squash = pixels_module.squash

    def slow(*arguments):
        decoded.append(arguments[1])
        time.sleep(0.02)
        return squash(*arguments)

    monkeypatch.setattr(pixels_module, "squash", slow)
    with ThreadPoolExecutor(4) as pool:
        config = stored(store_size=8)
        opened = [pool.submit(open_pixels, split, "abc", config, tmp_path, 0, Reporter()) for _ in range(4)]
    assert len({each.result().folder for each in opened}) == 1
    assert sorted(decoded) == [0, 1, 2, 3, 4]


def test_the_cache_is_for_what_fits(tmp_path, monkeypatch):
    split = Photos(SIZES[:5])
    little = stored(store_size=8, cache_limit_gb=1e-7)
    assert isinstance(open_pixels(split, "abc", little, tmp_path, 0, Reporter()), DecodedPixels)
    always = stored(store_size=8, cache_limit_gb=1e-7, cache="always")
    assert isinstance(open_pixels(split, "abc", always, tmp_path, 0, Reporter()), CachedPixels)
    usage = type("usage", (), {"free": 100})
    monkeypatch.setattr(pixels_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=r"are free; --set data\.cache=never"):
        open_pixels(split, "full", always, tmp_path, 0, Reporter())
    with pytest.raises(DataError, match="holds no image"):
        open_pixels(Photos([]), "none", always, tmp_path, 0, Reporter())


@pytest.mark.parametrize(
    ("sizes", "fields", "sides"),
    [
        ([(300, 200)], {"store_size": 77}, (77, 77)),
        ([(300, 200)], {"image_size": 224}, (300, 256)),
        ([(900, 600)], {"image_size": 224}, (512, 256)),
        ([(300, 200)], {"image_size": 32}, (73, 37)),
        ([(400, 300)], {"image_size": 224, "gap": 4}, (400, 320)),
        ([(32, 32)] * 3, {"image_size": 224}, (32, 32)),
        ([(30, 20), (20, 240)], {"image_size": 224}, (240, 240)),
        ([(10, 10)] * 150 + [(500, 500)] * 10, {"image_size": 224}, (500, 256)),
    ],
)
def test_the_stored_sides_follow_the_training_size_and_the_images(sizes, fields, sides):
    assert stored_sides(Photos(sizes), stored(**fields)) == sides


def test_the_better_side_is_kept_where_it_fits_and_decoded_where_nothing_does(tmp_path):
    split = Photos([(90, 80)] * 3)  # at 73 pixels 48 kB, at 37 pixels 12 kB
    for limit, kind, side in ((1e-4, CachedPixels, 73), (2e-5, CachedPixels, 37), (1e-6, DecodedPixels, 73)):
        config = stored(image_size=32, cache_limit_gb=limit)
        opened = open_pixels(split, "abc", config, tmp_path, 0, Reporter())
        assert isinstance(opened, kind)
        assert opened.size == side
