"""The estimate of a plan: what it adds up, what it times, what it says where it cannot know."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lmim_bench.bench.api import make_config
from lmim_bench.bench.errors import ConfigError
from lmim_bench.bench.estimate import REFERENCE_RATE, Estimator, product_rate
from lmim_bench.bench.opening import open_run
from lmim_bench.bench.plan import make_plan
from lmim_bench.bench.progress import Reporter
from lmim_bench.bench.show import duration
from lmim_bench.bench.types import Dataset, EncoderSpec
from lmim_bench.tasks import registry


@pytest.fixture
def another(save_tiny, tmp_path):
    return save_tiny(tmp_path / "two.pth", seed=2)


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        for name in ("day", "night"):
            folder = tmp_path / "hours" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(256, size=(40, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "hours"


@pytest.fixture
def opened(checkpoint, images, tmp_path):
    def open_it(*tasks, ckpt=(), **options):
        config = make_config(
            [checkpoint, *ckpt],
            **{
                "tasks": list(tasks),
                "data": [str(images)],
                "out": tmp_path / "run",
                "cache_dir": tmp_path / "cache",
                "device": "cpu",
                **options,
            },
        )
        return open_run(make_plan(config), Reporter(), "test")

    return open_it


@pytest.fixture
def steps(monkeypatch):
    """The steps of a run, with fixed numbers where the machine would be timed."""

    def foreseen(run):
        for name in ("encoding", "reading"):
            monkeypatch.setattr(Estimator, f"_{name}", lambda *_, _of=name[:4]: FIXED[_of])
        monkeypatch.setattr(Estimator, "_slower", lambda *_: FIXED["slower"])
        return {step.what: step for step in Estimator(run).steps()}

    return foreseen


FIXED = {"enco": 0.25, "read": 0.125, "slower": 2.0}
"""What ``steps`` takes for the timings of this machine."""
TRAIN, VAL = "features of hours/train at 32 px", "features of hours/val at 32 px"


def test_features_are_counted_once_for_all_tasks_and_tasks_in_seconds_of_this_machine(opened, steps):
    run = opened("knn", "few_shot")
    found = steps(run)
    assert list(found) == [TRAIN, VAL, "knn on hours", "few_shot on hours"]
    assert found[TRAIN].seconds == 12 * (0.25 + 0.125)
    assert found[VAL].images == 8
    spec, data = run.cells[0].checkpoint.spec, run.data["hours"]
    for cell in run.cells:
        task = cell.evaluation.task
        work = task.work(cell.evaluation.config, spec, data)
        step = found[f"{task.name} on hours"]
        assert step.seconds == pytest.approx(2 * sum(work.seconds.values()))
        assert step.memory == work.memory
        assert step.images == 0


def test_images_that_a_task_encodes_itself_are_in_its_time(opened, steps):
    found = steps(opened("diagnose", overrides={"diagnose": {"patch_images": 5}}))["diagnose on hours"]
    assert found.images == 10
    assert found.seconds > 10 * 0.25


def test_the_images_that_time_an_encoder_lie_on_its_device(opened, monkeypatch):
    """Neither their making nor their way to the device is the encoder's time."""
    seen = []

    class Device:
        device = "meta"

        def batch_for(self, height, width):
            return 4

        def encode(self, images, taps):
            seen.append(images)

    run = opened("knn")
    monkeypatch.setattr(Estimator, "_engine", lambda *_: Device())
    Estimator(run)._encoding(run.cells[0], 24, 32)
    assert {images.device.type for images in seen} == {"meta"}
    assert seen[-1].shape == (4, 3, 24, 32)
    assert all(images.is_contiguous() for images in seen)


def test_reading_in_workers_goes_on_beside_the_encoder(opened, steps):
    assert steps(opened("knn", workers=4))[TRAIN].seconds == 12 * 0.25
    assert steps(opened("knn", workers=1, out=None))[TRAIN].seconds == 12 * 0.25


def test_what_is_cached_or_scored_costs_nothing(opened, steps):
    opened("knn").execute()
    assert steps(opened("knn")) == {}
    assert list(steps(opened("knn", out=None))) == ["knn on hours"]
    more = steps(opened("knn", "linear"))
    assert TRAIN in more
    assert "knn on hours" not in more


def test_the_disk_space_is_that_of_the_files(opened, steps, tmp_path):
    run = opened("linear", "knn")
    foreseen = sum(step.disk for step in steps(run).values())
    run.execute()
    files = (tmp_path / "cache" / "features").rglob("*@*.npy")
    assert foreseen == sum(np.load(path, mmap_mode="r").nbytes for path in files)


