"""Curves over the epochs of a training, and scores against what the encoder costs."""

from __future__ import annotations

import re

from lmim_bench.reports.figures import _front
from lmim_bench.reports.html import build_report
from lmim_bench.reports.model import read_report
from lmim_bench.reports.progression import progression, trainings


def point(run, epoch):
    return {"training": {"run": run, "epoch": epoch}}


def a_run(tmp_path, result, score, write_run):
    rows = [
        ("mae-20", "m", 20, 0.5),
        ("mae-10", "m", 10, 0.4),
        ("lmim-10", "l", 10, 0.3),
        ("lmim-20", "l", 20, 0.7),
    ]
    results = [
        result(label, info=point(run, epoch), scores=(score("top1@k=20", value),))
        for label, run, epoch, value in rows
    ]
    results += [result("alone", info=point("x", 5)), result("unknown")]
    return write_run(tmp_path / "run", results)


def test_checkpoints_of_a_training_are_joined_by_epoch(tmp_path, result, score, write_run):
    report = read_report([a_run(tmp_path, result, score, write_run)])
    assert [[c.label for c in run] for run in trainings(report)] == [
        ["mae-10", "mae-20"],
        ["lmim-10", "lmim-20"],
    ]
    (curve,) = progression(report)
    lines = {report.checkpoints[line.checkpoint].label: line for line in curve.lines}
    assert set(lines) == {"mae-20", "lmim-20"}
    assert (lines["lmim-20"].x, lines["lmim-20"].y) == ((10, 20), (0.3, 0.7))
    assert lines["mae-20"].low == (0.39, 0.49)


def test_a_gap_is_no_point_of_the_curve(tmp_path, result, score, write_run):
    results = [
        result("a", info=point("m", 1), scores=(score("top1@k=20", 0.4),)),
        result("b", info=point("m", 2), error="out of memory"),
        result("c", info=point("m", 3), scores=(score("top1@k=20", 0.6, half=None),)),
    ]
    (curve,) = progression(read_report([write_run(tmp_path / "run", results)]))
    assert curve.lines[0].x == (1, 3)
    assert curve.lines[0].low == ()


def test_the_page_has_the_section_only_where_there_is_a_training(tmp_path, result, score, write_run):
    page = build_report(a_run(tmp_path, result, score, write_run)).read_text()
    assert 'id="training"' in page
    assert 'href="#training"' in page
    page = build_report(write_run(tmp_path / "other", [result("a"), result("b")])).read_text()
    assert "training" not in re.sub(r"pretraining|<style>.*?</style>", "", page, flags=re.S)


def test_the_front_keeps_what_nothing_cheaper_reaches():
    points = [(10.0, 0.5, 0), (20.0, 0.4, 1), (30.0, 0.8, 2), (30.0, 0.7, 3), (40.0, 0.8, 4)]
    assert _front(points, True, False) == [(10.0, 0.5), (30.0, 0.8)]
    assert _front(points, False, False) == [(10.0, 0.5), (20.0, 0.4)]
    assert _front(points, True, True) == [(40.0, 0.8)]
    assert _front(points, False, True) == [(40.0, 0.8), (30.0, 0.7), (20.0, 0.4)]


def test_scores_stand_against_each_cost_that_is_known(tmp_path, result, write_run):
    def sized(label, parameters, flops, speed):
        made = result(label, info={"parameters": parameters}, images_per_second=speed)
        record = made.checkpoint.model_copy(update={"flops": flops})
        return made.model_copy(update={"checkpoint": record})

    results = [sized("small", 5_000_000, 2e9, 400.0), sized("large", 80_000_000, 3e10, 40.0)]
    page = build_report(write_run(tmp_path / "run", results)).read_text()
    assert "small 50.0 at 5\N{NO-BREAK SPACE}M, large 50.0 at 80\N{NO-BREAK SPACE}M" in page
    assert "small 50.0 at 2\N{NO-BREAK SPACE}G, large 50.0 at 30\N{NO-BREAK SPACE}G" in page
    assert "small 50.0 at 400, large 50.0 at 40" in page
    results = [sized("a", 5_000_000, None, None), sized("b", 80_000_000, None, None)]
    page = build_report(write_run(tmp_path / "other", results)).read_text()
    assert "parameters of the encoder" in page
    assert "FLOPs for an image" not in page
    alike = [sized("a", 5_000_000, 2e9, 400.0), sized("b", 5_000_000, 2e9, 300.0)]
    page = build_report(write_run(tmp_path / "alike", alike)).read_text()
    assert "Score and cost" not in page
