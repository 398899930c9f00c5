"""Encoders: features equal to timm's, position tables by their rules, references and their refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lmim_bench.bench.backbones import ViTEncoder, resample_positions
from lmim_bench.bench.encoders import inspect_checkpoint, load_encoder
from lmim_bench.bench.errors import CheckpointError, ConfigError, TaskError
from lmim_bench.bench.modules import PixelEncoder
from lmim_bench.bench.references import split_reference
from lmim_bench.bench.timm_models import create_timm, timm_encoder, timm_spec
from lmim_bench.bench.types import CheckpointInfo, Encoder, Tap
from lmim_bench.bench.vit import build_vit, vit_spec

INFO = CheckpointInfo(
    source="test", sha256=None, format="test", container="", parameters=0, loaded_tensors=0, encoder_tensors=0
)
SHAPE: dict[str, Any] = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no class token": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "registers": {"reg_tokens": 2, "no_embed_class": True},
    "registers in the table": {"reg_tokens": 2},
    "norm of the mean": {"global_pool": "avg"},
    "layer scale, no qkv bias": {"init_values": 0.1, "qkv_bias": False},
    "norm before the blocks": {"pre_norm": True},
}


def jitter(module: nn.Module, seed: int = 1) -> nn.Module:
    """Every parameter random, so that no norm, bias or token is at a value that hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def images(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def pair(side: int = 32, **variant: Any) -> tuple[Any, ViTEncoder]:
    """A timm model that resamples its positions by itself, and our encoder with the same weights."""
    reference = jitter(
        VisionTransformer(img_size=side, num_classes=0, dynamic_img_size=True, **SHAPE, **variant)
    )
    ours = VisionTransformer(img_size=side, num_classes=0, **SHAPE, **variant)
    ours.load_state_dict(reference.state_dict())
    return reference, ViTEncoder(ours, timm_spec(ours, {}), INFO)


# ------------------------------------------------------------------------------------------- plain ViT


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("size", [(32, 32), (48, 48), (24, 56), (64, 32), (8, 8)])
def test_every_block_equals_timm_at_any_size(variant: dict[str, Any], size: tuple[int, int]) -> None:
    model, encoder = pair(**variant)
    x = images(*size)
    taps = [Tap(layer, norm) for layer in (-1, -2, -3) for norm in (True, False)]
    found = encoder(x, taps)
    for tap in taps:
        entry = model.forward_intermediates(
            x, indices=[3 + tap.layer], return_prefix_tokens=True, norm=tap.norm, intermediates_only=True
        )[0]
        patches, prefix = entry if model.num_prefix_tokens else (entry, torch.empty(0))
        features = found[tap]
        torch.testing.assert_close(features.patches, patches.permute(0, 2, 3, 1), atol=1e-5, rtol=1e-5)
        if model.has_class_token:
            torch.testing.assert_close(features.cls, prefix[:, 0], atol=1e-5, rtol=1e-5)
        else:
            assert features.cls is None
        mean = patches.mean(dim=(2, 3))
        torch.testing.assert_close(
            features.mean, model.fc_norm(mean) if tap.norm else mean, atol=1e-5, rtol=1e-5
        )


def test_the_global_feature_is_the_one_timm_hands_to_its_head() -> None:
    for variant, kind in ((VARIANTS["plain"], "cls"), (VARIANTS["norm of the mean"], "mean")):
        model, encoder = pair(**variant)
        x = images(32, 32)
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
        assert encoder.spec.pooling == kind
        torch.testing.assert_close(getattr(encoder(x)[Tap()], kind), expected, atol=1e-5, rtol=1e-5)


def test_blocks_run_once_and_not_beyond_the_deepest_tap() -> None:
    _, encoder = pair()
    calls = [0, 0, 0]
    for i, block in enumerate(encoder.model.blocks):
        block.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    encoder(images(32, 32), [Tap(-3), Tap(-2), Tap(-2, False), Tap(-2)])
    assert calls == [1, 1, 0]
    encoder(images(32, 32), [Tap(-1), Tap(-3, False)])
    assert calls == [2, 2, 1]


def test_features_carry_no_graph_and_the_model_is_in_evaluation_mode() -> None:
    _, encoder = pair()
    assert not encoder.model.training
    assert not any(p.requires_grad for p in encoder.model.parameters())
    assert not encoder(images(32, 32))[Tap()].patches.requires_grad


def test_a_size_that_the_patches_do_not_divide_is_refused() -> None:
    _, encoder = pair()
    with pytest.raises(TaskError, match="30x32 cannot be cut into patches of 8x8"):
        encoder(images(30, 32))
    with pytest.raises(TaskError, match=r"shape \(B, 3, H, W\)"):
        encoder(torch.zeros(2, 1, 32, 32))


@pytest.mark.parametrize("layer", [0, -4, 2])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    _, encoder = pair()
    with pytest.raises(TaskError, match=f"layer {layer} does not exist"):
        encoder(images(32, 32), [Tap(layer)])


def test_build_vit_leaves_the_random_state_alone_and_meta_has_no_values() -> None:
    spec = vit_spec("x", **SHAPE, image_size=32)
    before = torch.get_rng_state()
    build_vit(spec.arch)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.is_meta for p in build_vit(spec.arch, device="meta").parameters())