def test_pixels_that_are_kept_take_room_once_and_no_time_after(opened, steps, another):
    run = opened("knn", ckpt=[another], keep_pixels=True)
    steps(run)
    first, second = (step for step in Estimator(run).steps() if step.what == TRAIN)
    assert first.seconds == 12 * (0.25 + 0.125)
    assert second.seconds == 12 * 0.25
    assert first.disk - second.disk == 12 * 3 * 32 * 32
    run.execute()
    after = opened("linear", keep_pixels=True)
    (found,) = (step for step in Estimator(after).steps() if step.what == TRAIN)
    assert found.seconds == 12 * 0.25
    assert found.disk == steps(opened("linear"))[TRAIN].disk


def test_pixels_that_the_cache_may_not_hold_are_foreseen(opened, steps):
    needed = sum(step.disk for step in steps(opened("knn", keep_pixels=True)).values())
    assert steps(opened("knn", keep_pixels=True, cache_size_gb=needed / 1e9))
    with pytest.raises(
        ConfigError, match=r"0\.1 MB for decoded images beside 0\.0 MB of .* raise --cache-size"
    ):
        opened("knn", keep_pixels=True, cache_size_gb=(needed - 1) / 1e9)


def test_broken_images_fail_every_checkpoint_that_would_keep_them(opened, images, another):
    (images / "train" / "day" / "0.png").write_bytes(b"")
    run = opened("knn", ckpt=[another], keep_pixels=True)
    failed = [step for step in Estimator(run).steps() if step.what == TRAIN]
    assert len(failed) == 2
    assert all("0.png is broken" in step.failure for step in failed)


def test_a_cell_that_will_fail_says_so(opened, steps):
    found = steps(opened("knn", overrides={"knn": {"layer": -9}}))["knn on hours"]
    assert found.seconds is None
    assert "-9" in found.failure


def test_a_task_without_a_count_is_not_guessed(opened, steps):
    run = opened("knn")
    evaluation = replace(run.cells[0].evaluation, task=replace(run.cells[0].evaluation.task, work=None))
    run.cells = [replace(run.cells[0], evaluation=evaluation)]
    found = steps(run)["knn on hours"]
    assert found.seconds is None
    assert not found.failure


def test_checkpoints_of_one_architecture_are_timed_once(opened, monkeypatch, tmp_path, checkpoint):
    other = tmp_path / "two.pth"
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"more": 1}, other)
    run = opened("knn", ckpt=[other])
    from lmim_bench.bench import encoders

    loads = []
    original = encoders.load_encoder
    monkeypatch.setattr(encoders, "load_encoder", lambda ref, **kw: loads.append(ref) or original(ref, **kw))
    found = list(Estimator(run).steps())
    assert len(loads) == 1
    assert all(step.seconds > 0 for step in found)
    assert {step.checkpoint for step in found} == {"one", "two"}


def test_timing_meets_a_broken_image_as_the_run_would(opened, images):
    (images / "train" / "day" / "0.png").write_bytes(b"no picture")
    found = {step.what: step for step in Estimator(opened("knn")).steps()}
    assert found[TRAIN].seconds is None
    assert re.search(r"0\.png.*--skip-broken", found[TRAIN].failure)
    assert not any(step.failure for step in Estimator(opened("knn", skip_broken=True)).steps())


def test_the_rate_of_products_is_that_of_a_machine():
    assert 1e8 < product_rate("cpu") < 1e15
    assert REFERENCE_RATE > 1e9


def test_every_task_that_comes_with_the_project_is_counted():
    tasks, _ = registry()
    assert [name for name, task in tasks.items() if task.work is None] == []


class Split:
    labels = None

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return self.images


class Film:
    def __init__(self, frames):
        self.frames = frames

    def __len__(self):
        return self.frames

    def mask(self, i):
        mask = np.zeros((120, 200), dtype=np.uint8)
        mask[20:80, 30:90] = 1
        return mask


def made(kind, size):
    spec = EncoderSpec(family="toy", arch={}, embed_dim=64, depth=8, patch_size=16, image_size=64)
    splits = {"train": Split(10 * size), "val": Split(5 * size)}
    names = tuple(str(i) for i in range(10))
    if kind == "video":
        return spec, Dataset("toy", kind, "toy", sequences=tuple(Film(8) for _ in range(size)))
    return spec, Dataset("toy", kind, "toy", names, splits)


@pytest.mark.parametrize("name", list(registry()[0]))
def test_more_data_never_cost_less(name):
    task = registry()[0][name]
    totals, memory = [], []
    for size in (10, 100, 1000, 100_000):
        work = task.work(task.config(), *made(task.data, size))
        assert all(seconds >= 0 for seconds in work.seconds.values())
        assert set(work.on_device) <= set(work.seconds)
        totals.append(sum(work.seconds.values()) + sum(work.encoded.values()))
        memory.append(work.memory)
    assert totals == sorted(totals)
    assert name == "linear" or memory == sorted(memory), "only the linear probe changes its solver"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (99, "99 s"),
        (100, "2 min"),
        (5940, "99 min"),
        (11_100, "3 h 05 min"),
    ],
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text
