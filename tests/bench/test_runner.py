"""A run as a user sees it: cells kept, added, refused, failed, limited, interrupted."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lmim_bench.bench import encoders, records
from lmim_bench.bench.api import run
from lmim_bench.bench.cache import staging
from lmim_bench.bench.checkpoints import save_checkpoint
from lmim_bench.bench.claims import claim
from lmim_bench.bench.engine import Engine
from lmim_bench.bench.errors import ConfigError, DataError
from lmim_bench.bench.features import FeatureStore
from lmim_bench.bench.results import load_run
from lmim_bench.bench.vit import build_vit, vit_spec
from lmim_bench.reports.html import build_report
from lmim_bench.reports.model import read_report
from lmim_bench.tasks.knn import KnnConfig

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


def make_checkpoint(path: Path, seed: int) -> Path:
    spec = vit_spec("lmim-bench", embed_dim=24, depth=4, num_heads=2, patch_size=8, image_size=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = build_vit(spec.arch).state_dict()
    save_checkpoint(path, spec, state, {"objective": "random"})
    return path


def make_images(root: Path, train: int = 12, val: int = 8) -> Path:
    rng = np.random.default_rng(0)
    for split, n in (("train", train), ("val", val)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                cast = np.array(colour) + rng.normal(0, 70, 3)  # some pictures are taken for another class
                pixels = np.clip(cast + rng.normal(0, 40, (32, 32, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02}.png")
    return root


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "colours")


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(tmp_path / "one.pth", seed=1)


@pytest.fixture
def options(tmp_path, images):
    return {
        "data": [str(images)],
        "tasks": ["knn"],
        "out": tmp_path / "run",
        "cache_dir": tmp_path / "cache",
        "device": "cpu",
    }


@pytest.fixture
def encoded(monkeypatch):
    """Counts the images that pass through an encoder."""
    counts = {"images": 0}
    original = Engine.launch

    def counting(self, images, *args):
        counts["images"] += len(images)
        return original(self, images, *args)

    monkeypatch.setattr(Engine, "launch", counting)
    return counts


def values(finished):
    return {(r.cell, s.metric): (s.value, s.low, s.high) for r in finished.results for s in r.scores}


def test_each_image_is_encoded_once_whatever_number_of_tasks_need_it(checkpoint, options, encoded):
    finished = run(checkpoint, **{**options, "tasks": ["knn", "linear", "few_shot"]})
    assert [r.status for r in finished.results] == ["ok"] * 3
    assert encoded["images"] == 36 + 24
    assert (options["out"] / "report.html").stat().st_size > 1000


def test_a_second_run_keeps_the_cells_and_one_more_checkpoint_adds_its_own(
    checkpoint, options, encoded, tmp_path
):
    first = run(checkpoint, **options)
    stamps = {p.name: p.stat().st_mtime_ns for p in (options["out"] / "results").glob("*.json")}
    encoded["images"] = 0
    assert values(run(checkpoint, **options)) == values(first)
    assert encoded["images"] == 0
    other = make_checkpoint(tmp_path / "two.pth", seed=2)
    both = run([checkpoint, other], **options)
    assert encoded["images"] == 60
    assert {r.checkpoint.label for r in both.results} == {"one", "two"}
    for name, stamp in stamps.items():
        assert (options["out"] / "results" / name).stat().st_mtime_ns == stamp


def test_what_was_scored_is_not_opened_again_until_its_file_changes(
    checkpoint, options, monkeypatch, tmp_path
):
    run(checkpoint, **options)
    opened = []
    original = encoders.load_encoder

    def counting(reference, **kwargs):
        opened.append(reference)
        return original(reference, **kwargs)

    monkeypatch.setattr(encoders, "load_encoder", counting)
    run(checkpoint, **options)
    assert opened == []
    page = (options["out"] / "report.html").stat().st_mtime_ns
    run([checkpoint], **{**options, "seeds": (0,)})
    assert (options["out"] / "report.html").stat().st_mtime_ns == page, "the same results keep their page"
    make_checkpoint(checkpoint, seed=5)
    with pytest.raises(ConfigError, match="other weights under the same label"):
        run(checkpoint, **options)
    assert opened == [str(checkpoint)]


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "processor_config.json"])
def test_what_lies_beside_a_file_and_decides_what_is_loaded_is_looked_at(
    checkpoint, tmp_path, monkeypatch, name
):
    (tmp_path / name).write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    record = records.checkpoint_record("a", str(checkpoint), tmp_path / "cache")
    (tmp_path / name).write_text('{"image_mean": [0, 0, 0]}')
    monkeypatch.setattr(encoders, "load_encoder", lambda *_: pytest.fail("opened"))
    with pytest.raises(pytest.fail.Exception, match="opened"):
        records.checkpoint_record("a", str(checkpoint), tmp_path / "cache")
    assert record.label == "a"


@pytest.mark.parametrize("damaged", [b"", b"{", b"{}"])
def test_a_damaged_record_of_a_checkpoint_is_made_again(checkpoint, options, damaged):
    first = run(checkpoint, **options)
    (kept,) = (options["cache_dir"] / "records").glob("*.json")
    whole = kept.read_bytes()
    kept.write_bytes(damaged)
    assert values(run(checkpoint, **options)) == values(first)
    assert kept.read_bytes() == whole


def test_a_record_that_cannot_be_kept_does_not_stop_the_run(checkpoint, options, monkeypatch):
    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(records, "write_json", forbidden)
    assert run(checkpoint, **options).results[0].status == "ok"


@pytest.mark.parametrize("reference", ["random:{}", "timm:test_vit"])
def test_random_weights_are_drawn_once(reference, checkpoint, options, monkeypatch):
    reference = reference.format(checkpoint)
    first = run(reference, **options)
    monkeypatch.setattr(encoders, "load_encoder", lambda *_: pytest.fail("it was opened again"))
    assert values(run(reference, **options)) == values(first)


def test_the_weights_that_are_scored_are_those_that_were_opened(checkpoint, options, monkeypatch):
    """A file that changes between the plan and its turn, with the very times that it had before."""
    run(checkpoint, **options)
    make_checkpoint(checkpoint, seed=5)
    record = next((options["cache_dir"] / "records").glob("*.json"))
    monkeypatch.setattr(records, "_state", lambda *_: record.stem)
    found = run(checkpoint, **{**options, "tasks": ["linear"]})
    assert [r.status for r in found.results] == ["ok", "failed"]
    assert "other weights than when it was opened" in found.results[1].error


def test_another_task_reuses_the_bank(checkpoint, options, encoded):
    run(checkpoint, **{**options, "tasks": ["linear"]})
    before = encoded["images"]
    finished = run(checkpoint, **{**options, "tasks": ["linear", "few_shot"]})
    assert encoded["images"] == before
    assert len(finished.results) == 2


def test_a_further_seed_adds_cells(checkpoint, options):
    options["tasks"] = ["few_shot"]
    run(checkpoint, **options)
    finished = run(checkpoint, **{**options, "seeds": (0, 1)})
    assert [r.seed for r in finished.results] == [0, 1]
    assert finished.results[0].scores != finished.results[1].scores


def test_the_same_seed_gives_the_same_numbers(checkpoint, options, tmp_path):
    options["tasks"] = ["knn", "linear", "few_shot"]
    first = run(checkpoint, **options)
    again = run(checkpoint, **{**options, "out": tmp_path / "b", "cache_dir": tmp_path / "cache-b"})
    assert values(first) == values(again)
    alone = run(checkpoint, **{**options, "tasks": ["few_shot"], "out": tmp_path / "c"})
    assert values(alone).items() <= values(first).items()


def test_results_made_otherwise_are_refused_with_the_difference(checkpoint, options):
    run(checkpoint, **options)
    with pytest.raises(ConfigError, match=r"another protocol \(k="):
        run(checkpoint, **options, overrides={"knn": {"k": "1,2"}})
    with pytest.raises(ConfigError, match="--limit none, not 6"):
        run(checkpoint, **options, limit=6)
    make_checkpoint(checkpoint, seed=9)
    with pytest.raises(ConfigError, match="other weights under the same label"):
        run(checkpoint, **options)
    with pytest.raises(ConfigError, match="already holds"):
        run(checkpoint, **options, overwrite="never")
    finished = run(checkpoint, **options, overwrite="always", overrides={"knn": {"k": "1,2"}})
    assert finished.results[0].protocol["k"] == [1, 2]
    assert "k" in finished.results[0].overrides
    assert finished.results[0].defaults == {"k": [*KnnConfig().k]}
    assert '"k=1, 2"' in (options["out"] / "results.csv").read_text()


def test_a_limited_run_says_so_everywhere(checkpoint, options):
    finished = run(checkpoint, **options, limit=6)
    assert finished.limited
    assert finished.results[0].limit == 6
    assert finished.results[0].data.counts == {"train": 6, "val": 6}
    assert "limited" in (options["out"] / "report.html").read_text(encoding="utf-8").lower()


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


def test_cells_keep_their_place_and_a_plan_of_all_of_them_gives_a_new_one(checkpoint, options, tmp_path):
    other = make_checkpoint(tmp_path / "two.pth", seed=2)
    run(checkpoint, **options)
    added = run(other, **options)
    assert [r.checkpoint.label for r in added.results] == ["one", "two"]
    again = run(checkpoint, **{**options, "tasks": ["few_shot"]})
    assert [(r.checkpoint.label, r.task) for r in again.results] == [
        ("one", "knn"),
        ("two", "knn"),
        ("one", "few_shot"),
    ]
    both = run([other, checkpoint], **{**options, "tasks": ["few_shot", "knn"]})
    assert [r.checkpoint.label for r in both.results] == ["two", "two", "one", "one"]


def test_a_run_of_which_all_is_scored_does_without_torch(checkpoint, options):
    options["device"] = "auto"
    run(checkpoint, **options)
    given = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    code = (
        "import sys, json; from lmim_bench.bench.api import run; "
        f"run({str(checkpoint)!r}, **json.loads({json.dumps(given)!r})); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr
    assert "1 of 1 cells are already scored" in done.stderr


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


def test_a_checkpoint_that_changes_meanwhile_fails_alone(checkpoint, options, tmp_path, monkeypatch):
    from lmim_bench.bench import encoders

    gone, changed = (Path(shutil.copy(checkpoint, tmp_path / f"{name}.pth")) for name in ("gone", "changed"))
    load = encoders.load_encoder
    opened = []

    def loaded(reference, *args):
        if reference in opened:  # to be scored
            gone.unlink(missing_ok=True)
            make_checkpoint(changed, seed=7)
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
def test_a_plan_that_was_cut_does_not_stop_the_next_run(checkpoint, options, damaged):
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


def test_a_factory_in_the_working_folder_with_random_weights_is_the_same_twice(
    options, tmp_path, monkeypatch
):
    (tmp_path / "my_net.py").write_text(
        "import timm\n"
        "def make():\n"
        "    return timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=0)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    finished = run("python:my_net:make", **options)
    assert finished.results[0].status == "ok"


FACTORIES = """
import torch

