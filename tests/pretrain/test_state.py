"""What a training keeps on disk: its states, and its metrics."""

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from lmim_bench.bench.errors import CheckpointError
from lmim_bench.pretrain.engine import make_optimizer
from lmim_bench.pretrain.logbook import Logbook, read_metrics
from lmim_bench.pretrain.model import MaskedImageModel
from lmim_bench.pretrain.state import read_state, restore, snapshot, states, whole_weights, write_state


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def save(folder, step, keep=9):
    return write_state(folder, step, {"step": step, "x": torch.full((50,), float(step))}, keep)


def test_the_last_states_are_kept(tmp_path):
    for step in (3, 20, 100, 1000):
        path = save(tmp_path, step, keep=2)
        assert path.name == f"step-{step:08d}.pth"
    assert names(tmp_path) == ["step-00000100.pth", "step-00001000.pth"]
    (tmp_path / "notes.pth").touch()
    (tmp_path / ".step-00002000.pth.abc.tmp").touch()
    assert [step for _, step in states(tmp_path)] == [1000, 100]
    path, state, broken = read_state(tmp_path)
    assert (path.name, state["step"], broken) == ("step-00001000.pth", 1000, [])
    assert torch.equal(state["x"], torch.full((50,), 1000.0))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def blank(path):
    """As after a power cut: the length is right, the content is not."""
    path.write_bytes(bytes(path.stat().st_size))


def empty(path):
    path.write_bytes(b"")


