"""What a table says besides its numbers: the protocol behind each, the seeds, what was not scored."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lmim_bench.bench.report_commands import compare
from lmim_bench.bench.results import DataRecord, Result, RunFile
from lmim_bench.reports.html import build_report
from lmim_bench.reports.model import Report, make_report, read_report
from lmim_bench.reports.tables import write_table
from lmim_bench.reports.text import summary_table

Make = Callable[..., Result]
USUAL = {"k": [1, 20], "temperature": 0.07}
WARM: dict[str, Any] = {
    "protocol": USUAL | {"temperature": 0.2},
    "overrides": ("temperature",),
    "defaults": {"temperature": 0.07},
}


def run_of(results: Sequence[Result]) -> RunFile:
    return RunFile(command="run", limited=any(r.limit for r in results), results=tuple(results))


def report_of(*results: Result) -> Report:
    return make_report([(run_of(results), None)])


def note_of(form: str, *results: Result) -> str:
    return write_table(report_of(*results), form).splitlines()[-1]


def rows_of(*results: Result) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(write_table(report_of(*results), "csv"))))


def test_a_line_of_csv_says_under_which_protocol_it_was_scored(result: Make) -> None:
    rows = rows_of(result("a"), result("b"), result("a", **WARM), result("a", limit=50))
    key = ("checkpoint", "task", "task_version", "protocol", "data", "limit", "seed", "metric")
    assert len({tuple(row[name] for name in key) for row in rows}) == len(rows) == 8
    told = {row["protocol"]: row["changed"] for row in rows}
    assert sorted(told.values()) == ["", "temperature=0.2"]
    assert {row["changed"] for row in rows if row["limit"]} == {""}


def test_changed_lists_stay_one_field_of_csv(result: Make) -> None:
    both = result(protocol={"k": [5, 10], "temperature": 0.2}, overrides=("k", "temperature"))
    assert {row["changed"] for row in rows_of(both)} == {"k=5, 10; temperature=0.2"}


def test_latex_takes_any_label(result: Make) -> None:
    """pdflatex makes of this table what it says; a bracket at the start of a row it took for a length."""
    table = write_table(report_of(result('[x] <a> | "q"'), result("b")), "latex")
    assert table.startswith("% needs \\usepackage{booktabs}\n")
    assert r"{[}x] \textless{}a\textgreater{} \textbar{} ''q'' & " in table
    beyond = write_table(report_of(result("日本語"), result("b")), "latex")
    assert beyond.startswith(r"% needs \usepackage{booktabs}; lualatex or xelatex")
    assert "lualatex" not in write_table(report_of(result("ünïcødé"), result("b")), "latex")


@pytest.mark.parametrize("form", ["md", "latex"])
def test_the_note_says_bold_only_where_something_is(result: Make, form: str) -> None:
    assert "bold" in note_of(form, result("a"), result("b"))
    assert "bold" not in note_of(form, result("a"))


@pytest.mark.parametrize("form", ["md", "latex"])
def test_a_head_says_where_lower_is_better(result: Make, form: str) -> None:
    table = write_table(report_of(result("a", headline="nll"), result("a", "linear")), form)
    assert "nll, lower is better" in table
    assert table.count("lower is better") == 1


def test_labels_of_the_same_weights_are_told(
    result: Make, tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    first, second, third = (result(label) for label in "abc")
    twin = second.checkpoint.model_copy(update={"fingerprint": first.checkpoint.fingerprint})
    results = [first, second.model_copy(update={"checkpoint": twin}), third]
    page = build_report(write_run(tmp_path / "run", results)).read_text(encoding="utf-8")
    assert "a and b hold the same weights" in page


@pytest.mark.parametrize("form", ["md", "latex", "terminal", "compare", "page"])
def test_several_precisions_are_told(
    result: Make, form: str, tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    half = result("b").environment.model_copy(update={"precision": "bf16", "device": "cuda:0, H100"})
    results = [result("a"), result("b", environment=half), result("c", "linear", error="x", environment=half)]
    folder = write_run(tmp_path / "run", results)

    def shown(results: Sequence[Result]) -> str:
        folder = write_run(tmp_path / "run", results)
        if form == "terminal":
            return str(summary_table(run_of(results), folder))
        if form == "compare":
            out = str(tmp_path / "c.html")
            return CliRunner().invoke(compare, [str(folder), "--out", out], catch_exceptions=False).output
        return (
            build_report(folder).read_text() if form == "page" else write_table(read_report([folder]), form)
        )

    said = "Computed in fp32 and bf16: small differences between checkpoints may be those of arithmetic"
    assert said in shown(results)
    if form == "page":
        assert "cpu and cuda:0, H100, fp32 and bf16" in (folder / "report.html").read_text()
    assert "Computed in" not in shown([result("a"), result("b"), results[2]])


def test_of_a_cell_that_was_scored_twice_it_is_said_which_is_shown(
    result: Make, tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    half = result("a").environment.model_copy(update={"precision": "bf16"})
    first = write_run(tmp_path / "first", [result("a"), result("b")])
    later = result("a", environment=half).model_copy(update={"finished": "2099-01-01T00:00:00+00:00"})
    second = write_run(tmp_path / "second", [later])
    said = write_table(read_report([first, second]), "md")
    assert f"{later.cell} was scored in fp32 and in bf16, and the later is shown" in said
    again = later.model_copy(update={"environment": result("a").environment})
    second = write_run(tmp_path / "second", [again])
    assert "was scored in" not in write_table(read_report([first, second]), "md")


def test_features_of_two_versions_share_no_column(result: Make) -> None:
    now, before = result("a"), result("b").model_copy(update={"features_version": -1})
    columns = make_report([(run_of([now, before]), None)]).columns
    assert len(columns) == 2
    assert "features version = -1" in {column.variant for column in columns}


def test_a_line_of_csv_says_where_it_was_computed(result: Make) -> None:
    half = result("b").environment.model_copy(update={"precision": "bf16", "device": "cuda:0, H100"})
    rows = rows_of(result("a"), result("b", environment=half), result("c", error="x", environment=half))
    told = {row["checkpoint"]: (row["precision"], row["device"], row["status"]) for row in rows}
    assert told == {
        "a": ("fp32", "cpu", "ok"),
        "b": ("bf16", "cuda:0, H100", "ok"),
        "c": ("bf16", "cuda:0, H100", "failed"),
    }


@pytest.mark.parametrize("form", ["md", "latex"])
def test_the_note_names_fields_that_are_not_at_their_defaults(result: Make, form: str) -> None:
    assert "Changed" not in note_of(form, result("a"))
    warm = note_of(form, result("a", **WARM), result("a", data="other", **WARM))
    assert "Changed from the defaults: knn: temperature = 0.2 (default 0.07). " in warm


def test_the_note_names_the_columns_where_a_task_has_two_protocols(result: Make) -> None:
    note = note_of("latex", result("a"), result("a", **WARM), result("a", data="other"))
    assert "defaults: knn on toy [temperature = 0.2]: temperature = 0.2 (default 0.07). " in note


def test_results_that_did_not_keep_the_defaults_are_told_as_changed(result: Make) -> None:
    old = result(**WARM | {"defaults": {}})
    assert "knn: temperature = 0.2 (not the default)" in note_of("md", old)


def test_the_terminal_says_what_was_changed(result: Make, tmp_path: Any) -> None:
    lines = str(summary_table(run_of([result(**WARM)]), tmp_path)).splitlines()
    assert lines[-1] == "CHANGED knn: temperature = 0.2 (default 0.07)"


@pytest.mark.parametrize("form", ["md", "latex"])
def test_cells_of_different_numbers_of_seeds_say_so(result: Make, form: str) -> None:
    table = write_table(report_of(result("a"), result("a", seed=1), result("b")), form)
    assert table.count("(2 seeds)") == 1
    assert "(2 seeds)" in next(line for line in table.splitlines() if "a " in line and "50.0" in line)
    assert "Means of" not in table


@pytest.mark.parametrize("form", ["md", "latex"])
def test_the_note_tells_a_number_of_seeds_that_all_cells_have(result: Make, form: str) -> None:
    table = write_table(report_of(*(result(label, seed=s) for label in "ab" for s in range(3))), form)
    assert "seeds)" not in table
    assert "Means of 3 seeds. " in table
    assert "seed" not in write_table(report_of(result("a"), result("b")), form)


@pytest.mark.parametrize("form", ["md", "latex", "terminal"])
def test_broken_images_that_were_left_out_are_told(result: Make, form: str, tmp_path: Any) -> None:
    def on(*skipped: str) -> DataRecord:
        return DataRecord(
            name="toy", kind="classification", fingerprint="f", counts={"val": 9}, skipped=skipped
        )

    results = [result("a", record=on("train/a.png")), result("a", "linear", record=on("val/b.png"))]
    said = "2 broken images left out of toy, first train/a.png"
    if form == "terminal":
        limited = [one.model_copy(update={"limit": 4}) for one in results]
        assert str(summary_table(run_of(limited), tmp_path)).splitlines()[:2] == [
            "LIMITED RUN: at most 4 images a split (or frames a sequence)",
            said,
        ]
    else:
        assert f"{said}. " in note_of(form, *results)
    assert [row["broken_left_out"] for row in rows_of(*results)] == ["1"] * 4
