"""The same numbers on the GPU; skipped where there is none."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lmim_bench.bench.data.loading import _Resampled, view_pixels
from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.engine import Engine, resolve_device
from lmim_bench.bench.types import Column, FeatureBank, Tap, View
from lmim_bench.pretrain.crops import CROP_NOISE, Crops, crop_and_resize, draw_crops
from lmim_bench.pretrain.engine import make_fabric
from lmim_bench.pretrain.masking import Masks, draw_masks
from lmim_bench.pretrain.recipe import load_recipe
from lmim_bench.pretrain.step import Fed, Stepper
from lmim_bench.tasks._math.propagation import propagate
from lmim_bench.tasks._probe import FeatureChoice, TrainSplit, fit_lbfgs, fit_sgd, judge
from lmim_bench.tasks.linear import LinearConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Torch's own notices: of the debug mode below, of the older way to turn TF32 off, of what tracing reads,
    # of slow guards in Python 3.13.0, of what its compiler (2.11) imports.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
    pytest.mark.filterwarnings("ignore:Please use the new API settings to control TF32"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.3)])
def test_features_agree_with_the_cpu(precision, tolerance):
    images = torch.randn(4, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    taps = (Tap(-1), Tap(-2, norm=False))
    on_cpu = Engine(load_encoder("timm:vit_tiny_patch16_224"), "cpu", "fp32", None).encode(images, taps)
    engine = Engine(load_encoder("timm:vit_tiny_patch16_224"), resolve_device("auto"), precision, None)
    for tap, features in engine.encode(images, taps).items():
        assert features.patches.dtype == torch.float32
        scale = on_cpu[tap].patches.std()
        assert (features.patches.cpu() - on_cpu[tap].patches).abs().max() / scale < tolerance


def test_propagation_agrees_with_the_cpu():
    generator = torch.Generator().manual_seed(1)
    keys = torch.nn.functional.normalize(torch.randn(3, 20, 30, 16, generator=generator), dim=-1)
    labels = torch.rand(3, 20, 30, 2, generator=generator)
    options = {"window": "square", "radius": 6, "topk": 5, "temperature": 0.1}
    on_cpu = propagate(keys[0], keys, labels, **options)
    on_gpu = propagate(keys[0].cuda(), keys.cuda(), labels.cuda(), **options)
    assert torch.allclose(on_gpu.cpu(), on_cpu, atol=1e-4)


def silent(*_):
    return nullcontext(SimpleNamespace(advance=lambda n=1: None))


def test_heads_of_the_linear_probe_agree_with_the_cpu():
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 5, 200)
    rows = (draws.normal(0, 1, (5, 16))[labels] + draws.normal(0, 1, (200, 16))).astype(np.float32)
    columns = (Column("cls", Tap()),)
    bank = FeatureBank({columns[0].id: rows}, [str(i) for i in range(200)], labels, np.arange(200))
    train = TrainSplit(bank, labels, np.arange(0, 200, 2), np.arange(1, 200, 2), 5)
    config = LinearConfig(solver="sgd", steps=50, batch=32)
    for solve, grid in ((fit_sgd, (0.01, 0.1)), (fit_lbfgs, (0.1, 1.0))):
        found = {}
        for device in ("cpu", "cuda:0"):
            context = SimpleNamespace(device=device, rng=lambda *_: np.random.default_rng(1), progress=silent)
            (fitted,) = solve(context, config, train, [FeatureChoice("cls", columns)], grid, train.kept)
            found[device] = fitted.heads, judge(fitted, train, device)
        for (head, trial), (other, known) in zip(
            zip(*found["cuda:0"], strict=True), zip(*found["cpu"], strict=True), strict=True
        ):
            assert np.abs(head.weight - other.weight).max() < 0.01 * np.abs(other.weight).max()
            assert trial.loss == pytest.approx(known.loss, rel=1e-2)


def first_losses(device, precision, compiled, steps=4):
    """Losses of the first steps of Latent MIM on a fixed batch; on a GPU no step may wait for it."""
    recipe = load_recipe(
        "latent-mim",
        [
            *("model.embed_dim=64", "model.depth=2", "model.num_heads=2", "model.patch_size=8"),
            *("data.image_size=64", "masking.gap=2", "decoder.width=32", "decoder.depth=1"),
            *("decoder.num_heads=2", "projector.hidden_dim=64", "optim.batch_size=16", "optim.clip=1.0"),
            *(f"engine.device={device}", f"engine.precision={precision}", f"engine.compile={compiled}"),
        ],
    )
    stepper = Stepper(recipe, make_fabric(recipe.engine))
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(16, 3, recipe.crop_size, recipe.crop_size, generator=draws)
    masks = draw_masks(recipe, 16, slice(0, 16), draws)
    offsets = torch.zeros(16, recipe.grid**2, 2, dtype=torch.int64)
    fed = Fed(images.to(device), offsets.to(device), Masks(*(m.to(device) for m in masks)))
    losses = [stepper(0.1, [fed], 1)["loss"]]  # compiles, and makes the optimiser's state
    try:
        if device != "cpu":
            torch.cuda.set_sync_debug_mode("error")
        losses += [stepper(0.1, [fed], 1)["loss"] for _ in range(steps - 1)]
    finally:
        if device != "cpu":
            torch.cuda.set_sync_debug_mode("default")
    return [loss.item() for loss in losses]


@pytest.mark.parametrize(
    ("precision", "compiled", "tolerance"),
    [("fp32", "off", 1e-3), ("fp16", "off", 0.004), ("bf16", "off", 0.03), ("bf16", "on", 0.03)],
)
def test_a_training_on_the_gpu_follows_the_cpu_and_never_waits_in_a_step(precision, compiled, tolerance):
    on_cpu = first_losses("cpu", "fp32", "off")
    assert first_losses("cuda:0", precision, compiled) == pytest.approx(on_cpu, rel=tolerance)


def test_crops_on_the_gpu_equal_those_on_the_cpu():
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 40, 40), dtype=torch.uint8, generator=draws)
    crops = draw_crops(
        torch.tensor([[30, 50]] * 8), 0.2, (0.75, 1.33), True, torch.rand(8, CROP_NOISE, generator=draws)
    )
    on_gpu = crop_and_resize(images.cuda(), Crops(*(c.cuda() for c in crops)), 32)
    assert torch.allclose(on_gpu.cpu(), crop_and_resize(images, crops, 32), atol=1e-4)


@pytest.mark.parametrize("tf32", [False, True])
def test_the_gpu_resizes_to_the_pixels_of_pillow(tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    draws = np.random.default_rng(0)
    shapes = [(375, 500), (500, 333), (480, 500), (300, 120), (224, 224), (900, 1200)]
    pixels = [draws.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    for mode, interpolation in (("crop", "bicubic"), ("squash", "bilinear")):
        view = View(mode, 224, 256, interpolation, (0.5,) * 3, (0.5,) * 3)
        way = _Resampled(view, "cuda:0")
        found = way.finish(way.join([way.prepare(Image.fromarray(each)) for each in pixels])).cpu()
        for image, each in zip(found, pixels, strict=True):
            expected = torch.from_numpy(view_pixels(Image.fromarray(each), view).copy()).permute(2, 0, 1)
            assert torch.equal(image, expected)
