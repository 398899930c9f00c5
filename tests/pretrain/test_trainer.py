"""Whole trainings: what they leave behind, several processes, and what goes wrong."""

import json
import multiprocessing
import shutil
import time

import numpy as np
import pytest
import torch

from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.errors import ConfigError, DataError, TrainingError
from lmim_bench.bench.progress import Reporter
from lmim_bench.pretrain import masking, trainer
from lmim_bench.pretrain.api import open_images, pretrain, resume
from lmim_bench.pretrain.logbook import read_metrics
from lmim_bench.pretrain.model import MaskedImageModel
from lmim_bench.pretrain.monitor import Watcher
from lmim_bench.pretrain.recipe import load_recipe
from lmim_bench.pretrain.state import states


@pytest.mark.parametrize(
    "recipe", ["latent-mim", "mae", "latent-mim-naive", "i-jepa", "data2vec", "latent-mim-lite"]
)
def test_every_recipe_trains_and_leaves_an_encoder_that_loads(start, tmp_path, recipe, losses):
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


@pytest.mark.parametrize(
    ("recipe", "sets", "kept", "other"),
    [
        ("latent-mim", (), "encoder", "target_encoder"),
        ("latent-mim", ("target.export=target",), "target_encoder", "encoder"),
        ("i-jepa", ("masking.min_context=1",), "target_encoder", "encoder"),
        ("data2vec", ("target.top_blocks=2",), "encoder", "target_encoder"),
    ],
)
def test_the_encoder_that_is_kept_and_watched_is_the_one_that_the_recipe_exports(
    start, tmp_path, monkeypatch, recipe, sets, kept, other
):
    watched, look = [], Watcher.__call__

    def noted(self, *weights):
        watched.append(weights)
        return look(self, *weights)

    monkeypatch.setattr(Watcher, "__call__", noted)
    start(recipe, *sets, "watch.keep_encoders=true")
    state = torch.load(tmp_path / "out" / "states" / "step-00000008.pth", weights_only=True)["model"]

    def of(name, part):
        start = f"{name}.{part}."
        return {k.removeprefix(start): tensor for k, tensor in state.items() if k.startswith(start)}

    def same(one, two):
        return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

    for file in ("encoder.pth", "encoders/step-00000008.pth"):
        saved = torch.load(tmp_path / "out" / file, weights_only=True)
        assert same(saved["encoder"], of(kept, "vit"))
        assert not same(saved["encoder"], of(other, "vit"))
        said = any("target encoder" in note for note in saved["recipe"]["notes"])
        assert said == (kept == "target_encoder")
    assert same(watched[-1][0], of(kept, "vit"))
    assert same(watched[-1][1], of(kept, "projector"))


def test_the_same_seed_gives_the_same_training_and_another_seed_another(start, tmp_path, losses):
    start("latent-mim", out="a")
    start("latent-mim", out="b")
    start("latent-mim", "seed=1", out="c")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")
    fingerprints = [load_encoder(str(tmp_path / n / "encoder.pth")).fingerprint for n in "abc"]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_accumulated_parts_give_the_same_losses(start, tmp_path, losses):
    start("mae", out="whole")
    start("mae", "engine.accumulate=4", out="parts")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_images_that_see_other_numbers_of_patches_share_a_part(start, tmp_path, losses, monkeypatch):
    monkeypatch.setattr(masking, "GROUP", 3)
    passes, predict = [], MaskedImageModel.predict

    def noted(self, patches, masks, runs=()):
        passes.append(len(runs))
        return predict(self, patches, masks, runs)

    monkeypatch.setattr(MaskedImageModel, "predict", noted)
    sets = ("masking.min_context=1", "data.workers=0")
    start("i-jepa", *sets, out="whole")
    assert max(passes) > 1
    start("i-jepa", *sets, "engine.accumulate=4", out="parts")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_activation_checkpointing_changes_no_loss(start, tmp_path, losses):
    start("latent-mim", out="plain")
    start("latent-mim", "engine.activation_checkpointing=true", out="less")
    assert losses(tmp_path / "less") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)


def test_the_speed_counts_the_time_in_which_processes_agree(start, tmp_path, monkeypatch):
    """A device works through the steps that it was handed while they wait for it."""
    agree = trainer._Run._agree

    def waiting(self, asked, step):
        time.sleep(0.1)
        return agree(self, asked, step)

    monkeypatch.setattr(trainer._Run, "_agree", waiting)
    found = start("mae")
    speeds = [line["images_per_second"] for line in read_metrics(tmp_path / "out") if "loss" in line]
    assert max(found.images_per_second, *speeds) < 16 / 0.1


def test_an_error_that_is_kept_keeps_no_process(start, monkeypatch):
    def failing(self, done, feed):
        next(feed)
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(trainer.Stepper, "__call__", failing)
    with pytest.raises(RuntimeError, match="a fault of ours") as kept:
        start("mae", "data.workers=2")
    assert kept.traceback
    assert not multiprocessing.active_children()


def test_a_gpu_without_room_is_one_line_and_accumulation_mends_it(start, cache, tmp_path, monkeypatch):
    step = trainer.Stepper.__call__

    def crowded(self, done, feed):
        if done >= 0.5 and self.recipe.engine.accumulate < 2:
            raise torch.OutOfMemoryError("made up")
        return step(self, done, feed)

    monkeypatch.setattr(trainer.Stepper, "__call__", crowded)
    wanted = (
        r"cpu has no room for this training; set engine\.activation_checkpointing=true, .*parts "
        r"\(engine\.accumulate=2\), .*state is .*step-00000004\.pth"
    )
    with pytest.raises(TrainingError, match=wanted):
        start("mae")
    done = resume(tmp_path / "out", sets=("engine.accumulate=2",), cache_dir=cache)
    assert done.finished


