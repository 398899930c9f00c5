"""Files of Hugging Face, towers of CLIP and SigLIP: what is stated, what is assumed, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmim_bench.bench.encoders import load_encoder
from lmim_bench.bench.errors import CheckpointError
from lmim_bench.bench.timm_models import create_timm, timm_encoder, timm_spec
from lmim_bench.bench.types import CheckpointInfo, Tap

State = dict[str, torch.Tensor]


def change(folder: Path, edit: Callable[[State], object], name: str = "model.safetensors") -> str:
    """Change the tensors of a safetensors file; returns its path."""
    state = load_file(folder / name)
    edit(state)
    save_file(state, folder / name)
    return str(folder / name)


def configure(folder: Path, name: str = "config.json", **fields: Any) -> str:
    """Change a JSON file of a folder; returns the folder's path."""
    stated = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**stated, **fields}))
    return str(folder)


def features(reference: str, layouts: ModuleType, size: tuple[int, int] = (32, 32)) -> Any:
    return load_encoder(reference)(layouts.images(size))[Tap()]


def notes(reference: str) -> str:
    return " | ".join(load_encoder(reference).info.notes)


# ------------------------------------------------------------------------------------------- config.json


def test_a_folder_and_its_file_are_one_encoder(folder: Any, layouts: ModuleType) -> None:
    place = folder("hf-vit")
    expected = features(str(place), layouts).patches
    for reference in (f"hf:{place}", str(place / "model.safetensors")):
        assert torch.equal(features(reference, layouts).patches, expected)


def test_the_configuration_says_heads_eps_and_activation(folder: Any) -> None:
    place = configure(
        folder("hf-vit"), num_attention_heads=6, layer_norm_eps=1e-3, hidden_act="gelu_pytorch_tanh"
    )
    arch: Any = load_encoder(place).spec.arch
    assert (arch["num_heads"], arch["eps"], arch["activation"]) == (6, 1e-3, "gelu_tanh")
    assert "6 heads, from config.json" in notes(place)
    assert "norm eps 0.001 and tanh GELU, from config.json (vit)" in notes(place)


def test_a_configuration_may_leave_out_the_defaults(folder: Any) -> None:
    place = configure(folder("hf-siglip"), vision_config={"model_type": "siglip_vision_model"})
    arch: Any = load_encoder(f"{place}#heads=3").spec.arch
    assert (arch["eps"], arch["activation"]) == (1e-6, "gelu_tanh")
    assert "(siglip_vision_model) or by the defaults of transformers" in notes(f"{place}#heads=3")


def test_heads_that_the_user_asks_for_overrule_the_configuration(folder: Any) -> None:
    reference = f"{folder('hf-vit')}#heads=2"
    assert load_encoder(reference).spec.arch["num_heads"] == 2
    assert "2 heads, as asked" in notes(reference)


def test_a_file_alone_needs_heads_where_its_width_says_none(folder: Any) -> None:
    place = folder("hf-vit")
    (place / "config.json").unlink()
    with pytest.raises(CheckpointError, match="a width of 96 has; add #heads=N"):
        load_encoder(str(place / "model.safetensors"))
    said = notes(f"{place / 'model.safetensors'}#heads=3")
    assert "the default of transformers, as no config.json is beside the file" in said


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"hidden_size": 768},
            "of another model: its width and depth are 768 and 2, those of the weights 96 and 2",
        ),
        ({"num_hidden_layers": 12}, "of another model: its width and depth are 96 and 12"),
        ({"num_attention_heads": 5}, "5 attention heads, which do not divide the width 96"),
        ({"hidden_act": "relu"}, "the activation 'relu'; known are gelu, "),
        ({"layer_norm_eps": "small"}, "layer_norm_eps 'small'; expected a small positive number"),
    ],
)
def test_a_configuration_that_cannot_be_of_these_weights(
    fields: dict[str, Any], words: str, folder: Any
) -> None:
    with pytest.raises(CheckpointError, match=words):
        load_encoder(configure(folder("hf-vit"), **fields))


def test_dinov3_with_another_activation_than_its_own_is_refused(folder: Any) -> None:
    place = configure(folder("hf-dinov3-in-memory"), hidden_act="gelu")
    with pytest.raises(CheckpointError, match="the activation 'gelu', which no gated DINOv3 has"):
        load_encoder(place)


def test_dinov3_takes_the_base_of_its_angles_from_the_configuration(folder: Any, layouts: ModuleType) -> None:
    place = folder("hf-dinov3")
    before = features(str(place), layouts).patches
    after = features(configure(place, rope_theta=10.0), layouts).patches
    assert (before - after).abs().max() > 1e-3


