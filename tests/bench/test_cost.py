"""The arithmetic of an encoder against counts written down by hand, and against a count on real values."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lmim_bench.bench.cost import encoder_flops
from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.types import Tap


def test_a_plain_transformer_by_hand() -> None:
    width, depth, tokens = 192, 12, 197
    products = 12 * width**2 * tokens + 2 * tokens**2 * width  # qkv, proj, two of the MLP; q k and a v
    patches = 3 * 16**2 * width * 196
    assert encoder_flops(load_encoder("timm:vit_tiny_patch16_224")) == 2 * (depth * products + patches)


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_counting_without_values_counts_what_runs(name: str) -> None:
    encoder = load_encoder(f"timm:{name}")
    side = encoder.spec.image_size
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        encoder(torch.zeros(1, 3, side, side), (Tap(),))
    assert encoder_flops(encoder) == counter.get_total_flops() > 0


def test_pixels_take_no_product() -> None:
    assert encoder_flops(load_encoder("pixels")) is None


def test_a_module_that_looks_at_values_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "value_dependent.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    embed_dim, patch_size = 8, 16\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = torch.nn.Conv2d(3, 8, 16, 16)\n"
        "    def forward_features(self, x):\n"
        "        assert float(x.mean()) > -1e9\n"
        "        return self.conv(x).flatten(2).transpose(1, 2)\n"
        "def make():\n"
        "    return Net()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "value_dependent", raising=False)
    encoder = load_encoder("python:value_dependent:make")
    assert encoder_flops(encoder) is None
