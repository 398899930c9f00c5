"""Trainings that are compared, one at a time and side by side."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest

from lmim_bench.bench import cores, trainings
from lmim_bench.bench.data import workers as data_workers
from lmim_bench.bench.data.splits import ArraySplit
from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.errors import TrainingError
from lmim_bench.bench.progress import Reporter
from lmim_bench.bench.trainings import Trainer, plan_row
from lmim_bench.pretrain.api import open_images
from lmim_bench.pretrain.recipe import load_recipe
from lmim_bench.pretrain.state import states
from lmim_bench.pretrain.step import Stepper
from lmim_bench.pretrain.studies import Row


@pytest.fixture
def short(tiny_sets):
    """The changes for a training of four steps."""
    return (
        *tiny_sets,
        *("optim.steps=4", "watch.evaluations=1", "watch.tensorboard=false", "engine.device=cpu"),
    )


@pytest.fixture
def planned(colours, tmp_path, short):
    """A trainer, and rows of these recipes with changes, in a folder of the test."""
    data = open_images(str(colours), Reporter(), tmp_path / "cache")
    trainer = Trainer(data, str(colours), tmp_path / "cache", "a test")

    def call(*recipes, out="out", sets=()):
        rows = [Row(label=f"row {i}", recipe=name) for i, name in enumerate(recipes)]
        made = [load_recipe(row.recipe or "mae", [*short, "masking.gap=0", *sets]) for row in rows]
        return trainer, [plan_row(*pair, data, tmp_path / out) for pair in zip(rows, made, strict=True)]

    return call


@pytest.mark.slow
def test_side_by_side_gives_the_encoders_of_one_at_a_time(planned, capfd):
    recipes = ("mae", "latent-mim", None, "mae")
    trainer, single = planned(*recipes, out="single")
    trainer.train_all(single, Reporter())
    said = capfd.readouterr().err
    assert [line for line in said.splitlines() if line.startswith("row")] == ["row 0:", "row 1:", "row 2:"]
    _, double = planned(*recipes, out="double")
    trainer.train_all(double, Reporter(), jobs=2)
    said = capfd.readouterr().err
    assert "row 0: step 4: cosine" in said
    assert "row 1: step 4: cosine" in said
    assert said.count("decoding images, once") <= 1
    for one, other in zip(single, double, strict=True):
        assert other.finished
        ours, theirs = (load_encoder(str(t.folder / "encoder.pth")).model.state_dict() for t in (other, one))
        for name, tensor in theirs.items():
            np.testing.assert_allclose(ours[name], tensor, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("asked", "workers"), [((), 6), (("data.workers=2",), 2)])
def test_images_are_decoded_by_all_cores_before_the_trainings_share_them(
    planned, monkeypatch, asked, workers
):
    opened, begun = [], []
    monkeypatch.setattr(data_workers, "own_cores", lambda: 7)
    monkeypatch.setattr(
        trainings, "open_pixels", lambda split, _, recipe, root, workers, __: opened.append(workers)
    )
    monkeypatch.setattr(Trainer, "_side_by_side", lambda self, todo, jobs: begun.append(list(opened)))
    trainer, rows = planned("mae", "latent-mim", None, sets=asked)
    trainer.train_all(rows, Reporter(), jobs=2)
    assert begun == [[workers]]


def test_what_a_process_is_sent_fits_into_the_pipe_that_it_has_not_read_yet(planned, monkeypatch):
    """Else its start waits until it has imported all that reads it, and for ever where it dies meanwhile."""
    sent = []

    def begin(context, *arguments):
        sent.append(len(ForkingPickler.dumps(arguments)))
        raise TrainingError("seen enough")

    monkeypatch.setattr(trainings, "_begin", begin)
    trainer, rows = planned("mae", "latent-mim")
    pixels = np.zeros((500, 32, 32, 3), np.uint8)
    large = ArraySplit(pixels, [str(i) for i in range(500)], np.zeros(500, np.int64))
    splits = {**trainer.data.splits, "large": large}
    trainer = replace(trainer, data=replace(trainer.data, splits=splits))
    with pytest.raises(TrainingError, match="seen enough"):
        trainer.train_all(rows, Reporter(), jobs=2)
    assert 0 < sent[0] < 2**15


@pytest.mark.slow
def test_an_error_of_one_training_stops_all_and_is_the_error(planned):
    trainer, rows = planned("mae", "latent-mim", sets=("optim.base_lr=1e30", "optim.steps=60"))
    with pytest.raises(TrainingError, match="the loss is nan between steps"):
        trainer.train_all(rows, Reporter(), jobs=2)
    assert not any(trained.finished for trained in rows)


def test_a_row_goes_on_with_the_engine_and_the_watching_of_the_new_command(planned, monkeypatch):
    trainer, (row,) = planned("mae", sets=("engine.threads=1", "watch.checkpoints=2"))
    trainer.train(row, Reporter())
    (row.folder / "summary.json").unlink()
    (row.folder / "states" / "step-00000004.pth").unlink()
    _, (again,) = planned("mae", sets=("engine.accumulate=2", "watch.keep_encoders=true"))
    assert again.folder == row.folder
    parts = []
    step = Stepper.__call__

    def counted(self, *args):
        parts.append(self.recipe.engine.accumulate)
        return step(self, *args)

    monkeypatch.setattr(Stepper, "__call__", counted)
    trainer.train(again, Reporter())
    assert parts == [2, 2]
    kept = sorted(path.name for path in (row.folder / "encoders").iterdir())
    assert kept == ["step-00000002.pth", "step-00000003.pth", "step-00000004.pth"]


def test_a_row_goes_on_where_its_images_lie_now(planned, colours, tmp_path):
    trainer, (row,) = planned("mae", sets=("watch.checkpoints=2",))
    trainer.train(row, Reporter())
    (row.folder / "summary.json").unlink()
    (row.folder / "states" / "step-00000004.pth").unlink()
    recipe = json.loads((row.folder / "recipe.json").read_text())
    (row.folder / "recipe.json").write_text(json.dumps({**recipe, "data": str(tmp_path / "gone")}))
    trainer.train(row, Reporter())
    assert row.finished


@pytest.mark.slow
def test_a_killed_training_is_named_and_the_others_are_saved(planned):
    trainer, rows = planned("mae", "latent-mim", sets=("optim.steps=1000000",))
    metrics = [trained.folder / "metrics.jsonl" for trained in rows]

    def kill_the_first():
        while not all(path.is_file() for path in metrics):
            time.sleep(0.05)
        first = min(multiprocessing.active_children(), key=lambda process: process.pid)
        os.kill(first.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill_the_first)
    thread.start()
    with pytest.raises(
        TrainingError, match=r"row 0: the training was killed \(SIGKILL\).* fewer --jobs than 2"
    ):
        trainer.train_all(rows, Reporter(), jobs=2)
    thread.join()
    assert not states(rows[0].folder / "states")
    assert len(states(rows[1].folder / "states")) == 1
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_fault_of_ours_is_shown_and_ends_all(planned, capfd):
    trainer, rows = planned("mae", "latent-mim")
    with pytest.raises(TrainingError, match=r"row [01]: the training ended by the error above"):
        replace(trainer, reference=7).train_all(rows, Reporter(), jobs=2)
    assert "TypeError" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True], ids=["SIGTERM to the parent", "Ctrl-C to all"])
def test_a_stopped_study_saves_all_and_leaves_no_process(colours, tmp_path, short, to_all):
    out = tmp_path / "study"
    sets = [word for text in (*short, "optim.steps=1000000") for word in ("--set", text)]
    command = [
        *(sys.executable, "-m", "lmim_bench", "ablate", "--study", "headline", "--budget", "tiny"),
        *("--data", str(colours), "--out", str(out), "--cache-dir", str(tmp_path / "cache"), "--jobs", "2"),
    ]
    process = subprocess.Popen(
        [*command, *sets],
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        text=True,
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob("trainings/*/metrics.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    if to_all:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "the same command goes on" in said
    assert "Traceback" not in said
    begun = [path.parent for path in out.glob("trainings/*/metrics.jsonl")]
    assert len(begun) == 2
    for folder in begun:
        ((_, step),) = states(folder / "states")
        assert 0 < step < 1_000_000
        assert json.loads((folder / "summary.json").read_text())["finished"] is False
    while any_left(process.pid) and time.monotonic() < deadline + 30:
        time.sleep(0.05)  # the last to go is multiprocessing's own helper
    assert not any_left(process.pid)


def any_left(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_jobs_take_the_gpus_in_turn(monkeypatch):
    import torch

    for count, expected in ((0, [None] * 3), (1, [None] * 3), (2, ["cuda:0", "cuda:1", "cuda:0"])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert trainings._devices(3) == expected


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_cores_are_shared_out(monkeypatch, count):
    monkeypatch.setattr(cores, "usable_cores", lambda: list(range(4, 4 + count)))
    for parts in (1, 2, 3, 16, 20):
        shares = cores.split_cores(parts)
        assert len(shares) == parts
        assert all(shares)
        taken = [core for share in shares for core in share]
        assert sorted(set(taken)) == list(range(4, 4 + count))
        if parts <= count:
            assert taken == list(range(4, 4 + count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_cores_are_those_that_the_scheduler_gives():
    assert cores.usable_cores() == sorted(os.sched_getaffinity(0))
