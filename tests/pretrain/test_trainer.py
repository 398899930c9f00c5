"""Whole trainings: what they leave behind, interruptions, several processes, and what goes wrong."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from lmim_bench.bench.claims import claim
from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.errors import ConfigError, DataError, TrainingError
from lmim_bench.bench.progress import Reporter
from lmim_bench.pretrain import trainer
from lmim_bench.pretrain.api import open_images, pretrain, resume
from lmim_bench.pretrain.logbook import read_metrics
from lmim_bench.pretrain.recipe import load_recipe
from lmim_bench.pretrain.state import states

TINY = (
    "model.embed_dim=24",
    "model.depth=2",
    "model.num_heads=2",
    "model.patch_size=8",
    "data.image_size=32",
    "decoder.width=16",
    "decoder.depth=1",
    "decoder.num_heads=2",
    "projector.hidden_dim=32",
    "optim.batch_size=16",
    "optim.base_lr=1e-2",
    "optim.steps=8",
    "watch.log_every=1",
    "watch.checkpoints=2",
    "watch.evaluations=1",
    "watch.tensorboard=false",
    "engine.device=cpu",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(colours, cache, tmp_path):
    """Train with a recipe's name and changes into a folder of the test."""

    def call(recipe, *sets, out="out"):
        return pretrain(recipe, str(colours), tmp_path / out, sets=(*TINY, *sets), cache_dir=cache)

    return call


def losses(folder):
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


@pytest.mark.parametrize(
    "recipe", ["latent-mim", "mae", "latent-mim-naive", "i-jepa", "data2vec", "latent-mim-lite"]
)
def test_every_recipe_trains_and_leaves_an_encoder_that_loads(start, tmp_path, recipe):
    gap = ("masking.gap=2",) if recipe.startswith("latent-mim") else ()
    blocks = ("target.top_blocks=2",) if recipe == "data2vec" else ()
    context = ("masking.min_context=1",) if recipe == "i-jepa" else ()
    summary = start(recipe, *gap, *blocks, *context)
    assert summary.finished
    assert summary.step == 8
    assert summary.health is not None
    assert 0 <= summary.knn <= 1
    encoder = load_encoder(str(tmp_path / "out" / "encoder.pth"))
    assert not encoder.info.random_weights
    assert any(f"trained by the recipe {recipe} on" in note for note in encoder.info.notes)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["finished"] is True
    assert [step for _, step in states(tmp_path / "out" / "states")] == [8, 4]
    assert len(losses(tmp_path / "out")) == 8


def test_the_trained_encoder_is_the_one_of_the_state(start, tmp_path):
    start("latent-mim")
    state = torch.load(tmp_path / "out" / "states" / "step-00000008.pth", weights_only=True)
    saved = torch.load(tmp_path / "out" / "encoder.pth", weights_only=True)["encoder"]
    for name, tensor in saved.items():
        assert torch.equal(tensor, state["model"][f"encoder.vit.{name}"])


def test_the_same_seed_gives_the_same_training_and_another_seed_another(start, tmp_path):
    start("latent-mim", out="a")
    start("latent-mim", out="b")
    start("latent-mim", "seed=1", out="c")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")
    fingerprints = [load_encoder(str(tmp_path / n / "encoder.pth")).fingerprint for n in "abc"]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_accumulated_parts_give_the_same_losses(start, tmp_path):
    start("mae", out="whole")
    start("mae", "engine.accumulate=4", out="parts")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_activation_checkpointing_changes_no_loss(start, tmp_path):
    start("latent-mim", out="plain")
    start("latent-mim", "engine.activation_checkpointing=true", out="less")
    assert losses(tmp_path / "less") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)


def command(*args):
    return [sys.executable, "-m", "lmim_bench", "pretrain", *map(str, args)]


def sets(*changes):
    return [word for change in (*TINY, *changes) for word in ("--set", change)]


