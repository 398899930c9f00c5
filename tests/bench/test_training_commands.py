"""``pretrain``, ``ablate`` and ``export`` as a user types them."""

import json
import os
import re
import signal

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from lmim_bench.bench.cli import cli
from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.trainings import plan_row
from lmim_bench.bench.types import Dataset
from lmim_bench.pretrain.studies import (
    SCALES,
    idle_reason,
    load_study,
    refuse_overruled,
    row_recipe,
    study_names,
)


@pytest.fixture
def invoke():
    def call(*args):
        return CliRunner().invoke(cli, [str(a) for a in args])

    return call


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i, name in enumerate(("a", "b", "c")):
            folder = tmp_path / "letters" / split / name
            folder.mkdir(parents=True)
            for j in range(24):
                pixels = rng.integers(0, 120, (40, 40, 3))
                pixels[..., i] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{j}.png")
    return tmp_path / "letters"


@pytest.fixture
def tiny(tiny_sets):
    """The words that make a training of four steps, with changes."""

    def call(*changes):
        sets = (*tiny_sets, "optim.steps=4", "watch.tensorboard=false", *changes)
        return [word for change in sets for word in ("--set", change)]

    return call


def test_pretrain_lists_its_recipes_and_shows_one(invoke):
    listed = invoke("pretrain", "--list").output
    for name in ("mae", "latent-mim", "latent-mim-naive", "latent-mim-lite", "i-jepa", "data2vec"):
        assert any(line.split()[:1] == [name] for line in listed.splitlines())
    shown = invoke("pretrain", "--recipe", "latent-mim", "--set", "model.depth=6", "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "objective.tau" in shown.output
    assert "20 of 196 patches visible, crops of 280 pixels" in shown.output
    assert "peak learning rate 0.0024" in shown.output


def test_pretrain_trains_resumes_and_what_it_writes_is_scored(invoke, images, tmp_path, tiny):
    out, cache = tmp_path / "run", tmp_path / "cache"
    common = ("--cache-dir", cache)
    done = invoke(
        *("pretrain", "--recipe", "mae", "--data", images, "--out", out, "--device", "cpu", *common, *tiny())
    )
    assert done.exit_code == 0, done.output
    assert f"lmim-bench run --ckpt {out / 'encoder.pth'} --tasks all" in done.stdout
    again = invoke("pretrain", "--recipe", "mae", "--data", images, "--out", out, *common, *tiny())
    assert again.exit_code == 2
    assert f"--resume {out}" in again.stderr
    resumed = invoke("pretrain", "--recipe", "mae", "--resume", out, *common)
    assert resumed.exit_code == 0, resumed.output
    scored = invoke(
        *("run", "--ckpt", out / "encoder.pth", "--tasks", "knn", "--data", images),
        *("--out", tmp_path / "scores", "--device", "cpu", *common),
    )
    assert scored.exit_code == 0, scored.output
    assert "trained by the recipe mae" in (tmp_path / "scores" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("args", [("pretrain", "--recipe", "mae"), ("ablate", "--study", "decoder")])
def test_a_terminated_command_ends_as_an_interrupted_one(invoke, images, tmp_path, monkeypatch, args):
    def terminated(*given, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal did not come")

    monkeypatch.setattr("lmim_bench.bench.ablation.open_images", terminated)  # imported before the next
    monkeypatch.setattr("lmim_bench.pretrain.api.open_images", terminated)
    done = invoke(*args, "--data", images, "--out", tmp_path / "out")
    assert done.exit_code == 130


@pytest.mark.parametrize("name", ["mps", "tpu", "xpu:0", "cuda:x"])
def test_a_device_that_is_not_known_is_one_line(invoke, images, tmp_path, tiny, name):
    args = ("pretrain", "--recipe", "mae", "--data", images, "--out", tmp_path / "out", "--device", name)
    done = invoke(*args, "--cache-dir", tmp_path / "cache", *tiny())
    assert done.exit_code == 2
    assert f"there is no device '{name}'; use auto, cpu, cuda or cuda:N" in done.stderr


def test_pretrain_leaves_broken_images_out_where_it_is_told_to(invoke, images, tmp_path, tiny):
    cut = images / "train" / "a" / "3.png"
    cut.write_bytes(cut.read_bytes()[:99])
    args = ("pretrain", "--recipe", "mae", "--data", images, "--device", "cpu", "--cache-dir", tmp_path / "c")
    refused = invoke(*args, "--out", tmp_path / "refused", *tiny())
    assert refused.exit_code == 2
    assert f"{cut} is broken" in refused.stderr
    assert refused.stderr.strip().endswith("--skip-broken puts another image in its place")
    done = invoke(*args, "--out", tmp_path / "run", "--skip-broken", *tiny())
    assert done.exit_code == 0, done.output
    assert "1 broken image(s) left out, another in the place of each, first train/a/3.png" in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give --recipe NAME"),
        (("--recipe", "mea"), "Did you mean 'mae'?"),
        (("--recipe", "mae"), "give --data"),
        (("--recipe", "mae", "--data", "nowhere"), "nowhere"),
        (("--recipe", "mae", "--set", "model.dept=3"), "Did you mean 'depth'?"),
        (("--resume", "nowhere"), "holds no training"),
        (("--resume", "nowhere", "--out", "x"), "leave out --out"),
    ],
)
def test_pretrain_refuses_in_one_line(invoke, args, message):
    result = invoke("pretrain", *args)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_ablate_lists_every_study_and_all_rows_make_recipes(invoke):
    listed = invoke("ablate", "--list").output
    for name in study_names():
        assert f"{name}: " in listed
        labels = [row.label for row in load_study(name).rows]
        assert len(set(labels)) == len(labels)
        for scale in SCALES.values():
            rows = load_study(name).rows
            recipes = [row_recipe(row, scale, side, (), "cpu") for row in rows for side in (32, 500)]
            assert len({r.model.shape for r in recipes}) == 1
            assert len({(r.optim.epochs, r.optim.batch_size, r.optim.base_lr) for r in recipes}) == 1


def test_widths_of_a_row_follow_the_encoder_that_is_asked_for():
    row = load_study("remedies").rows[-3]
    for sets, width in (
        ((), 384),
        (("model.arch=vit_tiny",), 192),
        (("model.embed-dim=96", "model.num_heads=3", "seed=1"), 96),
    ):
        recipe = row_recipe(row, SCALES["full"], 32, sets, "cpu")
        assert recipe.model.shape[0] == width
        assert recipe.decoder.width == width * 2 // 3
        assert recipe.decoder.num_heads == width * 2 // 3 // 32
        assert recipe.projector.hidden_dim == width * 16 // 3
    assert row_recipe(row, SCALES["full"], 32, ("decoder.width=64",), "cpu").decoder.width == 64


def test_rows_that_could_not_differ_are_left_out(invoke, images, tmp_path):
    """A gap of one pixel, which small patches get, leaves no choice of where a patch lies in its cell."""
    for name in study_names():
        for scale in SCALES.values():
            for side in (32, 500):
                rows = {row.label: row for row in load_study(name).rows}
                idle = [
                    label
                    for label, row in rows.items()
                    if idle_reason(row, row_recipe(row, scale, side, (), "cpu"))
                ]
                assert idle == (["gap, fixed place"] if name == "masking" and side == 32 else [])
    # Nothing is trained: the batch is larger than the data.
    args = ("--budget", "tiny", "--out", tmp_path, "--cache-dir", tmp_path, "--set", "optim.batch_size=1000")
    stopped = invoke("ablate", "--study", "masking", "--data", images, *args)
    assert stopped.exit_code == 2
    assert (
        "'gap, fixed place' is left out: masking.placement changes nothing, as masking.gap is 1"
        in stopped.stderr
    )


@pytest.mark.slow
def test_ablate_trains_scores_and_compares_and_keeps_what_is_done(invoke, images, tmp_path, tiny):
    out = tmp_path / "studies"
    args = ("ablate", "--study", "decoder", "--data", images, "--budget", "tiny", "--out", out)
    args += ("--device", "cpu", "--cache-dir", tmp_path / "cache", *tiny("watch.evaluations=1"))
    cut = images / "train" / "a" / "3.png"
    cut.write_bytes(cut.read_bytes()[:99])
    stopped = invoke(*args)
    assert stopped.exit_code == 2
    assert f"{cut} is broken" in stopped.stderr
    args += ("--skip-broken",)
    done = invoke(*args)
    assert done.exit_code == 0, done.output
    table = (out / "decoder" / "table.md").read_text(encoding="utf-8")
    *rows, shallow = load_study("decoder").rows
    assert all(f"| {row.label} |" in table for row in rows)
    assert f"| {shallow.label} |" not in table
    assert f"{shallow.label!r} is left out: at this size it is the same training as" in done.stderr
    assert "peak learning rate" in table
    assert re.search(r"minutes of training in all on .*, in fp32\.\n", table)
    assert "train/a/3.png" in (out / "decoder" / "report.html").read_text(encoding="utf-8")
    before = {p: p.stat().st_mtime_ns for p in out.glob("trainings/*/encoder.pth")}
    assert len(before) == len(load_study("decoder").rows) - 1  # MAE's depth is one block already at this size
    assert invoke(*args).exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in out.glob("trainings/*/encoder.pth")} == before
    refused = invoke(*args, "--set", "optim.steps=6")
    assert refused.exit_code == 2
    assert "trained otherwise" in refused.output
    assert "give another --out" in refused.output
    assert {p: p.stat().st_mtime_ns for p in out.glob("trainings/*/encoder.pth")} == before


