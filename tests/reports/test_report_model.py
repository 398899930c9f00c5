from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmim_bench.bench.errors import ConfigError
from lmim_bench.bench.results import DataRecord, RunFile
from lmim_bench.bench.stats import over_seeds
from lmim_bench.bench.types import Metric, Score
from lmim_bench.reports.model import make_report, read_report
from lmim_bench.reports.readings import Reading, _leads, clean, format_value, show


def report_of(*results, limited=False):
    return make_report([(RunFile(command="run", limited=limited, results=results), None)])


def reading_of(value, low, high, higher=True):
    metric = Metric(id="m", title="m", higher_is_better=higher)
    found = Score(metric="m", value=value, low=low, high=high, n=1)
    return Reading(value, low, high, ((0, found),), metric)


def leads_of(*values, higher=True):
    readings = [None if value is None else reading_of(value, 0, 1, higher) for value in values]
    return _leads(readings, Metric(id="m", title="m", higher_is_better=higher))


# ------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.7449, "%", "74.5"),
        (1.0, "%", "100.0"),
        (-0.0001, "%", "0.0"),
        (-0.012, "%", "-1.2"),
        (0.12345, "", "0.123"),
        (-0.0, "", "0.000"),
        (12345.6, "", "12,346"),
    ],
)
def test_numbers_are_shown_by_their_unit(value, unit, text):
    assert format_value(value, unit) == text


def test_settings_are_shown_without_python_syntax():
    assert show([1, 20]) == "1, 20"
    assert show({"a": None, "b": True}) == "a: none, b: yes"
    assert show(1e-06) == "1e-06"
    assert show([]) == "(empty)"


def test_control_characters_are_replaced():
    assert clean("a\x1b[31mb\x00\ud800\nc") == "a\ufffd[31mb\ufffd\ufffd\nc"


# ------------------------------------------------------------------------------------------- the best


def test_the_best_is_the_highest_or_the_lowest():
    assert leads_of(0.7, 0.69, 0.5) == (True, False, False)
    assert leads_of(0.7, 0.2, 0.35, higher=False) == (False, True, False)


def test_the_same_shown_number_is_a_tie():
    assert leads_of(0.70001, 0.7, 0.1) == (True, True, False)


def test_nothing_is_best_alone():
    assert leads_of(0.7, None) == (False, False)
    assert leads_of(None, None) == (False, False)


intervals = st.tuples(st.floats(0, 1), st.floats(0, 0.2), st.floats(0, 0.2)).map(
    lambda t: (t[0], t[0] - t[1], t[0] + t[2])
)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(intervals, intervals)
def test_intervals_overlap_where_a_point_is_in_both(one, two):
    assert reading_of(*one).overlaps(reading_of(*two)) == (max(one[1], two[1]) <= min(one[2], two[2]))


def test_an_interval_that_is_not_known_overlaps_all():
    assert reading_of(0.7, None, None).overlaps(reading_of(0.1, 0.05, 0.2))


# ------------------------------------------------------------------------------------------- columns


def test_columns_are_tasks_on_data_sets_grouped_by_task(result):
    report = report_of(
        result(task="knn", data="x"), result(task="linear", data="x"), result(task="knn", data="y")
    )
    assert [(c.task, c.data.name) for c in report.columns] == [("knn", "x"), ("knn", "y"), ("linear", "x")]
    assert [len(columns) for columns in report.tasks.values()] == [2, 1]


def test_seeds_are_averaged_and_their_interval_is_of_items_and_seeds(result, score):
    scores = {0: score("top1@k=20", 0.50, 0.02), 1: score("top1@k=20", 0.56, 0.01)}
    report = report_of(*(result(seed=s, scores=(scores[s],)) for s in (1, 0)))
    row = report.columns[0].headline
    assert row is not None
    reading = row.readings[0]
    assert reading is not None
    assert reading.value == pytest.approx(0.53)
    expected = over_seeds([(0.50, 0.48, 0.52), (0.56, 0.55, 0.57)])
    assert (reading.low, reading.high) == pytest.approx(tuple(np.clip(expected, 0, 1)))
    assert [seed for seed, _ in reading.scores] == [0, 1]
    assert reading.text == "53.0"


