"""Published numbers: sources, settings, and the footnote that belongs to Latent MIM's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmim_bench.reports.model import read_report
from lmim_bench.reports.published import published, published_for


def test_every_number_has_a_source_at_a_commit_and_a_setting() -> None:
    rows = published()
    assert len(rows) > 20
    assert all(row.setting for row in rows)
    keys = [(r.method, r.arch, r.task, r.source, r.setting) for r in rows]
    assert len(set(keys)) == len(keys)


def test_latent_mims_nearest_neighbour_stands_with_its_footnote() -> None:
    (row,) = [r for r in published() if r.method == "Latent MIM" and r.task == "knn"]
    assert row.value == 0.501
    assert "leave-one-out" in row.note


def test_only_the_tasks_of_the_report(
    tmp_path: Path, result: Callable[..., Any], write_run: Callable[..., Path]
) -> None:
    folder = write_run(tmp_path / "r", [result("a", "linear"), result("a", "vos")])
    rows = published_for(read_report([folder]))
    assert {row.task for row in rows} == {"linear"}
    assert [row.value for row in rows] == sorted((row.value for row in rows), reverse=True)
