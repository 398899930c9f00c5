"""DINO and its descendants beyond the recordings: choices, refusals, and what the file says of itself."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch

from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.errors import CheckpointError
from lmim_bench.bench.networks.capi import _Attention

State = dict[str, torch.Tensor]


@pytest.fixture
def written(layouts: ModuleType, tmp_path: Path) -> Any:
    """Writes a recorded layout; returns its path and what the file holds, to be changed and saved again."""

    def write(name: str) -> tuple[Path, dict[str, Any]]:
        reference, _ = layouts.write(name, tmp_path)
        return Path(reference), torch.load(reference, weights_only=False)

    return write


def vit(**options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
        return timm.create_model("vit_tiny_patch16_224", num_classes=0, **{**shape, **options})


def dino_file(state: State, args: Any) -> dict[str, Any]:
    teacher = {f"backbone.{name}": tensor for name, tensor in state.items()}
    return {"teacher": teacher | {"head.mlp.0.bias": torch.ones(4)}, "args": args, "epoch": 1}


@pytest.mark.parametrize(
    "args",
    [argparse.Namespace(arch="vit_tiny", patch_size=8), argparse.Namespace(arch="deit_tiny")],
    ids=["vit", "deit"],
)
def test_dino_takes_the_heads_of_the_arch_that_the_file_states(args: Any, tmp_path: Path) -> None:
    torch.save(dino_file(vit(embed_dim=192).state_dict(), args), tmp_path / "x.pth")
    encoder = load_encoder(f"{tmp_path}/x.pth")
    assert encoder.spec.arch["num_heads"] == 3
    assert any(f"from the arch '{args.arch}' that the file states" in note for note in encoder.info.notes)


def test_a_stated_arch_of_another_width_says_nothing(tmp_path: Path) -> None:
    state = vit(embed_dim=192).state_dict()
    torch.save(dino_file(state, argparse.Namespace(arch="vit_small")), tmp_path / "x.pth")
    encoder = load_encoder(f"{tmp_path}/x.pth")
    assert encoder.spec.arch["num_heads"] == 3
    assert not any("states" in note for note in encoder.info.notes)


def test_the_heads_asked_for_overrule_the_stated_arch(tmp_path: Path) -> None:
    state = vit(embed_dim=192).state_dict()
    torch.save(dino_file(state, argparse.Namespace(arch="vit_tiny")), tmp_path / "x.pth")
    assert load_encoder(f"{tmp_path}/x.pth#heads=6").spec.arch["num_heads"] == 6


def test_the_stated_arch_says_the_depth(tmp_path: Path) -> None:
    state = vit(embed_dim=192, depth=11).state_dict()
    torch.save(dino_file(state, argparse.Namespace(arch="vit_tiny")), tmp_path / "x.pth")
    with pytest.raises(
        CheckpointError, match="states the arch 'vit_tiny' of 12 blocks and has 11; if it was"
    ):
        load_encoder(f"{tmp_path}/x.pth")
    assert load_encoder(f"{tmp_path}/x.pth#family=timm").spec.depth == 11


def test_a_teacher_that_lost_its_last_block_is_seen_by_its_student(written: Any) -> None:
    path, payload = written("dino")
    gone = {k: t for k, t in payload["teacher"].items() if not k.startswith("backbone.blocks.1.")}
    torch.save({**payload, "teacher": gone}, path)
    words = (
        r"'teacher.backbone' has no blocks\.1, which 'student.module.backbone' has; .* add #teacher.backbone"
    )
    with pytest.raises(CheckpointError, match=words):
        load_encoder(str(path))
    assert load_encoder(f"{path}#teacher").spec.depth == 1


@pytest.mark.parametrize("name", ["dinov2", "dinov3", "franca"])
def test_every_network_of_dinov2_and_3_has_a_layer_scale(name: str, written: Any) -> None:
    path, payload = written(name)
    state = payload.get("teacher", payload)
    for key in [key for key in state if ".ls1." in key or ".ls2." in key]:
        del state[key]
    torch.save(payload, path)
    with pytest.raises(CheckpointError, match=rf"no layer scale .* every network of {name} has"):
        load_encoder(str(path))


def test_a_class_token_of_another_shape_is_not_spread_over_its_row(written: Any) -> None:
    path, payload = written("dinov2-registers")
    torch.save({**payload, "cls_token": torch.tensor(1.0)}, path)
    with pytest.raises(CheckpointError, match=r"cls_token has shape \(\), and its row"):
        load_encoder(str(path))


def test_timms_config_beside_a_file_says_more_than_its_name(tmp_path: Path) -> None:
    model = vit()
    torch.save(model.state_dict(), tmp_path / "dino_mine.pth")
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": arguments}
    config["pretrained_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 32, 32]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = load_encoder(f"{tmp_path}/dino_mine.pth").spec
    assert (spec.family, spec.mean) == ("timm", (0.5, 0.5, 0.5))
    (tmp_path / "config.json").unlink()
    assert load_encoder(f"{tmp_path}/dino_mine.pth#heads=3").spec.family == "dino"


def test_the_student_of_dino_is_picked(written: Any) -> None:
    path, _ = written("dino")
    teacher, student = load_encoder(str(path)), load_encoder(f"{path}#student")
    assert student.info.container == "student.module.backbone"
    assert student.info.dropped["teacher.*"] == "the other network of the pair"
    assert student.fingerprint != teacher.fingerprint


@pytest.mark.parametrize("name", ["dinov2-teacher", "franca"])
def test_chunks_must_count_through(name: str, written: Any) -> None:
    path, payload = written(name)
    teacher = payload["teacher"]
    payload["teacher"] = {k.replace("blocks.1.1.", "blocks.1.2."): v for k, v in teacher.items()}
    torch.save(payload, path)
    with pytest.raises(CheckpointError, match=r"lacks block 1 of 3"):
        load_encoder(str(path))


@pytest.mark.parametrize("name", ["dinov2", "dinov2-registers", "dinov3", "dinov3-swiglu", "capi"])
def test_a_missing_tensor_is_named(name: str, written: Any) -> None:
    path, payload = written(name)
    gone = next(key for key in payload if key.endswith(("blocks.1.norm2.weight", "1.residual2.norm.weight")))
    del payload[gone]
    torch.save(payload, path)
    family = name.partition("-")[0]
    with pytest.raises(
        CheckpointError, match=rf"does not fill the {family} encoder: 1 missing \(blocks\.1\."
    ):
        load_encoder(str(path))


@pytest.mark.parametrize("name", ["dinov2", "dinov2-registers", "dinov3", "capi"])
def test_an_unknown_tensor_is_refused(name: str, written: Any) -> None:
    path, payload = written(name)
    prefix = "backbone." if name == "capi" else ""
    torch.save(payload | {f"{prefix}adapter.weight": torch.ones(2, 2)}, path)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(adapter\.weight\)"):
        load_encoder(str(path))


def test_a_table_that_is_no_square_is_refused(written: Any) -> None:
    path, payload = written("dinov2")
    payload["pos_embed"] = payload["pos_embed"][:, :-2]
    torch.save(payload, path)
    with pytest.raises(CheckpointError, match=r"no square grid|a square grid"):
        load_encoder(str(path))


def test_the_mask_token_and_the_heads_are_listed_as_dropped(written: Any) -> None:
    path, _ = written("dinov2-teacher")
    dropped = load_encoder(str(path)).info.dropped
    assert dropped["teacher.dino_head.*"] == dropped["teacher.ibot_head.*"] == "projection head"
    assert "mask token" in dropped["teacher.backbone.mask_token"]


def test_capi_turns_by_exact_angles_in_sixteen_bits() -> None:
    attention = _Attention(64, 1)
    places = torch.rand(5, 2, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 1, 5, 64, generator=torch.Generator().manual_seed(1))
    exact = attention._rotate(x, places)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = attention._rotate(x.bfloat16(), places)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 0.04


def test_capi_drops_only_what_the_global_feature_does_not_need(written: Any) -> None:
    path, payload = written("capi")
    encoder = load_encoder(str(path))
    dropped = encoder.info.dropped
    assert {dropped[name] for name in dropped if name != "head.*"} == {"later blocks of the decoder"}
    assert all(name.startswith(("backbone.decoder.", "head.")) for name in dropped)
    later = [key for key in payload if key.startswith("backbone.decoder.blocks.1.")]
    torch.save({key: value for key, value in payload.items() if key not in later}, path)
    assert load_encoder(str(path)).fingerprint == encoder.fingerprint


def test_dinov3_says_how_to_set_the_satellite_models_preprocessing(written: Any) -> None:
    path, _ = written("dinov3")
    advice = next(note for note in load_encoder(str(path)).info.notes if "SAT-493M" in note)
    option = "mean=0.430:0.411:0.296,std=0.213:0.156:0.143"
    assert option in advice
    spec = load_encoder(f"{path}#{option}").spec
    assert (spec.mean, spec.std) == ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
