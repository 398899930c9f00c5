"""``docs/results.md`` names all that a program may read."""

from pathlib import Path

import pytest

from lmim_bench.bench.results import SCHEMA, CheckpointRecord, DataRecord, Result, RunFile
from lmim_bench.bench.types import Score
from lmim_bench.reports.tables import _COLUMNS

DOCUMENT = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("model", [RunFile, Result, Score, CheckpointRecord, DataRecord])
def test_every_field_of_the_unified_file_is_named(model):
    assert [name for name in model.model_fields if f"`{name}`" not in DOCUMENT] == []
    assert f"`{SCHEMA}`" in DOCUMENT


def test_every_column_of_the_table_is_named():
    section = DOCUMENT.partition("## `results.csv`")[2].partition("## ")[0]
    assert [name for name in _COLUMNS.split() if f"`{name}`" not in section] == []