class Net(torch.nn.Module):
    embed_dim, patch_size = 3, 16
    def __init__(self, factor):
        super().__init__()
        self.factor = factor
    def forward_features(self, images):
        return self.factor * torch.nn.functional.avg_pool2d(images, 16)

def one():
    return Net(1.0)

def nothing():
    return Net(0.0)
"""


def test_factories_are_told_apart_by_name_and_code_where_their_weights_are_equal(
    options, tmp_path, monkeypatch
):
    (tmp_path / "my_nets.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    score = {}
    for factory in ("one", "nothing"):
        (result,) = run(f"python:my_nets:{factory}", **{**options, "out": tmp_path / factory}).results
        score[factory] = result.score(result.headline).value
    assert score["one"] > 0.6
    assert score["nothing"] == pytest.approx(1 / 3)
    first = encoders.load_encoder("python:my_nets:one").fingerprint
    (tmp_path / "my_nets.py").write_text(FACTORIES.replace("16)", "16) ** 3"))
    assert encoders.load_encoder("python:my_nets:one").fingerprint != first


def test_items_are_kept_beside_the_scores(checkpoint, options):
    finished = run(checkpoint, **options)
    (result,) = finished.results
    items = np.load(options["out"] / "items" / f"{result.cell}.npz")
    head = result.score(result.headline)
    assert items[result.headline].mean() == pytest.approx(head.value)
    assert head.low <= head.value <= head.high
    assert head.n == 24


def test_results_file_is_valid_json_without_nan(checkpoint, options):
    run(checkpoint, **options)
    text = (options["out"] / "results.json").read_text(encoding="utf-8")
    payload = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert payload["schema_version"] == "lmim-bench/results/1"
    assert payload["results"][0]["environment"]["packages"]["torch"]


def test_a_result_file_with_a_score_that_is_no_number_is_refused(checkpoint, options):
    finished = run(checkpoint, **options)
    path = options["out"] / "results.json"
    value = finished.results[0].scores[0].value
    path.write_text(path.read_text(encoding="utf-8").replace(f'"value": {value}', '"value": NaN', 1))
    with pytest.raises(DataError, match=r"results\.json .*finite"):
        load_run(options["out"])


def test_the_cache_is_bounded_and_evicts_what_was_used_longest_ago(checkpoint, options, tmp_path):
    run(checkpoint, **options)
    banks = options["cache_dir"] / "features"
    old = {p.name for p in banks.iterdir()}
    other = make_checkpoint(tmp_path / "two.pth", seed=2)
    run(other, **{**options, "out": tmp_path / "b"}, cache_size_gb=1e-9)
    left = {p.name for p in banks.iterdir()}
    assert len(left) == 1
    assert not left & old


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
def test_a_stopped_run_goes_on_to_the_same_numbers(checkpoint, options, tmp_path, sign, code):
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


def test_a_half_written_bank_of_a_dead_process_is_swept(checkpoint, options):
    alive = staging(options["cache_dir"] / "features" / "abc")
    stale = alive.with_name(alive.name.replace(f".{os.getpid()}.", ".999999999."))
    stale.mkdir()
    run(checkpoint, **options)
    assert not stale.exists()
    assert alive.exists()


def test_a_run_says_at_its_start_what_is_doubtful_in_a_checkpoint(tmp_path, options, capsys):
    spec = vit_spec("lmim-bench", embed_dim=24, depth=2, num_heads=2, patch_size=8, image_size=32)
    note = "WARNING: the representations have collapsed"
    save_checkpoint(tmp_path / "x.pth", spec, build_vit(spec.arch).state_dict(), {"notes": [note]})
    run(tmp_path / "x.pth", **{**options, "tasks": "knn"})
    said = " ".join(capsys.readouterr().err.split())
    assert said.index(f"x: {note}") < said.index("scoring 1 cells")
