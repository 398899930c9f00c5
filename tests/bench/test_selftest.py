"""The self test: all tasks beside random weights, its verdicts, its exit codes."""

import numpy as np
import pytest
from click.testing import CliRunner

from lmim_bench.bench import selftest
from lmim_bench.bench.building import build_model
from lmim_bench.bench.checkpoints import save_checkpoint
from lmim_bench.bench.cli import cli
from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.results import load_run
from lmim_bench.bench.selftest import CONTROL, _side, compared, is_above
from lmim_bench.bench.vit import vit_spec

TASKS = {"knn", "linear", "unsup_seg", "vos", "few_shot"}


def invoke(*args):
    return CliRunner().invoke(cli, ["selftest", *map(str, args)])


def save(path, seed=3):
    spec = vit_spec("lmim-bench", embed_dim=48, depth=2, num_heads=3, patch_size=16, image_size=64)
    save_checkpoint(path, spec, build_model(spec, seed).state_dict(), {})
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output of one self test, and its run folder."""
    folder = tmp_path_factory.mktemp("selftest")
    result = invoke("--ckpt", f"mine={save(folder / 'tiny.pth')}", "--out", folder / "out")
    return result, folder / "out"


@pytest.fixture
def smallest(monkeypatch):
    """Fewer pictures, for the runs of which no number is looked at."""
    sizes = selftest.Sizes(train_per_class=2, val_per_class=1, segmentation=(1, 10), sequences=1)
    monkeypatch.setattr(selftest, "_SIZES", sizes)


def test_every_task_is_scored_beside_random_weights(finished):
    result, out = finished
    assert result.exit_code == 0, result.output
    run = load_run(out)
    assert {(r.checkpoint.label, r.task) for r in run.results} == {
        (label, task) for label in ("mine", CONTROL) for task in TASKS
    }
    assert {r.status for r in run.results} == {"ok"}
    specs = {r.checkpoint.label: r.checkpoint for r in run.results}
    assert specs["mine"].spec == specs[CONTROL].spec
    assert specs["mine"].fingerprint != specs[CONTROL].fingerprint
    assert not specs["mine"].info.random_weights
    assert specs[CONTROL].info.random_weights


def test_the_output_says_that_it_is_no_benchmark_and_has_a_line_a_task(finished):
    result, out = finished
    lines = result.stdout.splitlines()
    assert any("LIMITED RUN" in line for line in lines)
    assert any("no benchmark numbers" in line and "every cell was scored" in line for line in lines)
    sentences = {line.split()[0] for line in lines if CONTROL in line and " points " in line}
    assert sentences == TASKS
    assert any(line.startswith("verdict") and "of 5 tasks" in line for line in lines)
    assert str(out / "report.html") in lines[-1]
    assert (out / "report.html").is_file()
    assert load_run(out).limited


def tampered(finished, tmp_path, task, value):
    """The verdict on a task where every item of the checkpoint has this value."""
    _, out = finished
    for path in (out / "items").glob("*.npz"):
        target = tmp_path / "items" / path.name
        target.parent.mkdir(exist_ok=True)
        with np.load(path) as stored:
            arrays = dict(stored)
        if path.name.startswith(f"mine--{task}--"):
            arrays = {k: v if k.endswith("/clusters") else np.full_like(v, value) for k, v in arrays.items()}
        np.savez(target, **arrays)
    run = load_run(out)
    results = [
        result.model_copy(
            update={"scores": tuple(score.model_copy(update={"value": value}) for score in result.scores)}
        )
        if (result.checkpoint.label, result.task) == ("mine", task)
        else result
        for result in run.results
    ]
    verdicts = compared(run.model_copy(update={"results": tuple(results)}), "mine", tmp_path)
    assert [v.column.task for v in verdicts].count(task) == 1
    assert len(verdicts) == len(TASKS)
    return next(v for v in verdicts if v.column.task == task)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_a_clear_lead_on_a_task_is_above_and_a_clear_loss_is_not(finished, tmp_path, task):
    better = tampered(finished, tmp_path, task, 2.0)
    assert is_above(better)
    assert better.sentence.startswith("mine is better than random weights by ")
    worse = tampered(finished, tmp_path, task, -1.0)
    assert not is_above(worse)
    assert worse.sentence.startswith("random weights is better than mine by ")


def test_without_out_nothing_is_left_behind(smallest, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    result = invoke("--ckpt", save(tmp_path / "tiny.pth"))
    assert result.exit_code == 0, result.output
    assert list((tmp_path / "temporary").iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["temporary", "tiny.pth"]


@pytest.mark.parametrize(
    ("reference", "note"),
    [
        ("pixels", "no row of random weights"),
        ("timm:vit_tiny_patch16_224#image_size=64", "has random weights itself"),
    ],
)
def test_without_a_control_the_reason_is_said(smallest, reference, note):
    result = invoke("--ckpt", reference)
    assert result.exit_code == 0, result.output
    assert note in result.stdout
    assert "verdict" not in result.stdout
    assert "every cell was scored" in result.stdout


def test_checkpoints_without_a_control_share_a_folder(smallest, tmp_path):
    for reference in ("pixels", "other=pixels:32"):
        result = invoke("--ckpt", reference, "--out", tmp_path / "out")
        assert result.exit_code == 0, result.output
    assert {r.checkpoint.label for r in load_run(tmp_path / "out").results} == {"pixels", "other"}


def test_a_failed_cell_is_exit_code_one(smallest, tmp_path, monkeypatch):
    usual = selftest._protocol
    monkeypatch.setattr(selftest, "_protocol", lambda side: usual(side) | {"knn": {"layer": -7}})
    result = invoke("--ckpt", save(tmp_path / "tiny.pth"))
    assert result.exit_code == 1
    assert "2 cells FAILED" in result.stdout
    assert "layer -7" in result.stdout
    assert "of 4 tasks" in result.stdout


def test_a_checkpoint_that_cannot_be_loaded_is_exit_code_two():
    result = invoke("--ckpt", "nowhere.pth")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "nowhere.pth" in result.stderr


def test_images_are_about_96_pixels_or_of_the_only_size_that_the_encoder_takes(tmp_path, monkeypatch):
    assert _side(load_encoder("timm:vit_tiny_patch16_224")) == (96, [])
    assert _side(load_encoder("pixels:14")) == (98, [])
    (tmp_path / "one_size.py").write_text(
        "import torch\n"
        "from lmim_bench.bench.errors import TaskError\n"
        "class OneSize(torch.nn.Module):\n"
        "    embed_dim, patch_size, image_size = 3, 16, 64\n"
        "    def forward_features(self, images):\n"
        "        if images.shape[-1] != 64:\n"
        "            raise TaskError('only 64 pixels')\n"
        "        return torch.nn.functional.avg_pool2d(images, 16)\n"
    )
    monkeypatch.chdir(tmp_path)
    side, notes = _side(load_encoder("python:one_size:OneSize"))
    assert side == 64
    assert "only 64 pixels" in notes[0]