def test_parts_that_change_what_is_learned_are_said(start, cache, tmp_path, monkeypatch, capsys):
    def said():
        lines = " ".join(capsys.readouterr().err.split()).split("WARNING: ")[1:]
        return [line for line in lines if "compares the images" in line]

    start("mae", "engine.accumulate=2", out="alike")
    start("latent-mim", "objective.similarity_weight=0", "engine.accumulate=2", out="of each image")
    start("latent-mim")
    assert said() == []
    resume(tmp_path / "out", sets=("engine.accumulate=4",), cache_dir=cache)
    (line,) = said()
    assert line.startswith(
        "objective.similarity_weight compares the images of one part, so that engine.accumulate=4 "
        "(before: 1) changes what is learned; engine.activation_checkpointing=true saves memory without that"
    )
    changes = ("objective.similarity_weight=0", "objective.negatives=batch", "engine.accumulate=2")
    start("latent-mim", *changes, out="parts")
    (line,) = said()
    assert line.startswith("objective.negatives=batch compares the images of one part, so that engine.acc")
    resume(tmp_path / "parts", sets=("engine.accumulate=1",), cache_dir=cache)
    (line,) = said()
    assert "engine.accumulate=1 (before: 2) changes what is learned" in line

    def crowded(self, done, feed):
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(trainer.Stepper, "__call__", crowded)
    with pytest.raises(TrainingError, match=r"\(engine\.accumulate=2, which changes what is learned by this"):
        start("latent-mim", out="crowded")


def test_a_training_that_diverges_says_so_whatever_looks_first(start):
    with pytest.raises(
        TrainingError, match=r"(not finite after|nan between) steps? \d.*lower optim\.base_lr"
    ):
        start("mae", "optim.base_lr=1e9", "optim.steps=20", "watch.evaluations=20", "watch.log_every=20")
    with pytest.raises(TrainingError, match=r"not finite after step 1; nothing was saved .*Start anew"):
        start("mae", "optim.base_lr=1e30", "optim.steps=1", "optim.warmup=0", out="at the last step")


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(colours, tmp_path, start, training, carry_out, losses):
    """DDP over gloo at the same global batch; tolerance 1e-5, of which sums in another order take 1e-7."""
    start("latent-mim", "masking.gap=2", "optim.clip=1.0", out="one")
    args = ("--recipe", "latent-mim", "--data", colours, "--out", tmp_path / "two")
    said, _ = carry_out(*args, sets=(*training, "masking.gap=2", "optim.clip=1.0"), processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2
    assert said.count("encoder  ") == 1


@pytest.mark.slow
def test_fsdp2_saves_reloads_and_goes_on_under_another_strategy(
    colours, tmp_path, start, training, carry_out, losses
):
    start("latent-mim", out="plain")
    args = ("--recipe", "latent-mim", "--data", colours, "--out", tmp_path / "sharded")
    carry_out(*args, sets=(*training, "engine.strategy=fsdp2"))
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)
    for strategy in ("fsdp2", "auto"):
        (tmp_path / "sharded" / "states" / "step-00000008.pth").unlink()
        carry_out("--resume", tmp_path / "sharded", sets=(f"engine.strategy={strategy}",))
        assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)


def test_a_loss_that_is_not_finite_ends_the_training_and_names_the_last_good_state(start, tmp_path, losses):
    with pytest.raises(TrainingError, match=r"the last state is .*step-00000002\.pth.*optim\.base_lr"):
        start("mae", "optim.base_lr=1e30", "optim.warmup=0.5", "optim.warmup_from=0", "watch.checkpoints=4")
    assert all(np.isfinite(losses(tmp_path / "out")))
    state = torch.load(tmp_path / "out" / "states" / "step-00000002.pth", weights_only=True)
    assert all(torch.isfinite(t).all() for t in state["model"].values())


def test_images_without_labels_train_without_k_nn(colours, cache, tmp_path, capsys, training):
    summary = pretrain(
        "mae", str(colours / "train" / "red"), tmp_path / "out", sets=training, cache_dir=cache
    )
    assert summary.finished
    assert summary.knn is None
    assert summary.health is not None
    assert "24 images without labels" in capsys.readouterr().err


def test_images_of_types_that_are_not_read_are_told(colours, cache, tmp_path, capsys):
    shutil.copytree(colours, tmp_path / "copy")
    (tmp_path / "copy" / "train" / "red" / "x.avif").write_bytes(b"")
    open_images(str(tmp_path / "copy"), Reporter(), cache)
    assert "1 file ignored (.avif 1)" in " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_trained_on(start, cache, tmp_path):
    with pytest.raises(DataError, match="is a segmentation data set"):
        open_images("scenes-seg", Reporter(), cache)
    with pytest.raises(DataError, match="no data folder"):
        open_images(str(tmp_path / "nowhere"), Reporter(), cache)
    with pytest.raises(ConfigError, match=r"optim\.batch_size 64 is more than the 48 images"):
        start("mae", "optim.batch_size=64")


def test_decoding_in_every_epoch_gives_the_same_training(start, tmp_path, losses):
    start("latent-mim", out="cached")
    start("latent-mim", "data.cache=never", "data.workers=1", out="decoded")
    assert losses(tmp_path / "decoded") == losses(tmp_path / "cached")


def test_tensorboard_holds_the_losses(start, tmp_path, losses):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start("mae", "watch.tensorboard=true")
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses(tmp_path / "out"))


@pytest.mark.slow
def test_a_small_encoder_learns_on_the_scenes_and_the_naive_method_is_flagged(tmp_path, losses):
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
