import math

import pytest
import torch
import torch.nn.functional as F

from lmim_bench.pretrain import model as model_module
from lmim_bench.pretrain.masking import Masks
from lmim_bench.pretrain.model import MaskedImageModel
from lmim_bench.pretrain.objectives import mean_cosine, reconstruction_loss
from lmim_bench.pretrain.patches import cut_patches
from lmim_bench.pretrain.recipe import load_recipe, recipe_names

KINDS = ["stop_gradient", "ema", "frozen", "projection", "pixels", "shared"]


def latent_recipe(tiny, kind, *sets):
    return tiny("latent-mim", f"target.kind={kind}", "objective.similarity_weight=0", *sets)


def shown(encoder, patches, index):
    """Latents of some patches of one image, without the prefix."""
    return encoder(patches[index][None], torch.tensor([index]))[0, encoder.prefix :]


def test_the_loss_of_mae_equals_the_formula_image_by_image(tiny, built, fed):
    recipe = tiny("mae")
    model = built(recipe)
    images, offsets, masks = fed(recipe)
    assert offsets is None
    found = model(images, None, masks, 0.0)
    vit, decoder, losses = model.encoder.vit, model.decoder, []
    for image, visible, hidden in zip(
        images, masks.visible.tolist(), masks.hidden[:, 0].tolist(), strict=True
    ):
        assert len(visible) == 4
        tokens = vit.patch_embed(image[None])[0] + vit.pos_embed[0, 1:]
        x = torch.cat([vit.cls_token[0], tokens[visible]])[None]
        latents = decoder.embed(vit.norm(vit.blocks(x)))[0]
        full = decoder.mask_token[0].expand(16, -1).clone()
        full[visible] = latents[1:]
        x = torch.cat([latents[:1], full + decoder.positions])[None]
        for block in decoder.blocks:
            x = block(x)
        predicted = decoder.head(decoder.norm(x))[0, 1:]
        for patch in hidden:
            row, column = divmod(patch, 4)
            pixels = image[:, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4].permute(1, 2, 0).reshape(-1)
            target = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            losses.append(((predicted[patch] - target) ** 2).mean())
    assert found.loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)
    assert found.terms["reconstruction"].item() == found.loss.item()


def test_latent_mim_is_the_mean_over_images_and_adds_the_constraint(tiny, built, fed):
    recipe = tiny("latent-mim", "objective.similarity_weight=0.3")
    model = built(recipe)
    images, offsets, masks = fed(recipe)
    assert offsets is not None
    found = model(images, offsets, masks, 0.6)
    losses, cosines = [], {"cosine_predictions": [], "cosine_visible": [], "cosine_targets": []}
    for i, patches in enumerate(cut_patches(images, 4, offsets)):
        visible, hidden = masks.visible[i].tolist(), masks.hidden[i, 0].tolist()
        latents = model.encoder(patches[visible][None], masks.visible[i : i + 1])
        predicted = model.decoder(latents, masks.visible[i : i + 1], masks.hidden[i])[0]
        target = shown(model.target_encoder, patches, hidden)
        losses.append(reconstruction_loss(predicted[None], target[None], recipe.objective))
        for name, x in zip(cosines, (predicted, latents[0, 1:], target), strict=True):
            cosines[name].append(mean_cosine(x[None]).item())
    means = {name: sum(values) / len(values) for name, values in cosines.items()}
    for name, value in means.items():
        assert found.terms[name].item() == pytest.approx(value, abs=1e-5)
    reconstruction = torch.stack(losses).mean().item()
    constraint = (means["cosine_predictions"] - 0.6) ** 2 + (means["cosine_visible"] - 0.6) ** 2
    assert found.terms["reconstruction"].item() == pytest.approx(reconstruction, abs=1e-5)
    assert found.loss.item() == pytest.approx(reconstruction + 0.3 * constraint, abs=1e-5)


def test_i_jepa_predicts_each_block_apart_from_the_whole_image(tiny, built, fed):
    recipe = tiny("i-jepa", "data.image_size=24")
    model = built(recipe)
    images, _, masks = fed(recipe)
    found = model(images, None, masks, 0.0).loss
    losses = []
    for i, patches in enumerate(cut_patches(images, 4)):
        latents = model.encoder(patches[masks.visible[i]][None], masks.visible[i : i + 1])
        whole = shown(model.target_encoder, patches, list(range(36)))
        for block in masks.hidden[i]:
            predicted = model.decoder(latents, masks.visible[i : i + 1], block[None])[0]
            for prediction, place in zip(predicted, block.tolist(), strict=True):
                row = whole[place]
                target = (row - row.mean()) / (row.var(correction=0) + 1e-5).sqrt()
                gap = (prediction - target).abs()
                losses.append(torch.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean())
    assert found.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


