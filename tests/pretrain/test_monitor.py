import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lmim_bench.bench.types import Dataset
from lmim_bench.pretrain.monitor import Health, Watcher, effective_rank, pooled_cosine, position_share

CASES = settings(deadline=None, derandomize=True, max_examples=25)


def latents(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@CASES
@given(st.integers(0, 999), st.integers(2, 6), st.integers(1, 4))
def test_pooled_cosine_equals_a_loop_over_different_images(seed, images, patches):
    x = latents(seed, images, patches, 5)
    pooled = [np.mean(image, axis=0) for image in x.double().numpy()]
    values = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.permutations(pooled, 2)]
    assert pooled_cosine(x) == pytest.approx(np.mean(values), abs=1e-9)


def test_pooled_cosine_of_identical_opposite_and_orthogonal_images():
    assert pooled_cosine(latents(0, 1, 4, 5).expand(6, -1, -1)) == pytest.approx(1)
    assert pooled_cosine(torch.eye(4)[:, None]) == pytest.approx(0)
    assert pooled_cosine(torch.tensor([[[1.0, 0]], [[-3.0, 0]]])) == pytest.approx(-1)


def test_pooled_cosine_sees_a_collapse_behind_a_position_code():
    code = latents(0, 1, 9, 8)
    assert pooled_cosine(code + 1e-3 * latents(1, 5, 9, 8)) > 0.999


@CASES
@given(st.integers(0, 999), st.integers(2, 6), st.integers(2, 6))
def test_effective_rank_equals_numpy(seed, rows, columns):
    x = latents(seed, rows, columns)
    values = np.linalg.svd(x.double().numpy(), compute_uv=False)
    shares = values / values.sum() + 1e-7
    assert effective_rank(x) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_of_known_spectra(rank):
    left = torch.linalg.qr(latents(0, 20, 20))[0][:, :rank]
    right = torch.linalg.qr(latents(1, 8, 8))[0][:rank]
    assert effective_rank(5 * left @ right) == pytest.approx(rank, rel=1e-3)
    halves = torch.tensor([0.5, 0.25, 0.25])
    expected = math.exp(-sum(p * math.log(p) for p in halves.tolist()))
    assert effective_rank(torch.diag(halves)) == pytest.approx(expected, rel=1e-5)


def test_effective_rank_of_nothing_is_finite():
    assert math.isfinite(effective_rank(torch.zeros(4, 3)))


@CASES
@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_position_share_equals_a_loop(seed, images, patches, width):
    x = latents(seed, images, patches, width).double().numpy()
    mean = x.reshape(-1, width).mean(axis=0)
    total = sum(((row - mean) ** 2).sum() for image in x for row in image) / (images * patches)
    explained = sum(((x[:, p].mean(axis=0) - mean) ** 2).sum() for p in range(patches)) / patches
    expected = explained / total if images * patches > 1 else 0.0
    assert position_share(torch.from_numpy(x)) == pytest.approx(expected, abs=1e-9)


def test_position_share_of_a_code_of_noise_and_of_images():
    assert position_share(latents(0, 1, 9, 8).expand(5, -1, -1)) == pytest.approx(1)
    assert position_share(latents(0, 400, 9, 8)) < 0.01
    assert position_share(latents(0, 7, 1, 8).expand(-1, 9, -1)) == pytest.approx(0)


@pytest.mark.parametrize("seed", range(5))
def test_position_share_is_nothing_where_nothing_varies(seed):
    assert position_share(latents(seed, 1, 1, 8).expand(7, 9, -1)) == pytest.approx(0, abs=1e-6)


def health(**changes):
    return replace(Health(0.5, 0.5, 20, 0.2), **changes)


def test_health_warns_of_a_collapse_and_of_a_code_of_position():
    assert health().warnings() == []
    assert health(pooled_cosine=1.0).warnings() == [], "before the projector latents may be alike"
    (collapsed,) = health(projected_cosine=0.9991, effective_rank=1.04).warnings()
    assert "have collapsed" in collapsed
    assert "0.999 on average (effective rank 1.0)" in collapsed
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
        return Image.fromarray(noise.astype(np.uint8))

    def subset(self, index):
        return self if len(index) == len(self) else Tones(len(index), self.labels is not None)


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
    resized = [splits["val"].image(i).resize((18, 18), Image.Resampling.BICUBIC) for i in range(8)]
    middle = torch.stack([torch.from_numpy(np.array(image))[1:17, 1:17] for image in resized])
    images = (middle.permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        patches = model.encoder.vit.forward_features(images)[:, model.encoder.prefix :]
        projected = model.encoder.projector(patches)
    assert found.pooled_cosine == pytest.approx(pooled_cosine(patches), abs=1e-5)
    assert found.projected_cosine == pytest.approx(pooled_cosine(projected), abs=1e-5)
    assert found.effective_rank == pytest.approx(effective_rank(patches.mean(1)), rel=1e-3)
    assert found.position_share == pytest.approx(position_share(patches), abs=1e-4)
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
