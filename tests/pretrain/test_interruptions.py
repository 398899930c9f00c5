"""Trainings that stop and go on: told to, killed, broken, under other settings, in a folder of another."""

import errno
import json
import os
import re
import shutil
import signal
import threading
import time
from functools import partial

import pytest
from torch._inductor.exc import InductorError

from lmim_bench.bench.claims import claim
from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.errors import CheckpointError, ConfigError, DataError
from lmim_bench.bench.progress import Reporter
from lmim_bench.pretrain import trainer
from lmim_bench.pretrain.api import pretrain, resume
from lmim_bench.pretrain.logbook import read_metrics
from lmim_bench.pretrain.recipe import load_recipe
from lmim_bench.pretrain.step import Stepper


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_losses_equal_an_unbroken_training(
    colours, tmp_path, training, launch, carry_out, losses, number
):
    args = ("--recipe", "latent-mim", "--data", colours, "--out")
    changes = (*training, "optim.steps=120", "masking.gap=2")
    carry_out(*args, tmp_path / "whole", sets=changes)
    broken = launch(*args, tmp_path / "broken", sets=changes)
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
    _, said = carry_out("--recipe", "latent-mim", "--resume", tmp_path / "broken")
    assert f"going on at step {stopped} of 120" in said
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


def test_a_first_save_that_fails_can_be_gone_on_from(start, cache, tmp_path, monkeypatch, losses):
    """Whether the state or the encoder did not get there."""
    start("mae", out="whole")

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("write_state", "save_checkpoint"):
        monkeypatch.setattr(trainer, name, full)
        with pytest.raises(OSError, match="No space left"):
            start("mae", "watch.keep_encoders=true", out=name)
        monkeypatch.undo()
        assert not (tmp_path / name / "encoder.pth").exists()
        assert resume(tmp_path / name, cache_dir=cache).finished
        assert losses(tmp_path / name) == losses(tmp_path / "whole")
        kept = sorted(path.name for path in (tmp_path / name / "encoders").iterdir())
        assert kept == ["step-00000004.pth", "step-00000008.pth"]


def test_what_a_killed_save_left_is_gone_after_the_next_sitting(start, cache, tmp_path):
    start("mae")
    out = tmp_path / "out"
    (out / "states" / "step-00000008.pth").unlink()
    left = [out / "states" / ".step-00000008.pth.0123abcd.tmp", out / ".encoder.pth.89abcdef.tmp"]
    for path in left:
        path.write_bytes(b"half")
    with claim(out), pytest.raises(ConfigError, match="another process"):
        resume(out, cache_dir=cache)
    assert all(path.exists() for path in left)
    assert resume(out, cache_dir=cache).finished
    assert not any(path.exists() for path in left)


def test_killed_before_the_summary_keeps_what_was_measured(start, cache, tmp_path):
    before = start("mae")
    (tmp_path / "out" / "summary.json").unlink()
    again = resume(tmp_path / "out", cache_dir=cache)
    assert again.finished
    assert (again.health, again.knn, again.loss) == (before.health, before.knn, before.loss)
    assert before.images_per_second
    assert again.images_per_second is None  # it had no step of its own to take


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


def test_a_recipe_of_a_file_is_known_by_its_name(start, cache, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: foo\nprojector: {depth: 0}\ntarget: {kind: pixels}\nobjective: {loss: mse}\n")
    start(str(mine))
    assert resume(tmp_path / "out", recipe=str(mine), cache_dir=cache).finished
    with pytest.raises(ConfigError, match="is a training of foo, not of mae"):
        resume(tmp_path / "out", recipe="mae", cache_dir=cache)


def test_killed_outright_goes_on_from_the_last_save(start, colours, cache, tmp_path, losses):
    start("latent-mim", out="whole")
    start("latent-mim", out="killed")
    (tmp_path / "killed" / "states" / "step-00000008.pth").unlink()  # as if killed between two saves
    (tmp_path / "killed" / "summary.json").unlink()
    assert resume(tmp_path / "killed", cache_dir=cache).finished
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.parametrize(("precision", "called"), [("bf16", "bf16-mixed"), ("fp16", "16-mixed")])
def test_in_half_precision_too_a_training_goes_on_as_if_unbroken(
    start, cache, tmp_path, precision, called, losses
):
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


def test_without_its_states_a_finished_training_is_left_and_another_refused(start, cache, tmp_path, capsys):
    summary = start("mae")
    out = tmp_path / "out"
    shutil.rmtree(out / "states")
    before = {path: path.read_bytes() for path in out.glob("*.*") if path.name != ".lock"}
    assert resume(out, cache_dir=cache, reporter=Reporter()) == summary
    assert "is finished, all 8 steps" in " ".join(capsys.readouterr().err.split())
    assert {path: path.read_bytes() for path in before} == before
    (out / "summary.json").unlink()
    with pytest.raises(ConfigError, match=r"holds encoder\.pth, and no state in states/ to go on from"):
        resume(out, cache_dir=cache)
    assert (out / "encoder.pth").read_bytes() == before[out / "encoder.pth"]


@pytest.mark.parametrize("kept", ["encoder.pth", "summary.json"])
def test_what_is_left_of_a_training_is_not_written_over(start, tmp_path, kept):
    start("mae")
    for path in (tmp_path / "out").iterdir():
        if path.name not in (kept, "recipe.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = (tmp_path / "out" / kept).read_bytes()
    with pytest.raises(ConfigError, match="already holds a training"):
        start("mae", "seed=7")
    assert (tmp_path / "out" / kept).read_bytes() == before


def test_a_recipe_that_was_edited_meanwhile_is_said_to_have_no_effect(start, cache, tmp_path, capsys):
    mine = tmp_path / "mine.yaml"
    text = "name: foo\nprojector: {depth: 0}\ntarget: {kind: pixels}\nobjective: {loss: mse}\n"
    mine.write_text(text)
    start(str(mine))
    mine.write_text(f"{text}seed: 3\nmodel: {{init: beit}}\n")
    assert resume(tmp_path / "out", recipe=str(mine), cache_dir=cache, reporter=Reporter()).finished
    said = " ".join(capsys.readouterr().err.split())
    assert f"WARNING: {mine} is not what {tmp_path / 'out'} is trained by, which stays:" in said
    assert "model.init xavier (not beit)" in said
    assert "seed 0 (not 3)" in said


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("summary.json", b'{"finished": tr', "summary.json is damaged; delete it"),
        ("summary.json", b"[]", "summary.json is damaged"),
        ("metrics.jsonl", b'{"step": 1}\n{"st\n{"step": 2}\n', "metrics.jsonl: line 2 is damaged"),
    ],
)
def test_a_damaged_file_of_a_training_is_named(start, cache, tmp_path, name, content, words):
    start("mae")
    (tmp_path / "out" / name).write_bytes(content)
    read = partial(resume, cache_dir=cache) if name == "summary.json" else read_metrics
    with pytest.raises(DataError, match=words):
        read(tmp_path / "out")