def test_runs_that_see_other_numbers_of_patches_are_the_images_one_by_one(tiny, built):
    recipe = tiny("i-jepa", "data.image_size=24", "objective.similarity_weight=0.3")
    model = built(recipe)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 24, 24, generator=generator)
    order = torch.rand(3, 36, generator=generator).argsort(1)
    hidden = order[:, -12:].reshape(3, 2, 6)
    visible = order[:, :9].clone()
    visible[2, 5:] = -1
    found = model(images, None, Masks(visible, hidden), 0.5, [(2, 9), (1, 5)])
    patches, single = cut_patches(images, 4), []
    for i, seen in enumerate((9, 9, 5)):
        one = slice(i, i + 1)
        masks = Masks(visible[one, :seen], hidden[one])
        single.append(model(images[one], None, masks, 0.5).terms)
        expected = model.predict(patches[one], masks)[1]
        given = model.predict(patches, Masks(visible, hidden), [(2, 9), (1, 5)])[1]
        torch.testing.assert_close(given[2 * i : 2 * i + 2], expected)
    for name, value in found.terms.items():
        assert value.item() == pytest.approx(sum(t[name].item() for t in single) / 3, abs=1e-5), name


@pytest.mark.parametrize("sees", ["masked", "all"])
@pytest.mark.parametrize("normalise", ["true", "false"])
def test_targets_are_the_latents_of_what_the_target_sees(tiny, built, fed, sees, normalise):
    recipe = latent_recipe(tiny, "ema", f"target.sees={sees}", f"target.normalise={normalise}")
    model = built(recipe)
    images, offsets, masks = fed(recipe)
    patches = cut_patches(images, 4, offsets)
    found = model.targets(patches, masks)
    for i in range(3):
        hidden = masks.hidden[i, 0].tolist()
        if sees == "masked":
            expected = shown(model.target_encoder, patches[i], hidden)
        else:
            expected = shown(model.target_encoder, patches[i], list(range(16)))[hidden]
        if normalise == "true":
            expected = F.layer_norm(expected, (16,))
        torch.testing.assert_close(found[i], expected, atol=1e-5, rtol=0)
    changed = patches.clone()
    changed[0, masks.visible[0]] += 1
    same = torch.equal(model.targets(changed, masks)[0], found[0])
    assert same == (sees == "masked")


