"""The commands as a user types them: what they print, and their exit codes."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from lmim_bench.bench.checkpoints import save_checkpoint
from lmim_bench.bench.cli import cli
from lmim_bench.bench.vit import build_vit, vit_spec


@pytest.fixture
def invoke():
    def call(*args):
        return CliRunner().invoke(cli, [str(a) for a in args])

    return call


@pytest.fixture
def checkpoint(tmp_path):
    spec = vit_spec("lmim-bench", embed_dim=24, depth=4, num_heads=2, patch_size=8, image_size=32)
    save_checkpoint(tmp_path / "tiny.pth", spec, build_vit(spec.arch).state_dict(), {})
    return tmp_path / "tiny.pth"


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


def test_tasks_lists_the_five_with_their_headline(invoke):
    output = invoke("tasks").output
    for name, headline in {
        "knn": "top1@k=20",
        "linear": "top1",
        "unsup_seg": "miou",
        "vos": "jf_mean",
        "few_shot": "ncm@shots=5",
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


def test_inspect_prints_text_and_json(invoke, checkpoint):
    assert "lmim-bench" in invoke("inspect", checkpoint).output
    found = json.loads(invoke("inspect", checkpoint, "--json").output)
    assert found["format"].startswith("lmim-bench")
    broken = checkpoint.with_name("page.pth")
    broken.write_text("<!doctype html><html>login</html>")
    result = invoke("inspect", broken)
    assert result.exit_code == 2
    assert "page.pth" in result.stderr
    assert "Traceback" not in result.output


def test_run_report_and_dry_run(invoke, checkpoint, images, tmp_path):
    out = tmp_path / "out"
    common = ("run", "--ckpt", f"first={checkpoint}", "--tasks", "knn,few_shot", "--data", images)
    common += ("--out", out, "--cache-dir", tmp_path / "cache", "--device", "cpu", "--set", "knn.k=1,3")
    planned = invoke(*common, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "2 of 2 cells to do" in planned.output
    assert "k=[1, 3]" in planned.output
    assert not out.exists()
    done = invoke(*common)
    assert done.exit_code == 0, done.output
    assert "report.html" in done.stdout
    assert "first" in done.stdout
    assert "0 of 2 cells to do" in invoke(*common, "--dry-run").output
    (out / "report.html").unlink()
    again = invoke("report", out)
    assert again.exit_code == 0
    assert (out / "report.html").is_file()
    recorded = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert {r["protocol"].get("k", [None])[0] for r in recorded["results"]} >= {1}


def test_a_failed_cell_makes_exit_code_one(invoke, checkpoint, images, tmp_path):
    result = invoke(
        *("run", "--ckpt", checkpoint, "--tasks", "knn,few_shot", "--data", images, "--out", tmp_path / "o"),
        *("--cache-dir", tmp_path / "cache", "--device", "cpu", "--set", "knn.layer=-7"),
    )
    assert result.exit_code == 1
    assert "layer -7" in result.stdout


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


@pytest.mark.slow
def test_demo_trains_scores_and_reports(invoke, tmp_path):
    out = tmp_path / "demo"
    result = invoke("demo", "--out", out, "--steps", 5, "--device", "cpu", "--limit", 16)
    assert result.exit_code == 0, result.output
    recorded = json.loads((out / "results.json").read_text(encoding="utf-8"))
    labels = [r["checkpoint"]["label"] for r in recorded["results"]]
    assert list(dict.fromkeys(labels)) == ["Latent MIM", "MAE", "random weights"]
    assert {r["task"] for r in recorded["results"]} == {"knn", "linear", "unsup_seg", "vos", "few_shot"}
    assert (out / "report.html").is_file()
