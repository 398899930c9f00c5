"""The commands as a user types them: what they print, and their exit codes."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from lmim_bench.bench.checkpoints.loading import families
from lmim_bench.bench.cli import cli


@pytest.fixture
def invoke():
    def call(*args):
        return CliRunner().invoke(cli, [str(a) for a in args])

    return call


@pytest.fixture
def checkpoint(save_tiny, tmp_path):
    return save_tiny(tmp_path / "tiny.pth")


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b", "c"):
            folder = tmp_path / "letters" / split / name
            folder.mkdir(parents=True)
            for i in range(6):
                Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "letters"


def test_help_of_every_command(invoke):
    assert "one report" in invoke("--help").output
    for name in cli.commands:
        result = invoke(name, "--help")
        assert result.exit_code == 0
        assert result.output.startswith("Usage: ")


def test_unknown_command_names_the_nearest(invoke):
    result = invoke("rnu")
    assert result.exit_code == 2
    assert "Did you mean 'run'?" in result.output


def test_tasks_lists_each_with_its_headline(invoke):
    output = invoke("tasks").output
    for name, headline in {
        "knn": "top1@k=20",
        "linear": "top1",
        "unsup_seg": "miou",
        "vos": "jf_mean",
        "few_shot": "ncm@shots=5",
        "diagnose": "collapse",
        "hidden_patches": "content",
    }.items():
        assert any(line.split()[:1] == [name] and headline in line for line in output.splitlines())


def test_describe_prints_every_field(invoke):
    from lmim_bench.tasks import registry

    for name, spec in registry()[0].items():
        output = invoke("describe", name).output
        for field in spec.config.model_fields:
            assert f" {field} " in output
    result = invoke("describe", "vso")
    assert result.exit_code == 2
    assert "Did you mean 'vos'?" in result.stderr


def test_data_lists_and_describes(invoke, images, tmp_path):
    assert "scenes-video" in invoke("data").output
    output = invoke("data", images, "--cache-dir", tmp_path / "cache").output
    assert "imagefolder" in output
    assert "train 18, val 18" in output
    result = invoke("data", tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "nowhere" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_inspect_prints_groups_of_aligned_values(invoke, checkpoint):
    lines = invoke("inspect", checkpoint).output.splitlines()
    titles = [line for line in lines if not line.startswith(" ")]
    assert titles == ["checkpoint", "encoder", "evaluated with", "coverage"]
    assert all(line[14:16] == "  " and line[16] != " " for line in lines if line not in titles)
    values = {line[:16].strip(): line[16:] for line in lines}
    assert values["format"] == "lmim-bench (torch)"
    assert values["heads"] == "2"
    assert values["tokens"] == "class token + 16 patches"
    assert values["positions"] == "resampled by the rule 'timm'"
    assert values["filled"] == "54 of 54 tensors of the encoder"


def test_inspect_says_where_the_heads_come_from_and_what_was_dropped_for_which_reason(invoke, tmp_path):
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=192, depth=1, num_heads=3, num_classes=7, reg_tokens=4
    )
    torch.save({"state_dict": model.state_dict(), "optimizer": {"m": torch.ones(2)}}, tmp_path / "vit.pth")
    output = invoke("inspect", tmp_path / "vit.pth").output
    assert "heads         WARNING: 3 heads are assumed for width 192" in output
    assert "class token + 4 registers + 16 patches" in output
    assert "classifier head: state_dict.head.*" in output
    assert "training state: optimizer.*" in output
    found = json.loads(invoke("inspect", tmp_path / "vit.pth", "--json").output)
    assert found["heads"]["number"] == 3
    assert found["heads"]["source"].startswith("WARNING: 3 heads are assumed for width 192")
    assert found["registers"] == 4
    assert found["dropped"] == {"state_dict.head.*": "classifier head", "optimizer.*": "training state"}


def test_inspect_prints_json_and_names_a_broken_file(invoke, checkpoint):
    found = json.loads(invoke("inspect", checkpoint, "--json").output)
    assert found["format"].startswith("lmim-bench")
    assert found["preprocessing"]["pos_interpolation"] == "timm"
    broken = checkpoint.with_name("page.pth")
    broken.write_text("<!doctype html><html>login</html>")
    result = invoke("inspect", broken)
    assert result.exit_code == 2
    assert "page.pth" in result.stderr
    assert "Traceback" not in result.output


def test_formats_has_a_line_for_every_family_and_names_the_other_references(invoke):
    lines = invoke("formats").output.splitlines()
    for family in families():
        (line,) = [line for line in lines if line.split()[:1] == [family.name]]
        for text in (family.title, family.known_by, family.evaluated, family.source):
            assert text in line
    assert any(line.split()[:1] == ["lmim-bench"] for line in lines)
    for reference in ("timm:NAME", "random:REF", "python:package.module:factory", "pixels, pixels:PATCH"):
        assert any(line.strip().startswith(reference) for line in lines)


def test_formats_as_json_holds_all_encoders_that_a_family_prefers(invoke):
    listing = json.loads(invoke("formats", "--json").output)
    rows = {row["family"]: row for row in listing["families"]}
    assert set(rows) == {"lmim-bench", *(family.name for family in families())}
    assert rows["dino"]["encoders"][0] == "teacher"
    assert {"random:REF", "timm:NAME"} <= {row["reference"] for row in listing["references"]}


def test_formats_fits_a_terminal_of_100_columns(invoke, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in invoke("formats").output.splitlines()]
    assert max(map(len, lines)) <= 100
    assert any(line.split() == ["known", "by", "rope_embed.periods"] for line in lines)


def test_run_report_and_dry_run(invoke, checkpoint, images, tmp_path):
    out = tmp_path / "out"
    common = ("run", "--ckpt", f"first={checkpoint}", "--tasks", "knn,few_shot", "--data", images)
    common += ("--out", out, "--cache-dir", tmp_path / "cache", "--device", "cpu", "--set", "knn.k=1,3")
    planned = invoke(*common, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "2 of 2 cells to do" in planned.output
    assert "k=[1, 3]" in planned.output
    assert "estimate, for this machine" in planned.output
    assert re.search(r"about [\d.]+ s; [\d.,]+ [MG]B of memory; [1-9]\d* kB in the cache", planned.output)
    assert not out.exists()
    done = invoke(*common)
    assert done.exit_code == 0, done.output
    assert "report.html" in done.stdout
    assert "first" in done.stdout
    again = invoke(*common, "--dry-run").output
    assert "0 of 2 cells to do" in again
    assert "about" not in again
    (out / "report.html").unlink()
    again = invoke("report", out)
    assert again.exit_code == 0
    assert (out / "report.html").is_file()
    recorded = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert {r["protocol"].get("k", [None])[0] for r in recorded["results"]} >= {1}


def test_a_dry_run_says_that_the_disk_is_too_small(invoke, checkpoint, images, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    result = invoke(
        *("run", "--ckpt", f"first={checkpoint}", "--tasks", "knn", "--data", images, "--dry-run"),
        *("--out", tmp_path / "out", "--cache-dir", tmp_path / "cache", "--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    assert "WARNING  the disk of the cache has 1 kB free: free some, or give --cache-dir" in result.output


def test_a_dry_run_says_what_will_fail(invoke, checkpoint, images, tmp_path):
    result = invoke(
        *(
            "run",
            "--ckpt",
            f"first={checkpoint}",
            "--tasks",
            "knn",
            "--data",
            images,
            "--out",
            tmp_path / "o",
        ),
        *("--cache-dir", tmp_path / "cache", "--device", "cpu", "--set", "knn.layer=-7", "--dry-run"),
    )
    assert result.exit_code == 1
    assert "first: knn on letters will fail: layer -7" in result.output
    assert not (tmp_path / "o").exists()


def test_a_failed_cell_makes_exit_code_one(invoke, checkpoint, images, tmp_path):
    result = invoke(
        *("run", "--ckpt", checkpoint, "--tasks", "knn,few_shot", "--data", images, "--out", tmp_path / "o"),
        *("--cache-dir", tmp_path / "cache", "--device", "cpu", "--set", "knn.layer=-7"),
    )
    assert result.exit_code == 1
    assert "layer -7" in result.stdout
    # A later run of other cells tells of the failure, and has none of its own.
    later = invoke(
        *("run", "--ckpt", checkpoint, "--tasks", "few_shot", "--data", images, "--out", tmp_path / "o"),
        *("--cache-dir", tmp_path / "cache", "--device", "cpu"),
    )
    assert later.exit_code == 0
    assert "FAILED" in later.stdout


def test_a_full_disk_is_one_line(invoke, monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lmim_bench.bench.opening.open_run", full)
    result = invoke("run", "--ckpt", "pixels", "--tasks", "knn", "--out", tmp_path / "o")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "lmim-bench: No space left on device"
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--ckpt", "nowhere.pth"), "nowhere.pth"),
        (("--ckpt", "pixels", "--tasks", "knnn"), "Did you mean 'knn'?"),
        (("--ckpt", "pixels", "--set", "knn.temprature=1"), "Did you mean 'temperature'?"),
        (("--ckpt", "pixels", "--set", "knn"), "--set takes"),
        (("--ckpt", "pixels", "--set", "knn.k=many"), "knn.k"),
        (("--ckpt", "pixels", "--suite", "scene"), "Did you mean 'scenes'?"),
        (("--ckpt", "pixels", "--device", "cuda:99"), "cuda:99"),
        (("--ckpt", "pixels", "--device", "tpu"), "device"),
        (("--ckpt", "pixels", "--data", "no/such/folder"), "no/such/folder"),
        (("--ckpt", "timm:vit_tinny_patch16_224"), "vit_tinny_patch16_224"),
        (("--ckpt", "pixels", "--limit", "0"), "limit"),
        (("--ckpt", "=pixels"), "label"),
        (("--ckpt", ""), "--ckpt.reference"),
        (("--ckpt", f"{'x' * 90}.pth"), f"{'x' * 90}.pth"),
        (("--ckpt", "pixels", "--cache-size", "inf"), "cache_size"),
        (("--ckpt", "pixels", "--set", "vos.topk=3"), "no task 'vos'"),
        (("--ckpt", "pixels", "--data", "scenes-video"), "none of the chosen tasks takes one"),
        (("--ckpt", "python:nowhere:make"), "nowhere cannot be imported"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_two(invoke, tmp_path, args, message):
    result = invoke("run", "--tasks", "knn", "--out", tmp_path / "o", "--cache-dir", tmp_path / "c", *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output
    assert not (tmp_path / "o").exists()


def test_a_run_folder_that_cannot_be_made_is_one_line(invoke, checkpoint, images, tmp_path):
    (tmp_path / "file").touch()
    result = invoke(
        *(
            "run",
            "--ckpt",
            checkpoint,
            "--tasks",
            "knn",
            "--data",
            images,
            "--out",
            tmp_path / "file" / "sub",
        ),
        *("--cache-dir", tmp_path / "cache", "--device", "cpu"),
    )
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert str(tmp_path / "file") in result.stderr


def test_a_task_without_data_of_its_own_says_that_it_runs_on_the_embedded(
    invoke, checkpoint, images, tmp_path
):
    result = invoke(
        *(
            "run",
            "--ckpt",
            checkpoint,
            "--tasks",
            "knn,vos",
            "--data",
            images,
            "--dry-run",
            "--device",
            "cpu",
        ),
        *("--out", tmp_path / "o", "--cache-dir", tmp_path / "cache"),
    )
    assert "no video data is named: vos runs on the embedded scenes-video" in result.output


def test_a_suite_serves_the_tasks_that_it_does_not_list(invoke, checkpoint, images, tmp_path):
    suite = tmp_path / "s.yaml"
    suite.write_text("data: {mine: letters}\ntasks: {knn: {data: mine, k: [1, 5, 10, 20, 50, 100, 200]}}\n")
    result = invoke(
        *("run", "--ckpt", checkpoint, "--tasks", "knn,few_shot", "--suite", suite, "--dry-run"),
        *("--out", tmp_path / "o", "--cache-dir", tmp_path / "cache", "--device", "cpu"),
    )
    assert "few_shot" in result.output
    assert "scenes" not in result.output
    assert "k=[" not in result.output  # what equals the default is not a change


def test_debug_shows_the_traceback(checkpoint):
    done = subprocess.run(
        [sys.executable, "-m", "lmim_bench", "--debug", "inspect", "nowhere.pth"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_cache_shows_and_clears(invoke, checkpoint, images, tmp_path):
    cache = tmp_path / "cache"
    invoke(
        *("run", "--ckpt", checkpoint, "--tasks", "knn", "--data", images, "--out", tmp_path / "o"),
        *("--cache-dir", cache, "--device", "cpu"),
    )
    assert "features" in invoke("cache", "--cache-dir", cache).output
    assert invoke("cache", "--clear", "features", "--cache-dir", cache).output.startswith("freed")
    assert not list((cache / "features").glob("*/meta.json"))


def test_the_installed_command_answers():
    command = shutil.which("lmim-bench", path=str(sys.prefix) + "/bin")
    assert command
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("lmim-bench, version ")


def test_a_terminal_that_is_not_of_utf_8_is_no_error():
    done = subprocess.run(
        [sys.executable, "-m", "lmim_bench", "describe", "vos"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"?" in done.stdout


@pytest.mark.slow
def test_demo_trains_scores_and_reports(invoke, tmp_path):
    out = tmp_path / "demo"
    result = invoke("demo", "--out", out, "--steps", 5, "--device", "cpu", "--limit", 16)
    assert result.exit_code == 0, result.output
    recorded = json.loads((out / "results.json").read_text(encoding="utf-8"))
    labels = [r["checkpoint"]["label"] for r in recorded["results"]]
    assert list(dict.fromkeys(labels)) == ["Latent MIM", "MAE", "random weights"]
    assert {r["task"] for r in recorded["results"]} == {
        "knn",
        "linear",
        "unsup_seg",
        "vos",
        "few_shot",
        "diagnose",
        "hidden_patches",
    }
    shown = [r["checkpoint"]["label"] for r in recorded["results"] if r["task"] == "hidden_patches"]
    assert shown == ["Latent MIM", "MAE"]
    assert "hidden_patches is left out for random weights: there is no decoder beside it" in result.stderr
    assert (out / "report.html").is_file()
