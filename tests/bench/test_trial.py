"""Encoders that somebody's code makes: refused where they are none, and known by what they compute."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.errors import CheckpointError
from lmim_bench.bench.trial import try_encoder

BASE = """
import json
import timm
import torch
import torch.nn.functional as F
from lmim_bench.bench.modules import PixelEncoder
from lmim_bench.bench.types import Features


class Net(torch.nn.Module):
    embed_dim, patch_size, image_size = 6, 8, 32

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 6, 8, 8)

    def forward_features(self, images):
        return self.conv(images)

class Dropout(Net):
    def forward_features(self, images):
        return F.dropout(self.conv(images), training=True)

class Noise(Net):
    def forward_features(self, images):
        return self.conv(images) + torch.rand(1, device=images.device)

class BatchNorm(Net):
    def forward_features(self, images):
        return F.batch_norm(self.conv(images), None, None, training=True)

class Centred(Net):
    def forward_features(self, images):
        out = self.conv(images)
        return out - out.mean(dim=0)

class Half(Net):
    def __init__(self):
        super().__init__()
        self.half()

class Tuple(Net):
    def forward_features(self, images):
        return self.conv(images), None

class Dino(Net):
    def forward_features(self, images):
        return {"x_norm_patchtokens": self.conv(images).flatten(2).mT}

class Silent(Net):
    def forward_features(self, images):
        out = self.conv(images).flatten(2).mT
        return {"patches": out, "cls": out.mean(dim=1)}

class Wide(Silent):
    has_cls = True
    def forward_features(self, images):
        out = self.conv(images).flatten(2).mT
        return {"patches": out, "cls": out.mean(dim=1).repeat(1, 2)}

class One(Silent):
    has_cls = True
    def forward_features(self, images):
        out = self.conv(images).flatten(2).mT
        return {"patches": out, "cls": out.mean(dim=1)[:1]}

class Zero(Net):
    patch_size = 0

class Flat(Net):
    std = (0, 1, 1)

class Changed(PixelEncoder):
    def __call__(self, *args):
        return {tap: self.change(found) for tap, found in super().__call__(*args).items()}

class First(Changed):
    def change(self, found):
        return Features(None, found.patches[:1], found.mean[:1])

class Bare(Changed):
    def change(self, found):
        return found.patches

class Registers(Net):
    num_prefix_tokens, has_cls = 2, False
    def forward_features(self, images):
        out = self.conv(images).flatten(2).mT
        return torch.cat([torch.zeros_like(out[:, :2]), out], dim=1)
"""
Write = Callable[[str], str]


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a module of factories, as Python sees it in a new process; returns the beginning of its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def written(code: str = "", name: str = "somebodys_nets") -> str:
        (tmp_path / f"{name}.py").write_text(BASE + code)
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return f"python:{name}:"

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return written


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Dropout", "features of an image differ from pass to pass; is dropout on"),
        ("Noise", "differ from pass to pass"),
        ("BatchNorm", "depend on the others of its batch; is a batch norm in training mode"),
        ("Centred", "depend on the others of its batch"),
        ("Half", "cannot encode images of 32 pixels in float32: RuntimeError"),
        ("Tuple", "gave tuple, expected a map, tokens, or a mapping"),
        ("Dino", "gave dict of x_norm_patchtokens, expected"),
        ("Silent", "gave `cls`, and the module does not say has_cls = True"),
        ("Wide", r"gave cls of shape \(2, 12\), expected \(2, 6\)"),
        ("One", r"gave cls of shape \(1, 6\), expected \(2, 6\)"),
        ("Zero", "patch_size: Input should be greater than or equal to 1"),
        ("Flat", "std.0: Input should be greater than 0"),
        ("First", r"gave patches of shape \(1, 14, 14, 192\), expected \(2, 14, 14, 192\)"),
        ("Bare", "the features of a tap are Tensor, not Features"),
    ],
)
def test_what_is_no_encoder_is_refused_in_a_line(factory: Write, name: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        load_encoder(factory("") + name)
    assert "\n" not in str(caught.value)


def test_registers_may_stand_before_the_patches_without_a_class_token(factory: Write) -> None:
    spec = load_encoder(factory("") + "Registers").spec
    assert (spec.has_cls, spec.pooling) == (False, "mean")


DECIDED = """
from pathlib import Path
import helper

def heads():
    return timm.create_model("test_vit", img_size=32, num_classes=0, num_heads=2 * helper.NUMBER)

class Helped(Net):
    def forward_features(self, images):
        return helper.scaled(self.conv(images))

class Read(Net):
    def forward_features(self, images):
        return json.loads(Path(__file__).with_name("number.json").read_text()) * self.conv(images)

class Hidden(Net):
    def __init__(self):
        super().__init__()
        self.nets = [torch.nn.Conv2d(3, 6, 8, 8)]
        torch.nn.init.constant_(self.nets[0].weight, helper.NUMBER)
    def forward_features(self, images):
        return self.nets[0](images)
"""


@pytest.mark.parametrize("name", ["heads", "Helped", "Read", "Hidden"])
def test_whatever_decides_the_features_is_in_the_fingerprint(
    factory: Write, tmp_path: Path, name: str
) -> None:
    marks = []
    for number in (1, 2):
        (tmp_path / "helper.py").write_text(f"NUMBER = {number}\ndef scaled(x):\n    return {number} * x\n")
        (tmp_path / "number.json").write_text(str(number))
        sys.modules.pop("helper", None)
        encoder = load_encoder(factory(DECIDED) + name)
        assert load_encoder(factory(DECIDED) + name).fingerprint == encoder.fingerprint
        marks.append(encoder.fingerprint)
    assert marks[0] != marks[1]


def test_a_trial_leaves_the_mark_of_the_features_alone() -> None:
    first, second = (load_encoder("timm:test_vit", seed=seed) for seed in (0, 1))
    assert try_encoder(first, "first") == try_encoder(first, "again")
    assert try_encoder(first, "first") != try_encoder(second, "second")


def test_random_weights_are_the_same_from_several_threads() -> None:
    alone = load_encoder("timm:test_vit").fingerprint
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(load_encoder("timm:test_vit").fingerprint))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone] * 4
