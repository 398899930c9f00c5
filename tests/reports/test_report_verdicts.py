"""Verdicts on made-up runs: what is paired, what is not and why; tables of every format."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from lmim_bench.bench.errors import ConfigError
from lmim_bench.bench.report_commands import compare, table
from lmim_bench.bench.results import DataRecord
from lmim_bench.reports.html import build_report, lead, render
from lmim_bench.reports.model import read_report
from lmim_bench.reports.tables import write_table
from lmim_bench.reports.verdicts import Pairings, comparisons, ranking

HOSTILE = "<img src=x onerror=alert(1)>|_\\"


def hits(rate: float, n: int = 400, seed: int = 0) -> Any:
    """Right and wrong answers that agree where both are right: the same difficulty for every encoder."""
    return (np.random.default_rng(seed).random(n) < rate).astype(np.float32)


@pytest.fixture
def run(
    tmp_path: Path, result: Callable[..., Any], score: Callable[..., Any], write_run: Callable[..., Path]
) -> Callable[..., Path]:
    def make(
        name: str,
        labels: dict[str, float],
        tasks: Sequence[str] = ("knn",),
        items: bool = True,
        **fields: Any,
    ) -> Path:
        results = []
        for label, rate in labels.items():
            for task in tasks:
                answers = hits(rate)
                scores = (score("top1@k=20", float(answers.mean()), chance=0.1),)
                results.append(result(label, task, scores=scores, **fields))
        folder = write_run(tmp_path / name, results)
        (folder / "items").mkdir(exist_ok=True)
        for made in results if items else []:
            np.savez(
                folder / "items" / f"{made.cell}.npz", **{"top1@k=20": hits(labels[made.checkpoint.label])}
            )
        return folder

    return make


def test_the_better_one_is_named_with_its_margin(run: Callable[..., Path]) -> None:
    report = read_report([run("a", {"MAE": 0.5, "Latent MIM": 0.6}, tasks=("knn", "linear"))])
    (comparison,) = comparisons(report)
    assert comparison.summary == (
        "Latent MIM against MAE in 2 columns: clearly better in 2, clearly worse in 0."
    )
    verdict = comparison.verdicts[0]
    expected = (hits(0.6) - hits(0.5)).mean()
    assert verdict.found.value == pytest.approx(expected)
    assert verdict.better.label == "Latent MIM"
    assert verdict.sentence.startswith("Latent MIM is better than MAE by")
    assert verdict.found.test == "McNemar's exact test"
    # Two columns of one p value each: Holm doubles the smaller.
    assert verdict.p == pytest.approx(2 * verdict.found.p)


def test_equal_encoders_are_not_told_apart(run: Callable[..., Path]) -> None:
    (comparison,) = comparisons(read_report([run("a", {"x": 0.5, "y": 0.5})]))
    assert "1 cannot be told apart" in comparison.summary
    assert comparison.verdicts[0].sentence.startswith("y and x are not told apart: 0.0 points")


def test_runs_are_compared_across_folders(run: Callable[..., Path]) -> None:
    folders = [run("a", {"MAE": 0.5}), run("b", {"Latent MIM": 0.7})]
    (comparison,) = comparisons(read_report(folders))
    assert comparison.verdicts[0].clear


def test_another_protocol_is_never_compared(run: Callable[..., Path]) -> None:
    folders = [
        run("a", {"MAE": 0.5}),
        run("b", {"Latent MIM": 0.7}, protocol={"k": [1], "temperature": 0.07}),
    ]
    (comparison,) = comparisons(read_report(folders))
    assert comparison.verdicts == ()
    assert comparison.gaps == ("knn on toy: not the same protocol: k = 1, 20 against k = 1",)
    assert "share nothing" in comparison.summary


def test_a_task_that_one_lacks_is_said(run: Callable[..., Path]) -> None:
    folders = [run("a", {"MAE": 0.5}, tasks=("knn", "linear")), run("b", {"Latent MIM": 0.7})]
    (comparison,) = comparisons(read_report(folders))
    assert comparison.gaps == ("linear on toy: Latent MIM was not scored",)


def test_lines_name_the_protocol_where_a_task_has_several_on_one_data_set(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    warm = {"k": [1, 20], "temperature": 0.2}
    folders = [run("a", {"x": 0.5, "y": 0.7}), run("b", {"x": 0.5, "y": 0.7}, items=False, protocol=warm)]
    folders.append(run("c", {"x": 0.5}, protocol=warm | {"temperature": 0.3}))
    out = tmp_path / "c.html"
    text = invoke(compare, *folders, "--out", out)
    assert "  knn on toy [temperature = 0.07]: y is better than x" in text
    assert "not compared: knn on toy [temperature = 0.2]: x--knn--toy--s0.npz holds no per-item" in text
    assert "not compared: knn on toy [temperature = 0.3]: y was not scored" in text
    (found,) = json.loads(invoke(compare, *folders, "--json"))
    assert [column["variant"] for column in found["columns"]] == ["temperature = 0.07"]
    section = out.read_text().partition('id="comparison"')[2].partition("</section>")[0]
    assert section.count('<span class="variant">[temperature = 0.07]</span>') == 2


def test_who_failed_is_named(run: Callable[..., Path], result: Any, write_run: Any, tmp_path: Path) -> None:
    failed = [result(label, task, error="gone") for label, task in (("x", "b"), ("y", "b"), ("y", "c"))]
    others = [result("x", "c"), result("x", "d", scores=()), result("y", "d")]
    folder = write_run(tmp_path / "f", [*failed, *others])
    (comparison,) = comparisons(read_report([folder]))
    assert comparison.gaps == (
        "b on toy: x and y failed",
        "c on toy: y failed",
        "d on toy: x without top1@k=20",
    )
    assert comparison.summary == "y and x share nothing that can be compared."


def on(name: str, fingerprint: str) -> DataRecord:
    return DataRecord(name=name, kind="classification", fingerprint=fingerprint, counts={})


def test_data_under_two_names_and_two_data_under_one_are_told_apart(run: Callable[..., Path]) -> None:
    one = run("a", {"x": 0.5}, record=on("cifar10", "f1:limit=60:seed=0"))
    other = run("b", {"y": 0.7}, record=on("my_cifar", "f1:limit=50:seed=1"))
    (comparison,) = comparisons(read_report([one, other]))
    assert comparison.gaps == ("knn: the same data under the names cifar10 and my_cifar",)
    (comparison,) = comparisons(read_report([one, run("c", {"y": 0.7}, record=on("cifar10", "f2"))]))
    assert comparison.gaps == ("knn on cifar10: not the same data: data = f1 against data = f2",)


def test_data_under_two_names_count_once_in_the_ranks(run: Callable[..., Path]) -> None:
    labels = {"x": 0.5, "y": 0.6, "z": 0.7}
    twice = [run(name, labels, record=on(name, "f1:limit=60:seed=0")) for name in "ab"]
    found = ranking(read_report(twice))
    assert found is not None
    assert (found[0].columns, found[0].data_sets) == (2, 1)


@pytest.mark.parametrize("kept", [0, 3, 40, 0.5, 0.9])
def test_items_that_are_damaged_are_said(run: Callable[..., Path], kept: float) -> None:
    folder = run("a", {"x": 0.5, "y": 0.6})
    path = next(folder.glob("items/y--*.npz"))
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    (comparison,) = comparisons(read_report([folder]))
    mend = "score it again (--overwrite always)"
    assert comparison.gaps == (f"knn on toy: its items {path.name} are damaged; {mend}",)


def test_items_of_which_a_byte_changed_are_said(run: Callable[..., Path]) -> None:
    folder = run("a", {"x": 0.5, "y": 0.6})
    path = next(folder.glob("items/y--*.npz"))
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 255
    path.write_bytes(whole)
    (comparison,) = comparisons(read_report([folder]))
    assert "are damaged; score it again" in comparison.gaps[0]


def test_items_that_are_missing_or_differ_are_said(run: Callable[..., Path]) -> None:
    (comparison,) = comparisons(read_report([run("a", {"x": 0.5, "y": 0.6}, items=False)]))
    assert "holds no per-item numbers of top1@k=20" in comparison.gaps[0]
    folder = run("b", {"x": 0.5, "y": 0.6})
    path = next(folder.glob("items/y--*.npz"))
    np.savez(path, **{"top1@k=20": hits(0.6, n=300)})
    (comparison,) = comparisons(read_report([folder]))
    assert comparison.gaps == ("knn on toy: 400 items against 300",)


def test_first_order_terms_stand_in_for_sums(run: Callable[..., Path]) -> None:
    folder = run("a", {"x": 0.5, "y": 0.6})
    for path, shift in (
        (next(folder.glob("items/x--*.npz")), 0.0),
        (next(folder.glob("items/y--*.npz")), 0.1),
    ):
        sums = np.ones((50, 6))
        terms = np.random.default_rng(1).normal(0.5 + shift, 0.01, size=50)
        np.savez(
            path, **{"top1@k=20": sums, "top1@k=20/terms": terms, "top1@k=20/clusters": np.arange(50) // 5}
        )
    (comparison,) = comparisons(read_report([folder]))
    found = comparison.verdicts[0].found
    assert found.value == pytest.approx(0.1)
    assert (found.items, found.independent) == (50, 10)


def test_the_baseline(run: Callable[..., Path]) -> None:
    report = read_report([run("a", {"x": 0.5, "y": 0.6, "z": 0.7})])
    assert [c.reference.label for c in comparisons(report)] == ["x", "x"]
    assert [(c.reference.label, c.challenger.label) for c in comparisons(report, "z")] == [
        ("z", "x"),
        ("z", "y"),
    ]
    with pytest.raises(ConfigError, match="no checkpoint 'zz'"):
        comparisons(report, "zz")
    twice = read_report([run("b", {"x": 0.5, "y": 0.6}), run("c", {"x": 0.5}, weights="other")])
    with pytest.raises(ConfigError, match=r"2 checkpoints .* 'x' .* --baseline 'x \(x-finger\)' or 'x \(xot"):
        comparisons(twice, "x")
    assert comparisons(twice, "x (x-finger)")[0].reference.label == "x (x-finger)"


def test_random_weights_are_not_the_baseline(run: Callable[..., Path]) -> None:
    control = run("a", {"control": 0.1}, info={"random_weights": True})
    report = read_report([control, run("b", {"trained": 0.6})])
    assert [c.reference.label for c in comparisons(report)] == ["trained"]


# ------------------------------------------------------------------------------------------- standings


def marks(folder: Path) -> list[str]:
    pairings = Pairings(read_report([folder]))
    column = pairings.report.columns[0]
    return [cell.standing for cell in pairings.summary(column)]


def test_overlapping_intervals_do_not_hide_a_difference_on_the_same_items(run: Callable[..., Path]) -> None:
    folder = run("a", {"x": 0.50, "y": 0.53})  # intervals of +- 1 point are made up: here they overlap
    results = json.loads((folder / "results.json").read_text())
    for result in results["results"]:
        result["scores"][0] |= {"low": 0.4, "high": 0.6}
    (folder / "results.json").write_text(json.dumps(results))
    assert marks(folder) == ["", "best"]


def test_what_a_test_does_not_tell_apart_is_close(run: Callable[..., Path]) -> None:
    folder = run("a", {"x": 0.50, "y": 0.53, "z": 0.2})
    rng = np.random.default_rng(5)
    np.savez(folder / "items" / "x--knn--toy--s0.npz", **{"top1@k=20": rng.permutation(hits(0.50))})
    assert marks(folder) == ["close", "best", ""]


def test_whoever_is_better_on_the_seeds_that_both_have_is_not_clearly_worse(run: Callable[..., Path]) -> None:
    folder = run("a", {"x": 0.60, "y": 0.70})
    more = [run(f"b{seed}", {"x": 0.9}, seed=seed) for seed in (1, 2)]
    pairings = Pairings(read_report([folder, *more]))
    (column,) = pairings.report.columns
    assert [cell.standing for cell in pairings.summary(column)] == ["best", "close"]
    (verdict,) = pairings.against()[0].verdicts
    assert (verdict.clear, verdict.better.label) == (True, "y")
    assert verdict.sentence.endswith("on 400 test images, over the seed that both have (0)")


def test_numbers_that_look_alike_may_be_told_apart(run: Callable[..., Path]) -> None:
    folder = run("a", {"x": 0.5, "y": 0.5})
    one, two = (np.zeros(40_000, dtype=np.float32) for _ in range(2))
    one[:20_000] = two[:20_012] = 1
    for label, items in (("x", one), ("y", two)):
        np.savez(folder / "items" / f"{label}--knn--toy--s0.npz", **{"top1@k=20": items})
    results = json.loads((folder / "results.json").read_text())
    for result, items in zip(results["results"], (one, two), strict=True):
        result["scores"][0]["value"] = float(items.mean())
    (folder / "results.json").write_text(json.dumps(results))
    assert marks(folder) == ["", "best"]
    assert "not told apart" not in " ".join(lead(Pairings(read_report([folder]))))


def test_what_so_few_items_cannot_show_is_said_whatever_they_show(run: Callable[..., Path]) -> None:
    folder = run("a", {"x": 0.5, "y": 0.5, "z": 0.5})
    for label, items in (("x", [0, 0, 0, 0, 0]), ("y", [1, 1, 1, 1, 1]), ("z", [0, 0, 0, 0, 0])):
        np.savez(folder / "items" / f"{label}--knn--toy--s0.npz", **{"top1@k=20": np.float32(items)})
    first, second = (c.verdicts[0].sentence for c in comparisons(read_report([folder])))
    assert "y leads x by 100.0 points" in first
    assert first.endswith("on 5 test images; too few independent test images for a test at 5%")
    assert second.startswith("z and x are equal (-43.4 to 43.4) on 5")


def test_few_groups_may_be_too_few_for_many_tests(run: Callable[..., Path]) -> None:
    labels = {f"e{i}": 0.5 for i in range(9)}
    folder = run("a", labels)
    for i, label in enumerate(labels):
        items = np.random.default_rng(i).uniform(0, 0.01, 8) + (i == 8)
        np.savez(folder / "items" / f"{label}--knn--toy--s0.npz", **{"top1@k=20": items})
    found = [c.verdicts[0] for c in comparisons(read_report([folder]))]
    assert found[-1].found.p == 2**-7  # every group differs, and still p is 0.06 of eight tests
    assert found[-1].sentence.endswith("too few independent test images for so many tests at 5%")
    assert not any("not told apart" in verdict.sentence for verdict in found)


@pytest.mark.parametrize(("other", "mark"), [(0.59, "untested"), (0.5, "")])
def test_intervals_decide_where_items_cannot_be_paired(
    run: Callable[..., Path], other: float, mark: str
) -> None:
    assert marks(run("a", {"x": other, "y": 0.6}, items=False)) == [mark, "best"]


def test_comparisons_say_the_same_whatever_the_baseline(run: Callable[..., Path]) -> None:
    folder = run("a", {"x": 0.50, "y": 0.53, "z": 0.51}, tasks=("knn", "linear"))
    for path in folder.glob("items/[xz]--*.npz"):  # answers of no binary kind: the test draws exchanges
        items = np.random.default_rng(len(path.name)).normal(size=400)
        np.savez(path, **{"top1@k=20": items + (path.name[0] == "x") * 0.15})
    report = read_report([folder])
    pairings = Pairings(report)
    for baseline in ("x", "y", "z"):
        for found in pairings.against(baseline):
            other = Pairings(report).against(found.challenger.label)
            back = next(c for c in other if c.challenger is found.reference)
            assert [v.found.p for v in back.verdicts] == [v.found.p for v in found.verdicts]
            assert [v.found.value for v in back.verdicts] == [-v.found.value for v in found.verdicts]
            for one, two in zip(found.verdicts, back.verdicts, strict=True):
                assert (one.found.low, one.found.high) == (-two.found.high, -two.found.low)
                if one.found.effect is not None:
                    assert one.found.effect == -two.found.effect
            for verdict in found.verdicts:
                cells = pairings.summary(verdict.column)
                two = [cells[c.index].standing for c in found.pair]
                if "best" in two and not verdict.clear:  # a mark asks for more
                    assert "close" in two


def test_an_interval_does_not_depend_on_what_else_a_report_holds(run: Callable[..., Path]) -> None:
    few, many = (
        run("a", {"x": 0.50, "y": 0.53}),
        run("b", {"z": 0.5, "y": 0.53, "x": 0.50}, tasks=("knn", "linear")),
    )
    for path in (*few.glob("items/x--*.npz"), *many.glob("items/x--*.npz")):
        np.savez(path, **{"top1@k=20": np.random.default_rng(len(path.name)).normal(size=400)})
    (alone,), (_, beside) = (comparisons(read_report([folder]), "y") for folder in (few, many))
    (found,) = alone.verdicts
    assert next(v.found for v in beside.verdicts if v.column.task == "knn") == found.found


def test_whatever_the_summary_calls_clear_is_clear_in_the_section(run: Callable[..., Path]) -> None:
    rng, seen = np.random.default_rng(0), set()
    for trial in range(6):
        rates = {label: 0.5 + 0.03 * i for i, label in enumerate("wxyz")}
        folder = run(f"r{trial}", rates, tasks=("knn", "linear"))
        for path in folder.glob("items/*.npz"):
            np.savez(path, **{"top1@k=20": (rng.random(400) < rates[path.name[0]]).astype(np.float32)})
        pairings = Pairings(read_report([folder]))
        for baseline in rates:
            for found in pairings.against(baseline):
                for verdict in found.verdicts:
                    best, other = (pairings.summary(verdict.column)[c.index].standing for c in found.pair)
                    if best == "best" and other != "best":
                        seen.add((other, verdict.clear))
    assert ("", False) not in seen
    assert {other for other, _ in seen} == {"", "close"}


def test_equal_encoders_are_seldom_marked_or_called_better_however_many(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    labels, rng = [f"e{i}" for i in range(8)], np.random.default_rng(3)
    marked = called = 0
    for i in range(40):
        folder = run(f"r{i}", dict.fromkeys(labels, 0.5))
        for path in folder.glob("items/*.npz"):
            np.savez(path, **{"top1@k=20": (rng.random(400) < 0.5).astype(np.float32)})
        results = json.loads((folder / "results.json").read_text())
        for result in results["results"]:
            with np.load(folder / "items" / f"{result['cell']}.npz") as items:
                result["scores"][0]["value"] = float(items["top1@k=20"].mean())
        (folder / "results.json").write_text(json.dumps(results))
        marked += "" in marks(folder)
        called += any(v.clear for c in comparisons(read_report([folder])) for v in c.verdicts)
    assert marked <= 5  # uncorrected: about 20 of 40
    assert called <= 5


def test_few_sequences_are_said_to_be_too_few_for_a_test(run: Callable[..., Path]) -> None:
    folder = run("a", {"x": 0.5, "y": 0.8})
    for label, shift in (("x", 0.0), ("y", 0.3)):
        items = np.random.default_rng(0).random(10) + shift
        clusters = {"top1@k=20/clusters": np.arange(10) // 2}
        np.savez(folder / "items" / f"{label}--knn--toy--s0.npz", **{"top1@k=20": items}, **clusters)
    (comparison,) = comparisons(read_report([folder]))
    (verdict,) = comparison.verdicts
    assert (verdict.found.p, verdict.p) == (2**-4, None)
    assert verdict.sentence.startswith("y leads x by 30.0 points (30.0 to 30.0) on 10 test images in 5")
    assert verdict.sentence.endswith("too few groups for a test at 5%")
    assert comparison.tally == (0, 0, 0, 1)
    assert comparison.summary.endswith("clearly worse in 0; 1 with too few items to test.")
    assert marks(folder) == ["", "best"]


def test_what_nothing_tests_is_not_called_alike(run: Callable[..., Path], tmp_path: Path) -> None:
    folder = run("a", {"x": 0.788, "y": 0.8, "z": 0.79}, tasks=("knn", "linear"))
    for path in folder.glob("items/?--knn--*.npz"):
        np.savez(path, **{"top1@k=20": hits(0.8), "top1@k=20/clusters": np.zeros(400)})
    assert marks(folder) == ["untested", "best", "untested"]
    page = build_report(folder, tmp_path / "page.html").read_text()
    assert "In 1 of 2 columns another was not tested against the best; their intervals overlap." in page
    assert page.count('aria-label="not tested against the best"') == 2
    assert "<b>?</b> not tested" in page
    heads, row = re.findall(r"<tr>.*?</tr>", page.partition('class="tally"')[2], re.S)[:2]
    assert re.findall(r">([^<]+)</th>", heads)[3:] == ["Not told apart", "Too few to test"]
    assert re.findall(r"<td>(\d+)</td>", row) == ["0", "0", "1", "1"]
    whole = build_report(run("b", {"x": 0.5, "y": 0.7, "z": 0.6}), tmp_path / "whole.html").read_text()
    assert "Too few to test" not in whole
    assert "<b>?</b>" not in whole
    assert "<b>≈</b>" not in whole


@pytest.mark.parametrize("alike", [True, False])
def test_seeds_that_differ_are_samples(run: Callable[..., Path], alike: bool) -> None:
    folders = [run(f"s{seed}", {"x": 0.5, "y": 0.6}, seed=seed) for seed in range(3)]
    for seed, folder in enumerate(folders):
        for path in folder.glob("items/*.npz"):
            rng = np.random.default_rng(path.name[0] == "x" or (0 if alike else seed + 2))
            np.savez(path, **{"top1@k=20": hits(0.5 + 0.1 * (path.name[0] == "y"), seed=rng.integers(99))})
    (comparison,) = comparisons(read_report(folders))
    (verdict,) = comparison.verdicts
    assert verdict.found.test.startswith("McNemar" if alike else "Student's t over draws and items")
    assert verdict.found.items == 400


def test_ranks_of_three(run: Callable[..., Path]) -> None:
    report = read_report([run("a", {"x": 0.5, "y": 0.6, "z": 0.7}, tasks=("knn", "linear"))])
    found = ranking(report)
    assert found is not None
    assert found[0].ranks == (3.0, 2.0, 1.0)
    assert ranking(read_report([run("b", {"x": 0.5, "y": 0.6})])) is None


def test_the_page_shows_it_and_hostile_names_stay_text(run: Callable[..., Path]) -> None:
    folder = run("a", {HOSTILE: 0.5, "y": 0.7, "z": 0.6}, tasks=("knn", "linear"))
    page = build_report(folder).read_text()
    assert "Is the difference more than noise?" in page
    assert "y is better than &lt;img src=x" in page
    assert "<img src=x" not in page
    assert "Average ranks" in page
    assert build_report(folder).read_text() == page


def test_cells_sort_by_the_numbers_behind_them_and_p_shows_on_which_side_it_is(
    run: Callable[..., Path], monkeypatch: Any
) -> None:
    folder = run("a", {"x": 0.5, "y": 0.7}, tasks=("knn", "linear"))
    report = read_report([folder])
    first, second = comparisons(report)[0].verdicts
    verdicts = (replace(first, p=0.04996), replace(second, p=None))
    made = replace(comparisons(report)[0], verdicts=verdicts)
    monkeypatch.setattr(Pairings, "against", lambda *_: (made,))
    page = render(report)
    assert '<td data-value="0.04996">0.0500</td>' in page
    assert f'<td class="text" data-value="{first.found.low}">[' in page
    assert f'<td>–</td><td data-value="{second.found.p}">&lt; 0.001</td>' in page


# ------------------------------------------------------------------------------------------- commands


def invoke(command: Any, *arguments: Any) -> Any:
    found = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
    assert found.exit_code == 0
    return found.output


def test_compare_prints_and_writes(run: Callable[..., Path], tmp_path: Path) -> None:
    folder = run("a", {"MAE": 0.5, "Latent MIM": 0.7})
    out = tmp_path / "c.html"
    text = invoke(compare, folder, "--out", out)
    assert "knn on toy: Latent MIM is better than MAE by" in text
    assert "corrected" not in text  # for a single test
    assert "LIMITED RUN" not in text
    several = invoke(
        compare, run("c", {"MAE": 0.5, "x": 0.7}, tasks=("knn", "linear"), limit=60), "--out", out
    )
    assert "LIMITED RUN: at most 60 images a split" in several
    assert "p is corrected for 2 tests (Holm)" in several
    assert out.read_text().startswith("<!doctype html>")
    (found,) = json.loads(invoke(compare, folder, "--json"))
    document = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    told = document.partition("## `lmim-bench compare --json`")[2]
    assert [key for key in (*found, *found["columns"][0]) if f"`{key}`" not in told] == []
    assert found["reference"] == "MAE"
    assert found["columns"][0]["clear"] is True
    with pytest.raises(ConfigError, match="hold one checkpoint"):
        invoke(compare, run("b", {"x": 0.5}))


def test_tables_of_every_format(run: Callable[..., Path], tmp_path: Path) -> None:
    folder = run("a", {HOSTILE: 0.5, "best": 0.7})
    markdown = invoke(table, folder)
    assert f"**{100 * hits(0.7).mean():.1f}**" in markdown
    assert "&lt;img src=x" in markdown
    assert markdown.count("\n| ") == 2
    latex = invoke(table, folder, "--format", "latex")
    assert r"\textbf{" in latex
    assert r"\textless{}img src=x onerror=alert(1)\textgreater{}\textbar{}\_\textbackslash{}" in latex
    assert latex.count("&") == 4
    rows = list(csv.DictReader(io.StringIO(invoke(table, folder, "-f", "csv"))))
    assert [row["metric"] for row in rows] == ["top1@k=20"] * 2
    assert rows[0]["checkpoint"] == HOSTILE
    assert float(rows[1]["value"]) == pytest.approx(hits(0.7).mean())
    out = tmp_path / "t.csv"
    invoke(table, folder, "-f", "csv", "-o", out)
    assert out.read_text() == write_table(read_report([folder]), "csv")
    with pytest.raises(ValueError, match="no table format"):
        write_table(read_report([folder]), "doc")


def test_a_failed_cell_is_in_the_tables(
    run: Callable[..., Path], result: Any, write_run: Any, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "f", [result("x", error="out of memory")])
    report = read_report([folder])
    assert "| failed |" in write_table(report, "md")
    assert "& failed" in write_table(report, "latex")
    assert write_table(report, "csv").rstrip().endswith(",failed")
