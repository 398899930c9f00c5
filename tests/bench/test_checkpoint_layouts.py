"""Every layout that is read: built here key by key as its trainer saves it, and equal to its origin."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from lmim_bench.bench.checkpoints import save_checkpoint
from lmim_bench.bench.checkpoints.families import latent_mim
from lmim_bench.bench.encoders import inspect_checkpoint, load_encoder
from lmim_bench.bench.errors import CheckpointError
from lmim_bench.bench.timm_models import create_timm
from lmim_bench.bench.types import Encoder, Tap
from lmim_bench.bench.vit import build_vit, vit_spec

State = dict[str, torch.Tensor]
DIM, DEPTH, HEADS, PATCH, SIDE = 48, 3, 4, 8, 32
Draw = Callable[..., torch.Tensor]


def draw_from(seed: int) -> Draw:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: 0.1 * torch.randn(*shape, generator=generator)


def origin(seed: int = 0, **variant: Any) -> Any:
    """A plain ViT with every parameter random."""
    shape: dict[str, Any] = {"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "patch_size": PATCH}
    model = VisionTransformer(img_size=SIDE, **{"num_classes": 0, **shape, **variant}).eval()
    draw = draw_from(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(draw(*parameter.shape))
    return model


def prefixed(prefix: str, state: Mapping[str, torch.Tensor]) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def optimizer_state() -> dict[str, Any]:
    return {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}},
        "param_groups": [{"lr": 1e-3}],
    }


def sine_cosine_table() -> torch.Tensor:
    """The table of MAE, written from the paper's formula: half column, half row, class row zero."""
    grid = SIDE // PATCH
    frequency = 1 / 10000 ** (np.arange(DIM // 4) / (DIM / 4))
    rows = [np.zeros(DIM)]
    for r in range(grid):
        for c in range(grid):
            rows.append(np.concatenate([f(p * frequency) for p in (c, r) for f in (np.sin, np.cos)]))
    return torch.tensor(np.array(rows), dtype=torch.float32)[None]


def decoder_state(draw: Draw) -> State:
    state = {
        "mask_token": draw(1, 1, 32),
        "decoder_pos_embed": draw(1, 17, 32),
        "decoder_embed.weight": draw(32, DIM),
        "decoder_embed.bias": draw(32),
        "decoder_norm.weight": draw(32),
        "decoder_norm.bias": draw(32),
        "decoder_pred.weight": draw(PATCH * PATCH * 3, 32),
        "decoder_pred.bias": draw(PATCH * PATCH * 3),
    }
    decoder = VisionTransformer(
        img_size=SIDE, patch_size=PATCH, embed_dim=32, depth=1, num_heads=2, num_classes=0
    )
    blocks = {k: v for k, v in decoder.state_dict().items() if k.startswith("blocks.")}
    return state | {"decoder_" + name: tensor for name, tensor in blocks.items()}


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *(size or (SIDE, SIDE)), generator=torch.Generator().manual_seed(9))


def assert_same_features(encoder: Encoder, model: Any) -> None:
    """The loaded encoder gives the origin's tokens, at every block, with and without the norm."""
    x = images()
    prefix = model.num_prefix_tokens
    for layer in range(-DEPTH, 0):
        for norm in (True, False):
            tap = Tap(layer, norm)
            with torch.inference_mode():
                tokens = model.forward_intermediates(
                    x, indices=[DEPTH + layer], norm=norm, output_fmt="NLC", return_prefix_tokens=prefix > 0,
                    intermediates_only=True,
                )[0]  # fmt: skip
            body, head = tokens if prefix else (tokens, None)
            features = encoder(x, [tap])[tap]
            torch.testing.assert_close(features.patches.flatten(1, 2), body, atol=1e-5, rtol=1e-5)
            if head is not None:
                torch.testing.assert_close(features.cls, head[:, 0], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------- timm, DeiT


PLAIN_FILES: dict[str, Callable[[State], dict[str, Any]]] = {
    "bare": lambda s: s,
    "DeiT": lambda s: {"model": s, "optimizer": optimizer_state(), "epoch": 3, "scaler": {"scale": 1.0}},
    "DDP": lambda s: {"state_dict": prefixed("module.", s), "epoch": 1},
    "compiled": lambda s: prefixed("_orig_mod.", s),
    "compiled inside DDP": lambda s: {"model": prefixed("module._orig_mod.", s)},
    "FSDP": lambda s: {k.replace("blocks.1.", "blocks.1._fsdp_wrapped_module."): v for k, v in s.items()},
    "Lightning": lambda s: {
        "state_dict": prefixed("model.backbone.", s) | {"model.projector.0.weight": torch.ones(3, 3)},
        "pytorch-lightning_version": "2.4",
        "optimizer_states": [optimizer_state()],
        "loops": {},
        "callbacks": {},
    },
}


@pytest.mark.parametrize("wrap", PLAIN_FILES.values(), ids=PLAIN_FILES)
def test_plain_vit_in_every_wrapping(wrap: Callable[[State], dict[str, Any]], tmp_path: Path) -> None:
    model = origin()
    torch.save(wrap(model.state_dict()), tmp_path / "x.pth")
    encoder = load_encoder(f"{tmp_path}/x.pth#heads={HEADS}")
    assert_same_features(encoder, model)
    assert encoder.spec.family == "timm"
    assert encoder.info.loaded_tensors == encoder.info.encoder_tensors == len(model.state_dict())
    assert not encoder.info.random_weights


PLAIN_SHAPES: dict[str, dict[str, Any]] = {
    "with a head": {"num_classes": 5},
    "no class token": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "mean pooling": {"global_pool": "avg", "num_classes": 5},
    "layer scale": {"init_values": 1e-5},
    "no qkv bias": {"qkv_bias": False},
    "narrow MLP": {"mlp_ratio": 1.5},
    "patch 16": {"patch_size": 16},
}


@pytest.mark.parametrize("variant", PLAIN_SHAPES.values(), ids=PLAIN_SHAPES)
def test_plain_vit_of_every_shape(variant: dict[str, Any], tmp_path: Path) -> None:
    model = origin(**variant)
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    encoder = load_encoder(f"{tmp_path}/x.safetensors#heads={HEADS}")
    assert_same_features(encoder, model)
    expected = "mean" if variant.get("global_pool") == "avg" else "cls"
    assert encoder.spec.pooling == expected
    assert encoder.spec.image_size == SIDE
    x = images()
    with torch.inference_mode():
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(getattr(encoder(x)[Tap()], expected), pooled, atol=1e-5, rtol=1e-5)


def test_distilled_deit_keeps_its_second_token(tmp_path: Path) -> None:
    model = origin(reg_tokens=1)
    state = {k.replace("reg_token", "dist_token"): v for k, v in model.state_dict().items()}
    torch.save({"model": state | {"head_dist.weight": torch.ones(5, DIM)}}, tmp_path / "x.pth")
    encoder = load_encoder(f"{tmp_path}/x.pth#heads={HEADS}")
    assert_same_features(encoder, model)
    assert encoder.info.dropped == {"model.head_dist.*": "classifier head"}


def test_the_running_average_is_preferred_and_the_choice_is_said(tmp_path: Path) -> None:
    model, average = origin(1), origin(2)
    torch.save({"model": model.state_dict(), "model_ema": average.state_dict()}, tmp_path / "x.pth")
    encoder = load_encoder(f"{tmp_path}/x.pth#heads={HEADS}")
    assert_same_features(encoder, average)
    assert "encoder 'model_ema', the default of timm, of: model, model_ema" in encoder.info.notes
    assert encoder.info.dropped == {"model.*": "another encoder of the file"}
    assert_same_features(load_encoder(f"{tmp_path}/x.pth#model,heads={HEADS}"), model)


def test_two_encoders_without_a_rule_must_be_chosen(tmp_path: Path) -> None:
    left, right = origin(1), origin(2)
    torch.save({"left": left.state_dict(), "right": right.state_dict()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"several encoders \(left, right\); choose one, such as #left"):
        load_encoder(str(tmp_path / "x.pth"))
    with pytest.raises(CheckpointError, match="has no encoder 'middle'; it holds: left, right"):
        load_encoder(f"{tmp_path}/x.pth#middle")
    assert_same_features(load_encoder(f"{tmp_path}/x.pth#right,heads={HEADS}"), right)


def test_a_named_timm_model_of_any_kind(tmp_path: Path) -> None:
    model = create_timm("test_resnet", pretrained=False, seed=5).eval()
    state = model.state_dict() | {"fc.weight": torch.ones(3, 4), "fc.bias": torch.ones(3)}
    torch.save({"state_dict": prefixed("module.", state)}, tmp_path / "x.pth")
    encoder: Any = load_encoder(f"{tmp_path}/x.pth#arch=test_resnet")
    x = images(64, 96)
    with torch.inference_mode():
        expected = model.forward_features(x).permute(0, 2, 3, 1)
    torch.testing.assert_close(encoder(x)[Tap()].patches, expected)
    assert encoder.info.dropped == {"state_dict.module.fc.*": "classifier head"}


def test_what_the_trainer_of_timm_writes_names_the_model(tmp_path: Path) -> None:
    model = create_timm("test_vit", pretrained=False, seed=5).eval()
    torch.save({"arch": "test_vit", "state_dict": model.state_dict(), "epoch": 1}, tmp_path / "x.pth")
    encoder = load_encoder(str(tmp_path / "x.pth"))
    assert encoder.spec.arch == {"builder": "timm", "name": "test_vit", "kwargs": {}}
    assert encoder.spec.mean == tuple(model.pretrained_cfg["mean"])
    x = images(160, 160)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(x)[Tap()].cls, model.forward_features(x)[:, 0])


def test_a_config_beside_the_file_names_the_model_and_its_preprocessing(tmp_path: Path) -> None:
    model = create_timm("test_vit", pretrained=False, seed=5)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "test_vit", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "crop_pct": 0.9}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = load_encoder(str(tmp_path / "model.safetensors")).spec
    assert spec.mean == (0.1, 0.2, 0.3)
    assert spec.crop_pct == 0.9
    assert spec.arch["name"] == "test_vit"


# ------------------------------------------------------------------------------------------- MAE


def mae_origin() -> Any:
    model = origin()
    with torch.no_grad():
        model.pos_embed.copy_(sine_cosine_table())
    return model


def test_mae_pretraining(tmp_path: Path) -> None:
    model = mae_origin()
    args = argparse.Namespace(model="mae_vit", output_dir=Path("out"), blr=np.float64(1e-3))
    state = model.state_dict() | decoder_state(draw_from(5))
    torch.save({"model": state, "optimizer": optimizer_state(), "epoch": 2, "args": args}, tmp_path / "x.pth")
    encoder = load_encoder(f"{tmp_path}/x.pth#heads={HEADS}")
    assert_same_features(encoder, model)
    assert (encoder.spec.family, encoder.spec.pooling) == ("mae", "cls")
    assert encoder.info.dropped["model.decoder_blocks.*"] == "decoder"
    assert encoder.info.dropped["optimizer.*"] == "training state"
    assert any("argparse.Namespace" in note for note in encoder.info.notes)


def test_mae_encoder_alone_is_known_by_its_table(tmp_path: Path) -> None:
    model = mae_origin()
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    encoder = load_encoder(f"{tmp_path}/x.pth#heads={HEADS}")
    assert encoder.spec.family == "mae"
    assert_same_features(encoder, model)


def test_mae_finetuned_norms_the_mean(tmp_path: Path) -> None:
    model = origin(global_pool="avg", num_classes=5)
    assert "norm.weight" not in model.state_dict()
    torch.save({"model": model.state_dict(), "epoch": 1}, tmp_path / "x.pth")
    encoder = load_encoder(f"{tmp_path}/x.pth#heads={HEADS}")
    assert (encoder.spec.family, encoder.spec.pooling) == ("mae", "mean")
    x = images()
    features = encoder(x, [Tap(), Tap(-1, False)])
    raw = features[Tap(-1, False)]
    torch.testing.assert_close(features[Tap()].patches, raw.patches)
    expected = F.layer_norm(
        raw.patches.mean(dim=(1, 2)), (DIM,), model.fc_norm.weight, model.fc_norm.bias, 1e-6
    )
    torch.testing.assert_close(features[Tap()].mean, expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------- DINO


def dino_head(draw: Draw) -> State:
    return {
        "head.mlp.0.weight": draw(16, DIM),
        "head.mlp.0.bias": draw(16),
        "head.last_layer.weight_g": draw(9, 1),
        "head.last_layer.weight_v": draw(9, 16),
    }


def test_dino_teacher_and_student(tmp_path: Path) -> None:
    teacher, student = origin(1), origin(2)
    torch.save(
        {
            "student": prefixed(
                "module.", prefixed("backbone.", student.state_dict()) | dino_head(draw_from(3))
            ),
            "teacher": prefixed("backbone.", teacher.state_dict()) | dino_head(draw_from(4)),
            "optimizer": optimizer_state(),
            "epoch": 1,
            "args": argparse.Namespace(arch="vit_small"),
            "dino_loss": {"center": torch.zeros(1, 9)},
        },
        tmp_path / "x.pth",
    )
    by_default = load_encoder(f"{tmp_path}/x.pth#heads={HEADS}")
    assert_same_features(by_default, teacher)
    assert (by_default.spec.family, by_default.spec.pooling) == ("dino", "cls")
    assert by_default.info.container == "teacher.backbone"
    assert by_default.info.dropped["teacher.head.*"] == "projection head"
    assert by_default.info.dropped["student.*"] == "the other network of the pair"
    picked = load_encoder(f"{tmp_path}/x.pth#student,heads={HEADS}")
    assert_same_features(picked, student)
    assert picked.fingerprint != by_default.fingerprint


def test_dino_hub_file(tmp_path: Path) -> None:
    model = origin()
    torch.save(model.state_dict(), tmp_path / "dino_deitsmall8_pretrain.pth")
    encoder = load_encoder(f"{tmp_path}/dino_deitsmall8_pretrain.pth#heads={HEADS}")
    assert encoder.spec.family == "dino"
    assert_same_features(encoder, model)


# ------------------------------------------------------------------------------------------- Latent MIM


def latent_mim_state(model: Any, draw: Draw, prefix: str) -> State:
    """The official names: a linear patch embedding over (row, column, colour), a 2-D table, a projector."""
    state = dict(model.state_dict())
    conv = state.pop("patch_embed.proj.weight")
    found = {
        "embed.proj.weight": conv.permute(0, 2, 3, 1).reshape(DIM, -1),
        "embed.proj.bias": state.pop("patch_embed.proj.bias"),
        "pos_embed.pos_embeds": state.pop("pos_embed")[0],
        "head.linear0.weight": draw(20, DIM),
        "head.norm0.weight": draw(20),
        "head.norm0.bias": draw(20),
        "head.linear1.weight": draw(DIM, 20),
    }
    return prefixed(prefix, state | found)


@pytest.mark.parametrize("ddp", ["", "module."])
def test_latent_mim(ddp: str, tmp_path: Path) -> None:
    model, target, draw = origin(1), origin(2), draw_from(3)
    state = latent_mim_state(model, draw, f"{ddp}encoder.") | latent_mim_state(
        target, draw, f"{ddp}target_encoder."
    )
    state[f"{ddp}decoder.embed.weight"] = draw(32, DIM)
    state[f"{ddp}decoder.pos_embed.pos_embeds"] = draw(17, 32)
    state[f"{ddp}decoder.blocks.0.attn.q_proj.weight"] = draw(32, 32)
    torch.save(
        {"state_dict": state, "optimizer": optimizer_state(), "loss_scaler": {}, "epoch": 2},
        tmp_path / "x.pth",
    )
    encoder = load_encoder(f"{tmp_path}/x.pth#heads={HEADS}")
    assert_same_features(encoder, model)
    assert (encoder.spec.family, encoder.spec.pooling, encoder.spec.final_norm) == (
        "latent_mim",
        "mean",
        False,
    )
    dropped = encoder.info.dropped
    assert dropped[f"state_dict.{ddp}encoder.head.*"] == "projector"
    assert dropped[f"state_dict.{ddp}decoder.*"] == "decoder and predictor"
    assert_same_features(load_encoder(f"{tmp_path}/x.pth#target_encoder,heads={HEADS}"), target)


def test_the_linear_patch_embedding_equals_its_convolution() -> None:
    weight, bias = draw_from(0)(DIM, PATCH * PATCH * 3), draw_from(1)(DIM)
    x = images(16, 24)
    expected = torch.zeros(2, 2, 3, DIM)
    for i in range(2):
        for j in range(3):
            patch = x[:, :, PATCH * i : PATCH * (i + 1), PATCH * j : PATCH * (j + 1)]
            expected[:, i, j] = patch.permute(0, 2, 3, 1).reshape(2, -1) @ weight.T + bias
    found = F.conv2d(x, latent_mim.linear_to_conv(weight), bias, stride=PATCH).permute(0, 2, 3, 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(CheckpointError, match="no square RGB patch"):
        latent_mim.linear_to_conv(torch.ones(4, 100))


# ------------------------------------------------------------------------------------------- lmim-bench


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_own_format_says_all_by_itself(suffix: str, tmp_path: Path) -> None:
    spec = vit_spec(
        "lmim-bench", embed_dim=DIM, depth=DEPTH, num_heads=HEADS, patch_size=PATCH, image_size=SIDE,
        pooling="cls+mean", mean=(0.5, 0.4, 0.3), final_norm=False,
    )  # fmt: skip
    model = build_vit(spec.arch)
    model.load_state_dict(origin().state_dict())
    path = tmp_path / "folder" / f"x.{suffix}"
    save_checkpoint(path, spec, model.state_dict(), {"method": "mae", "epochs": 3})
    encoder = load_encoder(str(path))
    assert encoder.spec == spec
    assert encoder.info.format.startswith("lmim-bench (")
    assert encoder.info.notes == ('recipe: {"method": "mae", "epochs": 3}',)
    assert_same_features(encoder, model.eval())
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(CheckpointError, match="takes no such option"):
        load_encoder(f"{path}#heads=2")


@pytest.mark.parametrize("step", [0, 7])
def test_own_format_says_what_its_training_says_of_it(step: int, tmp_path: Path) -> None:
    spec = vit_spec(
        "lmim-bench", embed_dim=DIM, depth=DEPTH, num_heads=HEADS, patch_size=PATCH, image_size=SIDE
    )
    said = ["trained somehow", "WARNING: it has collapsed"]
    save_checkpoint(tmp_path / "x.pth", spec, origin().state_dict(), {"step": step, "notes": said})
    encoder = load_encoder(str(tmp_path / "x.pth"))
    assert encoder.info.notes == tuple(said)
    assert encoder.info.random_weights == (step == 0)


def test_own_format_around_a_timm_model(tmp_path: Path) -> None:
    fresh: Any = load_encoder("timm:test_resnet", seed=2)
    save_checkpoint(tmp_path / "x.pth", fresh.spec, fresh.model.state_dict())
    encoder = load_encoder(str(tmp_path / "x.pth"))
    assert encoder.fingerprint == fresh.fingerprint
    assert not encoder.info.random_weights


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "format version 2, this lmim-bench reads 1"),
        ({"encoder": None}, "no encoder weights"),
        ({"spec": {"family": "x"}}, "spec is not valid: arch"),
    ],
)
def test_own_format_when_a_part_is_wrong(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    spec = vit_spec("x", embed_dim=DIM, depth=1, num_heads=HEADS, patch_size=PATCH, image_size=SIDE)
    save_checkpoint(tmp_path / "x.pth", spec, build_vit(spec.arch).state_dict())
    payload = torch.load(tmp_path / "x.pth", weights_only=True)
    torch.save(payload | change, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=words):
        load_encoder(str(tmp_path / "x.pth"))


def test_a_recipe_that_is_not_json_is_refused(tmp_path: Path) -> None:
    spec = vit_spec("x", embed_dim=DIM, depth=1, num_heads=HEADS)
    with pytest.raises(CheckpointError, match="plain JSON"):
        save_checkpoint(tmp_path / "x.pth", spec, {}, {"path": tmp_path})
    assert not (tmp_path / "x.pth").exists()


# ------------------------------------------------------------------------------------------- heads, notes


@pytest.mark.parametrize(("dim", "depth", "heads"), [(192, 1, 3), (384, 2, 6), (768, 1, 12), (128, 1, 2)])
def test_heads_are_those_of_the_published_models_and_their_source_is_said(
    dim: int, depth: int, heads: int, tmp_path: Path
) -> None:
    model = origin(embed_dim=dim, depth=depth, num_heads=heads)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    encoder = load_encoder(str(tmp_path / "x.pth"))
    assert encoder.spec.arch["num_heads"] == heads
    # 192 and 384 wide networks with 12 heads are about too.
    guess = dim != 768
    assert encoder.info.notes[0].startswith("WARNING: ") == guess
    other = load_encoder(f"{tmp_path}/x.pth#heads={2 * heads}")
    # The same weights in another number of heads are another encoder, and must not share its features.
    assert other.fingerprint != encoder.fingerprint
    assert f"{2 * heads} heads, as asked" in other.info.notes


def test_a_width_that_says_nothing_asks_for_heads(tmp_path: Path) -> None:
    torch.save(origin().state_dict(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="how many heads a width of 48 has; add #heads=N"):
        load_encoder(str(tmp_path / "x.pth"))
    with pytest.raises(CheckpointError, match="heads=5 does not divide"):
        load_encoder(f"{tmp_path}/x.pth#heads=5")
    with pytest.raises(CheckpointError, match="whole number"):
        load_encoder(f"{tmp_path}/x.pth#heads=six")


def test_half_precision_weights_are_converted_and_noted(tmp_path: Path) -> None:
    model = origin().half()
    torch.save(model.state_dict(), tmp_path / "x.pth")
    encoder = load_encoder(f"{tmp_path}/x.pth#heads={HEADS}")
    assert "weights converted from float16 to float32" in encoder.info.notes
    assert_same_features(encoder, model.float())


def test_inspection_of_a_file_is_json(tmp_path: Path) -> None:
    model = mae_origin()
    torch.save({"model": model.state_dict() | decoder_state(draw_from(1))}, tmp_path / "x.pth")
    found = inspect_checkpoint(f"{tmp_path}/x.pth#heads={HEADS}")
    assert json.loads(json.dumps(found)) == found
    assert found["family"] == "mae"
    assert found["container"] == "model"
    assert (
        found["coverage"]["loaded_tensors"] == found["coverage"]["encoder_tensors"] == len(model.state_dict())
    )
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert len(found["sha256"]) == 64


def test_a_loaded_encoder_does_not_need_its_file_any_more(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(origin().state_dict(), path)
    encoder = load_encoder(f"{path}#heads={HEADS}")
    before = encoder(images())[Tap()].cls
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(encoder(images())[Tap()].cls, before)