def test_a_training_is_found_again_by_its_recipe_and_its_data(tmp_path):
    row = load_study("decoder").rows[0]
    short, longer = (row_recipe(row, SCALES["tiny"], 32, (f"optim.steps={n}",), "cpu") for n in (4, 8))
    here, there = (Dataset("set", "classification", fingerprint, splits={}) for fingerprint in "ab")
    folders = [
        plan_row(row, *what, tmp_path).folder for what in ((short, here), (longer, here), (short, there))
    ]
    assert len(set(folders)) == 3
    assert plan_row(row, short, here, tmp_path).folder == folders[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give --study"),
        (
            ("--study", "collapse", "--data", "scenes", "--set", "target.kind=ema"),
            "the rows of the study collapse differ in it (ema, frozen",
        ),
        (
            ("--study", "masking", "--data", "scenes", "--set", "masking.visible=0.5"),
            "differ in it (0.103, 0.25, 0.5)",
        ),
        (
            ("--study", "decoder", "--data", "scenes", "--set", "optim.batch_size=5000"),
            "optim.batch_size 5000 is more than the 1200 images",
        ),
        (("--study", "colapse", "--data", "scenes"), "Did you mean 'collapse'?"),
        (("--study", "decoder", "--data", "scenes", "--set", "engine.skip_broken=true"), "say --skip-broken"),
    ],
)
def test_ablate_refuses_in_one_line_before_it_trains(invoke, tmp_path, args, message):
    result = invoke("ablate", *args, "--budget", "tiny", "--out", tmp_path)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "trainings").exists()


