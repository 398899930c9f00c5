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


def sized_result(result, label, parameters, flops, speed, task="knn", **kwargs):
    made = result(label, task, info={"parameters": parameters}, images_per_second=speed, **kwargs)
    record = made.checkpoint.model_copy(update={"flops": flops})
    return made.model_copy(update={"checkpoint": record})


def test_scores_stand_against_each_cost_that_is_known(tmp_path, result, write_run):
    def sized(*arguments):
        return sized_result(result, *arguments)

    results = [sized("small", 5_000_000, 2e9, 400.0), sized("large", 80_000_000, 3e10, 40.0)]
    page = build_report(write_run(tmp_path / "run", results)).read_text()
    assert re.search("small 50.0 .*at 5\N{NO-BREAK SPACE}M, large 50.0 .*at 80\N{NO-BREAK SPACE}M", page)
    assert re.search("small 50.0 .*at 2\N{NO-BREAK SPACE}G, large 50.0 .*at 30\N{NO-BREAK SPACE}G", page)
    assert re.search("small 50.0 .*at 400, large 50.0 .*at 40", page)
    results = [sized("a", 5_000_000, None, None), sized("b", 80_000_000, None, None)]
    page = build_report(write_run(tmp_path / "other", results)).read_text()
    assert "parameters of the encoder" in page
    assert "FLOPs for an image" not in page
    alike = [sized("a", 5_000_000, 2e9, 400.0), sized("b", 5_000_000, 2e9, 300.0)]
    page = build_report(write_run(tmp_path / "alike", alike)).read_text()
    assert "Score and cost" not in page


def figures_of(folder):
    from lmim_bench.reports.style import PAGE, style
    from lmim_bench.reports.tradeoffs import tradeoffs

    with style(PAGE):
        return {name: dict(figures) for name, _, figures in tradeoffs(read_report([folder]))}


def test_a_cost_that_all_of_a_column_share_is_left_out(tmp_path, result, write_run):
    results = [
        sized_result(result, label, 5_000_000, flops, 100.0) for label, flops in (("a", 2e9), ("b", 3e9))
    ]
    results += [result("c", "linear", info={"parameters": 7})]
    folder = write_run(tmp_path / "run", results)
    assert {name: list(figures) for name, figures in figures_of(folder).items()} == {"flops": ["column-1"]}
    section = build_report(folder).read_text().partition("Score and cost")[2].partition("</section>")[0]
    assert section.count("The line joins") == 1
    legend = section.partition('class="legend"')[2].partition("</ul>")[0]
    assert re.findall(r'<li data-c="(\d)"', legend) == ["0", "1"]


def test_speeds_of_several_machines_do_not_share_a_figure(tmp_path, result, write_run):
    half = result("b").environment.model_copy(update={"precision": "bf16"})
    small = sized_result(result, "a", 5_000_000, 2e9, 100.0)
    for environment, costs in (
        (small.environment, {"parameters", "flops", "speed"}),
        (half, {"parameters", "flops"}),
    ):
        large = sized_result(result, "b", 9_000_000, 4e9, 50.0, environment=environment)
        assert set(figures_of(write_run(tmp_path / environment.precision, [small, large]))) == costs


def test_axes_of_scores_say_unit_parameters_and_direction(tmp_path, result, score, write_run):
    results = [
        sized_result(result, label, size, None, None, task, headline=headline, protocol={"k": task})
        for label, size in (("a", 5_000_000), ("b", 9_000_000))
        for task, headline in (("knn", "top1@k=20"), ("linear", "nll"))
    ]
    results += [sized_result(result, "b", 9, None, None, "knn", protocol={"k": 7})]
    folder = write_run(
        tmp_path / "run", [r.model_copy(update={"cell": str(i)}) for i, r in enumerate(results)]
    )
    drawn = list(figures_of(folder)["parameters"].values())
    assert [drawing.figure.axes[0].get_ylabel() for drawing in drawn] == [
        "Top-1 accuracy (%), k=20",
        "Negative log-likelihood ↓ lower\nis better",
    ]
    assert [drawing.heading for drawing in drawn] == ["knn on toy [k = knn]", "linear on toy"]
    trained = a_run(tmp_path / "trained", result, score, write_run)
    assert progression(read_report([trained]))[0].y_label == "Top-1 accuracy (%), k=20"
