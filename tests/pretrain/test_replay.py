"""A recorded pass: the numbers of the pass as it is, and refusals of what cannot be recorded."""

import pytest
import torch

from lmim_bench.bench.errors import ConfigError
from lmim_bench.pretrain import step as step_module
from lmim_bench.pretrain.engine import make_fabric
from lmim_bench.pretrain.masking import Masks
from lmim_bench.pretrain.model import Fed
from lmim_bench.pretrain.replay import _WARM, Replayed, check_replayable
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
        kept = [*found.values(), *(g for g in gradients if g is not None)]
        for each in kept:
            each.fill_(torch.nan)  # recording computes nothing

        def replay():
            self.replays += 1
            for p in self.parameters:
                p.grad = None
            again = work()
            new = [*again.values(), *(p.grad for p in self.parameters if p.grad is not None)]
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
        monkeypatch.setattr(step_module, "check_replayable", lambda recipe, fabric: None)
        made = []
        for graph in (False, True):
            recipe = tiny(name, "engine.device=cpu", f"engine.cuda_graph={graph}", *changes)
            made.append(Stepper(recipe, make_fabric(recipe.engine)))
        recorder.parameters = list(made[1].model.parameters())
        return (*made, recorder)

    return build


def smaller(part: Fed) -> Fed:
    return Fed(*(None if x is None else x[:2] for x in part[:2]), Masks(*(x[:2] for x in part.masks)))


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
    steps, odd = 8, 6
    for step in range(steps):
        images, offsets, masks = fed(plain.recipe, seed=step)
        part = Fed(images, offsets, masks)
        part = smaller(part) if step == odd else part  # as no training has them, but nothing may go wrong
        expected, found = (one(step / steps, [part]) for one in (plain, recorded))
        assert list(found) == list(expected)
        for term, value in expected.items():
            assert found[term] == pytest.approx(float(value), rel=1e-6), (step, term)
    assert recorder.replays == steps - _WARM - 1
    for ours, theirs in zip(recorded.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_what_a_pass_returned_outlives_the_next_one(fed, tiny):
    weight = torch.nn.Parameter(torch.tensor(2.0))

    def work(part, aim):
        loss = weight * part.images.mean() + aim
        loss.backward()
        return {"loss": loss.detach()}

    replayed = Replayed(work, [weight], Recorded([weight]))
    found, gradients = [], []
    for i in range(6):
        weight.grad = None
        images, offsets, masks = fed(tiny("mae"), seed=i)
        found.append((replayed(Fed(images * 0 + i, offsets, masks), 0.5)["loss"], 2.0 * i + 0.5))
        gradients.append(float(weight.grad))
    assert [float(loss) for loss, _ in found] == [expected for _, expected in found]
    assert gradients == [float(i) for i in range(6)]


class Somewhere:
    """As much of Fabric as tells where a training runs."""

    def __init__(self, device="cuda:0", world_size=1):
        self.device, self.world_size = torch.device(device), world_size


@pytest.mark.parametrize(
    ("where", "name", "changes", "why"),
    [
        (Somewhere("cpu"), "mae", (), "runs on cpu, not on a GPU"),
        (Somewhere(world_size=4), "mae", (), "has 4 processes"),
        (Somewhere(), "mae", ("engine.strategy=fsdp2",), "shards its weights"),
        (Somewhere(), "mae", ("engine.accumulate=2",), r"engine\.accumulate=2"),
        (Somewhere(), "mae", ("engine.precision=fp16",), r"engine\.precision=fp16"),
        (Somewhere(), "mae", ("engine.activation_checkpointing=true",), "computes activations again"),
        (Somewhere(), "i-jepa", ("masking.min_context=1",), r"masking\.kind=multiblock"),
    ],
)
def test_what_cannot_be_recorded_is_refused_in_a_line(tiny, where, name, changes, why):
    with pytest.raises(
        ConfigError, match=f"engine.cuda_graph=true is not for a training that .*{why}"
    ) as caught:
        check_replayable(tiny(name, *changes), where)
    assert "\n" not in str(caught.value)
    check_replayable(tiny("mae", "engine.precision=bf16"), Somewhere())


def test_without_a_gpu_the_setting_ends_in_that_line(tiny):
    recipe = tiny("mae", "engine.device=cpu", "engine.cuda_graph=true")
    with pytest.raises(ConfigError, match="not on a GPU; leave it out"):
        Stepper(recipe, make_fabric(recipe.engine))
