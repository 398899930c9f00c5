"""The same numbers on the GPU; skipped where there is none."""

import pytest
import torch

from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.engine import Engine, resolve_device
from lmim_bench.bench.types import Tap
from lmim_bench.tasks._math.propagation import propagate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
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