def blank_inside(path):
    """The archive is whole, but the pickle in it is not one."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in content.items():
            archive.writestr(name, b"\0" * len(data) if name.endswith("data.pkl") else data)


@pytest.mark.parametrize("harm", [cut, blank, empty, blank_inside])
def test_a_damaged_newest_state_is_passed_over_and_named(tmp_path, harm):
    for step in (1, 2, 3):
        save(tmp_path, step)
    harm(tmp_path / "step-00000003.pth")
    path, state, broken = read_state(tmp_path)
    assert (path.name, state["step"]) == ("step-00000002.pth", 2)
    (line,) = broken
    assert line.startswith(f"{tmp_path / 'step-00000003.pth'} cannot be read (")
    assert "\n" not in line


@pytest.mark.parametrize("harm", [cut, blank, empty, blank_inside])
def test_no_readable_state_is_an_error(tmp_path, harm):
    for step in (1, 2):
        harm(save(tmp_path, step))
    with pytest.raises(
        CheckpointError,
        match=r"state can be read; the newest: .*00000002.*; start anew with another",
    ):
        read_state(tmp_path)


def test_a_folder_without_states_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="holds no training state"):
        read_state(tmp_path)


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_malicious_state_is_not_executed(tmp_path):
    """Whether a zip archive of torch or a bare pickle, it is a state that cannot be read."""
    target, folder = tmp_path / "executed", tmp_path / "states"
    save(folder, 1)
    torch.save({"step": Malicious(target)}, folder / "step-00000002.pth")
    (folder / "step-00000003.pth").write_bytes(pickle.dumps({"step": Malicious(target)}))
    path, _, broken = read_state(folder)
    assert not target.exists()
    assert path.name == "step-00000001.pth"
    assert len(broken) == 2


@pytest.mark.parametrize("keep", [1, 2])
def test_a_state_written_after_falling_back_is_kept(tmp_path, keep):
    """The damaged newer state must not push out the good ones."""
    save(tmp_path, 50)
    cut(save(tmp_path, 100))
    assert read_state(tmp_path)[1]["step"] == 50
    for step in (60, 70):
        assert save(tmp_path, step, keep=keep).exists()
        assert read_state(tmp_path)[1]["step"] == step
    good = [step for _, step in states(tmp_path) if step < 100]
    assert good == [70, 60][:keep]


@pytest.fixture
def stepped(tiny, fed):
    """A model and its optimiser after some steps; call to take more."""
    recipe = tiny("latent-mim")
    batch = fed(recipe)

    def fresh(seed):
        torch.manual_seed(seed)
        model = MaskedImageModel(recipe)
        return model, make_optimizer(model, recipe.optim, fused=False)

    def go(model, optimizer, steps):
        losses = []
        for _ in range(steps):
            model.update_target(0.9)
            loss = model(*batch, 0.5).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return fresh, go


def test_a_restored_training_goes_on_as_if_nothing_had_happened(tmp_path, stepped):
    fresh, go = stepped
    model, optimizer = fresh(0)
    go(model, optimizer, 3)
    write_state(tmp_path, 3, snapshot(model, optimizer), 1)
    expected = go(model, optimizer, 3)
    other, moments = fresh(1)
    restore(other, moments, read_state(tmp_path)[1])
    assert go(other, moments, 3) == expected
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("fused", [False, True])
def test_a_restored_optimiser_takes_its_steps_as_this_process_does(tmp_path, tiny, stepped, fused):
    """A state of a GPU is fused, one of the CPU is not; what it holds goes on under either."""
    fresh, go = stepped
    recipe = tiny("latent-mim")
    model, _ = fresh(0)
    other = make_optimizer(model, recipe.optim, fused=not fused)
    go(model, other, 3)
    write_state(tmp_path, 3, snapshot(model, other), 1)
    expected = go(model, other, 3)
    again, _ = fresh(1)
    mine = make_optimizer(again, recipe.optim, fused=fused)
    restore(again, mine, read_state(tmp_path)[1])
    assert [group["fused"] for group in mine.param_groups] == [fused, fused]
    assert all(moments["step"] == 3 for moments in mine.state.values())
    assert go(again, mine, 3) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("change", ["model.embed_dim=8", "model.depth=3", "target.kind=stop_gradient"])
def test_the_state_of_another_model_is_refused_in_one_line(tiny, stepped, change):
    fresh, go = stepped
    model, optimizer = fresh(0)
    go(model, optimizer, 1)
    recipe = tiny("latent-mim", change)
    other = MaskedImageModel(recipe)
    with pytest.raises(CheckpointError, match="the training state does not fit the recipe") as caught:
        restore(other, make_optimizer(other, recipe.optim, fused=False), snapshot(model, optimizer))
    assert "\n" not in str(caught.value)


def test_whole_weights_are_copies(stepped):
    model, _ = stepped[0](0)
    weights = whole_weights(model.encoder.vit)
    assert weights.keys() == model.encoder.vit.state_dict().keys()
    weights["norm.weight"].zero_()
    assert model.encoder.vit.norm.weight.min() == 1


def test_metrics_are_appended_line_by_line(tmp_path):
    log = Logbook(tmp_path, tensorboard=False, start=0)
    log.write(1, {"loss": 2.5})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.5}], "a line is there as soon as it is written"
    log.write(2, {"loss": 2.25, "knn": 0.5})
    log.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25, "knn": 0.5}]


def test_going_on_cuts_later_lines(tmp_path):
    log = Logbook(tmp_path, tensorboard=False, start=0)
    for step in range(1, 6):
        log.write(step, {"loss": float(step)})
    log.close()
    log = Logbook(tmp_path, tensorboard=False, start=3)
    log.write(4, {"loss": -4.0})
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, -4),
    ]
    assert names(tmp_path) == ["metrics.jsonl"]


def test_starting_anew_leaves_nothing_of_a_training_that_saved_nothing(tmp_path):
    """It is looked at before its first step; a second start looks again."""
    for _ in range(2):
        log = Logbook(tmp_path, tensorboard=False, start=0)
        log.write(0, {"knn": 0.1})
        log.write(1, {"loss": 1.0})
        log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    log = Logbook(tmp_path, tensorboard=False, start=5)
    log.write(6, {"loss": 1.0})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 6]
    assert read_metrics(tmp_path / "nowhere") == []


def test_tensorboard_files_are_written_beside(tmp_path):
    log = Logbook(tmp_path, tensorboard=True, start=0)
    log.write(1, {"loss": 2.5, "health/position_share": 0.5})
    log.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))
