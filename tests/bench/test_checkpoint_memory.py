"""Memory of loading: about the encoder, whatever else lies in the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lmim_bench.bench.checkpoints.pages import MappedFiles
from lmim_bench.bench.vit import build_vit, vit_spec

ROOM = 60
"""MB beyond the encoder: buffers of hashing, the objects of Python."""

LOAD = """
import json, pathlib, sys
from lmim_bench.bench.encoders import load_encoder
def peak():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
before = peak()
encoder = load_encoder(sys.argv[1])
size = sum(t.numel() * t.element_size() for t in encoder.model.state_dict().values()) / 2**20
print(json.dumps([peak() - before, size]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("name", ["weights.pth", "training.pth", "weights.safetensors"])
def test_the_peak_is_that_of_the_encoder(name: str, tmp_path: Path) -> None:
    spec = vit_spec("x", embed_dim=768, depth=6, num_heads=12, patch_size=16, image_size=224)
    state = {
        name: torch.randn(t.shape) for name, t in build_vit(spec.arch, device="meta").state_dict().items()
    }
    path = tmp_path / name
    if name.endswith(".safetensors"):
        save_file(state, path)
    else:
        moments = {i: {"exp_avg": t, "exp_avg_sq": t + 1} for i, t in enumerate(state.values())}
        extra = {"optimizer": {"state": moments}} if name == "training.pth" else {}
        torch.save({"model": state, **extra}, path)
    done = subprocess.run([sys.executable, "-c", LOAD, str(path)], capture_output=True, text=True, check=True)
    peak, size = json.loads(done.stdout)
    assert size > 150
    assert peak <= 1.3 * size + ROOM


def test_only_pages_of_files_are_given_back(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(1e6)}, tmp_path / "x.pth")
    mapped = torch.load(tmp_path / "x.pth", mmap=True, weights_only=True)["w"]
    own = torch.arange(1e6)
    files = MappedFiles()
    for tensor in (mapped, own, mapped[::2], mapped[:0]):
        files.release(tensor)
    assert torch.equal(mapped, torch.arange(1e6))
    assert torch.equal(own, torch.arange(1e6))
