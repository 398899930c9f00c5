"""Convolutional and hierarchical networks: which method wrote the file, names of timm, refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.errors import CheckpointError
from lmim_bench.bench.timm_models import create_timm
from lmim_bench.bench.types import Tap

State = dict[str, torch.Tensor]


def resnet(block: Any = BasicBlock, **options: Any) -> Any:
    torch.manual_seed(0)
    return ResNet(block, [1, 1, 1, 1], num_classes=3, **options).eval()


def save(payload: Any, folder: Path, name: str = "model.pth") -> str:
    torch.save(payload, folder / name)
    return str(folder / name)


def last_map(net: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            x = getattr(net, name)(x)
    return x.permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("block", "options"),
    [
        (BasicBlock, {}),
        (Bottleneck, {}),
        (Bottleneck, {"width_per_group": 128}),
        (Bottleneck, {"groups": 32, "width_per_group": 4}),
    ],
)
def test_every_shape_of_torchvisions_network(block: Any, options: dict[str, Any], tmp_path: Path) -> None:
    net = resnet(block, **options)
    encoder = load_encoder(save(net.state_dict(), tmp_path))
    x = torch.randn(2, 3, 64, 96)
    found = encoder(x)[Tap()]
    torch.testing.assert_close(found.patches, last_map(net, x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.mean, found.patches.mean((1, 2)))
    assert encoder.info.dropped == {"fc.*": "head"}
    assert any("anti-aliased networks" in note for note in encoder.info.notes)
    assert not encoder.spec.has_cls


def test_the_momentum_encoder_can_be_picked(layouts: ModuleType, tmp_path: Path) -> None:
    reference, _ = layouts.write("moco", tmp_path)
    online, momentum = load_encoder(reference), load_encoder(f"{reference}#encoder_k")
    assert online.fingerprint != momentum.fingerprint
    assert momentum.info.container == "state_dict.module.encoder_k"
    assert any("encoder_q" in note for note in online.info.notes)


def test_a_student_never_stands_in_for_a_teacher_without_a_first_layer(
    layouts: ModuleType, tmp_path: Path
) -> None:
    reference, _ = layouts.write("dino-resnet", tmp_path)
    payload = torch.load(reference, weights_only=False)
    (name,) = (key for key in payload["teacher"] if key.endswith("backbone.conv1.weight"))
    del payload["teacher"][name]
    torch.save(payload, reference)
    with pytest.raises(CheckpointError, match=r"lacks conv1\.weight, .* add #student"):
        load_encoder(reference)


def test_files_older_than_the_counters_of_batch_norms(tmp_path: Path) -> None:
    net = resnet()
    counters = [name for name in net.state_dict() if name.endswith("num_batches_tracked")]
    old = {name: tensor for name, tensor in net.state_dict().items() if name not in counters}
    encoder = load_encoder(save(old, tmp_path))
    assert any("before torch 0.4.1" in note for note in encoder.info.notes)
    assert encoder.info.loaded_tensors == encoder.info.encoder_tensors
    assert encoder.fingerprint == load_encoder(save(net.state_dict(), tmp_path)).fingerprint
    del old["bn1.running_var"]
    with pytest.raises(CheckpointError, match=r"1 missing \(bn1\.running_var\)"):
        load_encoder(save(old, tmp_path))
    partly = {name: tensor for name, tensor in net.state_dict().items() if name != counters[-1]}
    with pytest.raises(CheckpointError, match=r"1 missing .*num_batches_tracked"):
        load_encoder(save(partly, tmp_path))


@pytest.mark.parametrize("padding", [1, 2])
def test_networks_for_small_images(padding: int, tmp_path: Path) -> None:
    net = resnet()
    net.conv1 = torch.nn.Conv2d(3, 64, 3, padding=padding, bias=False)
    net.maxpool = torch.nn.Identity()
    state = {f"backbone.{k}": v for k, v in net.state_dict().items() if not k.startswith("fc.")}
    beside = {"classifier.weight": torch.ones(3, 512)} if padding == 2 else {}
    encoder = load_encoder(save({"state_dict": state | beside}, tmp_path))
    x = torch.randn(2, 3, 32, 48)
    found = encoder(x)[Tap()]
    assert found.patches.shape == (2, 4, 6, 512)
    torch.testing.assert_close(found.mean, last_map(net, x).mean((1, 2)), atol=1e-5, rtol=1e-5)
    assert encoder.spec.image_size == 32
    assert any(f"padding {padding}" in note for note in encoder.info.notes)


def test_networks_that_are_like_it_but_not_it_are_refused(tmp_path: Path) -> None:
    state = resnet().state_dict()
    five = state | {"conv1.weight": torch.randn(64, 3, 5, 5)}
    with pytest.raises(CheckpointError, match=r"conv1.weight has shape \(64, 3, 5, 5\)"):
        load_encoder(save(five, tmp_path))
    squeezed = state | {"layer1.0.se.fc1.weight": torch.randn(4, 64, 1, 1)}
    with pytest.raises(CheckpointError, match=r"1 unexpected \(layer1.0.se.fc1.weight\)"):
        load_encoder(save(squeezed, tmp_path))
    with pytest.raises(CheckpointError, match="has no heads"):
        load_encoder(save(state, tmp_path) + "#heads=3")
    lacking = {k: v for k, v in state.items() if k != "layer3.0.bn1.running_var"}
    with pytest.raises(CheckpointError, match=r"1 missing \(layer3.0.bn1.running_var\)"):
        load_encoder(save(lacking, tmp_path))


# ------------------------------------------------------------------------------------------- timm by names


def timm_state(name: str, **kwargs: Any) -> State:
    model = create_timm(name, pretrained=False, seed=4, **kwargs)
    return dict(model.state_dict())


@pytest.mark.parametrize("suffix", ["", "_ra-37913777", ".in1k", "-best"])
def test_a_file_called_after_a_timm_model(suffix: str, tmp_path: Path) -> None:
    state = timm_state("test_byobnet")
    encoder = load_encoder(save(state, tmp_path, f"test_byobnet{suffix}.pth"))
    assert "the file is called after timm's test_byobnet, whose keys it has" in encoder.info.notes
    assert encoder.spec.arch["name"] == "test_byobnet"


def test_an_unknown_network_is_told_the_ways_out(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_encoder(save({"state_dict": timm_state("test_byobnet")}, tmp_path))
    text = str(caught.value)
    assert "it holds state_dict.stem.conv.weight" in text
    assert "#arch=NAME" in text
    assert "python:package.module:factory" in text


def test_a_wrong_file_name_does_not_decide(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="layout is not known"):
        load_encoder(save(timm_state("test_byobnet"), tmp_path, "vit_base_patch16_224.pth"))


def test_the_configuration_beside_the_file_comes_first(tmp_path: Path) -> None:
    """timm's config.json says more than the shapes do: here the mean, and that it is timm's own Swin."""
    kwargs = {"img_size": 64, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    save_file(timm_state("swin_tiny_patch4_window7_224", **kwargs), tmp_path / "model.safetensors")
    config = {
        "architecture": "swin_tiny_patch4_window7_224",
        "model_args": kwargs,
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "input_size": [3, 64, 64]},
    }
    assert load_encoder(str(tmp_path)).spec.family == "swin"
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = load_encoder(str(tmp_path))
    assert encoder.spec.family == "timm"
    assert encoder.spec.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("name", ["test_convnext", "test_byobnet", "test_vit2"])
def test_a_folder_as_timm_writes_it(name: str, tmp_path: Path) -> None:
    """Of a model with its classifier, which newer versions of timm state among the arguments."""
    model = timm.create_model(name, num_classes=7)
    save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"] = {**config.get("model_args", {}), "num_classes": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder: Any = load_encoder(str(tmp_path))
    assert encoder.spec.arch["name"] == name
    for key, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key])


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_tiny", "convnextv2_atto"])
def test_bare_files_of_timm_are_recognised(name: str, tmp_path: Path) -> None:
    state = timm_state(name)
    encoder: Any = load_encoder(save(state, tmp_path))
    for key, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, state[key])
    assert encoder.spec.image_size == 224
    features = encoder(torch.randn(1, 3, 64, 96))[Tap()]
    assert features.patches.shape[1:3] == (2, 3)


# ------------------------------------------------------------------------------------------- EfficientNet


def lukemelas(model: Any, lite: bool) -> State:
    """The names of EfficientNet-PyTorch for a model of timm's."""
    places = [f"blocks.{i}.{j}." for i, stage in enumerate(model.blocks) for j in range(len(stage))]
    expanded: list[tuple[str, str]] = [
        (r"^conv_pwl", "_project_conv"),
        (r"^conv_pw\b", "_expand_conv"),
        (r"^bn1", "_bn0"),
        (r"^bn2", "_bn1"),
        (r"^bn3", "_bn2"),
    ]
    plain = [(r"^conv_pw\b", "_project_conv"), (r"^bn2", "_bn2"), (r"^bn1", "_bn1")]
    found = {}
    for key, tensor in model.state_dict().items():
        place = next((p for p in places if key.startswith(p)), None)
        if place is None:
            renamed = re.sub(r"^bn1", "_bn0", key) if key.startswith("bn1") else re.sub(r"^bn2", "_bn1", key)
            renamed = re.sub(r"^conv_(stem|head)", r"_conv_\1", renamed)
        else:
            inner = key.removeprefix(place)
            rules = expanded if hasattr(model.get_submodule(place.rstrip(".")), "conv_pwl") else plain
            for pattern, name in [*rules, (r"^conv_dw", "_depthwise_conv"), (r"^se\.conv_", "_se_")]:
                if re.search(pattern, inner):
                    inner = re.sub(pattern, name, inner)
                    break
            renamed = f"_blocks.{places.index(place)}.{inner}"
        found[renamed] = tensor
    return found