def test_what_changes_no_row_s_meaning_is_taken():
    for name in study_names():
        refuse_overruled(
            load_study(name), SCALES["tiny"], 32, ("optim.steps=3", "decoder.width=64", "seed=1")
        )


def test_a_row_is_trained_anew_where_parts_or_precision_decide_it(tmp_path, monkeypatch):
    def folder(label, *sets):
        row = next(row for row in load_study("objective").rows if row.label == label)
        recipe = row_recipe(row, SCALES["tiny"], 32, sets, "cpu")
        return plan_row(row, recipe, Dataset("set", "classification", "a", splits={}), tmp_path).folder

    batch, image = "negatives of the batch", "patch discrimination"
    assert folder(batch) != folder(batch, "engine.accumulate=4")
    assert folder(image) != folder(image, "engine.precision=fp16")
    here = folder(image)
    assert here == folder(image, "engine.precision=fp32")
    with monkeypatch.context() as gpu:
        gpu.setattr("lmim_bench.bench.trainings.resolve_device", lambda device: "cuda:0")
        assert here != folder(image) == folder(image, "engine.precision=bf16")
    alone = "objective.similarity_weight=0"
    assert folder(image, alone) == folder(image, alone, "engine.accumulate=4")


def test_a_dry_run_looks_at_the_data_and_at_what_changes_nothing(invoke, images, tiny, tmp_path):
    args = ("pretrain", "--recipe", "mae", "--dry-run", *tiny("objective.tau=0.3"), "--data")
    done = invoke(*args, images)
    assert done.exit_code == 0, done.output
    assert "4 steps of 16 images, 4 an epoch of 72" in done.output
    assert "WARNING  objective.tau changes nothing: objective.loss is mse" in done.output
    assert invoke(*args, tmp_path / "nowhere").exit_code == 2
    refused = invoke(*args, images, "--set", "optim.batch_size=4096")
    assert refused.exit_code == 2
    assert "is more than the 72 images" in refused.output


