"""A run that is refused, fails, is stopped or meets another: nothing is lost, and a line says what to do."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmim_bench.bench import cells, encoders
from lmim_bench.bench.api import run
from lmim_bench.bench.cache import staging
from lmim_bench.bench.claims import claim
from lmim_bench.bench.errors import ConfigError, DataError
from lmim_bench.bench.features import FeatureStore
from lmim_bench.bench.results import load_run
from lmim_bench.reports.html import build_report
from lmim_bench.reports.model import read_report
from lmim_bench.tasks.knn import KnnConfig


def command(checkpoint, options, *more):
    return [
        sys.executable,
        "-m",
        "lmim_bench",
        "run",
        "--ckpt",
        str(checkpoint),
        "--tasks",
        ",".join(options["tasks"]),
        "--data",
        options["data"][0],
        "--out",
        str(options["out"]),
        "--cache-dir",
        str(options["cache_dir"]),
        "--device",
        "cpu",
        *more,
    ]


def test_results_made_otherwise_are_refused_with_the_difference(save_tiny, checkpoint, options):
    run(checkpoint, **options)
    with pytest.raises(ConfigError, match=r"another protocol \(k="):
        run(checkpoint, **options, overrides={"knn": {"k": "1,2"}})
    with pytest.raises(ConfigError, match="--limit none, not 6"):
        run(checkpoint, **options, limit=6)
    save_tiny(checkpoint, seed=9)
    with pytest.raises(ConfigError, match="other weights under the same label"):
        run(checkpoint, **options)
    with pytest.raises(ConfigError, match="already holds"):
        run(checkpoint, **options, overwrite="never")
    finished = run(checkpoint, **options, overwrite="always", overrides={"knn": {"k": "1,2"}})
    assert finished.results[0].protocol["k"] == [1, 2]
    assert "k" in finished.results[0].overrides
    assert finished.results[0].defaults == {"k": [*KnnConfig().k]}
    assert '"k=1, 2"' in (options["out"] / "results.csv").read_text()


def test_a_cell_that_fails_is_kept_as_failed_and_the_others_run(checkpoint, options):
    finished = run(
        checkpoint, **{**options, "tasks": ["knn", "few_shot"]}, overrides={"knn": {"layer": "-9"}}
    )
    status = {r.task: r for r in finished.results}
    assert status["few_shot"].status == "ok"
    assert status["knn"].status == "failed"
    assert "layer -9 is not in this encoder of 4 blocks" in status["knn"].error
    assert "layer -9" in (options["out"] / "report.html").read_text(encoding="utf-8")


def test_a_failed_cell_is_mended_by_the_setting_that_its_error_names(checkpoint, options):
    wrong = run(checkpoint, **options, overrides={"knn": {"layer": "-9"}})
    assert wrong.results[0].status == "failed"
    mended = run(checkpoint, **options, overrides={"knn": {"layer": "-2"}})
    assert [r.status for r in mended.results] == ["ok"]
    with pytest.raises(ConfigError, match="another protocol"):
        run(checkpoint, **options, overrides={"knn": {"layer": "-3"}})


def test_cells_that_were_scored_later_than_the_unified_file_count(checkpoint, options):
    """As after a run that was killed: what it scored is there, and what it gathers at its end is not."""
    before = run(checkpoint, **options)
    out = options["out"]
    unified = (out / "results.json").read_bytes()
    both = run(checkpoint, **{**options, "tasks": ["knn", "few_shot"]})
    assert len(both.results) == len(before.results) + 1
    (out / "results.json").write_bytes(unified)
    os.utime(out / "results.json", ns=(1, 1))
    assert load_run(out).results == both.results
    (out / "results.json").unlink()
    assert load_run(out).results == both.results
    assert load_run(out).command == both.command
    (out / "plan.json").write_text("{")
    assert {r.cell for r in load_run(out).results} == {r.cell for r in both.results}


def test_the_report_is_written_before_another_process_may_write(checkpoint, options, monkeypatch):
    from lmim_bench.bench import api

    report = api._report

    def held(out):
        with pytest.raises(ConfigError, match="another process writes into"), claim(out):
            pass
        report(out)

    monkeypatch.setattr(api, "_report", held)
    run(checkpoint, **options)
    assert (options["out"] / "report.html").is_file()


def test_a_failed_cell_counts_whatever_another_process_plans_meanwhile(checkpoint, options, monkeypatch):
    from click.testing import CliRunner

    from lmim_bench.bench import api, cli

    broken = next((Path(options["data"][0]) / "val").rglob("*.png"))
    broken.write_bytes(b"cut")
    report = api._report

    def replaced(out):
        report(out)
        (out / "plan.json").write_text('{"cells": []}')

    monkeypatch.setattr(api, "_report", replaced)
    done = CliRunner().invoke(cli.cli, command(checkpoint, options)[3:])
    assert done.exit_code == 1, done.output


def test_a_checkpoint_that_changes_meanwhile_fails_alone(
    save_tiny, checkpoint, options, tmp_path, monkeypatch
):

    gone, changed = (Path(shutil.copy(checkpoint, tmp_path / f"{name}.pth")) for name in ("gone", "changed"))
    load = encoders.load_encoder
    opened = []

    def loaded(reference, *args):
        if reference in opened:  # to be scored
            gone.unlink(missing_ok=True)
            save_tiny(changed, seed=7)
        opened.append(reference)
        return load(reference, *args)

    monkeypatch.setattr(encoders, "load_encoder", loaded)
    found = run({"a": gone, "b": changed, "c": checkpoint}, **options)
    assert [(r.checkpoint.label, r.status) for r in found.results] == [
        ("a", "failed"),
        ("b", "failed"),
        ("c", "ok"),
    ]
    assert "there is no checkpoint file" in found.results[0].error
    assert "gives other weights than when it was opened" in found.results[1].error


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_named(checkpoint, options, monkeypatch, code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("lmim_bench.bench.claims.FileLock.acquire", refuse)
    with pytest.raises(ConfigError, match=r"the disk of .* has no file locks .*; give an --out on another"):
        run(checkpoint, **options)


def test_a_cache_folder_that_cannot_be_made_is_told_before_any_work(checkpoint, options, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"the cache folder .*file/cache cannot be made .*--cache-dir"):
        run(checkpoint, **{**options, "cache_dir": tmp_path / "file" / "cache"})
    assert not options["out"].exists()


@pytest.mark.parametrize("option", ["--data", "--out", "--cache-dir"])
def test_an_empty_name_is_not_the_working_folder(checkpoint, options, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    arguments = [*command(checkpoint, options), option, ""]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is empty" in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_has_one_writer(checkpoint, options):
    with claim(options["out"]), pytest.raises(ConfigError, match="another process writes into"):
        run(checkpoint, **options)
    assert run(checkpoint, **options).results[0].status == "ok"


def test_a_bug_in_a_task_fails_its_cell_with_a_traceback_on_disk(checkpoint, options, monkeypatch):
    from dataclasses import replace

    from lmim_bench.bench import plan as plan_module
    from lmim_bench.tasks import get_task

    def broken(ctx, config):
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr(plan_module, "get_task", lambda name: replace(get_task(name), run=broken))
    finished = run(checkpoint, **options)
    (result,) = finished.results
    assert result.status == "failed"
    assert "ZeroDivisionError: by nought" in result.error
    log = options["out"] / "artefacts" / result.cell / "error.txt"
    assert "Traceback" in log.read_text(encoding="utf-8")
    with pytest.raises(ZeroDivisionError):
        run(checkpoint, **options, debug=True)


def test_a_full_disk_fails_its_cell_and_is_no_bug(checkpoint, options, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/features/x")

    monkeypatch.setattr(FeatureStore, "_extract", full)
    (result,) = run(checkpoint, **options).results
    assert result.status == "failed"
    assert result.error == "/cache/features/x: No space left on device"
    assert not (options["out"] / "artefacts").exists()
    with pytest.raises(OSError, match="No space left"):
        run(checkpoint, **options, debug=True)


def test_an_error_of_a_library_without_a_number_is_a_bug(checkpoint, options, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("made up")

    monkeypatch.setattr(FeatureStore, "_extract", broken)
    (result,) = run(checkpoint, **options).results
    assert result.error.startswith("OSError: made up (a bug")


@pytest.mark.parametrize("damaged", [b"", b'{"order": ["one', b"[]", b"\xff"])
def test_a_plan_that_was_cut_does_not_stop_the_next_run(values, checkpoint, options, damaged):
    first = run(checkpoint, **options)
    (options["out"] / "plan.json").write_bytes(damaged)
    assert values(run(checkpoint, **options)) == values(first)
    order = json.loads((options["out"] / "plan.json").read_bytes())["order"]
    assert order == [first.results[0].cell]


def test_a_broken_image_is_named_and_can_be_left_out(checkpoint, options, images):
    broken = images / "train" / "red" / "03.png"
    broken.write_bytes(broken.read_bytes()[:60])
    finished = run(checkpoint, **options)
    assert finished.results[0].status == "failed"
    assert "red/03.png" in finished.results[0].error
    finished = run(checkpoint, **options, skip_broken=True)
    assert finished.results[0].status == "ok"
    assert finished.results[0].data.skipped == ("train/red/03.png",)
    assert "1 broken image(s) left out" in finished.results[0].notes[0]
    with pytest.raises(ConfigError, match=r"without 1 broken image\(s\), first train/red/03.png"):
        run(checkpoint, **options)
    again = run(checkpoint, **{**options, "tasks": ["few_shot"]})
    failed = next(r for r in again.results if r.task == "few_shot")
    assert failed.status == "failed"
    assert "--skip-broken" in failed.error


def test_an_empty_folder_and_an_unknown_task_stop_before_any_work(checkpoint, options, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        run(checkpoint, **{**options, "data": [str(tmp_path / "empty")]})
    with pytest.raises(ConfigError, match="Did you mean 'knn'"):
        run(checkpoint, **{**options, "tasks": ["kn"]})
    with pytest.raises(ConfigError, match="Did you mean 'temperature'"):
        run(checkpoint, **options, overrides={"knn": {"tempratur": "1"}})
    assert not options["out"].exists()


def test_a_result_file_with_a_score_that_is_no_number_is_refused(checkpoint, options):
    finished = run(checkpoint, **options)
    path = options["out"] / "results.json"
    value = finished.results[0].scores[0].value
    path.write_text(path.read_text(encoding="utf-8").replace(f'"value": {value}', '"value": NaN', 1))
    with pytest.raises(DataError, match=r"results\.json .*finite"):
        load_run(options["out"])


def wait_for(path: Path, process: subprocess.Popen, pattern: str) -> None:
    for _ in range(1200):
        if list(path.glob(pattern)) or process.poll() is not None:
            return
        time.sleep(0.05)
    pytest.fail("nothing was scored in a minute")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sign", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (signal.SIGTERM, 130)]
)
def test_a_stopped_run_goes_on_to_the_same_numbers(values, checkpoint, options, tmp_path, sign, code):
    options["tasks"] = ["knn", "linear", "few_shot"]
    whole = run(checkpoint, **{**options, "out": tmp_path / "whole", "cache_dir": tmp_path / "other-cache"})
    # A suite that a shell started in the background hands its children an ignored SIGINT.
    start = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('lmim_bench', run_name='__main__')"
    )
    arguments = command(checkpoint, options)[3:]
    process = subprocess.Popen(
        [sys.executable, "-c", start, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for(options["out"] / "results", process, "*.json")
    process.send_signal(sign)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    finished = {p: p.stat().st_mtime_ns for p in (options["out"] / "results").glob("*.json")}
    assert 1 <= len(finished) < 3
    if sign != signal.SIGKILL:
        assert "the same command goes on" in errors.decode(), errors
        assert (options["out"] / "report.html").is_file()
    assert {r.cell for r in load_run(options["out"]).results} == {path.stem for path in finished}
    assert len(read_report([options["out"]]).entries) == len(finished)
    assert build_report(options["out"]).is_file()
    done = subprocess.run(command(checkpoint, options), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())

    assert values(load_run(options["out"])) == values(whole)


def test_a_cell_that_is_scored_again_and_stopped_is_no_longer_scored(checkpoint, options, monkeypatch):
    (first,) = run(checkpoint, **options).results
    with monkeypatch.context() as patch:
        patch.setattr(cells.Attempt, "score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, **options, overwrite="always")
    assert not load_run(options["out"]).results
    (again,) = run(checkpoint, **options).results
    assert (again.status, again.scores) == ("ok", first.scores)
    assert all((options["out"] / file).is_file() for a in again.artefacts for file in a.files)


def interrupted(*args):
    raise KeyboardInterrupt


def test_a_half_written_bank_of_a_dead_process_is_swept(checkpoint, options):
    alive = staging(options["cache_dir"] / "features" / "abc")
    stale = alive.with_name(alive.name.replace(f".{os.getpid()}.", ".999999999."))
    stale.mkdir()
    run(checkpoint, **options)
    assert not stale.exists()
    assert alive.exists()
