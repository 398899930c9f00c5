"""A recorded pass: the numbers of the pass as it is, and refusals of what cannot be recorded."""

import gc
import weakref

import pytest
import torch

from lmim_bench.bench.errors import ConfigError
from lmim_bench.pretrain import engine
from lmim_bench.pretrain import step as step_module
from lmim_bench.pretrain.engine import make_fabric
from lmim_bench.pretrain.model import Fed
from lmim_bench.pretrain.replay import _WARM, Replayed
from lmim_bench.pretrain.step import Stepper


class Recorded:
    """A CUDA graph without a GPU: a replay reads and writes the memory that it was recorded with."""

    def __init__(self, parameters=()):
        self.parameters, self.replays = list(parameters), 0

    def warm(self, work):
        return work()

    def record(self, work):
        assert all(p.grad is None for p in self.parameters)
        found = work()
        gradients = [p.grad for p in self.parameters]
        kept = [found, *(g for g in gradients if g is not None)]
        for each in kept:
            each.fill_(torch.nan)  # recording computes nothing

        def replay():
            self.replays += 1
            for p in self.parameters:
                p.grad = None
            again = work()
            new = [again, *(p.grad for p in self.parameters if p.grad is not None)]
            for old, value in zip(kept, new, strict=True):
                old.copy_(value)
            for p in self.parameters:
                p.grad = None  # it is for whoever replays to say where they lie

        return found, replay


@pytest.fixture
def pair(tiny, monkeypatch):
    """A stepper as it is, and one whose pass is recorded."""

    def build(name, *changes):
        recorder = Recorded()
        monkeypatch.setattr(step_module, "GraphRecorder", lambda device: recorder)
        fabric = make_fabric(tiny(name, "engine.device=cpu").engine)
        made = [
            Stepper(tiny(name, f"engine.cuda_graph={graph}", *changes), fabric) for graph in (False, True)
        ]
        recorder.parameters = list(made[1].model.parameters())
        return (*made, recorder)

    return build


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mae", ("optim.clip=0.1",)),
        ("latent-mim", ("masking.gap=2", "objective.similarity_weight=0.5")),
        ("data2vec", ("target.top_blocks=2",)),
    ],
)
def test_a_recorded_pass_trains_as_the_pass_itself(pair, fed, name, changes):
    plain, recorded, recorder = pair(name, *changes)
    steps = 7
    for step in range(steps):
        part = Fed(*fed(plain.recipe, seed=step))
        expected, found = (one(step / steps, [part]) for one in (plain, recorded))
        assert list(found) == list(expected)
        for term, value in expected.items():
            assert found[term] == pytest.approx(float(value), rel=1e-6), (step, term)
    assert recorder.replays == steps - _WARM
    for ours, theirs in zip(recorded.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_what_a_pass_returned_outlives_the_next_one(fed, tiny):
    weight = torch.nn.Parameter(torch.tensor(2.0))

    def work(part, aim):
        loss = weight * part.images.mean() + aim
        loss.backward()
        return {"loss": loss.detach()}

    replayed = Replayed([weight], Recorded([weight]))
    found, gradients = [], []
    for i in range(6):
        weight.grad = None
        images, offsets, masks = fed(tiny("mae"), seed=i)
        found.append((replayed(work, Fed(images * 0 + i, offsets, masks), 0.5)["loss"], 2.0 * i + 0.5))
        gradients.append(float(weight.grad))
    assert [float(loss) for loss, _ in found] == [expected for _, expected in found]
    assert gradients == [float(i) for i in range(6)]


def test_a_training_that_is_over_leaves_no_weights_behind(tiny):
    """With its optimiser they fill a GPU, and the next training of an ablation begins at once."""
    recipe = tiny("mae", "engine.device=cpu")
    stepper = Stepper(recipe, make_fabric(recipe.engine))
    weights = weakref.ref(stepper.model.encoder.vit.patch_embed.proj.weight)
    gc.disable()
    try:
        del stepper
        assert weights() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ((), "runs on a CPU"),
        (("engine.strategy=fsdp2",), "shards its weights"),
        (("engine.accumulate=2",), r"engine\.accumulate=2"),
        (("engine.precision=fp16",), r"engine\.precision=fp16"),
        (("engine.activation_checkpointing=true",), "computes activations again"),
    ],
)
def test_what_cannot_be_recorded_is_refused_in_a_line(tiny, monkeypatch, changes, why):
    device = "cuda:0" if changes else "cpu"
    monkeypatch.setattr(engine, "resolve_device", lambda name: device)
    monkeypatch.setattr(engine, "Fabric", lambda **_: pytest.fail("not refused"))
    with pytest.raises(ConfigError, match=f"cuda_graph=true is not for a training that .*{why}") as caught:
        make_fabric(tiny("mae", "engine.cuda_graph=true", *changes).engine)
    assert "\n" not in str(caught.value)


def test_several_processes_are_refused_too(tiny, monkeypatch):
    monkeypatch.setattr(engine, "resolve_device", lambda name: "cuda:0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="has 4 processes; leave it out"):
        make_fabric(tiny("mae", "engine.cuda_graph=true").engine)


def test_a_recipe_whose_shapes_change_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"cuda_graph=true is not for masking\.kind=multiblock"):
        tiny("i-jepa", "masking.min_context=1", "engine.cuda_graph=true")


def test_a_refused_training_begins_nothing(start, tmp_path, capsys):
    with pytest.raises(ConfigError, match="not for a training that runs on a CPU"):
        start("mae", "engine.cuda_graph=true")
    assert not (tmp_path / "out" / "recipe.json").exists()
    assert "images are kept" not in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_training_is_recorded_while_its_batches_are_pinned(start, tmp_path, losses):
    sets = ("engine.device=cuda:0", "engine.compile=off", "engine.precision=fp32", "data.workers=2")
    start("latent-mim", *sets, out="plain")
    start("latent-mim", *sets, "engine.cuda_graph=true", out="recorded")
    assert losses(tmp_path / "recorded") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
