"""No task on global features ever holds the features of a whole train split."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from lmim_bench.tasks import _features, _probe
from lmim_bench.tasks._math import knn
from lmim_bench.tasks._math.normalise import Normaliser
from lmim_bench.tasks.few_shot import TASK as FEW_SHOT
from lmim_bench.tasks.knn import TASK as KNN
from lmim_bench.tasks.linear import TASK as LINEAR

BLOCK = 16


class Reluctant:
    """A column (N, D) that gives a block of rows, and neither more nor itself."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.shape, self.largest = rows, rows.shape, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        part = self.rows[index]
        self.largest = max(self.largest, len(part))
        return part

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the whole column was read")


@pytest.fixture
def contexts(toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Context over plain arrays, the same over a reluctant train split, and its two columns."""
    monkeypatch.setattr(knn, "_TILE_ROWS", BLOCK)
    monkeypatch.setattr(_features, "_CHECK_ROWS", BLOCK)
    monkeypatch.setattr(_probe, "_BLOCK", BLOCK)
    train, test = toy.blobs(30, 4, spread=4), toy.blobs(5, 4, spread=4, seed=1)
    train = (train[0] + 3, train[1])
    plain, shy = toy.toy_context(train, test), toy.toy_context(train, test)
    column = Reluctant(train[0])
    for key in shy.banks["train"].columns:
        shy.banks["train"].columns[key] = column
    return plain, shy, column


@pytest.mark.parametrize(
    ("task", "options"),
    [
        (KNN, {"k": (1, 5), "pooling": "cls"}),
        (KNN, {"k": (1, 5), "pooling": "cls+mean"}),
        (LINEAR, {"solver": "sgd", "features": ("cls", "4xcls"), "steps": 20, "batch": 8}),
        (FEW_SHOT, {"shots": (1, 3), "episodes": 0, "pooling": "cls+mean", "center": True}),
    ],
)
def test_a_block_of_train_at_a_time_is_enough(contexts: Any, task: Any, options: dict[str, Any]) -> None:
    plain, shy, column = contexts
    expected, found = plain.run(task, **options), shy.run(task, **options)
    assert column.largest == BLOCK
    for metric, measurement in expected.items():
        np.testing.assert_array_equal(found[metric].items, measurement.items)


def test_statistics_of_blocks_are_those_of_all_rows() -> None:
    rows = (np.random.default_rng(0).normal(size=(100, 6)) * [1, 1e-2, 10, 1, 1, 1] + 1000).astype(np.float32)
    rows[:, 4] = 7
    streamed = Normaliser.stream("batchnorm", np.array_split(rows, 7))
    wide = rows.astype(np.float64)
    expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-6)
    np.testing.assert_allclose(streamed(rows), expected, atol=2e-2)
    np.testing.assert_allclose(streamed.shift, wide.mean(0), rtol=1e-7)
    np.testing.assert_allclose(streamed.scale, 1 / np.sqrt(wide.var(0) + 1e-6), rtol=1e-4)
    np.testing.assert_array_equal(Normaliser.stream("none", iter(()))(rows), rows)