def test_dinov3_without_a_base_of_its_angles_is_refused(folder: Any) -> None:
    with pytest.raises(CheckpointError, match="rope_theta None; expected a positive number"):
        load_encoder(configure(folder("hf-dinov3"), rope_theta=None))


# ------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("key", ["query", "key", "value"])
def test_a_block_without_a_third_of_its_attention_is_refused(part: str, key: str, folder: Any) -> None:
    name = f"encoder.layer.1.attention.attention.{key}.{part}"
    path = change(folder("hf-vit"), lambda state: state.pop(name))
    with pytest.raises(CheckpointError, match=rf"blocks\.1\.attn has no {key[0]}\.{part}"):
        load_encoder(path)


def test_only_some_blocks_with_a_bias_for_the_keys_are_refused(folder: Any) -> None:
    def edit(state: State) -> None:
        state["layer.0.attention.k_proj.bias"] = torch.zeros(96)

    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn has no k\.bias"):
        load_encoder(change(folder("hf-dinov3"), edit))


def test_attention_without_any_bias_is_read(folder: Any) -> None:
    def edit(state: State) -> None:
        for name in [name for name in state if name.endswith((".query.bias", ".key.bias", ".value.bias"))]:
            del state[name]

    place = folder("hf-vit")
    path = change(place, edit)
    with pytest.raises(CheckpointError, match=r"config.json says qkv_bias True, and the file has none"):
        load_encoder(path)
    configure(place, qkv_bias=False)
    assert load_encoder(path).spec.arch["qkv_bias"] is False


@pytest.mark.parametrize(
    ("name", "ending", "said"),
    [
        ("hf-dinov2-registers", "register_tokens", "num_register_tokens 4"),
        ("hf-beit-pretrained", "relative_position_bias_table", "use_(shared_)?relative_position_bias True"),
        ("hf-dinov3", ".lambda1", "layerscale_value 1.0"),
        ("hf-vit", "key.bias", "model_type 'vit', whose attention has biases for keys too"),
    ],
)
def test_what_the_configuration_states_is_never_missing(
    name: str, ending: str, said: str, folder: Any
) -> None:
    def edit(state: State) -> None:
        for key in [key for key in state if key.endswith(ending)]:
            del state[key]
        if "beit" in name:
            state.setdefault("embeddings.position_embeddings", torch.randn(1, 17, 96))

    place = folder(name)
    configure(place, qkv_bias=False)
    with pytest.raises(CheckpointError, match=rf"config.json says {said}, and the file has none"):
        load_encoder(change(place, edit))


def test_a_key_in_both_spellings_is_refused(folder: Any) -> None:
    def edit(state: State) -> None:
        state["layers.0.attention.q_proj.weight"] = torch.ones(96, 96)

    with pytest.raises(CheckpointError, match=r"two keys of the file stand for 'blocks\.0\.attn\.q\.weight'"):
        load_encoder(change(folder("hf-vit"), edit))


def test_a_tensor_that_the_encoder_has_not_is_refused(folder: Any) -> None:
    def edit(state: State) -> None:
        state["embeddings.detection_tokens"] = torch.ones(1, 100, 96)

    with pytest.raises(CheckpointError, match=r"1 unexpected \(embeddings\.detection_tokens\)"):
        load_encoder(change(folder("hf-vit"), edit))


def test_heads_poolers_and_decoders_are_dropped_by_name(folder: Any) -> None:
    dropped = load_encoder(str(folder("hf-deit-distilled"))).info.dropped
    assert dropped == {
        "cls_classifier.*": "classifier head",
        "distillation_classifier.*": "classifier head",
    }
    assert load_encoder(str(folder("hf-mae"))).info.dropped == {"decoder.*": "decoder"}
    assert "pooler.*" in load_encoder(str(folder("hf-vit"))).info.dropped


def test_what_stands_beside_the_encoder_unknown_is_refused(folder: Any) -> None:
    def edit(state: State) -> None:
        state["neck.convs.0.weight"] = torch.ones(3, 3)

    with pytest.raises(CheckpointError, match="does not know: neck"):
        load_encoder(change(folder("hf-deit-distilled"), edit))


def test_beit_without_its_pooler_has_no_norm_and_says_so(folder: Any) -> None:
    encoder = load_encoder(str(folder("hf-data2vec")))
    assert (encoder.spec.arch["final_norm"], encoder.spec.final_norm) == (False, False)
    assert "the file has no final norm" in " ".join(encoder.info.notes)


