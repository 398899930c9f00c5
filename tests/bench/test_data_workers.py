"""Decoding processes: what they hand over has room, and a killed one is one line."""

import gc
import os
import signal
import time
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmim_bench.bench import cores
from lmim_bench.bench.data import loading, workers
from lmim_bench.bench.data.loading import iterate_batches
from lmim_bench.bench.data.splits import ArraySplit
from lmim_bench.bench.data.workers import decoding_workers, in_order, part_that_fits, workers_that_fit
from lmim_bench.bench.errors import DataError
from lmim_bench.bench.types import View

VIEW = View("crop", 16, 18, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGE = 3 * 16**2


@pytest.fixture
def room(monkeypatch):
    """Sets the free bytes of shared memory."""

    def call(free):
        monkeypatch.setattr(workers, "shared_room", lambda: free)

    return call


def pictures(count):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 20, 24, 3), dtype=np.uint8)
    return ArraySplit(pixels, [str(i) for i in range(count)], None)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.integers(0, 10**10), st.integers(1, 300), st.integers(1, 10**7), st.integers(1, 40))
def test_what_is_under_way_takes_half_of_the_room(free, count, each, wanted):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "shared_room", lambda: free)
        part = part_that_fits(count, each, wanted)
        able = workers_that_fit(wanted, part * each)
    assert 1 <= part <= count
    assert 0 <= able <= wanted
    if able:
        # Two items of each process, and two with whoever asks.
        assert (2 * able + 2) * part * each <= free / 2
    if part > 1:
        assert able == wanted, "parts are made small before processes are given up"
    if (2 * wanted + 2) * count * each <= free / 2:
        assert part == max(1, min(count, 64, 2**25 // each)), "all processes are to end together"


def test_no_limit_known_is_no_limit(room):
    room(None)
    assert part_that_fits(256, 10**5, 16) == 64
    assert part_that_fits(256, 10**7, 16) == 3
    assert part_that_fits(256, 10**9, 16) == 1
    assert part_that_fits(256, 10**9, 0) == 256
    assert workers_that_fit(16, 10**12) == 16


@pytest.mark.parametrize("free", [None, 10**9, 6 * 2 * IMAGE * 3, 13 * IMAGE, 1])
@pytest.mark.parametrize("processes", [0, 2])
def test_batches_are_the_same_however_little_room_there_is(room, free, processes):
    split = pictures(23)
    expected = list(iterate_batches(split, VIEW, 10))
    room(free)
    found = list(iterate_batches(split, VIEW, 10, processes))
    assert [len(b.positions) for b in found] == [10, 10, 3]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.positions.tolist() == theirs.positions.tolist()
        assert torch.equal(ours.images, theirs.images)
        assert ours.images.stride() == theirs.images.stride()


@pytest.mark.parametrize("processes", [1, 2])
def test_pixels_stay_until_they_were_copied(room, monkeypatch, processes):
    """Whoever takes them is slow, and the processes have made all that they may make meanwhile."""
    split = pictures(24)
    expected = torch.cat([batch.images for batch in iterate_batches(split, VIEW, 4)])
    finish = loading._Resized.finish

    def slow(way, written, rest):
        time.sleep(0.03)
        return finish(way, written, rest)

    monkeypatch.setattr(loading._Resized, "finish", slow)
    room(2 * (2 * processes + 2) * IMAGE)  # parts of one image
    found = [batch.images for batch in iterate_batches(split, VIEW, 4, processes)]
    assert torch.equal(torch.cat(found), expected)


def test_shared_memory_is_that_of_the_images_and_is_given_back(monkeypatch):
    taken = []
    slots = loading.Slots

    class Counted(slots):
        def __init__(self, count, size, shared):
            super().__init__(count, size, shared)
            taken.append((count, size, shared, weakref.ref(self._memory.untyped_storage())))

    class Broken(ArraySplit):
        def image(self, i):
            raise DataError(f"{i} is broken")

    monkeypatch.setattr(loading, "Slots", Counted)
    assert len(list(iterate_batches(pictures(3), VIEW, 256, 8))) == 1
    split = pictures(9)
    kept = []
    for processes in (0, 2):
        with pytest.raises(DataError) as caught:
            list(iterate_batches(Broken(split.pixels, split.ids, None), VIEW, 4, processes))
        kept.append(caught.value)
    assert [each[:3] for each in taken] == [(1, 3 * IMAGE, True), (1, 4 * IMAGE, False), (3, 4 * IMAGE, True)]
    gc.collect()
    assert [memory() for *_, memory in taken] == [None] * 3, "an error that is kept keeps no memory"


def test_parts_keep_broken_images_and_what_stops(room):
    class Holed(ArraySplit):
        def image(self, i):
            if i in (3, 4, 11):
                raise DataError(f"{i} is broken")
            return super().image(i)

    split = pictures(14)
    holed = Holed(*(getattr(split, name) for name in ("pixels", "ids", "labels")))
    room(6 * 2 * IMAGE * 2)  # parts of two images
    first, second = iterate_batches(holed, VIEW, 10, 2, skip_broken=True)
    assert (first.broken, second.broken) == (["3", "4"], ["11"])
    assert first.positions.tolist() == [0, 1, 2, 5, 6, 7, 8, 9]
    assert second.positions.tolist() == [10, 12, 13]
    with pytest.raises(DataError, match="3 is broken"):
        list(iterate_batches(holed, VIEW, 10, 2))


class Deadly(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        if i == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return i


def test_a_killed_process_is_one_line():
    with pytest.raises(DataError, match="a process that decodes images was killed") as caught:
        list(in_order(Deadly(), 2, batch_size=None))
    assert "\n" not in str(caught.value)


def test_a_killed_process_is_one_line_wherever_it_is_noticed(monkeypatch):
    """Torch says it in a handler of signals, so in the midst of anything."""

    def finish(way, written, rest):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(loading._Resized, "finish", finish)
    with pytest.raises(DataError, match="a process that decodes images was killed"):
        list(iterate_batches(pictures(3), VIEW, 2, 2))


def test_shared_memory_is_shared_by_those_of_torchrun_and_of_jobs(monkeypatch):
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: type("U", (), {"free": 1200}))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(cores, "_beside", 3)
    assert workers.shared_room() in (400, None)  # None where the system has no such folder
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers.shared_room() in (100, None)


def test_processes_are_for_gpus_and_by_the_cores_that_one_has(monkeypatch):
    assert decoding_workers("cpu") == 0
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for count, expected in ((1, 1), (4, 3), (64, 16)):
        monkeypatch.setattr(cores, "usable_cores", lambda count=count: list(range(count)))
        assert decoding_workers("cuda:0") == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert decoding_workers("cuda:0") == 7
