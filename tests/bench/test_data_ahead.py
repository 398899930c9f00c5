"""Calls that a thread makes ahead: in order, one at a time, no more than asked for, with their errors."""

import threading
from contextlib import closing
from functools import partial

import pytest

from lmim_bench.bench.data.ahead import ahead


@pytest.mark.parametrize("most", [1, 3, 9])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_results_come_in_order_from_one_other_thread(most, count):
    made_by = set()

    def call(i):
        made_by.add(threading.get_ident())
        return i

    assert list(ahead((partial(call, i) for i in range(count)), most)) == list(range(count))
    assert threading.get_ident() not in made_by
    assert len(made_by) == min(count, 1)


def test_calls_are_drawn_by_who_asks_and_no_further_than_most():
    drawn = []

    def calls():
        for i in range(9):
            drawn.append((i, threading.get_ident()))
            yield partial(int, i)

    with closing(ahead(calls(), 2)) as results:
        assert next(results) == 0
        assert [i for i, _ in drawn] == [0, 1, 2]
        assert next(results) == 1
        assert [i for i, _ in drawn] == [0, 1, 2, 3]
    assert {thread for _, thread in drawn} == {threading.get_ident()}


def test_a_call_is_made_while_the_result_before_is_used():
    begun = threading.Event()
    with closing(ahead(iter([lambda: 0, begun.set, lambda: 2]), 1)) as results:
        assert next(results) == 0
        assert begun.wait(20)


def test_errors_come_in_their_turn():
    def fail():
        raise KeyError("third")

    results = ahead(iter([lambda: 1, lambda: 2, fail, lambda: 4]), 4)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(KeyError, match="third"):
        next(results)


def test_who_leaves_early_waits_for_no_call_that_was_not_begun():
    made, holding = [], threading.Event()

    def slow():
        holding.wait(20)
        made.append("slow")

    calls = iter([lambda: 0, slow, *[partial(made.append, i) for i in range(5)]])
    results = ahead(calls, 4)
    assert next(results) == 0
    threading.Timer(1, holding.set).start()  # by then nobody is still on the way to closing
    results.close()
    assert made == ["slow"]
    assert threading.active_count() <= 2