def test_states_none_of_which_can_be_read_are_one_line(start, cache, tmp_path):
    start("mae")
    (tmp_path / "out" / "summary.json").unlink()
    for path in (tmp_path / "out" / "states").glob("*.pth"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        CheckpointError, match=r"no training state can be read; the newest: .*another --out"
    ) as said:
        resume(tmp_path / "out", cache_dir=cache)
    assert "going back" not in str(said.value)


def test_the_seconds_of_all_sittings_add_up(start, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer._Run, "_agree", lambda self, asked, step: (step == 5, False))
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


@pytest.mark.parametrize(("told", "fails_at", "kept"), [(True, 7, 4), (True, 1, 0), (False, 7, None)])
def test_a_stop_that_ends_the_compiler_too_goes_back_to_the_last_state(
    start, cache, tmp_path, monkeypatch, losses, capsys, told, fails_at, kept
):
    start("latent-mim", "watch.checkpoints=2", out="whole")
    step, taken = Stepper.__call__, []

    def interrupted(*args):
        taken.append(None)
        if len(taken) == fails_at:
            args[0].model.update_target(0.5)  # as far as the step came
            if told:
                os.kill(os.getpid(), signal.SIGTERM)
            raise InductorError(RuntimeError("ptxas failed with error code -15"), None)
        return step(*args)

    monkeypatch.setattr(Stepper, "__call__", interrupted)
    if not told:
        with pytest.raises(InductorError, match="ptxas"):
            start("latent-mim", "watch.checkpoints=2")
        return
    stopped = start("latent-mim", "watch.checkpoints=2")
    assert (stopped.finished, stopped.step) == (False, kept)
    assert stopped.loss == (losses(tmp_path / "whole")[kept - 1] if kept else None)
    said = " ".join(capsys.readouterr().err.split())
    assert "told to stop while blocks were being compiled" in said
    assert ("states/step-00000004.pth" if kept else "nothing was saved before") in said
    monkeypatch.undo()
    assert resume(tmp_path / "out", cache_dir=cache).finished
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_a_broken_newest_state_is_named_and_the_one_before_is_used(start, cache, tmp_path, capsys):
    start("latent-mim")
    newest = tmp_path / "out" / "states" / "step-00000008.pth"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert resume(tmp_path / "out", cache_dir=cache, reporter=Reporter()).finished
    assert "step-00000008.pth cannot be read" in capsys.readouterr().err


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


def test_other_content_under_the_same_path_is_refused(colours, cache, tmp_path, training):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(colours, copy)
    pretrain("mae", str(copy), tmp_path / "out", sets=training, cache_dir=cache)
    (copy / "train" / "red" / "0.png").unlink()
    with pytest.raises(ConfigError, match="another content"):
        resume(tmp_path / "out", cache_dir=cache)


def test_several_processes_agree_within_seconds_whatever_a_step_takes(monkeypatch):
    """The slowest process's pace decides, on every one of them at the same step."""
    clock = [0.0]
    monkeypatch.setattr(trainer.time, "monotonic", lambda: clock[0])

    def agreements(seconds):
        run = trainer._Run.__new__(trainer._Run)
        run.recipe, run.saved_at = load_recipe("mae"), clock[0]
        run.agreed_at, run.last_agreement, run.next_agreement = clock[0], 0, 1
        calls = []

        class Two:
            world_size, device = 2, "cpu"

            def all_reduce(self, flags, reduce_op):
                calls.append(step)
                return flags

        run.fabric = Two()
        for step in range(1, 61):
            clock[0] += seconds
            run._agree(threading.Event(), step)
        return calls

    assert agreements(0.01) == [1, 11, 21, 31, 41, 51]
    assert agreements(0.5) == list(range(1, 61, 4))
    assert agreements(7.0) == list(range(1, 61))


def test_a_save_that_is_long_ago_is_made_up_for(start, tmp_path, monkeypatch):
    saved = []
    save = trainer._Run._save

    def noted(self, step, keep_encoder):
        saved.append((step, keep_encoder))
        save(self, step, keep_encoder)

    monkeypatch.setattr(trainer._Run, "_save", noted)
    start("mae", "watch.save_minutes=1e-9", "watch.checkpoints=1", "watch.keep_encoders=true")
    assert saved == [(step, step == 8) for step in range(1, 9)]
    assert [path.name for path in (tmp_path / "out" / "encoders").iterdir()] == ["step-00000008.pth"]
