import math

import numpy as np
import pytest
import torch
from PIL import Image

from lmim_bench.bench.data import load_data
from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.progress import Reporter
from lmim_bench.bench.vit import build_vit, vit_spec
from lmim_bench.pretrain.objectives import MaskedAutoencoder, patchify, sincos_positions
from lmim_bench.pretrain.trainer import Recipe, augment, train

SPEC = vit_spec("lmim-bench", embed_dim=24, depth=2, num_heads=2, patch_size=8, image_size=32)


def test_sincos_positions_equal_the_formula():
    dim, grid = 16, 3
    table = sincos_positions(dim, grid)
    for row in range(grid):
        for column in range(grid):
            for i in range(dim // 4):
                frequency = 1 / 10000 ** (i / (dim / 4))
                expected = [
                    math.sin(column * frequency),
                    math.cos(column * frequency),
                    math.sin(row * frequency),
                    math.cos(row * frequency),
                ]
                found = table[row * grid + column, [i, 4 + i, 8 + i, 12 + i]]
                assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_sincos_positions_refuse_a_width_that_does_not_split():
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions(6, 2)


def test_patchify_lists_pixels_of_each_patch_in_row_column_channel_order():
    images = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[1, 4], images[1, :, 2:4, 2:4].permute(1, 2, 0).reshape(-1))


def test_mae_loss_equals_the_formula_image_by_image():
    torch.manual_seed(0)
    model = MaskedAutoencoder(build_vit(SPEC.arch), decoder_dim=16, decoder_depth=1, decoder_heads=2).eval()
    images = torch.randn(3, 3, 32, 32)
    loss = model(images, torch.zeros(3, dtype=torch.long), torch.Generator().manual_seed(5))
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(5))
    losses = []
    encoder = model.encoder
    for image, order in zip(images, noise.argsort(dim=1), strict=True):
        visible, hidden = order[:4].tolist(), order[4:].tolist()
        tokens = encoder.patch_embed(image[None])[0] + encoder.pos_embed[0, 1:]
        x = torch.cat([encoder.cls_token[0], tokens[visible]])[None]
        latents = model.decoder_embed(encoder.norm(encoder.blocks(x)))[0]
        full = model.mask_token[0].expand(16, -1).clone()
        full[visible] = latents[1:]
        decoded = model.decoder(torch.cat([latents[:1], full + model.decoder_positions[0]])[None])
        predicted = model.decoder_pred(decoded)[0, 1:]
        for patch in hidden:
            row, column = divmod(patch, 4)
            pixels = image[:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].permute(1, 2, 0).reshape(-1)
            target = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            losses.append(((predicted[patch] - target) ** 2).mean())
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


def test_mae_learns_through_visible_tokens_only():
    torch.manual_seed(0)
    model = MaskedAutoencoder(build_vit(SPEC.arch), decoder_dim=16, decoder_depth=1, decoder_heads=2)
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    latents = model._encode(model.encoder.patch_embed(images), torch.tensor([[0, 5]]))
    latents.sum().backward()
    touched = patchify(images.grad, 8).abs().sum(-1)[0].nonzero().flatten().tolist()
    assert touched == [0, 5]


def test_positions_are_fixed_and_zero_for_the_class_token():
    model = MaskedAutoencoder(build_vit(SPEC.arch))
    assert not model.encoder.pos_embed.requires_grad
    assert model.encoder.pos_embed[0, 0].abs().sum() == 0


@pytest.fixture
def colours(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i, name in enumerate(("red", "blue")):
            folder = tmp_path / "colours" / split / name
            folder.mkdir(parents=True)
            for j in range(16):
                pixels = rng.integers(0, 100, (40, 48, 3))
                pixels[..., 2 * i] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{j}.png")
    return load_data(str(tmp_path / "colours"), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("objective", ["mae", "supervised"])
def test_training_lowers_the_loss_and_leaves_a_checkpoint_that_loads(tmp_path, colours, objective):
    recipe = Recipe(
        objective=objective, image_size=32, embed_dim=24, depth=2, num_heads=2, steps=40, batch_size=16
    )
    log = train(recipe, colours, tmp_path / "out.pth", "cpu", Reporter())
    assert len(log.losses) == 40
    assert np.mean(log.losses[-8:]) < 0.95 * np.mean(log.losses[:4])
    encoder = load_encoder(str(tmp_path / "out.pth"))
    assert encoder.spec == recipe.spec()
    assert not encoder.info.random_weights
    again = train(recipe, colours, tmp_path / "again.pth", "cpu", Reporter())
    assert again.losses == log.losses
    assert load_encoder(str(tmp_path / "again.pth")).fingerprint == encoder.fingerprint


def test_crops_keep_their_size_and_flips_are_even():
    images = np.zeros((200, 20, 20, 3), dtype=np.uint8)
    images[:, :, 10:] = 255
    out = augment(images, 16, 1.0, torch.Generator().manual_seed(0))
    assert out.shape == (200, 3, 16, 16)
    assert out.dtype == torch.uint8
    flipped = (out[:, 0, 8, 0] > 128).float().mean()
    assert 0.35 < flipped < 0.65