def test_cells_that_left_out_different_images_never_share_a_column(result):
    def record(*skipped):
        return DataRecord(
            name="toy", kind="classification", fingerprint="same", counts={"val": 9}, skipped=skipped
        )

    assert len(report_of(result("a", record=record("x")), result("b", record=record("x"))).columns) == 1
    apart = report_of(result("a", record=record("x")), result("b", record=record("y")))
    assert [c.variant for c in apart.columns] == [
        "broken images left out = x",
        "broken images left out = y",
    ]


def test_different_protocols_never_share_a_column(result):
    report = report_of(result("a"), result("b", protocol={"k": [1, 5], "temperature": 0.07}))
    assert [c.variant for c in report.columns] == ["k = 1, 20", "k = 1, 5"]
    assert [cell.state for cell in report.columns[0].summary()] == ["ok", "missing"]


def test_another_task_version_data_or_limit_is_another_column(result):
    other = DataRecord(name="toy", kind="classification", fingerprint="other", counts={})
    for change in ({"task_version": 2}, {"record": other}, {"limit": 10}):
        assert len(report_of(result("a"), result("b", **change)).columns) == 2


def test_seeds_of_a_limited_run_share_a_column(result):
    data = [
        DataRecord(name="toy", kind="classification", fingerprint=f"h:limit=9:seed={s}", counts={})
        for s in (0, 1)
    ]
    report = report_of(*(result(seed=s, record=data[s], limit=9) for s in (0, 1)))
    assert len(report.columns) == 1
    assert report.limited
    assert report.limits == (9,)


def test_a_cell_that_failed_before_its_data_was_read_stays_in_the_column(result):
    unknown = DataRecord(name="toy", kind="classification", fingerprint="", counts={})
    report = report_of(result("b", error="no such file", record=unknown), result("a"))
    (column,) = report.columns
    assert [cell.state for cell in column.summary()] == ["failed", "ok"]
    assert column.first.status == "ok"
    assert [(c.label, r.error) for c, _, r in report.failures] == [("b", "no such file")]


def test_a_failed_seed_makes_the_cell_partial(result):
    report = report_of(result(seed=0), result(seed=1, error="out of memory"))
    (cell,) = report.columns[0].summary()
    assert (cell.state, cell.errors) == ("partial", ("out of memory",))


def test_one_label_with_other_weights_is_another_checkpoint(result):
    report = report_of(result("a"), result("a", weights="2"), result("b"))
    assert [c.label for c in report.checkpoints] == ["a (a-finger)", "a (a2-finge)", "b"]


def test_of_several_runs_a_scored_cell_beats_a_failed_one_and_the_later_counts(result, score):
    def run(*results):
        return RunFile(command="run", limited=False, results=results), None

    old = result(scores=(score("top1@k=20", 0.3),), finished="2026-01-01T00:00:00Z")
    new = result(scores=(score("top1@k=20", 0.4),), finished="2026-01-02T00:00:00Z")
    failed = result(error="interrupted", finished="2026-01-03T00:00:00Z")
    for order in ([old, new, failed], [failed, new, old]):
        report = make_report([run(r) for r in order])
        (cell,) = report.columns[0].summary()
        assert cell.reading is not None
        assert cell.reading.value == 0.4
        assert not report.failures


def test_a_headline_that_is_not_there_is_named(result, score):
    report = report_of(result(scores=(score("nll", 1.0),)))
    assert report.columns[0].summary()[0].state == "missing"
    assert "top1@k=20" in report.problems[0]


def test_chance_heat_and_span(result, score):
    values = {"a": 0.5, "b": 0.3, "c": 0.1}
    report = report_of(
        *(result(k, scores=(score("top1@k=20", v, 0.05, chance=0.1),)) for k, v in values.items())
    )
    a, b, c = report.columns[0].summary()
    assert (a.heat, c.heat) == (1, 0)
    assert b.heat == pytest.approx(0.5)
    assert a.span == pytest.approx((80, 90, 100))
    assert c.span == pytest.approx((0, 10, 20))
    assert [x.reading.at_chance for x in (a, b, c) if x.reading] == [False, False, True]
    assert not any(x.reading.below_chance for x in (a, b, c) if x.reading)
    assert report.columns[0].headline.chance == "10.0"


