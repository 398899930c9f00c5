import math

import pytest
import torch
from torch import nn

from lmim_bench.pretrain.decoders import Decoder, visual_cues
from lmim_bench.pretrain.encoder import PatchEncoder, build_projector
from lmim_bench.pretrain.patches import cut_patches, sincos_positions, take
from lmim_bench.pretrain.sections import ProjectorConfig

SIDE = 16  # of the tiny recipes' images, on a 4 x 4 grid


@pytest.fixture
def encoder_of(tiny, shaken):
    def make(*sets, name="mae"):
        torch.manual_seed(0)
        return shaken(PatchEncoder(tiny(name, *sets)))

    return make


@pytest.fixture
def decoder_of(tiny, shaken):
    def make(kind, *sets, prefix=1, cues=True):
        torch.manual_seed(0)
        recipe = tiny("latent-mim", f"decoder.kind={kind}", f"decoder.cues={cues}", *sets)
        return shaken(Decoder(recipe, 16, 10, prefix))

    return make


def floats(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_norm(row, eps):
    mean = row.mean()
    return (row - mean) / (((row - mean) ** 2).mean() + eps).sqrt()


@pytest.mark.parametrize("positions", ["sincos", "latent_mim", "learned"])
@pytest.mark.parametrize(("class_token", "registers"), [(True, 0), (False, 0), (True, 3), (False, 2)])
def test_all_patches_in_order_are_what_timm_computes(encoder_of, class_token, registers, positions):
    encoder = encoder_of(
        f"model.class_token={class_token}", f"model.registers={registers}", f"model.positions={positions}"
    )
    images = floats(2, 3, SIDE, SIDE)
    index = torch.arange(16).expand(2, -1)
    found = encoder(cut_patches(images, 4), index)
    assert encoder.prefix == class_token + registers
    assert found.shape == (2, encoder.prefix + 16, 16)
    torch.testing.assert_close(found, encoder.vit.forward_features(images), atol=1e-5, rtol=0)


def test_the_order_of_the_visible_patches_does_not_matter(encoder_of):
    encoder = encoder_of()
    patches, index = floats(1, 3, 48), torch.tensor([[2, 7, 11]])
    order = torch.tensor([2, 0, 1])
    found = encoder(patches, index)
    permuted = encoder(patches[:, order], index[:, order])
    torch.testing.assert_close(permuted[:, 1:], found[:, 1:][:, order], atol=1e-5, rtol=0)
    torch.testing.assert_close(permuted[:, 0], found[:, 0], atol=1e-5, rtol=0)


def test_patches_that_are_not_shown_have_no_influence(encoder_of):
    encoder = encoder_of("projector.depth=2")
    images = floats(2, 3, SIDE, SIDE).requires_grad_()
    index = torch.tensor([[0, 5], [15, 3]])
    (encoder(take(cut_patches(images, 4), index), index) ** 3).sum().backward()
    touched = cut_patches(images.grad, 4).abs().sum(-1)
    assert [row.nonzero().flatten().tolist() for row in touched] == [[0, 5], [3, 15]]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_top_blocks_equal_the_mean_of_normalised_outputs(encoder_of, count):
    encoder = encoder_of("model.depth=3")
    patches, index = floats(2, 5, 48), torch.tensor([[0, 1, 2, 3, 4], [9, 8, 7, 6, 5]])
    x = encoder.embed(patches, index)
    outputs = []
    for block in encoder.vit.blocks:
        x = block(x)
        outputs.append(x)
    found = encoder.top_blocks(patches, index, count)
    for b in range(2):
        for token in range(6):
            total = sum(layer_norm(out[b, token], 1e-5) for out in outputs[-count:])
            torch.testing.assert_close(found[b, token], total / count, atol=1e-5, rtol=0)


def test_recomputed_activations_change_neither_latents_nor_gradients(encoder_of):
    plain, saving = encoder_of(), encoder_of("engine.activation_checkpointing=true")
    patches, index = floats(1, 4, 48), torch.tensor([[0, 3, 5, 9]])
    for encoder in (plain, saving):
        encoder(patches, index).pow(3).sum().backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "sets",
    [
        ("decoder.kind=self",),
        ("decoder.kind=cross",),
        ("decoder.kind=cross_self",),
        ("target.kind=shared", "target.top_blocks=2", "projector.depth=0"),
    ],
)
def test_checkpointing_keeps_less_of_every_part(tiny, built, fed, sets):
    kept = []
    for saving in ("false", "true"):
        sizes = ("model.depth=4", "decoder.depth=4", f"engine.activation_checkpointing={saving}")
        recipe = tiny("latent-mim", *sizes, *sets)
        model, total = built(recipe), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda one, total=total: total.append(one.numel()) or one, lambda one: one
        ):
            model(*fed(recipe), 0.5)
        kept.append(sum(total))
    assert kept[1] < 0.5 * kept[0]


