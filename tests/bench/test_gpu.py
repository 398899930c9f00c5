"""The same numbers on the GPU; skipped where there is none."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lmim_bench.bench.data.loading import iterate_batches
from lmim_bench.bench.data.resampling import equals_pillow
from lmim_bench.bench.data.splits import ArraySplit
from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.engine import Engine, resolve_device
from lmim_bench.bench.features import FeatureStore
from lmim_bench.bench.progress import Reporter
from lmim_bench.bench.types import Column, Dataset, FeatureBank, Tap, View
from lmim_bench.pretrain.crops import CROP_NOISE, Crops, crop_and_resize, draw_crops
from lmim_bench.pretrain.engine import make_fabric
from lmim_bench.pretrain.masking import Masks, draw_masks
from lmim_bench.pretrain.model import Fed
from lmim_bench.pretrain.recipe import load_recipe
from lmim_bench.pretrain.step import Stepper
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


def first_losses(device, precision, compiled, *more, name="latent-mim", steps=4, free=(0,), recorded=False):
    """Losses of the first steps of a recipe on a fixed batch; on a GPU no step may wait for it, but for the
    ``free`` ones: the first, which compiles and makes the optimiser's state, and the one that is recorded.
    """
    recipe = load_recipe(
        name,
        [
            *("model.embed_dim=64", "model.depth=2", "model.num_heads=2", "model.patch_size=8"),
            *("data.image_size=64", "decoder.width=32", "decoder.depth=1"),
            *("decoder.num_heads=2", "projector.hidden_dim=64", "optim.batch_size=16", "optim.clip=1.0"),
            *(f"engine.device={device}", f"engine.precision={precision}", f"engine.compile={compiled}"),
            f"engine.cuda_graph={recorded}",
            *(["masking.gap=2"] if name == "latent-mim" else []),
            *more,
        ],
    )
    stepper = Stepper(recipe, make_fabric(recipe.engine))
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(16, 3, recipe.crop_size, recipe.crop_size, generator=draws)
    masks = draw_masks(recipe, 16, slice(0, 16), draws)
    offsets = torch.zeros(16, recipe.grid**2, 2, dtype=torch.int64) if recipe.masking.gap else None
    fed = Fed(
        images.to(device),
        None if offsets is None else offsets.to(device),
        Masks(*(m.to(device) for m in masks)),
    )
    losses = []
    for step in range(steps):
        try:
            if device != "cpu" and step not in free:
                torch.cuda.set_sync_debug_mode("error")
            losses.append(stepper(0.1, [fed])["loss"])
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


@pytest.mark.parametrize(
    ("name", "precision", "compiled", "more"),
    [
        ("latent-mim", "fp32", "off", ()),
        ("latent-mim", "bf16", "on", ()),
        ("latent-mim", "bf16", "off", ("objective.negatives=batch", "target.kind=stop_gradient")),
        ("latent-mim-lite", "bf16", "off", ()),
        ("latent-mim-naive", "bf16", "off", ()),
        ("mae", "bf16", "off", ()),
        ("data2vec", "bf16", "off", ("target.top_blocks=2",)),
    ],
)
def test_a_recorded_pass_gives_the_losses_of_one_as_it_is(name, precision, compiled, more):
    setting = (precision, compiled, *more)
    plain = first_losses("cuda:0", *setting, name=name, steps=7)
    recorded = first_losses("cuda:0", *setting, name=name, steps=7, free=(0, 3), recorded=True)
    assert recorded == pytest.approx(plain, rel=1e-5)


def test_crops_on_the_gpu_equal_those_on_the_cpu():
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 40, 40), dtype=torch.uint8, generator=draws)
    crops = draw_crops(
        torch.tensor([[30, 50]] * 8), 0.2, (0.75, 1.33), True, torch.rand(8, CROP_NOISE, generator=draws)
    )
    on_gpu = crop_and_resize(images.cuda(), Crops(*(c.cuda() for c in crops)), 32)
    assert torch.allclose(on_gpu.cpu(), crop_and_resize(images, crops, 32), atol=1e-4)


class Pictures(ArraySplit):
    """Noise of several shapes: all that are resized in one way or another."""

    shapes = ((375, 500), (500, 333), (480, 500), (300, 120), (224, 224), (900, 1200))

    def __init__(self) -> None:
        super().__init__(np.zeros((6, 1, 1, 3), np.uint8), list("abcdef"), None)

    def image(self, i):
        draws = np.random.default_rng(i)
        return draws.integers(0, 256, (*self.shapes[i], 3), dtype=np.uint8)


@pytest.mark.parametrize(("workers", "tf32"), [(0, False), (0, True), (2, False)])
def test_the_gpu_resizes_to_the_pixels_of_pillow(workers, tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    assert equals_pillow("cuda:0"), "otherwise Pillow resizes, and what follows compares nothing"
    for mode, interpolation in (("crop", "bicubic"), ("squash", "bilinear")):
        view = View(mode, 224, 256, interpolation, (0.5,) * 3, (0.5,) * 3)
        expected = torch.cat([batch.images for batch in iterate_batches(Pictures(), view, 4)])
        batches = list(iterate_batches(Pictures(), view, 4, workers, device="cuda:0"))
        assert all(batch.images.device.type == "cuda" for batch in batches)
        assert torch.equal(torch.cat([batch.images for batch in batches]).cpu(), expected)


def test_kept_pixels_come_to_the_gpu_as_they_were_decoded(tmp_path):
    engine = Engine(load_encoder("timm:vit_tiny_patch16_224"), "cuda:0", "bf16", 4)
    data = Dataset("noise", "classification", "noise", splits={"val": Pictures()})
    found = {}
    for way, keep in (("decoded", False), ("keeping", True), ("kept", False)):
        store = FeatureStore(tmp_path, 10**9, keep_pixels=keep)
        view = View.crop(engine.encoder.spec)
        bank, _ = store.bank(engine, data, "val", view, [Column("patches")], Reporter())
        found[way] = np.array(bank.column(Column("patches")))
        (tmp_path / bank.fingerprint / "patches@-1.npy").unlink()
        assert store.keeps(data, "val", view) == (way != "decoded")
    for way in ("keeping", "kept"):
        np.testing.assert_array_equal(found[way], found["decoded"])
