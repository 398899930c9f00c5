"""The code paths of a GPU where there is none: tensors where they belong, the CPU's numbers, no waits."""

from __future__ import annotations

import io
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from rich.console import Console

from lmim_bench.bench.api import run
from lmim_bench.bench.data.embedded import Sizes, generate
from lmim_bench.bench.data.resampling import equals_pillow
from lmim_bench.bench.data.splits import ArraySplit
from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.engine import Engine
from lmim_bench.bench.features import FeatureStore
from lmim_bench.bench.progress import Reporter
from lmim_bench.bench.types import Column, Dataset, Tap, View
from lmim_bench.pretrain.api import pretrain, resume
from lmim_bench.pretrain.logbook import read_metrics
from lmim_bench.pretrain.step import Stepper

RECIPES = {
    "mae": (),
    "latent-mim": ("masking.gap=2", "engine.accumulate=2"),
    "latent-mim-naive": ("masking.gap=2",),
    "latent-mim-lite": (),
    "i-jepa": ("masking.min_context=1",),
    "data2vec": ("target.top_blocks=2",),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument is set as true but no accelerator:UserWarning"
)


@pytest.fixture
def gpu(pretended):
    return pretended.pretended_gpu


@pytest.fixture
def short(tiny_sets):
    """The changes for a training of four steps."""
    return (
        *tiny_sets,
        *("optim.steps=4", "optim.clip=1.0", "watch.log_every=1", "watch.evaluations=1"),
        *("watch.tensorboard=false", "engine.compile=off", "engine.precision=fp32", "data.workers=1"),
    )


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    generate(root, Sizes(train_per_class=6, val_per_class=4, segmentation=(6, 6), sequences=1))
    return root


# ------------------------------------------------------------------------------------- what it would catch


def test_tensors_of_two_devices_do_not_go_together(gpu):
    with gpu():
        there, here = torch.arange(6.0, device="cuda:0").view(2, 3), torch.ones(2, 3)
        for mixed in (
            lambda: there + here,
            lambda: torch.cat([there, here]),
            lambda: torch.nn.functional.linear(there, here),
            lambda: there.index_select(0, torch.zeros(1, dtype=torch.long)),
            lambda: here[there[:, 0].long()],
            lambda: there.__setitem__(0, here[0]),
        ):
            with pytest.raises(RuntimeError, match=r"device|CPU"):
                mixed()
        with pytest.raises(RuntimeError, match="a generator of the CPU"):
            torch.rand(3, device="cuda:0", generator=torch.Generator())
        with pytest.raises(TypeError, match="copy it to the CPU first"):
            there.numpy()
        assert ((there + 1) * torch.tensor(2.0)).is_cuda
        assert there.cpu().numpy().sum() == 15
        assert torch.zeros(3).to(there).device == there.device


def test_waits_are_counted(gpu):
    with gpu() as waits:
        there = torch.arange(4.0, device="cuda:0")
        kept = there.topk(2).values.to("cpu", non_blocking=True)
        assert not waits
        assert float(there.sum()) == 6
        assert bool(there[0] == 0)
        assert there[there > 1].device == there.device
        assert there.cpu().equal(torch.arange(4.0))
        assert dict(waits) == {"__float__": 1, "__bool__": 1, "index": 1, "to the CPU": 1}
    assert kept.tolist() == [3, 2]


def test_gradients_come_to_where_the_weights_are(gpu):
    layer = torch.nn.Linear(3, 2)
    expected = torch.autograd.grad(layer(torch.ones(4, 3)).square().sum(), layer.weight)[0]
    with gpu():
        layer.to("cuda:0")
        layer(torch.ones(4, 3, device="cuda:0")).square().sum().backward()
        assert layer.weight.grad.device.type == "cuda"
        assert torch.equal(layer.weight.grad.cpu(), expected)


# ------------------------------------------------------------------------------------- encoders


@pytest.mark.slow
def test_all_recorded_checkpoints_give_the_features_of_the_cpu(gpu, layouts, tmp_path):
    for name in layouts.names():
        reference, layout = layouts.write(name, tmp_path)
        for height, width in layout.sizes.values():
            images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
            (expected,) = (
                Engine(load_encoder(reference), "cpu", "fp32", None).encode(images, [Tap()]).values()
            )
            with gpu() as waits:
                engine = Engine(load_encoder(reference), "cuda:0", "fp32", None)
                engine.encode(images, [Tap()])  # tables of this size are made once
                waits.clear()
                launched = engine.launch(images, [Tap()])
                assert not waits, (name, waits)
                (found,) = launched.checked().values()
                for field in ("patches", "mean", "cls"):
                    ours, theirs = getattr(found, field), getattr(expected, field)
                    assert (ours is None) == (theirs is None)
                    if ours is not None:
                        assert ours.is_cuda, (name, field)
                        assert torch.allclose(ours.cpu(), theirs, atol=1e-5), (name, field)


