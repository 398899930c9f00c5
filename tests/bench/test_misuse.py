"""What a task does wrong ends its own cells alone, in a line that says what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from lmim_bench.bench import plan as plan_module
from lmim_bench.bench.api import run
from lmim_bench.bench.cli import cli
from lmim_bench.bench.types import Column, FeatureRequest, Frozen, Measurement, Metric, Tap, View
from lmim_bench.tasks import get_task, task

Install = Callable[..., None]


def items(ctx: Any, *more: int) -> np.ndarray:
    return np.zeros((len(ctx.data.splits[ctx.data.test_split]), *more))


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a function, or other parts, in the place of those of k-NN."""

    def installed(function: Any = None, **parts: Any) -> None:
        changed = {"run": lambda ctx, config: function(ctx), **parts} if function else parts
        changed.setdefault("metrics", (Metric(id="top1", title="top-1"), Metric(id="file", title="file")))
        changed.setdefault("headline", lambda config: "top1")
        monkeypatch.setattr(
            plan_module,
            "get_task",
            lambda name: replace(get_task(name), **changed) if name == "knn" else get_task(name),
        )

    return installed


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda ctx: None, "the task knn returned NoneType, not a list of Measurement"),
        (lambda ctx: {"top1": items(ctx)}, "returned dict, not a list of Measurement"),
        (lambda ctx: [items(ctx)], "returned ndarray, not a list of Measurement"),
        (lambda ctx: [Measurement("top1", items(ctx))] * 2, "the metric 'top1' twice"),
        (lambda ctx: [Measurement("top7", items(ctx))], "the metric 'top7', which it does not declare"),
        (lambda ctx: [Measurement("file", items(ctx))], "did not return its headline metric 'top1'"),
        (lambda ctx: [Measurement("top1", items(ctx, 2))], r"items of shape \(24, 2\) are not \(N,\)"),
        (lambda ctx: [Measurement("top1", items(ctx)[:0])], "was measured on no items"),
        (lambda ctx: [Measurement("top1", items(ctx), clusters=np.zeros(3))], "3 clusters for 24 items"),
        (lambda ctx: [Measurement("top1", items(ctx), lambda m: m[:, 0] * np.nan)], "finite number"),
        (lambda ctx: [Measurement("top1", items(ctx), detail={"k": object()})], "object cannot be kept"),
        (
            lambda ctx: ctx.save_image("x", np.zeros((8, 8, 3), np.uint8), "X"),
            r"takes a list of \(H, W, 3\)|pictures",
        ),
    ],
)
def test_what_a_task_returns_is_looked_at(
    checkpoint: Path, options: dict[str, Any], install: Install, function: Any, words: str
) -> None:
    install(function)
    found = run(checkpoint, **{**options, "tasks": ["knn", "few_shot"]}).results
    assert [(r.task, r.status) for r in found] == [("knn", "failed"), ("few_shot", "ok")]
    (error,) = [r.error for r in found if r.error]
    assert "\n" not in error
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(error)


def test_numbers_of_numpy_and_any_metric_name_are_kept(
    checkpoint: Path, options: dict[str, Any], install: Install
) -> None:
    detail = {"k": np.int64(3), "curve": np.arange(2.0)}
    install(lambda ctx: [Measurement(name, items(ctx) + 1, detail=detail) for name in ("top1", "file")])
    (result,) = run(checkpoint, **options).results
    assert result.scores[0].detail == {"k": 3, "curve": [0.0, 1.0]}
    with np.load(options["out"] / "items" / f"{result.cell}.npz") as kept:
        assert {name: len(kept[name]) for name in kept} == {"top1": 24, "file": 24}


def two_views(config: Any, spec: Any, data: Any) -> list[FeatureRequest]:
    columns = (Column("mean", Tap()),)
    return [FeatureRequest((data.test_split,), View.squash(spec, size), columns) for size in (32, 64)]


def failing(*given: Any) -> Any:
    raise KeyError("nothing")


@pytest.mark.parametrize(
    ("features", "words"), [(two_views, "through two views"), (failing, "KeyError: 'nothing'")]
)
def test_features_that_cannot_be_asked_for_fail_their_cell_alone(
    checkpoint: Path, options: dict[str, Any], install: Install, features: Any, words: str
) -> None:
    install(features=features)
    found = {r.task: r for r in run(checkpoint, **{**options, "tasks": ["knn", "few_shot"]}).results}
    assert found["few_shot"].status == "ok"
    assert words in str(found["knn"].error)
    arguments = ["run", "--ckpt", str(checkpoint), "--tasks", "knn", "--data", *options["data"], "--dry-run"]
    done = CliRunner().invoke(cli, [*arguments, "--overwrite", "always", "--out", str(options["out"])])
    assert done.exit_code == 1, done.output
    assert words.split(":")[0] in done.output


def test_whether_it_applies_is_asked_of_a_task_before_any_work(
    checkpoint: Path, options: dict[str, Any], install: Install
) -> None:
    install(applies=failing)
    asked = ["--ckpt", str(checkpoint), "--tasks", "knn,few_shot", "--data", *options["data"]]
    words = "the task knn of lmim-bench"
    done = CliRunner().invoke(cli, ["run", *asked, "--out", str(options["out"])])
    assert done.exit_code == 2, done.output
    assert words in done.output
    assert "KeyError: 'nothing'; mend it, or name other --tasks" in done.output
    assert not options["out"].exists()
    examined = CliRunner().invoke(cli, ["doctor", *asked])
    assert examined.exit_code == 1, examined.output
    assert f"knn cannot be scored -> {words}" in examined.output
    assert "encodes the sizes of its tasks" in examined.output


class Bare(Frozen):
    size: int


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "my.task"}, "cannot be called 'my.task'"),
        ({"config": Bare}, "every field of Bare needs one"),
        ({"headline": lambda config: "top5"}, "does not declare its headline 'top5'"),
    ],
)
def test_a_declaration_is_checked_where_it_is_made(changes: dict[str, Any], words: str) -> None:
    parts: dict[str, Any] = {
        "name": "mine",
        "version": 1,
        "title": "mine",
        "data": "classification",
        "config": Frozen,
        "metrics": [Metric(id="top1", title="top-1")],
        "headline": lambda config: "top1",
        **changes,
    }
    with pytest.raises(ValueError, match=words):
        task(parts.pop("name"), **parts)