@pytest.mark.parametrize(("name", "lite"), [("tf_efficientnet_lite1", True), ("tf_efficientnet_b0", False)])
def test_efficientnets_in_their_original_names(name: str, lite: bool, tmp_path: Path) -> None:
    model = create_timm(name, pretrained=False, seed=2).eval()
    state = lukemelas(model, lite) | {"_fc.weight": torch.ones(3, 4), "_fc.bias": torch.ones(3)}
    encoder = load_encoder(save(state, tmp_path))
    assert encoder.spec.arch["name"] == name
    assert encoder.info.dropped == {"_fc.*": "classifier head"}
    assert (encoder.spec.mean == (127 / 255,) * 3) == lite
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model.forward_features(x).permute(0, 2, 3, 1)
    torch.testing.assert_close(encoder(x)[Tap()].patches, expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------- Swin


def test_the_teacher_of_a_swin_is_the_default(tmp_path: Path) -> None:
    kwargs = {"img_size": 64, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    teacher = timm_state("swin_tiny_patch4_window7_224", **kwargs)
    student = {name: tensor + 1 for name, tensor in teacher.items() if tensor.is_floating_point()}
    heads = {"head.mlp.0.weight": torch.ones(2, 2)}
    payload = {
        "student": {f"module.{name}": tensor for name, tensor in student.items()},
        "teacher": {f"backbone.{name}": tensor for name, tensor in teacher.items()} | heads,
    }
    encoder = load_encoder(save(payload, tmp_path))
    assert encoder.info.container == "teacher.backbone"
    assert encoder.info.dropped == {"student.*": "another encoder of the file", "teacher.head.*": "head"}
    assert load_encoder(f"{save(payload, tmp_path)}#student").fingerprint != encoder.fingerprint


def test_a_swin_says_where_its_size_comes_from(layouts: ModuleType, tmp_path: Path) -> None:
    reference, _ = layouts.write("swin", tmp_path)
    notes = load_encoder(reference).info.notes
    assert "trained at 64 pixels, from the attention masks" in notes
    payload = torch.load(reference, weights_only=True)
    bare = {k: v for k, v in payload["model"].items() if "attn_mask" not in k and "index" not in k}
    torch.save(bare, reference)
    encoder = load_encoder(reference)
    assert encoder.spec.image_size == 32
    assert any("set #image_size=" in note for note in encoder.info.notes)


@pytest.mark.parametrize("make", [lambda s: {"teacher": s}, lambda s: {"ema": s, "model": s}])
def test_averages_and_teachers_of_toolkits(make: Callable[[State], Any], tmp_path: Path) -> None:
    net = resnet()
    encoder = load_encoder(save(make(dict(net.state_dict())), tmp_path))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(encoder(x)[Tap()].patches, last_map(net, x), atol=1e-5, rtol=1e-5)