@pytest.mark.parametrize("hidden", [96, 100, 37, 1000])
def test_any_hidden_width_is_built_exactly(hidden: int) -> None:
    spec = vit_spec("x", **SHAPE, image_size=32, mlp_ratio=hidden / 24)
    assert build_vit(spec.arch).blocks[0].mlp.fc1.out_features == hidden


def test_numbers_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(CheckpointError, match="embed_dim 24 is not a multiple of num_heads 5"):
        vit_spec("x", embed_dim=24, depth=1, num_heads=5)
    with pytest.raises(CheckpointError, match="image_size 30 is not a multiple"):
        vit_spec("x", **SHAPE, image_size=30)
    with pytest.raises(CheckpointError, match="depht"):
        build_vit({**vit_spec("x", **SHAPE, image_size=32).arch, "depht": 3})


# ------------------------------------------------------------------------------------------- positions


def dino_rule(table: np.ndarray, new: tuple[int, int]) -> np.ndarray:
    """Bicubic (a = -0.75, borders repeated) at (i + 0.5) / s - 0.5 with s = (new + 0.1) / old, by hand."""

    def kernel(t: float) -> float:
        a, t = -0.75, abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    def weights(n_new: int, n_old: int) -> np.ndarray:
        matrix = np.zeros((n_new, n_old))
        for i in range(n_new):
            where = (i + 0.5) / ((n_new + 0.1) / n_old) - 0.5
            first = math.floor(where) - 1
            for j in range(first, first + 4):
                matrix[i, min(max(j, 0), n_old - 1)] += kernel(where - j)
        return matrix

    rows, columns = weights(new[0], table.shape[0]), weights(new[1], table.shape[1])
    resampled: np.ndarray = np.einsum("ir,jc,rcd->ijd", rows, columns, table)
    return resampled


@pytest.mark.parametrize("new", [(5, 5), (3, 9), (12, 4), (30, 53)])
def test_the_dino_rule_stated_by_hand(new: tuple[int, int]) -> None:
    table = np.random.default_rng(0).normal(size=(4, 4, 6))
    given = torch.from_numpy(table).float().reshape(1, 16, 6)
    found = resample_positions(given, (4, 4), new, "dino").reshape(*new, 6)
    np.testing.assert_allclose(found.numpy(), dino_rule(table, new), atol=1e-5)


def test_the_two_rules_differ_and_neither_touches_the_native_grid() -> None:
    _, encoder = pair()
    at_home, larger = images(32, 32), images(48, 64)
    native = encoder(at_home)[Tap()].patches
    assert torch.equal(native, encoder(at_home, pos_interpolation="dino")[Tap()].patches)
    timm_rule = encoder(larger)[Tap()].patches
    dino = encoder(larger, pos_interpolation="dino")[Tap()].patches
    assert (timm_rule - dino).abs().max() > 1e-3
    # Tables are cached by rule: asking in turn gives what asking alone gave.
    assert torch.equal(encoder(larger)[Tap()].patches, timm_rule)
    assert torch.equal(encoder(larger, pos_interpolation="antialias")[Tap()].patches, timm_rule)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    old=st.integers(1, 9),
    new=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    method=st.sampled_from(["timm", "dino", "antialias"]),
    value=st.floats(-3, 3, width=32),
)
def test_a_constant_table_stays_constant(old: int, new: tuple[int, int], method: Any, value: float) -> None:
    table = torch.full((1, old * old, 4), value)
    found = resample_positions(table, (old, old), new, method)
    assert found.shape == (1, new[0] * new[1], 4)
    torch.testing.assert_close(found, torch.full_like(found, value), atol=1e-4, rtol=1e-4)