def test_data2vec_averages_the_top_blocks_of_the_target(tiny, built, fed):
    recipe = tiny("data2vec")
    model = built(recipe)
    images, _, masks = fed(recipe)
    patches = cut_patches(images, 4)
    index = torch.arange(16).expand(3, -1)
    averaged = model.target_encoder.top_blocks(patches, index, 2)[:, 1:]
    found = model.targets(patches, masks)
    for i in range(3):
        expected = F.layer_norm(averaged[i, masks.hidden[i, 0]], (16,))
        torch.testing.assert_close(found[i], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", ["true", "false"])
@pytest.mark.parametrize("kind", ["pixels", "projection"])
def test_pixel_targets_are_standardised_patches_projected_for_lite(tiny, built, fed, kind, norm):
    recipe = latent_recipe(tiny, kind, f"target.norm_pixels={norm}")
    model = built(recipe)
    images, offsets, masks = fed(recipe)
    patches = cut_patches(images, 4, offsets)
    found = model.targets(patches, masks)
    for i in range(3):
        for t, place in enumerate(masks.hidden[i, 0].tolist()):
            row = patches[i, place]
            if norm == "true":
                row = (row - row.mean()) / (row.var() + 1e-6).sqrt()
            if kind == "projection":
                row = row @ model.random_projection
            torch.testing.assert_close(found[i, t], row, atol=1e-5, rtol=0)
    if kind == "projection":
        assert "random_projection" in model.state_dict()
        assert not any("random" in name for name, _ in model.named_parameters())
        assert model.random_projection.std().item() == pytest.approx(1 / math.sqrt(48), rel=0.1)


@pytest.mark.parametrize("kind", ["pixels", "projection"])
def test_targets_of_pixels_are_fp32_under_autocast_too(tiny, built, fed, kind):
    recipe = latent_recipe(tiny, kind)
    model = built(recipe)
    images, offsets, masks = fed(recipe)
    patches = cut_patches(images, 4, offsets)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.targets(patches, masks)
    assert torch.equal(found, model.targets(patches, masks))


@pytest.mark.parametrize("weight", [0, 0.3])
@pytest.mark.parametrize("kind", ["ema", "shared"])
def test_similarities_have_a_gradient_where_they_are_constrained_alone(
    tiny, built, fed, monkeypatch, kind, weight
):
    found = []

    def noted(x):
        found.append(mean_cosine(x))
        return found[-1]

    monkeypatch.setattr(model_module, "mean_cosine", noted)
    recipe = tiny("latent-mim", f"target.kind={kind}", f"objective.similarity_weight={weight}")
    built(recipe)(*fed(recipe), 0.5).loss.backward()
    assert [cosine.requires_grad for cosine in found] == [weight > 0, weight > 0, False]


@pytest.mark.parametrize("loss", ["infonce", "smooth_l1"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_target_of_the_shared_encoder_alone(tiny, built, fed, kind, loss):
    recipe = latent_recipe(tiny, kind, f"objective.loss={loss}")
    model = built(recipe)
    images, offsets, masks = fed(recipe)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradients(value):
        found = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
        return torch.cat([torch.zeros(1) if g is None else g.flatten() for g in found])

    found = gradients(model(images, offsets, masks, 0.0).loss)
    patches = cut_patches(images, 4, offsets)
    rows = torch.arange(3)[:, None]
    predicted = model.decoder(
        model.encoder(patches[rows, masks.visible], masks.visible), masks.visible, masks.hidden[:, 0]
    )
    targets = model.targets(patches, masks)
    held = gradients(reconstruction_loss(predicted, targets.detach(), recipe.objective))
    if kind == "shared":
        predicted = model.decoder(
            model.encoder(patches[rows, masks.visible], masks.visible), masks.visible, masks.hidden[:, 0]
        )
        through = gradients(reconstruction_loss(predicted, targets, recipe.objective))
        torch.testing.assert_close(found, through, atol=1e-6, rtol=1e-4)
        assert (found - held).abs().max() > 1e-3
    else:
        torch.testing.assert_close(found, held, atol=1e-6, rtol=1e-4)
    assert not any(name.startswith("target_encoder") for name in trained)
    assert (model.target_encoder is not None) == (kind in ("ema", "frozen"))


def test_an_ema_target_starts_as_the_online_encoder_and_a_frozen_one_does_not(tiny):
    for kind, same in (("ema", True), ("frozen", False)):
        model = MaskedImageModel(latent_recipe(tiny, kind))
        pairs = zip(
            model.encoder.vit.blocks.parameters(), model.target_encoder.vit.blocks.parameters(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs) == same


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.99, 1.0])
def test_the_ema_update_equals_the_loop_and_leaves_gradients_alone(tiny, built, fed, momentum):
    recipe = latent_recipe(tiny, "ema", "model.positions=learned")
    model = built(recipe)
    model(*fed(recipe), 0.0).loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    online = {name: p.detach().clone() for name, p in model.encoder.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.target_encoder.named_parameters()}
    model.update_target(momentum)
    assert any(not torch.equal(before[n], online[n]) for n in online)
    for name, parameter in model.target_encoder.named_parameters():
        expected = momentum * before[name] + (1 - momentum) * online[name]
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=1e-6, msg=name)
        assert parameter.grad is None
        assert not parameter.requires_grad
    for name, parameter in model.encoder.named_parameters():
        assert torch.equal(parameter, online[name])
    for name, parameter in model.named_parameters():
        assert name not in gradients or torch.equal(parameter.grad, gradients[name])


@pytest.mark.parametrize("kind", ["frozen", "stop_gradient", "projection"])
def test_only_an_ema_target_moves(tiny, built, kind):
    model = built(latent_recipe(tiny, kind))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.update_target(0.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_lowers_its_loss_on_a_fixed_batch(tiny, fed, name):
    recipe = tiny(name)
    torch.manual_seed(0)
    model = MaskedImageModel(recipe)
    fixed = fed(recipe, batch=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(15):
        model.update_target(0.99)
        found = model(*fixed, 0.5)
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        losses.append(found.loss.item())
        assert all(math.isfinite(value.item()) and not value.requires_grad for value in found.terms.values())
    assert losses[-1] < 0.95 * losses[0]


def test_what_is_hidden_decides_the_loss_and_not_the_order(tiny, built, fed):
    recipe = tiny("latent-mim")
    model = built(recipe)
    images, offsets, masks = fed(recipe)
    shuffled = Masks(masks.visible.flip(1), masks.hidden.flip(2))
    first, second = (model(images, offsets, m, 0.5).loss.item() for m in (masks, shuffled))
    assert first == pytest.approx(second, abs=1e-5)


@pytest.mark.parametrize(("arch", "count"), [("vit_base", 111_655_680), ("vit_large", 329_239_296)])
def test_mae_has_as_many_trained_parameters_as_the_official_one(arch, count):
    with torch.device("meta"):
        model = MaskedImageModel(load_recipe("mae", [f"model.arch={arch}"]))
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
