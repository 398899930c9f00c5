"""Official releases whose keys are not quite what one expects, and messages about what is not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.errors import CheckpointError
from lmim_bench.bench.timm_models import create_timm
from lmim_bench.bench.types import Encoder, Tap

State = dict[str, torch.Tensor]
SIDE, PATCH, DIM, HEADS = 32, 8, 48, 4


def vit(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    shape = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": DIM, "num_heads": HEADS, "num_classes": 0}
    model = VisionTransformer(**{**shape, "depth": 2, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def save(payload: Any, folder: Path, name: str = "x.pth") -> str:
    torch.save(payload, folder / name)
    return str(folder / name)


def images(side: int = SIDE) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(9))


def assert_tokens(encoder: Encoder, model: Any) -> None:
    with torch.inference_mode():
        tokens = model.forward_features(images())
    found = encoder(images())[Tap()]
    body = tokens[:, model.num_prefix_tokens :]
    torch.testing.assert_close(found.patches.flatten(1, 2), body, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------- DeiT III


def deit_3(model: Any) -> State:
    """timm's layer scale in the names of DeiT III (models_v2.py)."""
    return {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
        for name, tensor in model.state_dict().items()
    }


def test_deit_3(tmp_path: Path) -> None:
    model = vit(init_values=1e-5, no_embed_class=True)
    state = {"model": deit_3(model)}
    encoder = load_encoder(f"{save(state, tmp_path, 'deit_3_small_224_21k.pth')}#heads={HEADS}")
    assert_tokens(encoder, model)
    assert not any("WARNING" in note for note in encoder.info.notes)
    # RoPE-ViT with learned positions beside the rotary ones has the very same keys.
    unsure = load_encoder(f"{save(state, tmp_path)}#heads={HEADS}")
    assert any(note.startswith("WARNING: layer scale in the names of DeiT III") for note in unsure.info.notes)


def test_deit_3_as_a_named_model_of_timm(tmp_path: Path) -> None:
    model = create_timm("test_vit2", pretrained=False, seed=1).eval()
    state = deit_3(model)
    assert "blocks.0.gamma_1" in state
    encoder = load_encoder(f"{save({'model': state}, tmp_path)}#arch=test_vit2")
    with torch.inference_mode():
        tokens = model.forward_features(images(160))
    torch.testing.assert_close(
        encoder(images(160))[Tap()].patches.flatten(1, 2), tokens[:, model.num_prefix_tokens :]
    )


# ------------------------------------------------------------------------------------------- DINOv3 ConvNeXt


def official_convnext(model: Any) -> State:
    """timm's ConvNeXt in the official names."""
    found = {}
    for name, tensor in model.state_dict().items():
        for old, new in (
            ("stem.", "downsample_layers.0."), ("head.norm.", "norm."), (".blocks.", "."),
            ("conv_dw", "dwconv"), ("mlp.fc", "pwconv"),
        ):  # fmt: skip
            name = name.replace(old, new)
        if ".downsample." in name:
            _, stage, _, rest = name.split(".", 3)
            name = f"downsample_layers.{stage}.{rest}"
        found[name] = tensor
    return found


def test_the_convnext_of_dinov3_lists_its_norm_twice(tmp_path: Path) -> None:
    options = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
    model = create_timm("convnext_tiny", pretrained=False, seed=1, **options).eval()
    state = official_convnext(model)
    twice = {f"norms.3.{part}": state[f"norm.{part}"] for part in ("weight", "bias")}
    encoder = load_encoder(save(state | twice, tmp_path))
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(images(64)), pre_logits=True)
    torch.testing.assert_close(encoder(images(64))[Tap()].mean, expected, atol=1e-5, rtol=1e-5)
    assert encoder.info.dropped == {"norms.*": "the last norm a second time"}
    assert any("DINOv3's ConvNeXt" in note for note in encoder.info.notes)
    other = state | {"norms.3.weight": 2 * state["norm.weight"], "norms.3.bias": state["norm.bias"]}
    with pytest.raises(CheckpointError, match=r"norms\.3\.weight is not the norm"):
        load_encoder(save(other, tmp_path))


# ------------------------------------------------------------------------------------------- I-JEPA, OpenMM


def test_i_jepa_without_its_predictor_is_read_by_its_target_encoder(tmp_path: Path) -> None:
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    encoder, target = vit(1, **options), vit(2, **options)
    payload = {
        name: {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
        for name, model in (("encoder", encoder), ("target_encoder", target))
    }
    path = save(payload, tmp_path)
    found = load_encoder(f"{path}#heads={HEADS}")
    assert (found.spec.family, found.info.container) == ("ijepa", "target_encoder.module")
    assert_tokens(found, target)
    assert_tokens(load_encoder(f"{path}#encoder,heads={HEADS}"), encoder)


def test_the_norm_of_the_mean_of_openmmlab(tmp_path: Path) -> None:
    model = vit(global_pool="avg", fc_norm=True)
    swaps = (
        ("patch_embed.proj", "patch_embed.projection"), ("fc_norm.", "ln2."),
        ("norm1", "ln1"), ("norm2", "ln2"),
        ("blocks.", "layers."), ("mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1"),
    )  # fmt: skip
    state = {}
    for name, tensor in model.state_dict().items():
        for old, new in swaps:
            name = name.replace(old, new)
        state[f"backbone.{name}"] = tensor
    encoder = load_encoder(f"{save({'state_dict': state}, tmp_path)}#heads={HEADS}")
    assert (encoder.spec.family, encoder.spec.pooling) == ("mmpretrain", "mean")
    with torch.inference_mode():
        patches = model.forward_features(images())[:, 1:]
    norm = model.fc_norm
    expected = F.layer_norm(patches.mean(1), (DIM,), norm.weight, norm.bias, 1e-6)
    torch.testing.assert_close(encoder(images())[Tap()].mean, expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------- messages


def test_a_model_of_transformers_that_is_not_read_is_named(tmp_path: Path) -> None:
    save_file({"embedder.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(
        CheckpointError, match=r"'unheard-of' of transformers \(model_type in config\.json\) is not read"
    ):
        load_encoder(str(tmp_path))


def test_positions_that_leave_no_table_point_to_the_name(tmp_path: Path) -> None:
    state = vit().state_dict()
    del state["pos_embed"]
    with pytest.raises(CheckpointError, match="rotary or relative, name timm's model by #arch=NAME"):
        load_encoder(f"{save(state, tmp_path)}#heads={HEADS}")