def test_relative_positions_say_the_heads_of_beit_exactly(folder: Any) -> None:
    with pytest.raises(CheckpointError, match="the table of relative positions is for 3 heads"):
        load_encoder(f"{folder('hf-beit-pretrained')}#heads=4")


# ------------------------------------------------------------------------------------------- preprocessing


def prepared(place: Path, stated: dict[str, Any], name: str = "preprocessor_config.json") -> tuple[Any, ...]:
    (place / "preprocessor_config.json").unlink(missing_ok=True)
    (place / name).write_text(json.dumps(stated))
    spec = load_encoder(str(place)).spec
    return spec.image_size, round(spec.crop_pct, 3), spec.interpolation, spec.mean[0], spec.std[0]


COLOURS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
PROCESSORS: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "ConvNeXt's crop": (
        {"size": {"shortest_edge": 48}, "crop_pct": 0.875, **COLOURS},
        (48, 0.875, "bicubic", 0.1, 0.4),
    ),
    "ConvNeXt's squashing": (
        {"size": {"shortest_edge": 384}, "crop_pct": 0.875, **COLOURS},
        (384, 1.0, "bicubic", 0.1, 0.4),
    ),
    "PoolFormer's crop": (
        {"size": {"shortest_edge": 48}, "crop_size": 48, "do_center_crop": True, "crop_pct": 0.9, **COLOURS},
        (48, 0.9, "bicubic", 0.1, 0.4),
    ),
    "pixels up to 255": (
        {"size": 48, "do_rescale": False, **COLOURS},
        (48, 1.0, "bicubic", 0.1 / 255, 0.4 / 255),
    ),
    "pixels up to 2": ({"size": 48, "rescale_factor": 2 / 255, **COLOURS}, (48, 1.0, "bicubic", 0.05, 0.2)),
    "a divisor written out": (
        {"size": 48, "rescale_factor": 0.00392156862745098, **COLOURS},
        (48, 1.0, "bicubic", 0.1, 0.4),
    ),
    "a square": (
        {"size": {"height": 48, "width": 48}, "resample": 3, **COLOURS},
        (48, 1.0, "bicubic", 0.1, 0.4),
    ),
    "one number": ({"size": 48, "resample": 2, **COLOURS}, (48, 1.0, "bilinear", 0.1, 0.4)),
    "crop": (
        {"size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": {"height": 48, "width": 48}},
        (48, 0.75, "bicubic", 0.485, 0.229),
    ),
    "crop size without crop": (
        {"size": 48, "do_center_crop": False, "crop_size": 32, **COLOURS},
        (48, 1.0, "bicubic", 0.1, 0.4),
    ),
    "crop of the same size": (
        {"size": 32, "crop_size": 32, "do_normalize": False, **COLOURS},
        (32, 1.0, "bicubic", 0.0, 1.0),
    ),
    "no multiple of the patch": ({"size": 50, **COLOURS}, (32, 0.875, "bicubic", 0.1, 0.4)),
    "no resizing": ({"do_resize": False, "size": 48, **COLOURS}, (32, 0.875, "bicubic", 0.1, 0.4)),
    "Lanczos": ({"size": 48, "resample": 1, **COLOURS}, (48, 1.0, "bicubic", 0.1, 0.4)),
}


@pytest.mark.parametrize(("stated", "expected"), PROCESSORS.values(), ids=PROCESSORS)
def test_the_preprocessing_of_the_folder_is_taken(
    stated: dict[str, Any], expected: tuple[Any, ...], folder: Any
) -> None:
    assert prepared(folder("hf-mae"), stated) == expected


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (
            {"size": {"shortest_edge": 48}, "image_processor_type": "ConvNextImageProcessor"},
            (48, 0.875, "bicubic", 0.5, 0.5),
        ),
        # No value for do_normalize: it does not.
        (
            {"size": 48, "crop_size": 48, "image_processor_type": "MobileViTImageProcessor"}
            | {"do_flip_channel_order": False, **COLOURS},
            (48, 1.0, "bicubic", 0.0, 1.0),
        ),
    ],
)
def test_what_the_preprocessing_leaves_out_is_the_classs(
    stated: dict[str, Any], expected: tuple[Any, ...], folder: Any
) -> None:
    pytest.importorskip("transformers", "5")
    assert prepared(folder("hf-mae"), stated) == expected