def test_position_tables_do_not_pile_up() -> None:
    _, encoder = pair()
    for n in range(1, 80):
        encoder(images(8, 8 * n)[:1], [Tap(-3)])
    assert len(encoder._tables) <= 32


# ------------------------------------------------------------------------------------------- timm


def test_random_weights_are_seeded_and_said_to_be_random() -> None:
    before = torch.get_rng_state()
    first, again, other = (load_encoder("timm:test_vit", seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.info.random_weights
    assert first.info.loaded_tensors == 0
    assert "random weights, seed 3" in first.info.notes[0]
    assert isinstance(first, Encoder)


@pytest.mark.parametrize(
    "name",
    ["test_resnet", "test_convnext", "test_efficientnet", "test_nfnet", "test_byobnet", "test_mambaout"],
)
def test_convolutional_models_give_their_own_pooled_feature(name: str) -> None:
    encoder: Any = load_encoder(f"timm:{name}")
    spec = encoder.spec
    assert (spec.depth, spec.has_cls, spec.pooling) == (1, False, "mean")
    for size in ((spec.image_size,) * 2, (2 * spec.patch_size, 3 * spec.patch_size)):
        x = images(*size)
        features = encoder(x)[Tap()]
        grid = tuple(n // spec.patch_size for n in size)
        assert features.cls is None
        assert features.patches.shape == (2, *grid, spec.embed_dim)
        with torch.inference_mode():
            expected = encoder.model.forward_head(encoder.model.forward_features(x), pre_logits=True)
        # Models with a layer between pooling and head (EfficientNet has none, MambaOut does) differ by it.
        if expected.shape == features.mean.shape and name != "test_mambaout":
            torch.testing.assert_close(features.mean, expected, atol=1e-5, rtol=1e-5)


def test_swin_keeps_rows_and_columns_apart() -> None:
    small = {"embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2)}
    model = create_timm("swin_tiny_patch4_window7_224", pretrained=False, **small)
    encoder: Any = timm_encoder(model, timm_spec(model, {}), INFO)
    x = images(224, 224)
    features = encoder(x)[Tap()]
    with torch.inference_mode():
        torch.testing.assert_close(features.patches, model.forward_features(x))
    assert features.patches.shape == (2, 28, 28, 48)
    assert encoder(images(112, 224))[Tap()].patches.shape == (2, 14, 28, 48)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "deit_tiny_distilled_patch16_224"])
def test_relatives_of_the_vit_are_read_at_every_block(name: str) -> None:
    encoder: Any = load_encoder(f"timm:{name}")
    x = images(224, 224)
    found = encoder(x, [Tap(), Tap(-3), Tap(-3, False)])
    with torch.inference_mode():
        last = encoder.model.forward_features(x)
    prefix = encoder.model.num_prefix_tokens
    torch.testing.assert_close(found[Tap()].patches.flatten(1, 2), last[:, prefix:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[Tap()].cls, last[:, 0], atol=1e-4, rtol=1e-4)
    norm = encoder.model.norm
    with torch.inference_mode():
        torch.testing.assert_close(found[Tap(-3)].patches, norm(found[Tap(-3, False)].patches))
    patch = encoder.spec.patch_size
    assert encoder(images(8 * patch, 12 * patch))[Tap()].patches.shape[1:3] == (8, 12)
    with pytest.raises(TaskError, match="'dino' is not available"):
        encoder(images(8 * patch, 12 * patch), pos_interpolation="dino")


def test_a_model_of_one_size_says_so() -> None:
    encoder = load_encoder("timm:mixer_s32_224")
    assert encoder(images(224, 224))[Tap()].patches.shape[1:3] == (7, 7)
    with pytest.raises(TaskError, match="cannot take images of 288x224 pixels, only 224 squared is sure"):
        encoder(images(288, 224))


def test_a_model_with_tables_for_one_size_is_resized_and_itself_stays() -> None:
    encoder: Any = load_encoder("timm:vit_relpos_small_patch16_224")
    size = encoder.spec.image_size
    native = encoder(images(size, size))[Tap()].patches
    before = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    larger = encoder(images(size + 32, size))[Tap()].patches
    assert larger.shape[1] == native.shape[1] + 32 // encoder.spec.patch_size
    assert torch.equal(encoder(images(size, size))[Tap()].patches, native)
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_swin_keeps_its_windows_at_other_sizes() -> None:
    kwargs = {"img_size": 64, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    spec_of = create_timm("swin_tiny_patch4_window7_224", pretrained=False, seed=3, **kwargs)
    arch = {"builder": "timm", "name": "swin_tiny_patch4_window7_224", "kwargs": kwargs}
    encoder = timm_encoder(spec_of, timm_spec(spec_of, arch), INFO)
    free = create_timm(
        "swin_tiny_patch4_window7_224", pretrained=False, seed=3, **kwargs, strict_img_size=False
    ).eval()
    x = images(96, 72)
    with torch.inference_mode():
        expected = free.forward_features(x)
    torch.testing.assert_close(encoder(x)[Tap()].patches, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("timm:vit_smal_patch16_224", "has no model 'vit_smal_patch16_224'; near: vit_small_patch16_224"),
        ("timm:", r"expected timm:NAME"),
        ("timm:test_vit:trained", r"expected timm:NAME"),
        ("timm:pit_ti_224", "gives no map of patches"),
        ("pixels:x", "expected pixels"),
        ("pixels:0", "must be positive"),
        ("python:os", "expected python:package.module:factory"),
        ("python:no_such_package:make", "cannot be imported"),
        ("python:math:make", "has no 'make'"),
        ("python:math:pi", "not callable"),
        ("python:builtins:list", "returned list"),
        ("no/such/file.pth", "there is no checkpoint file"),
    ],
)
def test_references_that_lead_nowhere_end_in_one_line(reference: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        load_encoder(reference)
    assert "\n" not in str(caught.value)


def test_pretrained_weights_that_cannot_be_had_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        if kwargs["pretrained"]:
            raise OSError("no route to host\nand much more")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        CheckpointError, match=r"^the pretrained weights of timm's test_vit .*: no route to host$"
    ):
        load_encoder("timm:test_vit:pretrained")


def test_pretrained_weights_without_a_network_say_where_to_have_them_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"vit_tiny_patch16_224 cannot .* same HF_HOME"):
        load_encoder("timm:vit_tiny_patch16_224:pretrained")


# ------------------------------------------------------------------------------------------- factories

FACTORIES = """
import torch
from timm.models.vision_transformer import VisionTransformer
from lmim_bench.bench.modules import PixelEncoder

class Maps(torch.nn.Module):
    embed_dim, patch_size, image_size, mean = 6, 4, 16, (0.5, 0.5, 0.5)
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 4, 4)
    def forward_features(self, x):
        return self.conv(x)

class Tokens(Maps):
    num_prefix_tokens = 2
    def forward_features(self, x):
        body = self.conv(x).flatten(2).transpose(1, 2)
        return torch.cat([body.mean(1, keepdim=True), body[:, :1], body], dim=1)

class Named(Maps):
    has_cls = True
    def forward_features(self, x):
        body = self.conv(x).flatten(2).transpose(1, 2)
        return {"cls": body.mean(1), "patches": body}

class Wrong(Maps):
    def forward_features(self, x):
        return self.conv(x)[:, :5]

class BadSpec(Maps):
    interpolation = "lanczos"

class Diverged(Maps):
    def __init__(self):
        super().__init__()
        self.conv.bias.data[2] = float("nan")

def vit():
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=7)
def encoder():
    return PixelEncoder(8, 32)
def bare():
    return torch.nn.Linear(2, 2)
def fails():
    raise KeyError("weights")
"""


@pytest.fixture
def factories(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "enc_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    return "python:enc_factories"


def test_a_factory_may_return_an_encoder_a_vit_or_a_module(factories: str) -> None:
    assert isinstance(load_encoder(f"{factories}:encoder"), PixelEncoder)
    vit = load_encoder(f"{factories}:vit")
    assert isinstance(vit, ViTEncoder)
    assert (vit.spec.image_size, vit.spec.patch_size, vit.spec.depth) == (32, 8, 2)
    assert vit(images(40, 32))[Tap()].patches.shape == (2, 5, 4, 24)
    for name, has_cls in (("Maps", False), ("Tokens", True), ("Named", True)):
        encoder: Any = load_encoder(f"{factories}:{name}")
        x = images(8, 16)
        features = encoder(x)[Tap()]
        expected = encoder.model.conv(x).permute(0, 2, 3, 1)
        torch.testing.assert_close(features.patches, expected)
        torch.testing.assert_close(features.mean, expected.mean(dim=(1, 2)))
        assert (features.cls is not None) == encoder.spec.has_cls == has_cls
        if features.cls is not None:
            torch.testing.assert_close(features.cls, features.mean)
        assert encoder.spec.mean == (0.5, 0.5, 0.5)
        assert encoder.spec.image_size == 16


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bare", "Linear lacks embed_dim, patch_size, forward_features"),
        ("fails", "failed: KeyError"),
        ("BadSpec", "interpolation"),
        ("Diverged", "conv.bias holds NaN"),
        ("Wrong", r"gave patches of shape \(2, 4, 4, 5\), expected \(2, 4, 4, 6\)"),
    ],
)
def test_factories_that_go_wrong(factories: str, name: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        load_encoder(f"{factories}:{name}")


# ------------------------------------------------------------------------------------------- pixels


def test_pixels_are_block_means() -> None:
    encoder = load_encoder("pixels")
    x = images(32, 64)
    features = encoder(x)[Tap()]
    assert features.patches.shape == (2, 2, 4, 192)
    for b, i, j in ((0, 0, 0), (1, 1, 3), (0, 1, 2)):
        patch = x[b, :, 16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
        expected = torch.stack(
            [
                patch[c, 2 * r : 2 * r + 2, 2 * s : 2 * s + 2].mean()
                for c in range(3)
                for r in range(8)
                for s in range(8)
            ]
        )
        torch.testing.assert_close(features.patches[b, i, j], expected, atol=1e-6, rtol=1e-5)
    blocks = x.reshape(2, 3, 8, 4, 8, 8).mean(dim=(3, 5)).flatten(1)
    torch.testing.assert_close(features.mean, blocks, atol=1e-6, rtol=1e-5)
    assert features.cls is None
    assert encoder.spec.embed_dim == 192
    assert encoder.info.parameters == 0


# ------------------------------------------------------------------------------------------- options


def test_options_of_a_reference() -> None:
    assert split_reference("a/x.pth#student,heads=6") == ("a/x.pth", {"pick": "student", "heads": "6"})
    assert split_reference("x.pth#mean=0.5:0.4:0.3") == ("x.pth", {"mean": ["0.5", "0.4", "0.3"]})
    assert split_reference("x.pth") == ("x.pth", {})
    with pytest.raises(ConfigError, match="'pick' is given twice"):
        split_reference("x.pth#student,teacher")


def test_a_file_name_may_hold_the_sign_of_options(tmp_path: Any) -> None:
    path = tmp_path / "run#3.pth"
    path.write_bytes(b"")
    assert split_reference(str(path)) == (str(path), {})


def test_options_change_the_spec_and_the_fingerprint() -> None:
    plain = load_encoder("timm:test_vit")
    changed = load_encoder("timm:test_vit#image_size=192,mean=0.5:0.5:0.4,crop_pct=1,final_norm=false")
    assert changed.spec.image_size == 192
    assert changed.spec.mean == (0.5, 0.5, 0.4)
    assert changed.spec.crop_pct == 1.0
    assert changed.spec.final_norm is False
    assert changed.fingerprint != plain.fingerprint
    by_argument = load_encoder("timm:test_vit#image_size=160", overrides={"image_size": 192})
    assert by_argument.spec.image_size == 192


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("timm:test_vit#pooling=max", "pooling"),
        ("timm:test_vit#poling=cls", "has no option 'poling'. Did you mean 'pooling'"),
        ("timm:test_vit#heads=3", "has no option 'heads'"),
        ("timm:test_vit#image_size=100", "not a multiple of the patch size 16"),
        ("timm:test_vit#mean=0.5:0.5", "mean"),
        ("timm:test_resnet#pooling=cls", "lacks"),
    ],
)
def test_options_that_are_not_valid(reference: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_encoder(reference)


def test_inspection_is_plain_json() -> None:
    import json

    found = inspect_checkpoint("timm:test_vit")
    assert json.loads(json.dumps(found)) == found
    assert found["coverage"]["random_weights"] is True
    assert found["tokens"] == {"class": True, "registers": 0, "patches": 100}
