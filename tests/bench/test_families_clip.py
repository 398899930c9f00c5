"""Towers of CLIP as open_clip and OpenAI save them: what the configuration says, what is assumed, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers.activations import GELUTanh
from torch import nn
from torch.nn import functional as F

from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.errors import CheckpointError
from lmim_bench.bench.timm_models import create_timm
from lmim_bench.bench.types import Tap

State = dict[str, torch.Tensor]
CONFIG = "open_clip_config.json"


def change(folder: Path, edit: Callable[[State], object], name: str = "open_clip_model.safetensors") -> str:
    """Change the tensors of a safetensors file; returns its path."""
    state = load_file(folder / name)
    edit(state)
    save_file(state, folder / name)
    return str(folder / name)


def configure(folder: Path, **tower: Any) -> str:
    """Change the tower in a configuration of open_clip; returns the folder's path."""
    stated = json.loads((folder / CONFIG).read_text())
    stated["model_cfg"]["vision_cfg"] |= tower
    (folder / CONFIG).write_text(json.dumps(stated))
    return str(folder)


def features(reference: str, layouts: ModuleType, size: tuple[int, int] = (32, 32)) -> Any:
    return load_encoder(reference)(layouts.images(size))[Tap()]


def notes(reference: str) -> str:
    return " | ".join(load_encoder(reference).info.notes)


# ------------------------------------------------------------------------------------------- what is stated


def test_the_norm_after_pooling(folder: Any, layouts: ModuleType) -> None:
    place = folder("open-clip-config")
    plain = load_encoder(str(place))
    raw = plain(layouts.images((32, 32)), [Tap(-1, False)])[Tap(-1, False)]
    state = load_file(place / "open_clip_model.safetensors")
    encoder = load_encoder(configure(place, pool_type="avg", final_ln_after_pool=True))
    assert (encoder.spec.pooling, encoder.spec.arch["fc_norm"]) == ("mean", True)
    eps = plain.spec.arch["eps"]
    expected = F.layer_norm(
        raw.patches.mean((1, 2)), (192,), state["visual.ln_post.weight"], state["visual.ln_post.bias"], eps
    )
    found = encoder(layouts.images((32, 32)))[Tap()]
    torch.testing.assert_close(found.mean, expected, atol=1e-5, rtol=1e-5)
    # The class token is normed the same before and after it is taken.
    token = load_encoder(configure(place, pool_type="tok"))(layouts.images((32, 32)))[Tap()].cls
    torch.testing.assert_close(token, plain(layouts.images((32, 32)))[Tap()].cls)


def test_an_approximate_activation(folder: Any, layouts: ModuleType) -> None:
    place = folder("open-clip-config")
    exact: Any = load_encoder(str(place))
    with pytest.raises(CheckpointError, match="QuickGELU and tanh GELU at once"):
        load_encoder(configure(place, act_kwargs={"approximate": "tanh"}))
    stated = json.loads((place / CONFIG).read_text())
    stated["model_cfg"]["quick_gelu"] = False
    (place / CONFIG).write_text(json.dumps(stated))
    encoder: Any = load_encoder(str(place))
    assert encoder.spec.arch["activation"] == "gelu_tanh"
    assert f"tanh GELU, from {CONFIG}" in encoder.info.notes
    for block in exact.model.blocks:
        block.mlp.act = GELUTanh()
    x = layouts.images((32, 32))
    torch.testing.assert_close(encoder(x)[Tap()].cls, exact(x)[Tap()].cls)


def test_a_tower_without_the_norm_before_its_blocks(folder: Any, layouts: ModuleType) -> None:
    place = folder("open-clip-config")
    with_norm: Any = load_encoder(str(place))

    def edit(state: State) -> None:
        del state["visual.ln_pre.weight"], state["visual.ln_pre.bias"]

    change(place, edit)
    encoder: Any = load_encoder(configure(place, no_ln_pre=True))
    assert not encoder.spec.arch["pre_norm"]
    with_norm.model.norm_pre = nn.Identity()
    x = layouts.images((32, 32))
    torch.testing.assert_close(encoder(x)[Tap()].cls, with_norm(x)[Tap()].cls)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("qk_norm", True),
        ("scaled_cosine_attn", True),
        ("attentional_pool", "cascade"),
        ("global_average_pool", True),
        ("block_type", "custom"),
        ("pool_type", "none"),
        ("act_kwargs", {"negative_slope": 0.1}),
        ("norm_kwargs", {"elementwise_affine": False}),
        ("timm_pool", "abs_attn"),
        ("of_the_future", 3),
    ],
)
def test_what_a_configuration_asks_for_is_followed_or_refused(option: str, value: Any, folder: Any) -> None:
    with pytest.raises(CheckpointError, match=f"asks for {option} .* not supported"):
        load_encoder(configure(folder("open-clip-config"), **{option: value}))