def environment():
    # One thread: the processes of a test share the machine with each other and with the suite.
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_losses_equal_an_unbroken_training(colours, cache, tmp_path, number):
    common = [
        "--recipe",
        "latent-mim",
        "--data",
        colours,
        "--cache-dir",
        cache,
        *sets("optim.steps=120", "masking.gap=2"),
    ]
    whole = subprocess.run(
        command(*common, "--out", tmp_path / "whole"),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert whole.returncode == 0, whole.stderr
    broken = subprocess.Popen(
        command(*common, "--out", tmp_path / "broken"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while len(losses(tmp_path / "broken")) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    broken.send_signal(number)
    said, problems = broken.communicate(timeout=120)
    assert broken.returncode == 0, problems
    match = re.search(
        r"stopped at step (\d+) of 120 and saved; go on with: lmim-bench pretrain --resume", said
    )
    assert match, said
    stopped = int(match.group(1))
    assert 5 <= stopped < 120
    going_on = subprocess.run(
        command("--recipe", "latent-mim", "--resume", tmp_path / "broken", "--cache-dir", cache),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert going_on.returncode == 0, going_on.stderr
    assert f"going on at step {stopped} of 120" in going_on.stderr
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    fingerprints = [load_encoder(str(tmp_path / n / "encoder.pth")).fingerprint for n in ("broken", "whole")]
    assert fingerprints[0] == fingerprints[1]


def test_told_again_while_it_writes_its_summary(start, tmp_path, monkeypatch):
    reached = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: reached.append(number))
    original = trainer.environment

    def told_again(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(trainer, "environment", told_again)
    try:
        start("mae")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not reached  # whoever calls would have been ended here
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["finished"] is True


def test_an_error_that_is_kept_keeps_no_process(start, monkeypatch):
    def failing(self, done, feed, parts):
        next(feed)
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(trainer.Stepper, "__call__", failing)
    with pytest.raises(RuntimeError, match="a fault of ours") as kept:
        start("mae", "data.workers=2")
    assert kept.traceback
    assert not multiprocessing.active_children()


def test_a_gpu_without_room_is_one_line_and_accumulation_mends_it(start, cache, tmp_path, monkeypatch):
    step = trainer.Stepper.__call__

    def crowded(self, done, feed, parts):
        if done >= 0.5 and parts < 2:
            raise torch.OutOfMemoryError("made up")
        return step(self, done, feed, parts)

    monkeypatch.setattr(trainer.Stepper, "__call__", crowded)
    wanted = r"cpu has no room for this training.*engine\.accumulate=2.*state is .*step-00000004\.pth"
    with pytest.raises(TrainingError, match=wanted):
        start("mae")
    done = resume(tmp_path / "out", sets=("engine.accumulate=2",), cache_dir=cache)
    assert done.finished


def test_killed_inside_a_save_ends_with_the_last_encoder(start, cache, tmp_path, monkeypatch):
    start("mae", out="whole")
    save = trainer.save_checkpoint

    def killed(path, spec, state_dict, facts):
        if facts["step"] == 8:
            raise RuntimeError("killed here")
        save(path, spec, state_dict, facts)

    monkeypatch.setattr(trainer, "save_checkpoint", killed)
    with pytest.raises(RuntimeError, match="killed here"):
        start("mae", out="broken")
    monkeypatch.setattr(trainer, "save_checkpoint", save)
    assert resume(tmp_path / "broken", cache_dir=cache).finished
    found = [load_encoder(str(tmp_path / name / "encoder.pth")) for name in ("broken", "whole")]
    assert found[0].fingerprint == found[1].fingerprint


def test_killed_before_the_summary_keeps_what_was_measured(start, cache, tmp_path):
    before = start("mae")
    (tmp_path / "out" / "summary.json").unlink()
    again = resume(tmp_path / "out", cache_dir=cache)
    assert again.finished
    assert (again.health, again.knn, again.loss) == (before.health, before.knn, before.loss)


def test_a_later_sitting_knows_what_an_earlier_one_measured(start, cache, tmp_path):
    start("mae", "watch.evaluations=2", "watch.checkpoints=4")
    (tmp_path / "out" / "states" / "step-00000008.pth").unlink()
    (tmp_path / "out" / "summary.json").unlink()
    (measured,) = [line for line in read_metrics(tmp_path / "out") if line["step"] == 4 and "knn" in line]
    again = resume(tmp_path / "out", sets=("watch.evaluations=0",), cache_dir=cache)
    assert again.finished
    assert again.knn == measured["knn"]
    assert again.health == {name: measured[f"health/{name}"] for name in again.health}


def test_a_second_training_does_not_touch_the_recipe_of_one_that_runs(start, tmp_path):
    recipe = tmp_path / "out" / "recipe.json"
    recipe.parent.mkdir()
    recipe.write_text("of the one that runs")
    with claim(tmp_path / "out"), pytest.raises(ConfigError, match="another process"):
        start("mae")
    assert recipe.read_text() == "of the one that runs"


def test_states_without_a_recipe_are_not_gone_on_with(start, tmp_path):
    start("mae")
    (tmp_path / "out" / "recipe.json").unlink()
    with pytest.raises(ConfigError, match="already holds a training"):
        start("mae", "seed=7")


def test_a_training_that_diverges_says_so_whatever_looks_first(start):
    with pytest.raises(
        TrainingError, match=r"(not finite after|nan between) steps? \d.*Lower optim\.base_lr"
    ):
        start("mae", "optim.base_lr=1e9", "optim.steps=20", "watch.evaluations=20", "watch.log_every=20")
    with pytest.raises(TrainingError, match=r"not finite after step 1; nothing was saved before\. Lower"):
        start("mae", "optim.base_lr=1e30", "optim.steps=1", "optim.warmup=0", out="at the last step")


def test_a_recipe_of_a_file_is_known_by_its_name(start, cache, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: foo\nprojector: {depth: 0}\ntarget: {kind: pixels}\nobjective: {loss: mse}\n")
    start(str(mine))
    assert resume(tmp_path / "out", recipe=str(mine), cache_dir=cache).finished
    with pytest.raises(ConfigError, match="is a training of foo, not of mae"):
        resume(tmp_path / "out", recipe="mae", cache_dir=cache)


def test_killed_outright_goes_on_from_the_last_save(start, colours, cache, tmp_path):
    start("latent-mim", out="whole")
    start("latent-mim", out="killed")
    (tmp_path / "killed" / "states" / "step-00000008.pth").unlink()  # as if killed between two saves
    (tmp_path / "killed" / "summary.json").unlink()
    assert resume(tmp_path / "killed", cache_dir=cache).finished
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.parametrize(("precision", "called"), [("bf16", "bf16-mixed"), ("fp16", "16-mixed")])
def test_in_half_precision_too_a_training_goes_on_as_if_unbroken(start, cache, tmp_path, precision, called):
    changes = (f"engine.precision={precision}", "optim.clip=1.0")
    start("latent-mim", *changes, out="whole")
    start("latent-mim", *changes, out="killed")
    (tmp_path / "killed" / "states" / "step-00000008.pth").unlink()
    assert resume(tmp_path / "killed", cache_dir=cache).finished
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    summary = json.loads((tmp_path / "killed" / "summary.json").read_text())
    assert summary["environment"]["precision"] == called


def test_a_finished_training_is_left_as_it_is(start, cache, tmp_path, capsys):
    summary = start("latent-mim")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != ".lock"]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    again = resume(tmp_path / "out", cache_dir=cache, reporter=Reporter())
    assert again == summary
    assert again.loss is not None
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert "is finished, all 8 steps" in " ".join(capsys.readouterr().err.split())


def test_the_seconds_of_all_sittings_add_up(start, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer._Run, "_stop", lambda self, asked, step: step == 5)
    first = start("mae")
    assert (first.finished, first.step) == (False, 5)
    path = tmp_path / "out" / "summary.json"
    stored = json.loads(path.read_text())
    assert stored["seconds"] == first.seconds > 0
    path.write_text(json.dumps({**stored, "seconds": 1000.0}))
    monkeypatch.undo()
    second = resume(tmp_path / "out", cache_dir=cache)
    assert second.finished
    assert 1000 < second.seconds < 1100
    assert json.loads(path.read_text())["seconds"] == second.seconds


def test_a_broken_newest_state_is_named_and_the_one_before_is_used(start, cache, tmp_path, capsys):
    start("latent-mim")
    newest = tmp_path / "out" / "states" / "step-00000008.pth"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert resume(tmp_path / "out", cache_dir=cache, reporter=Reporter()).finished
    assert "step-00000008.pth cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(colours, cache, tmp_path, start):
    """DDP over gloo at the same global batch; tolerance 1e-5, of which sums in another order take 1e-7."""
    start("latent-mim", "masking.gap=2", "optim.clip=1.0", out="one")
    args = ["--recipe", "latent-mim", "--data", colours, "--cache-dir", cache, "--out", tmp_path / "two"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *command(*args, *sets("masking.gap=2", "optim.clip=1.0"))[1:],
        ],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2
    assert done.stdout.count("encoder  ") == 1


@pytest.mark.slow
def test_fsdp2_saves_reloads_and_goes_on_under_another_strategy(colours, cache, tmp_path, start):
    start("latent-mim", out="plain")
    args = ["--recipe", "latent-mim", "--data", colours, "--cache-dir", cache, "--out", tmp_path / "sharded"]
    done = subprocess.run(
        command(*args, *sets("engine.strategy=fsdp2")),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)
    for strategy in ("fsdp2", "auto"):
        (tmp_path / "sharded" / "states" / "step-00000008.pth").unlink()
        again = subprocess.run(
            command(
                "--resume", tmp_path / "sharded", "--set", f"engine.strategy={strategy}", "--cache-dir", cache
            ),
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert again.returncode == 0, again.stderr
        assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)


def test_a_loss_that_is_not_finite_ends_the_training_and_names_the_last_good_state(start, tmp_path):
    with pytest.raises(TrainingError, match=r"the last good state is .*step-00000002\.pth.*optim\.base_lr"):
        start("mae", "optim.base_lr=1e30", "optim.warmup=0.5", "optim.warmup_from=0", "watch.checkpoints=4")
    assert all(np.isfinite(losses(tmp_path / "out")))
    state = torch.load(tmp_path / "out" / "states" / "step-00000002.pth", weights_only=True)
    assert all(torch.isfinite(t).all() for t in state["model"].values())


def test_a_folder_with_a_training_is_not_trained_over(start, tmp_path):
    start("mae")
    before = (tmp_path / "out" / "encoder.pth").read_bytes()
    with pytest.raises(ConfigError, match="already holds a training; --resume"):
        start("latent-mim")
    assert (tmp_path / "out" / "encoder.pth").read_bytes() == before


def test_a_training_has_one_writer(start, tmp_path):
    with claim(tmp_path / "out"), pytest.raises(ConfigError, match="another process writes into"):
        start("mae")


def test_a_training_that_never_began_leaves_its_folder_free(start, tmp_path):
    with pytest.raises(ConfigError, match=r"optim\.batch_size"):
        start("mae", "optim.batch_size=100000")
    start("mae")
    assert (tmp_path / "out" / "encoder.pth").is_file()


def test_what_a_resumed_training_refuses(start, cache, tmp_path):
    start("mae")
    with pytest.raises(ConfigError, match="is a training of mae, not of latent-mim"):
        resume(tmp_path / "out", recipe="latent-mim", cache_dir=cache)
    with pytest.raises(ConfigError, match="would make it another training"):
        resume(tmp_path / "out", sets=("model.depth=3",), cache_dir=cache)
    with pytest.raises(ConfigError, match=r"holds no training"):
        resume(tmp_path, cache_dir=cache)
    assert resume(tmp_path / "out", recipe="mae", cache_dir=cache).finished


def test_other_content_under_the_same_path_is_refused(colours, cache, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(colours, copy)
    pretrain("mae", str(copy), tmp_path / "out", sets=TINY, cache_dir=cache)
    (copy / "train" / "red" / "0.png").unlink()
    with pytest.raises(ConfigError, match="another content"):
        resume(tmp_path / "out", cache_dir=cache)


def test_images_without_labels_train_without_k_nn(colours, cache, tmp_path, capsys):
    summary = pretrain("mae", str(colours / "train" / "red"), tmp_path / "out", sets=TINY, cache_dir=cache)
    assert summary.finished
    assert summary.knn is None
    assert summary.health is not None
    assert "24 images without labels" in capsys.readouterr().err


def test_what_cannot_be_trained_on(start, cache, tmp_path):
    with pytest.raises(DataError, match="is a segmentation data set"):
        open_images("scenes-seg", Reporter(), cache)
    with pytest.raises(DataError, match="no data folder"):
        open_images(str(tmp_path / "nowhere"), Reporter(), cache)
    with pytest.raises(ConfigError, match=r"optim\.batch_size 64 is more than the 48 images"):
        start("mae", "optim.batch_size=64")


def test_decoding_in_every_epoch_gives_the_same_training(start, tmp_path):
    start("latent-mim", out="cached")
    start("latent-mim", "data.cache=never", "data.workers=1", out="decoded")
    assert losses(tmp_path / "decoded") == losses(tmp_path / "cached")


def test_tensorboard_holds_the_losses(start, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start("mae", "watch.tensorboard=true")
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses(tmp_path / "out"))


@pytest.mark.slow
def test_a_small_encoder_learns_on_the_scenes_and_the_naive_method_is_flagged(tmp_path):
    """About a million parameters: losses fall, k-NN beats random weights, naive Latent MIM collapses."""
    common = (
        *(
            "model.embed_dim=128",
            "model.depth=5",
            "model.num_heads=4",
            "model.patch_size=8",
            "data.image_size=64",
        ),
        *("decoder.width=64", "decoder.depth=1", "decoder.num_heads=2", "projector.hidden_dim=256"),
        *("optim.batch_size=64", "optim.base_lr=4e-3", "optim.warmup=0.1", "watch.log_every=5"),
        *("watch.evaluations=1", "watch.checkpoints=1", "watch.tensorboard=false", "engine.device=cpu"),
    )
    steps = {"latent-mim": 240, "mae": 240, "latent-mim-naive": 100}
    gap = {"latent-mim": ("masking.gap=2",)}
    found = {}
    for recipe, count in steps.items():
        changes = (*common, f"optim.steps={count}", *gap.get(recipe, ()))
        found[recipe] = pretrain(recipe, "scenes", tmp_path / recipe, sets=changes)
        curve = losses(tmp_path / recipe)
        assert np.mean(curve[-4:]) < 0.95 * curve[0], recipe
    assert (
        0.8e6
        < sum(p.numel() for p in load_encoder(str(tmp_path / "mae" / "encoder.pth")).model.parameters())
        < 1.2e6
    )
    start_knn = next(line["knn"] for line in read_metrics(tmp_path / "latent-mim") if "knn" in line)
    assert found["latent-mim"].knn > start_knn + 0.02
    assert not found["latent-mim"].warnings
    assert any("collapsed" in warning for warning in found["latent-mim-naive"].warnings)
    encoder = load_encoder(str(tmp_path / "latent-mim-naive" / "encoder.pth"))
    assert any(note.startswith("WARNING: the representations have collapsed") for note in encoder.info.notes)
    assert load_recipe("latent-mim-naive").target.kind == "shared"