def test_features_are_extracted_without_waiting_for_the_batch_in_flight(gpu, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (120, 32, 32, 3), dtype=np.uint8)
    data = Dataset(
        "x", "classification", "x", splits={"val": ArraySplit(pixels, [*map(str, range(120))], None)}
    )
    columns, banks = (Column("cls"), Column("patches", Tap(-2))), {}
    for device, machine in (("cpu", nullcontext()), ("cuda:0", gpu())):
        with machine as waits:
            engine = Engine(load_encoder("timm:vit_tiny_patch16_224"), device, "fp32", 1)
            assert engine.batch_for(32, 32) == 49  # three batches
            engine.encode(torch.zeros(1, 3, 32, 32), [Tap()])  # tables of this size are made once
            if waits is not None:
                assert equals_pillow(device)  # which is tried once
                waits.clear()
            view = View.crop(engine.encoder.spec, 32)
            for way, keep in (("decoded", False), ("keeping", True), ("kept", False)):
                store = FeatureStore(tmp_path / device, 10**9, workers=0, keep_pixels=keep)
                bank, _ = store.bank(engine, data, "val", view, columns, Reporter())
                assert not waits, way
                banks[device, way] = [np.array(bank.column(column)) for column in columns]
                for column in columns:
                    (tmp_path / device / bank.fingerprint / f"{column.id}.npy").unlink()
    for (device, _), ours in banks.items():
        for values, of_the_cpu, decoded in zip(
            ours, banks["cpu", "decoded"], banks[device, "decoded"], strict=True
        ):
            np.testing.assert_allclose(values, of_the_cpu, atol=1e-5)
            np.testing.assert_array_equal(values, decoded)


# ------------------------------------------------------------------------------------- trainings and tasks


@pytest.fixture
def waited(pretended, monkeypatch):
    """How often each step of the trainings waited for the GPU."""
    found = []
    step = Stepper.__call__

    def counted(self, *args):
        before = pretended.waits.total()
        losses = step(self, *args)
        found.append(pretended.waits.total() - before)
        return losses

    monkeypatch.setattr(Stepper, "__call__", counted)
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_trainings_have_the_losses_of_the_cpu_and_no_step_waits(
    recipe, gpu, scenes, short, tmp_path, waited, capfd
):
    losses = {}
    for device, machine in (("cpu", nullcontext()), ("cuda", gpu())):
        sets = (*short, *RECIPES[recipe], f"engine.device={device}")
        with machine:
            pretrain(
                recipe, str(scenes / "scenes"), tmp_path / device, sets=sets, cache_dir=tmp_path / "cache"
            )
        losses[device] = [line["loss"] for line in read_metrics(tmp_path / device) if "loss" in line]
    assert len(losses["cpu"]) == 4
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-5)
    assert waited == [0] * 8
    assert "Tensor Cores" not in capfd.readouterr().err


def test_a_training_of_the_cpu_goes_on_on_the_gpu_with_its_losses(gpu, scenes, short, tmp_path):
    sets = (*short, "watch.checkpoints=2", "engine.device=cpu")
    pretrain("latent-mim", str(scenes / "scenes"), tmp_path, sets=sets, cache_dir=tmp_path / "cache")
    expected = [line["loss"] for line in read_metrics(tmp_path) if "loss" in line]
    (tmp_path / "states" / "step-00000004.pth").unlink()
    with gpu():
        resume(tmp_path, sets=("engine.device=cuda",), cache_dir=tmp_path / "cache")
    found = [line["loss"] for line in read_metrics(tmp_path) if "loss" in line]
    assert found == pytest.approx(expected, rel=1e-5)
    assert load_encoder(str(tmp_path / "encoder.pth")).spec.family == "lmim-bench"


@pytest.mark.slow
def test_all_tasks_have_the_scores_of_the_cpu(gpu, scenes, short, tmp_path):
    sets = (*short, "engine.device=cpu")
    pretrain("mae", str(scenes / "scenes"), tmp_path / "mae", sets=sets, cache_dir=tmp_path / "cache")
    scores = {}
    for device, machine in (("cpu", nullcontext()), ("cuda", gpu())):
        with machine:
            found = run(
                str(tmp_path / "mae" / "encoder.pth"),
                tasks=["all", "hidden_patches"],
                data=[str(scenes / name) for name in ("scenes", "scenes-seg", "scenes-video")],
                out=tmp_path / device,
                cache_dir=tmp_path / f"cache-{device}",
                device=device,
                precision="fp32",
                reporter=Reporter(Console(file=io.StringIO())),
                debug=True,
            )
        assert {result.status for result in found.results} == {"ok"}
        scores[device] = {(r.task, s.metric, str(s)): s.value for r in found.results for s in r.scores}
    assert len({task for task, *_ in scores["cpu"]}) == 7
    assert scores["cuda"] == pytest.approx(scores["cpu"], abs=1e-3)
