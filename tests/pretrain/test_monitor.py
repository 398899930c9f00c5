import itertools
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lmim_bench.bench.engine import Engine
from lmim_bench.bench.types import Dataset
from lmim_bench.pretrain import monitor as monitor_module
from lmim_bench.pretrain.monitor import Health, Watcher


def health(**changes):
    return replace(Health(0.5, 0.5, 20, 0.2), **changes)


def test_health_warns_of_a_collapse_and_of_a_code_of_position():
    assert health().warnings() == []
    assert health(pooled_cosine=1.0).warnings() == [], "before the projector latents may be alike"
    (collapsed,) = health(pooled_cosine=0.995, projected_cosine=0.9991, effective_rank=1.04).warnings()
    assert collapsed.startswith("the representations have collapsed: ")
    assert collapsed.endswith("0.999 on average (effective rank 1.0)")
    (projected,) = health(projected_cosine=0.9991).warnings()
    assert projected.startswith("the projected latents have collapsed: ")
    assert projected.endswith(
        "0.999 on average; the encoder's own, which tasks see, have 0.500 (effective rank 20.0)"
    )
    (code,) = health(position_share=0.97).warnings()
    assert "code of position: it explains 97% of the variance" in code
    assert len(health(projected_cosine=1.0, position_share=1.0).warnings()) == 2
    assert health(projected_cosine=0.99, position_share=0.9).warnings() == []


class Tones:
    """Plain images, dark of class 0 and bright of class 1."""

    def __init__(self, count, labelled=True):
        self.ids = [f"{i}.png" for i in range(count)]
        self.labels = np.arange(count) % 2 if labelled else None

    def __len__(self):
        return len(self.ids)

    def image(self, i):
        noise = np.random.default_rng(i).integers(0, 60, (16, 16, 3)) + 150 * (i % 2)
        return noise.astype(np.uint8)

    def subset(self, index):
        return self if len(index) == len(self) else Tones(len(index), self.labels is not None)


def cosine_of_different(patches):
    pooled = [image / np.linalg.norm(image) for image in patches.double().mean(1).numpy()]
    return np.mean([a @ b for a, b in itertools.permutations(pooled, 2)])


@pytest.mark.parametrize("name", ["latent-mim", "mae", "i-jepa"])
def test_the_watcher_measures_held_out_images(tiny, built, name):
    recipe = tiny(name, "watch.knn_k=3")
    splits = {"train": Tones(12), "val": Tones(8)}
    data = Dataset("tones", "classification", "abc", classes=("dark", "bright"), splits=splits)
    model = built(recipe).eval()
    weights = model.encoder.vit.state_dict(), model.encoder.projector.state_dict()
    found, knn = Watcher(recipe, data, "cpu", "fp32")(*weights)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (recipe.data.mean, recipe.data.std))
    # the view: the short side to 16 / 0.875 = 18, of which the middle 16
    resized = [
        Image.fromarray(splits["val"].image(i)).resize((18, 18), Image.Resampling.BICUBIC) for i in range(8)
    ]
    middle = torch.stack([torch.from_numpy(np.array(image))[1:17, 1:17] for image in resized])
    images = (middle.permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        patches = model.encoder.vit.forward_features(images)[:, model.encoder.prefix :]
        projected = model.encoder.projector(patches)
    assert found.pooled_cosine == pytest.approx(cosine_of_different(patches), abs=1e-5)
    assert found.projected_cosine == pytest.approx(cosine_of_different(projected), abs=1e-5)
    values = np.linalg.svd(patches.double().mean(1).numpy(), compute_uv=False)
    shares = values / values.sum() + 1e-7
    assert found.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
    explained = patches.mean(0).var(0, correction=0).sum() / patches.flatten(0, 1).var(0, correction=0).sum()
    assert found.position_share == pytest.approx(float(explained), abs=1e-4)
    assert knn == 1.0


@pytest.mark.parametrize("splits", [{"train": Tones(6, False)}, {"train": Tones(6), "val": Tones(4, False)}])
def test_the_watcher_needs_labels_for_k_nn_alone(tiny, built, splits):
    recipe = tiny("mae")
    model = built(recipe)
    data = Dataset("tones", "classification", "abc", classes=("dark", "bright"), splits=splits)
    watcher = Watcher(recipe, data, "cpu", "fp32")
    found, knn = watcher(model.encoder.vit.state_dict(), model.encoder.projector.state_dict())
    assert knn is None
    assert math.isfinite(found.projected_cosine)


def test_the_watcher_holds_the_patches_of_few_images_at_once(tiny, built, monkeypatch):
    recipe = tiny("latent-mim", "watch.knn_k=3")
    data = Dataset(
        "tones",
        "classification",
        "abc",
        classes=("dark", "bright"),
        splits={"train": Tones(24), "val": Tones(16)},
    )
    model = built(recipe)
    weights = model.encoder.vit.state_dict(), model.encoder.projector.state_dict()
    whole, accuracy = Watcher(recipe, data, "cpu", "fp32")(*weights)

    alive, most, projected = [], [], []
    encode, build = Engine.encode, monitor_module.build_projector

    def noted(engine, images, taps):
        found = encode(engine, images, taps)
        alive.append(weakref.ref(found[taps[0]].patches))
        most.append((len(images), sum(one() is not None for one in alive)))
        return found

    def watched(*args):
        projector = build(*args)
        projector.register_forward_hook(lambda module, given, out: projected.append(len(out)))
        return projector

    monkeypatch.setattr(Engine, "encode", noted)
    monkeypatch.setattr(Engine, "batch_for", lambda engine, height, width: 4)
    monkeypatch.setattr(monitor_module, "build_projector", watched)
    monkeypatch.setattr(monitor_module, "_PROJECTED", 3)
    found, again = Watcher(recipe, data, "cpu", "fp32")(*weights)
    assert again == accuracy
    for name, value in vars(whole).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4), name
    assert projected == [3, 1] * 4, "of the 16 images that the measures are taken on"
    looked, voted = most[:4], most[4:]
    assert [images for images, _ in voted] == [4] * 10
    assert max(held for _, held in voted) <= 2
    assert len(looked) == 4
