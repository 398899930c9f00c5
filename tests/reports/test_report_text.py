from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from lmim_bench.bench.results import RunFile
from lmim_bench.reports.text import print_summary, summary_table


@pytest.fixture
def run(result, score):
    """Cells without per-item numbers: nothing can be paired, and intervals decide."""
    results = (
        result("mae", scores=(score("top1@k=20", 0.745, 0.006, chance=0.1),)),
        result("[red]lmim\x1b[0m", scores=(score("top1@k=20", 0.75, 0.006, chance=0.1),)),
        result("random", scores=(score("top1@k=20", 0.1, None),)),
        result("mae", "vos", headline="jf", error="there are no frames\nin this folder " + "x" * 100),
        result("random", "vos", headline="jf", scores=(score("jf", 0.2, 0.1),)),
    )
    return RunFile(command="run", limited=True, results=results)


def printed(run, folder=Path("nowhere"), **console):
    stream = io.StringIO()
    print_summary(run, folder, Console(file=stream, **console))
    return stream.getvalue()


def test_a_pipe_gets_plain_whole_lines(run):
    lines = printed(run, width=40).splitlines()
    assert lines[0] == "LIMITED RUN"
    assert lines[1].split() == ["task", "mae", "[red]lmim\ufffd[0m", "random"]
    assert lines[2] == ("knn/toy top1@k=20 chance 10.0  74.5 [73.9, 75.1] ?  75.0 [74.4, 75.6] *  10.0 ?")
    assert lines[3].split() == ["vos/toy", "jf", "FAILED", "not", "run", "20.0", "[10.0,", "30.0]"]
    assert lines[4] == "FAILED mae on vos/toy: there are no frames in this folder " + "x" * 100
    assert lines[5] == "* best; ? not tested against the best; their intervals overlap"
    assert "\x1b" not in "".join(lines)


def test_the_plain_form_is_its_text(run):
    assert str(summary_table(run, Path("nowhere"))) == printed(run, width=40).rstrip("\n")


def test_a_terminal_gets_a_row_a_checkpoint(run):
    text = printed(run, width=160, force_terminal=True, color_system=None)
    assert "75.0 [74.4, 75.6] *" in text
    rows = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert rows.index("mae") < rows.index("[red]lmim\ufffd[0m") < rows.index("random")


def test_a_narrow_terminal_gets_a_row_a_task(result):
    results = tuple(result("mae", "knn", data=f"data-{i}") for i in range(9))
    text = printed(RunFile(command="run", limited=False, results=results), width=60, force_terminal=True)
    assert [f"knn/data-{i}" in text for i in range(9)] == [True] * 9
    assert max(map(len, text.splitlines())) < 90


def test_seeds_and_partial_failures_are_told(result):
    results = (result(seed=0), result(seed=1), result(seed=2, error="gone"))
    text = printed(RunFile(command="run", limited=False, results=results), width=200)
    assert "50.0 [49.0, 51.0] (2 seeds) (1 FAILED)" in text
    assert "FAILED a on knn/toy (seed 2): gone" in text


def test_a_warning_about_a_checkpoint_comes_with_the_numbers(result):
    told = result("naive", info={"notes": ("WARNING: it has collapsed", "a note")})
    run = RunFile(command="run", limited=False, results=(told,))
    lines = str(summary_table(run, Path("nowhere"))).splitlines()
    assert "WARNING naive: it has collapsed" in lines
    assert not any("a note" in line for line in lines)
