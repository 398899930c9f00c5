"""What toolkits save: networks that share their keys but not their heads, and what lies beside an encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from lmim_bench.bench.checkpoints.plain_vit import first_axis
from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.errors import CheckpointError
from lmim_bench.bench.types import Tap

State = dict[str, torch.Tensor]
SIDE, PATCH = 32, 8


def vit(dim: int = 384, heads: int = 12, **options: Any) -> Any:
    torch.manual_seed(heads)
    shape = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": dim, "num_heads": heads, "num_classes": 0}
    model = VisionTransformer(**{**shape, "depth": 2, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def table(dim: int, rows_first: bool) -> torch.Tensor:
    """A fixed table as MAE (columns first) or MoCo v3 (rows first) writes it."""
    frequency = 1 / 10000 ** (torch.arange(dim // 4) / (dim / 4))
    grid = torch.arange(SIDE // PATCH)
    rows, columns = (axis.reshape(-1).float() for axis in torch.meshgrid(grid, grid, indexing="ij"))
    axes = (rows, columns) if rows_first else (columns, rows)
    parts = [f(torch.outer(axis, frequency)) for axis in axes for f in (torch.sin, torch.cos)]
    return torch.cat([torch.zeros(1, dim), torch.cat(parts, dim=1)])[None]


def with_table(model: Any, *, rows_first: bool) -> Any:
    with torch.no_grad():
        model.pos_embed.copy_(table(model.embed_dim, rows_first))
    return model


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def save(payload: Any, folder: Path, name: str = "x.pth") -> str:
    torch.save(payload, folder / name)
    return str(folder / name)


def class_token(model: Any) -> torch.Tensor:
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        token: torch.Tensor = model.forward_features(x)[:, 0]
    return token


def assert_loads(reference: str, model: Any, family: str) -> tuple[str, ...]:
    """The notes of an encoder that gives the features of a model."""
    encoder = load_encoder(reference)
    assert encoder.spec.family == family
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(encoder(x)[Tap()].cls, class_token(model), atol=1e-5, rtol=1e-5)
    return encoder.info.notes


# ------------------------------------------------------------------------------------------- heads


def test_the_order_of_a_fixed_table() -> None:
    assert first_axis(table(384, rows_first=True)) == "rows"
    assert first_axis(table(384, rows_first=False)) == "columns"
    assert first_axis(table(384, rows_first=True) + 1e-3) is None
    assert first_axis(torch.zeros(1, 17, 384)) is None
    assert first_axis(table(384, rows_first=True)[:, 1:]) is None
    assert first_axis(None) is None


MOCO_V3: dict[str, Callable[[State], dict[str, Any]]] = {
    "convert_to_deit": lambda s: {"model": s},
    "linear probe": lambda s: {
        "epoch": 90,
        "arch": "vit_small",
        "state_dict": prefixed("module.", s | {"head.weight": torch.ones(5, 384)}),
        "best_acc1": torch.tensor(73.2),
    },
    "solo-learn": lambda s: {
        "state_dict": prefixed("backbone.", s)
        | prefixed("momentum_backbone.", {key: 2 * t for key, t in s.items()})
        | {"projector.0.weight": torch.ones(2, 2), "momentum_classifier.weight": torch.ones(2, 2)}
    },
}


@pytest.mark.parametrize("wrap", MOCO_V3.values(), ids=MOCO_V3)
def test_moco_v3_is_known_by_its_table(wrap: Callable[[State], dict[str, Any]], tmp_path: Path) -> None:
    model = with_table(vit(), rows_first=True)
    notes = assert_loads(save(wrap(model.state_dict()), tmp_path), model, "moco_v3")
    assert "12 heads, the family's number for width 384 (not stored in the file)" in notes


def test_the_tiny_moco_v3_of_solo_learn_has_12_heads(tmp_path: Path) -> None:
    model = with_table(vit(192), rows_first=True)
    assert_loads(save(MOCO_V3["solo-learn"](model.state_dict()), tmp_path), model, "moco_v3")


@pytest.mark.parametrize("dim", [192, 384])
def test_the_small_maes_of_solo_learn_have_12_heads(dim: int, tmp_path: Path) -> None:
    model = with_table(vit(dim), rows_first=False)
    decoder = {"decoder_embed.weight": torch.ones(8, dim), "decoder_pos_embed": torch.ones(1, 17, 8)}
    state = prefixed("backbone.", model.state_dict()) | prefixed("decoder.", decoder)
    path = save({"state_dict": state | {"classifier.weight": torch.ones(3, dim)}}, tmp_path, "x.ckpt")
    notes = assert_loads(path, model, "mae")
    assert not any("WARNING" in note for note in notes)
    assert load_encoder(path).info.dropped["state_dict.decoder.*"] == "decoder"


def openmmlab(state: State) -> State:
    """timm's names in OpenMMLab's."""
    swaps = (
        ("patch_embed.proj", "patch_embed.projection"), ("norm1", "ln1"), ("norm2", "ln2"),
        ("blocks.", "layers."), ("mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1"),
    )  # fmt: skip
    found = {}
    for name, tensor in state.items():
        for old, new in swaps:
            name = name.replace(old, new)
        found["backbone." + ("ln1." + name[5:] if name.startswith("norm.") else name)] = tensor
    return found


@pytest.mark.parametrize(
    ("dim", "heads", "text"),
    [
        (384, 12, "model=dict(backbone=dict(type='MoCoV3ViT', arch='mocov3-small', patch_size=16))"),
        (384, 6, "model = dict(\n    backbone=dict(\n        arch='deit-small',"),
        (768, 8, "backbone=dict(arch='s', img_size=224)"),
        (768, 12, "backbone=dict(arch='b'), target=dict(arch='l')"),
        (192, 3, '{"backbone": {"arch": "deit-tiny"}}'),
    ],
)
def test_openmmlab_states_the_network(dim: int, heads: int, text: str, tmp_path: Path) -> None:
    model = vit(dim, heads, depth=1)
    path = save({"meta": {"cfg": text}, "state_dict": openmmlab(model.state_dict())}, tmp_path)
    notes = assert_loads(path, model, "mmpretrain")
    assert any("that the file states" in note for note in notes)


def test_openmmlab_without_a_telling_configuration(tmp_path: Path) -> None:
    moco = with_table(vit(), rows_first=True)
    assert_loads(save({"state_dict": openmmlab(moco.state_dict())}, tmp_path), moco, "mmpretrain")
    small = vit(768, 8, depth=8)
    text = {"cfg": "backbone=dict(arch='s'), teacher=dict(arch='b')"}
    path = save({"meta": text, "state_dict": openmmlab(small.state_dict())}, tmp_path)
    assert_loads(path, small, "mmpretrain")


@pytest.mark.parametrize("dim", [192, 384])
def test_a_number_that_only_the_width_tells_is_a_warning(dim: int, tmp_path: Path) -> None:
    model = vit(dim, dim // 64)
    files = {
        "timm": model.state_dict(),
        "mae": {"model": with_table(vit(dim, dim // 64), rows_first=False).state_dict()},
        "mmpretrain": {"state_dict": openmmlab(model.state_dict())},
    }
    for family, payload in files.items():
        path = save(payload, tmp_path)
        encoder = load_encoder(path)
        assert encoder.spec.family == family
        assert encoder.info.notes[0].startswith(f"WARNING: {dim // 64} heads are assumed for width {dim}")
        assert "WARNING" not in load_encoder(f"{path}#heads={dim // 64}").info.notes[0]


# ------------------------------------------------------------------------------------------- siblings


def resnet(seed: int = 0) -> ResNet:
    torch.manual_seed(seed)
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3).eval()


def map_of(net: ResNet) -> torch.Tensor:
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        body = nn.Sequential(*list(net.children())[:-2])
        out: torch.Tensor = body(x)
    return out.permute(0, 2, 3, 1)


def assert_map(reference: str, net: ResNet) -> dict[str, str]:
    """What is dropped where the encoder gives the map of a network."""
    encoder = load_encoder(reference)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(encoder(x)[Tap()].patches, map_of(net), atol=1e-5, rtol=1e-5)
    return dict(encoder.info.dropped)


def test_a_residual_network_as_a_list_of_modules(tmp_path: Path) -> None:
    net = resnet()
    body = nn.Sequential(*list(net.children())[:-1])
    state = prefixed("backbone.", body.state_dict()) | {"projection_head.layers.0.weight": torch.ones(2, 2)}
    dropped = assert_map(save({"state_dict": state}, tmp_path), net)
    assert dropped == {"state_dict.projection_head.*": "projection head"}


BESIDE: dict[str, dict[str, str]] = {
    "solo-learn": {
        "classifier.weight": "head",
        "projector.0.weight": "projection head",
        "momentum_head.mlp.0.weight": "head",
        "dino_loss_func.center": "training state",
        "queue_ptr": "queue of keys",
    },
    "lightly": {
        "projection_head_momentum.layers.0.weight": "projection head",
        "prediction_head.layers.0.weight": "predictor",
        "student_head.layers.0.weight": "head",
        "criterion.center.center": "training state",
        "online_classifier.linear.weight": "head",
        "mask_token": "mask token",
        "decoder.decoder_embed.weight": "decoder",
    },
    "bolts": {
        "projection.model.0.weight": "projection head",
        "online_linear.weight": "head",
        "val_acc.correct": "metric",
        "non_linear_evaluator.heads.0.weight": "",
    },
    "VISSL": {"heads.0.clf.0.weight": "head", "loss.centers": "training state"},
}


@pytest.mark.parametrize("toolkit", BESIDE)
@pytest.mark.parametrize("kind", ["timm", "torchvision", "resnet"])
def test_heads_and_states_of_toolkits_beside_an_encoder(toolkit: str, kind: str, tmp_path: Path) -> None:
    beside = BESIDE[toolkit]
    refused = [name for name, reason in beside.items() if not reason]
    own = ENCODERS[kind]()
    state = prefixed("trunk.", own) | {name: torch.ones(2, 2) for name in beside}
    path = save({"state_dict": state}, tmp_path)
    if refused:
        named = refused[0].partition(".")[0]
        with pytest.raises(
            CheckpointError, match=rf"does not know: state_dict\.{named}; .* #ignore={named}$"
        ):
            load_encoder(path)
        path += f"#ignore={named}"
    dropped = load_encoder(path).info.dropped
    for name, reason in beside.items():
        branch = name if "." not in name else f"{name.partition('.')[0]}.*"
        assert dropped[f"state_dict.{branch}"] == (reason or "ignored, as asked")


def torchvision_vit() -> State:
    from torchvision.models.vision_transformer import VisionTransformer as Torchvision

    state: State = Torchvision(SIDE, PATCH, 1, 2, 128, 256).state_dict()
    return state


ENCODERS: dict[str, Callable[[], State]] = {
    "timm": lambda: vit(768, 12, depth=1).state_dict(),
    "torchvision": torchvision_vit,
    "resnet": lambda: resnet().state_dict(),
}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("backbone", "backbone_momentum"),
        ("backbone", "momentum_backbone"),
        ("teacher_backbone", "student_backbone"),
        ("online_network.encoder", "target_network.encoder"),
        ("online_encoder.net", "net"),
    ],
)
def test_the_default_of_a_toolkits_pair(first: str, second: str, tmp_path: Path) -> None:
    net, other = resnet(1), resnet(2)
    state = prefixed(f"{second}.", other.state_dict()) | prefixed(f"{first}.", net.state_dict())
    path = save({"state_dict": state}, tmp_path)
    assert_map(path, net)
    assert_map(f"{path}#state_dict.{second}", other)


def test_several_things_to_ignore(tmp_path: Path) -> None:
    state = {"model": resnet().state_dict(), "adapter": {"w": torch.ones(2)}, "gate": {"w": torch.ones(2)}}
    path = save(state, tmp_path)
    with pytest.raises(CheckpointError, match=r"does not know: adapter, gate; .* #ignore=adapter:gate$"):
        load_encoder(path)
    with pytest.raises(CheckpointError, match="does not know: gate"):
        load_encoder(f"{path}#ignore=adapter")
    dropped = assert_map(f"{path}#ignore=adapter:gate", resnet())
    assert dropped["gate.*"] == "ignored, as asked"


def test_numbers_of_the_training_beside_the_weights(tmp_path: Path) -> None:
    numbers = {"best_acc1": torch.tensor(73.2), "global_step": torch.tensor([7])}
    path = save({"arch": "resnet10", "state_dict": resnet().state_dict(), **numbers}, tmp_path)
    dropped = assert_map(path, resnet())
    assert {name: dropped[name] for name in numbers} == dict.fromkeys(numbers, "number of the training")
    # In a bare state dict a number may be a weight; two numbers are no single one.
    bare = prefixed("encoder.", resnet().state_dict()) | numbers
    with pytest.raises(CheckpointError, match="does not know: best_acc1, global_step"):
        load_encoder(save(bare, tmp_path))
    two = {"model": resnet().state_dict(), "best": torch.ones(2)}
    with pytest.raises(CheckpointError, match="does not know: best"):
        load_encoder(save(two, tmp_path))
    flat = resnet().state_dict() | {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    assert_map(save(flat, tmp_path), resnet())