def test_defaults_that_are_written_out_change_nothing(folder: Any) -> None:
    place = folder("open-clip-config")
    before = load_encoder(str(place)).fingerprint
    written = {
        "qk_norm": False,
        "scale_fc": False,
        "block_type": None,
        "pool_type": "tok",
        "act_kwargs": None,
    }
    assert load_encoder(configure(place, **written)).fingerprint == before


def save_tower(folder: Path, model: Any, **tower: Any) -> str:
    """A folder of open_clip with a tower of timm; returns its path."""
    state = {f"visual.trunk.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {"visual.head.proj.weight": torch.ones(2, 2), "text.token_embedding.weight": torch.ones(2, 2)}
    save_file({**state, "logit_scale": torch.ones(())}, folder / "open_clip_model.safetensors")
    images = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    stated = {"model_cfg": {"embed_dim": 2, "vision_cfg": tower, "text_cfg": {}}, "preprocess_cfg": images}
    (folder / CONFIG).write_text(json.dumps(stated))
    return str(folder)


def test_a_tower_of_timm_is_the_one_that_the_configuration_names(tmp_path: Path) -> None:
    model = create_timm("test_convnext", pretrained=False, seed=1).eval()
    tower = {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 96}
    encoder = load_encoder(save_tower(tmp_path, model, **tower))
    assert encoder.spec.arch["name"] == "test_convnext"
    assert (encoder.spec.mean, encoder.spec.image_size) == ((0.1, 0.2, 0.3), 96)
    assert encoder.info.dropped["text.*"] == "text tower"
    x = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(encoder(x)[Tap()].mean, pooled, atol=1e-5, rtol=1e-5)


def test_a_perception_encoder_in_open_clip_needs_its_name(tmp_path: Path) -> None:
    name = "vit_pe_core_tiny_patch16_384"
    place = save_tower(tmp_path, create_timm(name, pretrained=False), timm_model_name=name)
    assert load_encoder(place).spec.arch["name"] == name
    (tmp_path / CONFIG).unlink()
    with pytest.raises(CheckpointError, match="as Perception Encoders do"):
        load_encoder(place)


@pytest.mark.parametrize(("pool", "pooling"), [("avg", "mean"), ("token", "cls"), ("", "cls")])
def test_the_pooling_of_a_plain_tower_of_timm(pool: str, pooling: str, tmp_path: Path) -> None:
    model = create_timm("test_vit", pretrained=False)
    place = save_tower(tmp_path, model, timm_model_name="test_vit", timm_pool=pool)
    spec = load_encoder(place).spec
    assert (spec.family, spec.pooling, spec.arch["num_heads"]) == ("open_clip_timm", pooling, 2)


# ------------------------------------------------------------------------------------------- what is assumed


def test_the_activation_of_open_clip_is_assumed_aloud_and_can_be_chosen(
    folder: Any, layouts: ModuleType
) -> None:
    path = str(folder("open-clip-quickgelu") / "open_clip_pytorch_model.bin")
    assert "WARNING: exact GELU is assumed" in notes(path)
    assert "add #family=open_clip_quickgelu" in notes(path)
    chosen = f"{path}#family=open_clip_quickgelu"
    assert "WARNING" not in notes(chosen)
    assert (features(path, layouts).cls - features(chosen, layouts).cls).abs().max() > 1e-3


def test_a_tower_of_open_clip_by_itself_is_read(folder: Any, layouts: ModuleType) -> None:
    place = folder("open-clip-quickgelu")
    whole = torch.load(place / "open_clip_pytorch_model.bin", weights_only=True)
    tower = {name.removeprefix("visual."): t for name, t in whole.items() if name.startswith("visual.")}
    torch.save(tower, place / "tower.pt")
    expected = features(str(place / "open_clip_pytorch_model.bin"), layouts).cls
    assert torch.equal(features(str(place / "tower.pt"), layouts).cls, expected)


def test_a_configuration_of_another_tower_of_open_clip_is_refused(folder: Any) -> None:
    place = folder("open-clip-config")
    stated = json.loads((place / "open_clip_config.json").read_text())
    stated["model_cfg"]["vision_cfg"]["layers"] = 12
    (place / "open_clip_config.json").write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match="of another tower than this, of width 192 and depth 2"):
        load_encoder(str(place))
    (place / "open_clip_config.json").write_text('{"model_cfg": []}')
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json beside the file is no configuration"):
        load_encoder(str(place))


