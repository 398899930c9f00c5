"""Networks of timm: what a name tells beyond the shapes, and what is assumed where nothing tells it."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lmim_bench.bench.checkpoints import timm_names
from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.errors import CheckpointError
from lmim_bench.bench.timm_models import create_timm, timm_notes
from lmim_bench.bench.types import Encoder, EncoderSpec, Tap

IMAGENET = (0.485, 0.456, 0.406)
HALF = (0.5, 0.5, 0.5)
CLIP = (0.48145466, 0.4578275, 0.40821073)


def drawn(name: str, **options: Any) -> Any:
    """A timm model with every parameter random."""
    model = create_timm(name, pretrained=False, seed=1, **options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def save(payload: Any, folder: Path, name: str) -> str:
    torch.save(payload, folder / name)
    return str(folder / name)


def loaded(reference: str) -> tuple[EncoderSpec, tuple[str, ...]]:
    encoder = load_encoder(reference)
    return encoder.spec, encoder.info.notes


def assert_features(encoder: Encoder, model: Any) -> None:
    size = encoder.spec.image_size
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        out = model.forward_features(x)
        pooled = model.forward_head(out, pre_logits=True)
    found = encoder(x)[Tap()]
    body = out.permute(0, 2, 3, 1).flatten(1, 2) if out.ndim == 4 else out[:, model.num_prefix_tokens :]
    torch.testing.assert_close(found.patches.flatten(1, 2), body, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(getattr(found, encoder.spec.pooling), pooled, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("file", "model", "mean"),
    [
        # Plain by its shapes, but with heads of another width, and statistics of its own.
        ("test_vit.r160_in1k.pth", "test_vit", HALF),
        ("test_vit.r160_in1k-0123abcd.pth", "test_vit", HALF),
        # Rotary positions that leave no key; looks like SigLIP.
        ("vit_pe_core_tiny_patch16_384.fb.pth", "vit_pe_core_tiny_patch16_384", HALF),
        # Another family's keys.
        ("eva02_tiny_patch14_224.mim_in22k.pth", "eva02_tiny_patch14_224", CLIP),
        # The keys of a plain residual network, without a tag.
        ("resnetblur18-0123abcd.pth", "resnetblur18", IMAGENET),
    ],
)
def test_the_name_of_a_file_tells_the_model(file: str, model: str, mean: Any, tmp_path: Path) -> None:
    origin = drawn(model)
    encoder = load_encoder(save(origin.state_dict(), tmp_path, file))
    assert encoder.spec.arch["name"].startswith(model)
    assert encoder.spec.mean == mean
    assert (
        f"the file is called after timm's {encoder.spec.arch['name']}, whose keys it has"
        in encoder.info.notes
    )
    assert_features(encoder, origin)


def test_a_bare_name_does_not_tell_the_normalisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not timm_names._has_one_normalisation("vit_small_patch16_224")
    assert timm_names._has_one_normalisation("test_vit")
    state = drawn("test_vit").state_dict()
    spec, notes = loaded(save(state, tmp_path, "test_vit.pth"))
    assert spec.mean == HALF
    assert any(note.startswith("WARNING: mean and std are those of timm's own weights") for note in notes)
    monkeypatch.setattr(timm_names, "_has_one_normalisation", lambda name: False)
    spec, notes = loaded(save(state, tmp_path, "test_vit.pth"))
    assert (spec.arch["name"], spec.mean) == ("test_vit", IMAGENET)
    assert any(note.startswith("WARNING: ImageNet's mean and std are assumed") for note in notes)
    spec, notes = loaded(save(state, tmp_path, "test_vit.r160_in1k.pth"))
    assert spec.mean == HALF
    assert not any("WARNING" in note for note in notes)


def test_a_name_counts_for_the_whole_model_only(tmp_path: Path) -> None:
    state = drawn("test_vit").state_dict()
    name = "test_vit.r160_in1k.pth"
    more = state | {"decoder_embed.weight": torch.ones(3, 64), "decoder_pos_embed": torch.ones(1, 101, 3)}
    assert loaded(save({"model": more}, tmp_path, name) + "#heads=2")[0].family == "mae"
    assert loaded(save({"model": more}, tmp_path, name))[0].family == "mae"
    beside = {"state_dict": state, "projector": {"weight": torch.ones(3, 3)}}
    assert loaded(save(beside, tmp_path, name))[0].arch["builder"] == "vit"
    fewer = {key: tensor for key, tensor in state.items() if key != "norm.bias"}
    with pytest.raises(CheckpointError, match="1 missing"):
        load_encoder(save(fewer, tmp_path, name))


def test_heads_that_are_asked_for_overrule_the_name(tmp_path: Path) -> None:
    path = save(drawn("test_vit").state_dict(), tmp_path, "test_vit.pth")
    assert loaded(f"{path}#heads=4")[0].arch["num_heads"] == 4
    assert loaded(path)[0].arch["name"] == "test_vit"


def test_names_of_torchvision_are_left_to_the_families(tmp_path: Path) -> None:
    state = drawn("resnet18").state_dict()
    assert loaded(save(state, tmp_path, "resnet18-f37072fd.pth"))[0].family == "resnet"
    assert loaded(save(state, tmp_path, "resnet18.a1_in1k.pth"))[0].crop_pct == 0.95


@pytest.mark.parametrize(
    "reference", ["trained.pth.tar", "trained.pth.tar#arch=test_vit", "test_vit.r160_in1k.pth"]
)
def test_the_position_table_tells_the_size_of_the_images(reference: str, tmp_path: Path) -> None:
    model = drawn("test_vit", img_size=96)
    stated = (
        {"arch": "test_vit", "args": argparse.Namespace(img_size=96)}
        if reference == "trained.pth.tar"
        else {}
    )
    file = reference.partition("#")[0]
    path = save({"state_dict": model.state_dict(), **stated}, tmp_path, file)
    encoder = load_encoder(path.replace(file, reference))
    assert encoder.spec.image_size == 96
    assert encoder.spec.arch["kwargs"] == {"img_size": 96}
    assert "images of 96 pixels, the size of the position table" in encoder.info.notes
    assert_features(encoder, model)
    control = load_encoder(f"random:{path.replace(file, reference)}")
    assert control.spec == encoder.spec


@pytest.mark.parametrize("kind", [argparse.Namespace, dict])
def test_the_options_of_timms_trainer_are_followed(kind: Any, tmp_path: Path) -> None:
    model = drawn("test_vit", num_heads=4)
    args = {"model": "test_vit", "model_kwargs": {"num_heads": 4}, "img_size": None, "interpolation": ""}
    colours = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.9}
    payload = {"arch": "test_vit", "state_dict": model.state_dict(), "args": kind(**args, **colours)}
    encoder = load_encoder(save(payload, tmp_path, "model_best.pth.tar"))
    assert encoder.spec.mean == (0.1, 0.2, 0.3)
    assert encoder.spec.std == (0.4, 0.5, 0.6)
    assert encoder.spec.crop_pct == 0.9
    assert "built with num_heads=4, as they say" in encoder.info.notes
    assert_features(encoder, model)
    payload["args"] = kind(**args, mean=None, std=None, crop_pct=None)
    assert loaded(save(payload, tmp_path, "model_best.pth.tar"))[0].mean == HALF
    payload["args"] = kind(**args, mean=3)
    with pytest.raises(CheckpointError, match=r"options of timm's trainer in the file \(args\) cannot be"):
        load_encoder(save(payload, tmp_path, "model_best.pth.tar"))


@pytest.mark.parametrize("wrong", [{"mean": 3}, {"input_size": "big"}, {"crop_pct": "x"}, {"std": [0.5]}])
def test_a_preprocessing_of_other_types_is_one_line(wrong: dict[str, Any], tmp_path: Path) -> None:
    torch.save(drawn("test_vit").state_dict(), tmp_path / "x.pth")
    stated = {"architecture": "test_vit", "pretrained_cfg": {"input_size": [3, 160, 160], **wrong}}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match=r"pretrained_cfg of timm's test_vit .* followed") as caught:
        load_encoder(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_network_of_torchvisions_name_by_timms_trainer_is_timms(tmp_path: Path) -> None:
    args = {"model": "resnet18", "model_kwargs": {}, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    payload = {"arch": "resnet18", "state_dict": drawn("resnet18").state_dict(), "args": args}
    assert loaded(save(payload, tmp_path, "last.pth.tar"))[0].mean == HALF
    del payload["args"]
    assert loaded(save(payload, tmp_path, "last.pth.tar"))[0].family == "resnet"


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}], ids=["bare", "model"])
def test_norms_after_each_part_of_a_block_leave_no_trace(wrap: Any, tmp_path: Path) -> None:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 1, "num_heads": 3}
    model = drawn("vit_base_patch16_rpn_224", **shape)
    notes = loaded(save(wrap(model.state_dict()), tmp_path, "x.pth"))[1]
    assert any(n.startswith("WARNING: no class token, no qkv bias and a norm of the mean") for n in notes)
    plain = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=192, depth=1, num_heads=3, num_classes=0, class_token=False,
        global_pool="avg",
    )  # fmt: skip
    notes = loaded(save(wrap(plain.state_dict()), tmp_path, "x.pth"))[1]
    assert not any("no qkv bias" in note for note in notes)


def test_a_norm_inside_of_a_classifier_is_not_that_of_the_mean(tmp_path: Path) -> None:
    path = save(drawn("inception_next_atto").state_dict(), tmp_path, "x.pth")
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(9))
    found = load_encoder(f"{path}#arch=inception_next_atto")(x)[Tap()]
    torch.testing.assert_close(found.mean, found.patches.mean((1, 2)))


def test_a_norm_before_the_blocks_is_clips(tmp_path: Path) -> None:
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=1, num_classes=0, pre_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model.patch_embed.proj.weight.mul_(0.01)  # so that the epsilon shows
    encoder = load_encoder(save(model.state_dict(), tmp_path, "x.pth"))
    assert encoder.spec.mean == CLIP
    assert any(note.startswith("WARNING: a norm before the blocks, so CLIP") for note in encoder.info.notes)
    assert_features(encoder, model)


def test_where_timm_does_not_crop_a_note_says_so() -> None:
    model = create_timm("test_vit", pretrained=False)
    assert timm_notes(model) == ()
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_mode": "squash"}
    assert timm_notes(model) == ("timm prepares images by crop_mode=squash; the centre crops here do not",)


def test_a_perception_encoder_is_not_taken_for_siglip(tmp_path: Path) -> None:
    path = save(drawn("vit_pe_core_tiny_patch16_384").state_dict(), tmp_path, "x.pth")
    with pytest.raises(CheckpointError, match=r"as Perception Encoders do, .* by #arch=NAME"):
        load_encoder(path)
    assert loaded(f"{path}#arch=vit_pe_core_tiny_patch16_384")[0].mean == HALF