def test_a_training_goes_on_from_anywhere_and_with_its_images_elsewhere(
    invoke, images, tiny, tmp_path, monkeypatch
):
    monkeypatch.chdir(images.parent)
    common = ("--cache-dir", tmp_path / "cache")
    args = ("pretrain", "--recipe", "mae", "--data", images.name, "--out", tmp_path / "run", *common, *tiny())
    assert invoke(*args).exit_code == 0
    newest = max((tmp_path / "run" / "states").iterdir())
    monkeypatch.chdir(tmp_path / "cache")
    newest.unlink()
    (tmp_path / "run" / "summary.json").unlink()
    again = invoke("pretrain", "--resume", tmp_path / "run", *common)
    assert again.exit_code == 0, again.output
    images.rename(tmp_path / "moved")
    lost = invoke("pretrain", "--resume", tmp_path / "run", *common)
    assert lost.exit_code == 2
    assert f"--data says where the images of {tmp_path / 'run'} lie now" in lost.output
    assert "images/s" in again.output
    (tmp_path / "run" / "summary.json").unlink()
    found = invoke("pretrain", "--resume", tmp_path / "run", "--data", tmp_path / "moved", *common)
    assert found.exit_code == 0, found.output
    assert "images/s" not in found.output  # no step was left to do
    assert invoke("pretrain", "--resume", tmp_path / "run", "--dry-run").exit_code == 2


def test_export_writes_what_loads_again(invoke, images, tmp_path, tiny):
    done = invoke(
        *("pretrain", "--recipe", "mae", "--data", images, "--out", tmp_path / "run", "--device", "cpu"),
        *("--cache-dir", tmp_path / "cache", *tiny()),
    )
    assert done.exit_code == 0, done.output
    source = tmp_path / "run" / "encoder.pth"
    exported = invoke("export", source, "--format", "mae", "--out", tmp_path / "mae.pth")
    assert exported.exit_code == 0, exported.output
    assert "load     " in exported.stdout
    ours, theirs = load_encoder(str(source)), load_encoder(f"{tmp_path / 'mae.pth'}#heads=2")
    assert theirs.spec.family == "mae"
    for name, tensor in ours.model.state_dict().items():
        assert bool((theirs.model.state_dict()[name] == tensor).all()), name
    refused = invoke("export", source, "--format", "mae", "--out", tmp_path / "mae.pth")
    assert refused.exit_code == 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["finished"]
