"""Slots: arrays come back as they were put, and other processes write where this one reads."""

import multiprocessing
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lmim_bench.bench.data.slots import Slot, Slots
from lmim_bench.bench.errors import DataError

ARRAYS = arrays.arrays(
    st.sampled_from([np.uint8, np.int64, np.float32]), arrays.array_shapes(min_dims=1, max_dims=4, min_side=0)
)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.lists(ARRAYS, max_size=6), st.integers(0, 40))
def test_arrays_come_back_as_they_were_put(given_arrays, more):
    size = sum(each.nbytes + 8 for each in given_arrays) + more
    slots = Slots(2, size, shared=False)
    slot = slots.empty(5)
    places = [slot.put(each) for each in given_arrays]
    written = slots.filled(5, slot.used)
    assert len(written) == slot.used <= size
    for copy in (written, written.clone()):
        for place, array in zip(places, given_arrays, strict=True):
            found = place.of(copy)
            assert found.shape == array.shape
            assert np.array_equal(found.numpy(), array, equal_nan=array.dtype == np.float32)
            assert found.numpy().dtype == array.dtype


def test_no_array_is_written_beyond_a_slot():
    slot = Slot(np.zeros(16, np.uint8))
    slot.put(np.ones(9, np.uint8))
    with pytest.raises(ValueError, match="24 bytes in a slot of 16"):
        slot.put(np.ones(1, np.int64))
    assert slot.used == 9


def test_items_lie_in_the_slots_in_turn():
    slots = Slots(3, 64, shared=False)
    for item in range(5):
        slots.empty(item).put(np.full(8, item, np.uint8))
    assert [int(slots.filled(item, 8)[0]) for item in (3, 4, 2)] == [3, 4, 2]
    assert torch.equal(slots.filled(0, 8), slots.filled(3, 8))


def test_where_shared_memory_does_not_last_it_is_one_line():
    with pytest.raises(
        DataError, match=r"^1000000000\.00 GB of shared memory .* --shm-size=8g for Docker\)$"
    ):
        Slots(1, 10**18, shared=True)


def test_what_was_given_back_is_gone():
    slots = Slots(2, 64, shared=True)
    memory = weakref.ref(slots.filled(0, 1).untyped_storage())
    slots.close()
    assert memory() is None


def _write(slots, item):
    slots.empty(item).put(np.arange(item, item + 6, dtype=np.uint8))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_another_process_writes_where_this_one_reads(start):
    slots = Slots(2, 10**6, shared=True)
    # torch's own, which knows how to send shared memory to a process that is not forked.
    process = torch.multiprocessing.get_context(start).Process(target=_write, args=(slots, 3))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert slots.filled(3, 6).tolist() == [3, 4, 5, 6, 7, 8]
    assert multiprocessing.active_children() == []