def test_the_projector_is_linear_norm_gelu_without_biases(shaken):
    projector = build_projector(ProjectorConfig(depth=3, hidden_dim=10), 6)
    kinds = [nn.Linear, nn.LayerNorm, nn.GELU, nn.Linear, nn.LayerNorm, nn.GELU, nn.Linear, nn.LayerNorm]
    assert [type(layer) for layer in projector] == kinds
    maps = [layer for layer in projector if isinstance(layer, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in maps] == [(6, 10), (10, 10), (10, 6)]
    assert all(m.bias is None for m in maps)
    shaken(projector)
    norms = [layer for layer in projector if isinstance(layer, nn.LayerNorm)]
    x = floats(6)
    row = x
    for i, (linear, norm) in enumerate(zip(maps, norms, strict=True)):
        row = torch.stack([(weights * row).sum() for weights in linear.weight])
        row = layer_norm(row, 1e-5) * norm.weight + norm.bias
        if i < 2:
            row = row * 0.5 * (1 + torch.erf(row / math.sqrt(2)))
    torch.testing.assert_close(projector(x), row, atol=1e-5, rtol=0)


def test_a_projector_of_no_depth_is_the_identity():
    x = floats(2, 3, 4)
    assert torch.equal(build_projector(ProjectorConfig(depth=0), 4)(x), x)
    one = build_projector(ProjectorConfig(depth=1, hidden_dim=99), 4)
    assert [type(layer) for layer in one] == [nn.Linear, nn.LayerNorm]
    assert one[0].weight.shape == (4, 4)


@pytest.mark.parametrize(("style", "trained"), [("sincos", False), ("latent_mim", False), ("learned", True)])
def test_positions_are_fixed_and_zero_for_the_prefix_unless_learned(tiny, style, trained):
    encoder = PatchEncoder(tiny("mae", f"model.positions={style}", "model.registers=2"))
    table = encoder.vit.pos_embed
    assert table.requires_grad == trained
    assert table.shape == (1, 3 + 16, 16)
    if trained:
        assert table.std().item() == pytest.approx(0.02, rel=0.3)
    else:
        assert table[0, :3].abs().sum() == 0
        assert torch.equal(table[0, 3:], sincos_positions(16, 4, style))


def test_xavier_counts_the_patch_embedding_as_the_linear_map_that_it_is(tiny):
    vit = PatchEncoder(tiny("mae")).vit
    for weight in (vit.patch_embed.proj.weight, vit.blocks[1].mlp.fc1.weight, vit.blocks[0].attn.qkv.weight):
        rows, columns = weight.flatten(1).shape
        bound = math.sqrt(6 / (rows + columns))
        assert 0.9 * bound < weight.abs().max().item() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    biases = [p for name, p in vit.named_parameters() if name.endswith("bias")]
    assert all(bias.abs().max() == 0 for bias in biases)
    assert vit.cls_token.abs().max() > 0


@pytest.mark.parametrize(("name", "by_depth"), [("i-jepa", False), ("data2vec", True)])
def test_normal_weights_of_block_i_are_divided_by_the_root_of_2i_in_beit_alone(tiny, name, by_depth):
    recipe = tiny(name, "model.embed_dim=64", "decoder.width=64")
    for blocks in (PatchEncoder(recipe).vit.blocks, Decoder(recipe, 64, 64, 0).blocks):
        for i, block in enumerate(blocks, start=1):
            expected = 0.02 / math.sqrt(2 * i) if by_depth else 0.02
            for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
                assert weight.std().item() == pytest.approx(expected, rel=0.15)
            assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.15)


def test_visual_cues_equal_a_loop():
    asked, known, latents = floats(2, 3, 8), floats(2, 5, 8, seed=1), floats(2, 5, 6, seed=2)
    found = visual_cues(asked, known, latents)
    for b in range(2):
        for t in range(3):
            scores = [math.exp(float(asked[b, t] @ known[b, v]) / math.sqrt(8)) for v in range(5)]
            expected = sum(s / sum(scores) * latents[b, v] for v, s in enumerate(scores))
            torch.testing.assert_close(found[b, t], expected, atol=1e-5, rtol=0)