def test_clip_with_a_residual_network_is_refused(tmp_path: Path) -> None:
    state = {f"visual.attnpool.{part}_proj.weight": torch.ones(4, 4) for part in "qkvc"}
    state |= {
        "visual.conv1.weight": torch.ones(4, 3, 3, 3),
        "visual.layer1.0.conv1.weight": torch.ones(4, 4, 1, 1),
    }
    torch.save({**state, "logit_scale": torch.ones(())}, tmp_path / "RN50.pt")
    with pytest.raises(CheckpointError, match=r"CLIP with a residual network \(RN50 and its like\)"):
        load_encoder(str(tmp_path / "RN50.pt"))


def test_coca_is_refused(folder: Any) -> None:
    def edit(state: State) -> None:
        state["visual.attn_pool.query"] = torch.ones(4, 192)

    path = change(folder("open-clip-config"), edit)
    with pytest.raises(CheckpointError, match=r"pools by attention over queries \(CoCa\)"):
        load_encoder(path)


def test_the_enormous_eva_clip_is_refused(tmp_path: Path) -> None:
    state = {
        "visual.patch_embed.proj.weight": torch.ones(1792, 3, 2, 2),
        "visual.cls_token": torch.ones(1, 1, 1792),
        "visual.blocks.0.norm1.weight": torch.ones(1792),
        "visual.blocks.0.attn.proj.weight": torch.ones(1792, 4),
    }
    torch.save(state, tmp_path / "eva.pt")
    with pytest.raises(CheckpointError, match="the enormous EVA-CLIP"):
        load_encoder(str(tmp_path / "eva.pt"))


def test_a_tower_of_timm_alone_warns_of_what_is_assumed(folder: Any) -> None:
    place = folder("open-clip-siglip")
    (place / "open_clip_config.json").unlink()
    encoder = load_encoder(f"{place}#heads=16")
    assert encoder.spec.arch["activation"] == "gelu"
    assert (encoder.spec.mean, encoder.spec.pooling) == ((0.5, 0.5, 0.5), "cls")
    assert "WARNING: exact GELU and norm eps 1e-06 are assumed" in " ".join(encoder.info.notes)


def test_a_tower_of_another_name_than_the_configurations_is_refused(folder: Any) -> None:
    place = folder("open-clip-siglip")
    stated = json.loads((place / "open_clip_config.json").read_text())
    stated["model_cfg"]["vision_cfg"]["timm_model_name"] = "eva02_base_patch16_clip_224"
    (place / "open_clip_config.json").write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match="timm's eva02_base_patch16_clip_224, which has other"):
        load_encoder(str(place))


def test_any_tower_of_timm_in_open_clip_is_read_by_its_name(tmp_path: Path) -> None:
    model = create_timm("test_convnext", pretrained=False)
    state = {f"visual.trunk.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {"visual.head.proj.weight": torch.ones(2, 2), "text.token_embedding.weight": torch.ones(2, 2)}
    torch.save({"state_dict": {**state, "logit_scale": torch.ones(())}}, tmp_path / "clip.pt")
    encoder = load_encoder(f"{tmp_path / 'clip.pt'}#arch=test_convnext")
    assert encoder.info.loaded_tensors == len(model.state_dict())
    assert "state_dict.text.*" in encoder.info.dropped