@pytest.mark.parametrize(
    ("metric", "value", "at", "below"),
    [("top1@k=20", 0.02, False, True), ("top1@k=20", 0.1, True, False), ("nll", 9.0, False, True)],
)
def test_worse_than_chance_is_not_at_chance(result, score, metric, value, at, below):
    found = score(metric, value, 0.01, chance=0.1 if metric != "nll" else 2.3)
    (cell,) = report_of(result(scores=(found,), headline=metric)).columns[0].summary()
    assert (cell.reading.at_chance, cell.reading.below_chance) == (at, below)


def test_an_undeclared_metric_is_shown_under_its_id(result, score):
    report = report_of(result(scores=(score("odd@x=1", 0.5),), headline="odd@x=1"))
    row = report.columns[0].headline
    assert (row.metric.title, row.parameters) == ("odd", "x=1")


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"no results\.json"):
        read_report([tmp_path])


def test_an_empty_run_has_an_empty_report():
    report = report_of()
    assert (report.checkpoints, report.columns, report.finished) == ((), (), "")


def test_nothing_is_shaded_where_the_best_is_below_chance(result, score):
    report = report_of(
        *(result(k, scores=(score("top1@k=20", v, chance=0.3),)) for k, v in (("a", 0.2), ("b", 0.1)))
    )
    assert [cell.heat for cell in report.columns[0].summary()] == [0, 0]


def test_where_lower_is_better_the_shade_goes_from_the_worst_to_the_best(result, score):
    values = {"a": 3.0, "b": 2.0, "c": 1.0}
    report = report_of(*(result(k, headline="nll", scores=(score("nll", v),)) for k, v in values.items()))
    assert [cell.heat for cell in report.columns[0].summary()] == [0, 0.5, 1]


def test_equal_notes_and_equal_protocols_are_joined(result):
    report = report_of(
        result("a", notes=("both", "one")),
        result("b", notes=("both",)),
        result("a", data="y"),
        result("a", "vos"),
    )
    assert report.columns[0].notes == {"both": (0, 1), "one": (0,)}
    assert [[c.data.name for c in group] for group in report.protocols] == [["toy", "y"], ["toy"]]


@pytest.mark.parametrize(
    ("finished", "text"),
    [
        ("2026-01-02T03:04:05+00:00", "2026-01-02 03:04 UTC"),
        ("2026-01-02T03:04:05Z", "2026-01-02 03:04 UTC"),
        ("yesterday", "yesterday"),
    ],
)
def test_the_end_is_told_to_the_minute(result, finished, text):
    assert report_of(result(finished=finished)).finished == text


# ------------------------------------------------------------------------------------------- diagnoses


def test_a_diagnosis_is_counted_nowhere_but_shown_where_it_is_alone(result):
    def diagnosis(label, note):
        return result(label, task="diagnose", scored=False, notes=(note,))

    scores = [result("a"), result("b")]
    diagnoses = [diagnosis("a", "WARNING: it has collapsed"), diagnosis("b", "it has not collapsed")]
    report = report_of(*scores, *diagnoses)
    assert [c.task for c in report.columns] == ["knn", "diagnose"]
    assert [c.task for c in report.scored] == [c.task for c in report.summarised] == ["knn"]
    assert report.warnings == (("a", ("it has collapsed",)),)
    same = [diagnosis(label, "WARNING: few images") for label in "abc"]
    assert report_of(*same).warnings == (("all 3 checkpoints", ("few images",)),)
    assert report_of(*same[:2], diagnosis("c", "none")).warnings == (("a and b", ("few images",)),)
    for row in report.columns[1].rows:
        assert not any(row.leads)
    (alone,) = report_of(*diagnoses).summarised
    assert {cell.heat for cell in alone.summary()} == {0.0}
    assert not report_of(*diagnoses).scored