VISIBLE, HIDDEN = torch.tensor([[3, 10, 6], [0, 1, 15]]), torch.tensor([[5, 2, 9, 14], [7, 8, 4, 12]])


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_the_self_decoder_is_mae_with_mask_tokens_in_their_places(decoder_of, prefix):
    decoder = decoder_of("self", "model.positions=sincos", prefix=prefix, cues=False)
    latents = floats(2, prefix + 3, 16)
    found = decoder(latents, VISIBLE, HIDDEN)
    assert found.shape == (2, 4, 10)
    positions = sincos_positions(16, 4)
    for b in range(2):
        x = decoder.embed(latents[b])
        full = decoder.mask_token[0].expand(16, -1).clone()
        full[VISIBLE[b]] = x[prefix:]
        used = sorted(VISIBLE[b].tolist() + HIDDEN[b].tolist())
        x = torch.cat([x[:prefix], (full + positions)[used]])[None]
        for block in decoder.blocks:
            x = block(x)
        decoded = decoder.head(decoder.norm(x))[0, prefix:]
        for t, patch in enumerate(HIDDEN[b].tolist()):
            torch.testing.assert_close(found[b, t], decoded[used.index(patch)], atol=1e-5, rtol=0)


def attention(queries, keys, values, heads):
    """One head and one query at a time."""
    width = queries.shape[-1] // heads
    rows = []
    for q in queries:
        parts = []
        for h in range(heads):
            at = slice(h * width, (h + 1) * width)
            scores = torch.stack([(q[at] * k[at]).sum() / math.sqrt(width) for k in keys])
            parts.append((scores.softmax(0)[:, None] * values[:, at]).sum(0))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["cross", "cross_self"])
@pytest.mark.parametrize("cues", [True, False])
def test_the_cross_decoder_equals_attention_by_hand(decoder_of, kind, cues):
    decoder = decoder_of(kind, cues=cues)
    latents = floats(2, 4, 16)
    found = decoder(latents, VISIBLE, HIDDEN)
    positions = sincos_positions(16, 4, "latent_mim")
    for b in range(2):
        x = decoder.embed(latents[b])
        queries = decoder.mask_token[0].expand(4, -1) + positions[HIDDEN[b]]
        if cues:
            weights = positions[HIDDEN[b]] @ positions[VISIBLE[b]].T / math.sqrt(16)
            queries = queries + weights.softmax(1) @ x[1:]
        queries = torch.cat([decoder.query_token[0], queries])
        x = torch.cat([x[:1], x[1:] + positions[VISIBLE[b]]])
        for block in decoder.blocks:
            assert (block.self_attn is None) == (kind == "cross")
            if kind == "cross_self":
                mine = block.self_attn
                q, k, v = mine.qkv(block.norm1(queries)).chunk(3, dim=-1)
                queries = queries + mine.proj(attention(q, k, v, 2))
            other = block.cross_attn
            k, v = other.kv_proj(block.norm2kv(x)).chunk(2, dim=-1)
            seen = attention(other.q_proj(block.norm2q(queries)), k, v, 2)
            queries = queries + other.proj(seen)
            queries = queries + block.mlp(block.norm3(queries))
        expected = decoder.head(decoder.norm(queries))[1:]
        torch.testing.assert_close(found[b], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["self", "cross", "cross_self"])
def test_permuting_the_hidden_patches_permutes_the_predictions(decoder_of, kind):
    decoder = decoder_of(kind)
    latents, order = floats(2, 4, 16), torch.tensor([2, 0, 3, 1])
    found = decoder(latents, VISIBLE, HIDDEN)
    permuted = decoder(latents, VISIBLE, HIDDEN[:, order])
    torch.testing.assert_close(permuted, found[:, order], atol=1e-5, rtol=0)
    assert (found[:, 0] - found[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "talks"), [("self", True), ("cross", False), ("cross_self", True)])
def test_only_self_attention_lets_predictions_see_each_other(decoder_of, kind, talks):
    decoder = decoder_of(kind)
    latents = floats(2, 4, 16)
    together, alone = decoder(latents, VISIBLE, HIDDEN), decoder(latents, VISIBLE, HIDDEN[:, :1])
    assert ((together[:, :1] - alone).abs().max() > 1e-4) == talks


@pytest.mark.parametrize(("kind", "there"), [("self", False), ("cross", True), ("cross_self", True)])
def test_the_query_token_belongs_to_cross_attention(tiny, kind, there):
    decoder = Decoder(tiny("latent-mim", f"decoder.kind={kind}"), 16, 10, 1)
    assert (decoder.query_token is not None) == there
    assert (decoder.mask_token.abs().max() > 0) != there
    if there:
        assert decoder.query_token.abs().max() > 0
    assert "positions" not in decoder.state_dict()