def test_the_preprocessing_of_version_5_is_inside_the_processor(folder: Any) -> None:
    stated = {"processor_class": "CLIPProcessor", "image_processor": {"size": 48, **COLOURS}}
    found = prepared(folder("hf-clip-vision"), stated, "processor_config.json")
    assert found == (48, 1.0, "bicubic", 0.1, 0.4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"size": {"height": 32, "width": 64}}', "has size {'height': 32, 'width': 64}, which is no square"),
        ('{"size": "big"}', "has size 'big'; expected pixels"),
        ('{"size": 32, "image_mean": [0.5]}', r"has image_mean \[0.5\]; expected three numbers"),
        ('{"size": 32, "crop_pct": 2}', "has crop_pct 2; expected a number up to 1"),
        ('{"size": 32, "rescale_factor": "x"}', "has rescale_factor 'x'; expected a positive number"),
        ('{"size": 32, "do_flip_channel_order": true}', "asks for do_flip_channel_order, which is not"),
        ('{"size": 32, "rescale_offset": true}', "asks for rescale_offset, which is not supported"),
        ("{", "preprocessor_config.json beside the file cannot be read"),
    ],
)
def test_a_preprocessing_that_cannot_be_followed_is_refused(text: str, words: str, folder: Any) -> None:
    place = folder("hf-vit")
    (place / "preprocessor_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        load_encoder(str(place))


def test_a_file_alone_says_that_its_preprocessing_is_assumed(folder: Any) -> None:
    assert "WARNING: ImageNet's mean and std are assumed (Google's ViT has 0.5)" in notes(
        str(folder("hf-vit-alone") / "model.safetensors")
    )


# ------------------------------------------------------------------------------------------- CLIP and SigLIP


def test_siglip_without_its_head_is_pooled_by_the_mean(folder: Any) -> None:
    def edit(state: State) -> None:
        for name in [name for name in state if name.startswith("head.")]:
            del state[name]

    encoder = load_encoder(change(folder("hf-siglip-vision"), edit))
    assert (encoder.spec.pooling, encoder.spec.has_cls) == ("mean", False)
    assert "no attention pooling in the file" in " ".join(encoder.info.notes)


def test_siglip_for_images_of_any_shape_is_refused(folder: Any) -> None:
    def edit(state: State) -> None:
        state["embeddings.patch_embedding.weight"] = torch.ones(96, 192)

    with pytest.raises(CheckpointError, match=r"SigLIP 2 for images of any shape \(NaFlex\), which is not"):
        load_encoder(change(folder("hf-siglip-vision"), edit))


def test_the_projection_and_the_texts_are_dropped_by_name(folder: Any) -> None:
    dropped = load_encoder(str(folder("hf-clip"))).info.dropped
    assert dropped["visual_projection.*"] == "projection to the space of the texts"
    assert dropped["text_model.*"] == dropped["text_projection.*"] == "text tower"
    dropped = load_encoder(str(folder("openai-clip") / "ViT-B-32-state.pt")).info.dropped
    assert dropped["visual.proj"] == "projection to the space of the texts"
    assert dropped["input_resolution"] == "number of the configuration"


def test_siglip_in_the_names_of_timm_has_its_preprocessing(folder: Any, layouts: ModuleType) -> None:
    place = folder("open-clip-siglip")
    state = load_file(place / "open_clip_model.safetensors")
    trunk = {k.removeprefix("visual.trunk."): t for k, t in state.items() if k.startswith("visual.trunk.")}
    save_file(trunk, place / "siglip.safetensors")
    reference = f"{place / 'siglip.safetensors'}#heads=16"
    spec = load_encoder(reference).spec
    assert (spec.family, spec.mean, spec.pooling, spec.has_cls) == ("timm", (0.5, 0.5, 0.5), "cls", True)
    assert "attention pooling, so SigLIP" in notes(reference)


def test_a_timm_model_with_attention_pooling_has_its_global_token() -> None:
    small = {"embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": 32}
    model = create_timm("vit_base_patch16_siglip_224", pretrained=False, **small)
    spec = timm_spec(model, {"builder": "timm", "name": "vit_base_patch16_siglip_224", "kwargs": small})
    assert (spec.has_cls, spec.pooling) == (True, "cls")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        pooled = model.eval()(images)
    info = CheckpointInfo(
        source="", sha256=None, format="timm", container="", parameters=0, loaded_tensors=0, encoder_tensors=0
    )
    torch.testing.assert_close(timm_encoder(model, spec, info)(images)[Tap()].cls, pooled)
