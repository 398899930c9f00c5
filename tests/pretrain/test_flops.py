import pytest
import torch

from lmim_bench.pretrain import flops
from lmim_bench.pretrain.masking import Masks, draw_masks


def block(tokens, width):
    """Of a block: qkv, projection and MLP of ratio 4, scores and mixture; a multiply-add counts 2."""
    return 2 * tokens * width * (3 * width + width + 8 * width) + 4 * tokens**2 * width


def cross_block(queries, keys, width, attends_itself):
    own = 2 * queries * width * 4 * width + 4 * queries**2 * width if attends_itself else 0
    cross = 2 * queries * width * 2 * width + 2 * keys * width * 2 * width + 4 * queries * keys * width
    return own + cross + 2 * queries * width * 8 * width


def encoder(tokens, width, depth):
    return depth * block(tokens, width)


@pytest.mark.parametrize("saving", ["true", "false"])
def test_mae_equals_a_count_by_hand(tiny, saving):
    recipe = tiny(
        "mae", "model.embed_dim=64", "decoder.width=32", f"engine.activation_checkpointing={saving}"
    )
    embedding = 2 * 4 * 48 * 64
    decoder = 2 * block(17, 32) + 2 * 5 * 64 * 32 + 2 * 12 * 32 * 48
    # the backward pass of a product is two of them, but the pixels need no gradient
    expected = 3 * (encoder(5, 64, 2) + decoder) + 2 * embedding
    assert flops.training_flops(recipe) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("kind", ["ema", "stop_gradient", "shared"])
def test_the_target_counts_forward_alone_unless_it_is_shared(tiny, kind):
    sets = ["model.embed_dim=64", "decoder.width=32", "projector.depth=0", "target.sees=all"]
    recipe = tiny("latent-mim", *sets, f"target.kind={kind}", "objective.loss=mse", "decoder.cues=false")
    decoder = 2 * cross_block(13, 5, 32, True) + 2 * 5 * 64 * 32 + 2 * 12 * 32 * 64
    online, target = 3 * (encoder(5, 64, 2) + decoder) + 2 * 2 * 4 * 48 * 64, encoder(17, 64, 2)
    embedding = 2 * 16 * 48 * 64
    expected = online + (3 * target + 2 * embedding if kind == "shared" else target + embedding)
    assert flops.training_flops(recipe) == pytest.approx(expected, rel=0.03)


def test_i_jepa_counts_its_predictor_once_a_block(tiny, monkeypatch):
    seen, blocks, size = 6, 3, 4
    masks = Masks(torch.zeros(4, seen, dtype=torch.int64), torch.zeros(4, blocks, size, dtype=torch.int64))
    monkeypatch.setattr(flops, "draw_masks", lambda *_: masks)
    recipe = tiny("i-jepa", "model.embed_dim=64", "decoder.width=32")
    predictor = 2 * block(seen + size, 32) + 2 * seen * 64 * 32 + 2 * size * 32 * 64
    online = 3 * (encoder(seen, 64, 2) + blocks * predictor) + 2 * 2 * seen * 48 * 64
    target = encoder(16, 64, 2) + 2 * 16 * 48 * 64
    assert flops.training_flops(recipe) == pytest.approx(online + target, rel=0.03)


def test_i_jepa_counts_the_patches_that_a_training_sees(tiny):
    """The poorest of the 128 images of a group sees fewer than the poorest of four."""
    sets = ("model.embed_dim=64", "decoder.width=32", "data.image_size=56", "masking.min_context=10")
    recipe = tiny("i-jepa", *sets, "optim.batch_size=2048")
    few = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"batch_size": 4})})
    found, expected = flops.training_flops(recipe), []
    for seed in range(40):
        masks = draw_masks(recipe, 2048, slice(0, 4), torch.Generator().manual_seed(seed))
        seen, blocks, size = masks.visible.shape[1], *masks.hidden.shape[1:]
        predictor = 2 * block(seen + size, 32) + 2 * seen * 64 * 32 + 2 * size * 32 * 64
        online = 3 * (encoder(seen, 64, 2) + blocks * predictor) + 2 * 2 * seen * 48 * 64
        expected.append(online + encoder(196, 64, 2) + 2 * 196 * 48 * 64)
    assert found == pytest.approx(sum(expected) / len(expected), rel=0.05)
    assert flops.training_flops(few) > 1.1 * found


def test_operations_are_counted_where_linspace_does_not_follow_the_device(monkeypatch, tiny):
    """So it is in a process in which transformers was the first to load a model."""
    constructors = torch.utils._device._device_constructors() - {torch.linspace}
    monkeypatch.setattr(torch.utils._device, "_device_constructors", lambda: constructors)
    assert flops.training_flops(tiny("mae")) > 0
