"""transformers 5.24: folders as ``save_pretrained`` writes them, and files in the models' own names.

It needs no checkout; run it with any folder.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import token_features
from layouts import record

VERSION = f"huggingface/transformers {hf.__version__}"
SHAPE: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "image_size": 32,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES = {"native": (32, 32), "larger": (32, 56)}
Features = Callable[[Any, torch.Tensor], Mapping[str, torch.Tensor]]


def saved(
    name: str,
    model: Any,
    features: Features,
    *,
    read_as: Any = None,
    processor: Any = None,
    alone: bool = False,
    sizes: Mapping[str, tuple[int, int]] = SIZES,
    **expect: Any,
) -> None:
    """A folder of ``save_pretrained``; the features are of the model that transformers loads from it."""
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        if processor is not None:
            processor.save_pretrained(place)
        state = load_file(Path(place) / "model.safetensors")
        texts = {p.name: json.loads(p.read_text()) for p in Path(place).glob("*.json")}
    loaded: list[Any] = []

    def run(images: torch.Tensor) -> Mapping[str, torch.Tensor]:
        if not loaded:
            with tempfile.TemporaryDirectory() as place:
                save_file(state, Path(place) / "model.safetensors", metadata={"format": "pt"})
                for file, content in texts.items():
                    (Path(place) / file).write_text(json.dumps(content))
                loaded.append((read_as or type(model)).from_pretrained(place).eval())
        return features(loaded[0], images)

    record(
        name,
        made_by=f"{VERSION}, {type(model).__name__}",
        files={"model.safetensors": state, **({} if alone else texts)},
        features=run,
        sizes=sizes,
        load="model.safetensors" if alone else None,
        expect=expect,
    )


def in_memory(name: str, model: Any, features: Features, **expect: Any) -> None:
    """``torch.save(model.state_dict())``: the names that the models of version 5 have in memory."""
    model = model.eval()
    record(
        name,
        made_by=f"{VERSION}, {type(model).__name__}, state_dict()",
        files={"pytorch_model.bin": model.state_dict(), "config.json": model.config.to_dict()},
        features=lambda images: features(model, images),
        sizes=SIZES,
        load=None,
        expect=expect,
    )


def grid(images: torch.Tensor) -> tuple[int, int]:
    return images.shape[-2] // 8, images.shape[-1] // 8


def tokens(prefix: int = 1, base: str = "", **options: Any) -> Features:
    """The tokens after the final norm, and those of the first block."""

    def features(model: Any, images: torch.Tensor) -> Mapping[str, torch.Tensor]:
        out = (getattr(model, base) if base else model)(images, output_hidden_states=True, **options)
        inner = out.hidden_states[1]
        columns = token_features(out.last_hidden_state, grid(images), prefix)
        return columns | {"mean@-2:raw": inner[:, prefix:].mean(1)}

    return features


RESIZED = {"interpolate_pos_encoding": True}


def plain() -> None:
    torch.manual_seed(0)
    saved(
        "hf-vit",
        hf.ViTModel(hf.ViTConfig(**SHAPE)),
        tokens(**RESIZED),
        processor=hf.ViTImageProcessor(size={"height": 32, "width": 32}),
        family="hf_vit",
        num_heads=3,
        eps=1e-12,
        mean=[0.5, 0.5, 0.5],
        image_size=32,
        crop_pct=1.0,
        interpolation="bilinear",
        pooling="cls",
    )
    in_memory(
        "hf-vit-in-memory",
        hf.ViTForImageClassification(hf.ViTConfig(**SHAPE, layer_norm_eps=1e-5, hidden_act="gelu_new")),
        tokens(base="vit", **RESIZED),
        family="hf_vit",
        eps=1e-5,
        activation="gelu_tanh",
    )
    saved(
        "hf-vit-alone",
        hf.ViTModel(hf.ViTConfig(**{**SHAPE, "hidden_size": 192}), add_pooling_layer=False),
        tokens(**RESIZED),
        alone=True,
        sizes={"native": (32, 32)},
        family="hf_vit",
        num_heads=3,
        eps=1e-12,
    )
    saved(
        "hf-deit-distilled",
        hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**SHAPE)),
        tokens(2, "deit", **RESIZED),
        processor=hf.DeiTImageProcessor(
            size={"height": 36, "width": 36}, crop_size={"height": 32, "width": 32}
        ),
        family="hf_vit",
        reg_tokens=1,
        image_size=32,
        crop_pct=32 / 36,
    )
    saved("hf-msn", hf.ViTMSNModel(hf.ViTMSNConfig(**SHAPE)), tokens(**RESIZED), family="hf_vit")
    saved(
        "hf-ijepa",
        hf.IJepaModel(hf.IJepaConfig(**SHAPE)),
        tokens(0, **RESIZED),
        family="hf_vit",
        class_token=False,
        pooling="mean",
    )

    def unmasked(model: Any, images: torch.Tensor) -> Mapping[str, torch.Tensor]:
        # The mask is drawn from noise; rising noise keeps every patch in its place.
        model.config.mask_ratio = 0.0
        noise = torch.arange(float(grid(images)[0] * grid(images)[1])).expand(len(images), -1)
        out = model.vit(images, noise=noise, interpolate_pos_encoding=True)
        return token_features(out.last_hidden_state, grid(images), 1)

    decoder = {f"decoder_{name}": value for name, value in (("hidden_size", 24), ("num_hidden_layers", 1))}
    decoder |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 24}
    saved(
        "hf-mae",
        hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**SHAPE, **decoder)),
        unmasked,
        family="hf_vit",
        mean=[0.485, 0.456, 0.406],
    )


def dino() -> None:
    torch.manual_seed(0)
    v2 = {**SHAPE, "mlp_ratio": 2}
    saved(
        "hf-dinov2",
        hf.Dinov2Model(hf.Dinov2Config(**v2)),
        tokens(),
        processor=hf.BitImageProcessor(size={"shortest_edge": 36}, crop_size=24),
        family="hf_dinov2",
        eps=1e-6,
        image_size=24,
        pos_interpolation="bicubic",
    )
    saved(
        "hf-dinov2-swiglu",
        hf.Dinov2Model(hf.Dinov2Config(**v2, use_swiglu_ffn=True)),
        tokens(),
        family="hf_dinov2",
        swiglu=True,
    )
    in_memory(
        "hf-dinov2-in-memory",
        hf.Dinov2ForImageClassification(hf.Dinov2Config(**v2, use_swiglu_ffn=True)),
        tokens(base="dinov2"),
        family="hf_dinov2",
        swiglu=True,
    )
    saved(
        "hf-dinov2-registers",
        hf.Dinov2WithRegistersForImageClassification(hf.Dinov2WithRegistersConfig(**v2)),
        tokens(5, "dinov2_with_registers"),
        family="hf_dinov2",
        reg_tokens=4,
        pos_interpolation="antialias",
    )
    v3 = {**SHAPE, "num_register_tokens": 4}
    saved("hf-dinov3", hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**v3)), tokens(5), family="hf_dinov3", eps=1e-5)
    in_memory(
        "hf-dinov3-in-memory",
        hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**v3, use_gated_mlp=True, hidden_act="silu", rope_theta=50.0)),
        tokens(5),
        family="hf_dinov3",
        swiglu=True,
    )


def beit() -> None:
    torch.manual_seed(0)

    def raw(model: Any, images: torch.Tensor) -> Mapping[str, torch.Tensor]:
        out = model(images, output_hidden_states=True)
        last = out.hidden_states[-1]
        return {"patches@-1:raw": last[:, 1:].unflatten(1, grid(images)), "cls@-1:raw": last[:, 0]}

    def mean(model: Any, images: torch.Tensor) -> Mapping[str, torch.Tensor]:
        out = model(images)
        return {
            "mean@-1": out.pooler_output,
            "patches@-1": out.last_hidden_state[:, 1:].unflatten(1, grid(images)),
        }

    def normed(model: Any, images: torch.Tensor) -> Mapping[str, torch.Tensor]:
        return raw(model, images) | {"cls@-1": model.layernorm(model.beit(images).last_hidden_state)[:, 0]}

    saved(
        "hf-beit-pretrained",
        hf.BeitForMaskedImageModeling(
            hf.BeitConfig(**SHAPE, vocab_size=16, use_mask_token=True, use_shared_relative_position_bias=True)
        ),
        normed,
        family="hf_beit",
        num_heads=3,
        pooling="cls+mean",
        eps=1e-12,
    )
    finetuned = hf.BeitConfig(**SHAPE, use_relative_position_bias=True, use_absolute_position_embeddings=True)
    saved(
        "hf-beit-finetuned",
        hf.BeitForImageClassification(finetuned),
        lambda model, images: mean(model.beit, images),
        family="hf_beit",
        pooling="mean",
        mean_norm=True,
    )
    in_memory(
        "hf-beit-in-memory",
        hf.BeitModel(hf.BeitConfig(**SHAPE, use_relative_position_bias=True, use_mean_pooling=False)),
        tokens(),
        family="hf_beit",
    )
    saved(
        "hf-data2vec",
        hf.Data2VecVisionModel(hf.Data2VecVisionConfig(**SHAPE, use_relative_position_bias=True)),
        raw,
        family="hf_beit",
        pooling="mean",
        final_norm=False,
    )


def towers() -> None:
    torch.manual_seed(0)

    def clip(model: Any, images: torch.Tensor) -> Mapping[str, torch.Tensor]:
        out = getattr(model, "vision_model", model)(images, interpolate_pos_encoding=True)
        return {
            "cls@-1": out.pooler_output,
            "patches@-1:raw": out.last_hidden_state[:, 1:].unflatten(1, grid(images)),
        }

    def siglip(model: Any, images: torch.Tensor) -> Mapping[str, torch.Tensor]:
        out = getattr(model, "vision_model", model)(images, interpolate_pos_encoding=True)
        return {"cls@-1": out.pooler_output, "patches@-1": out.last_hidden_state.unflatten(1, grid(images))}

    saved(
        "hf-clip-vision",
        hf.CLIPVisionModel(hf.CLIPVisionConfig(**SHAPE)),
        clip,
        family="hf_clip",
        activation="quick_gelu",
        eps=1e-5,
    )
    saved(
        "hf-clip",
        hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config={**SHAPE, "hidden_act": "gelu"})),
        clip,
        processor=hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        family="hf_clip",
        activation="gelu",
        num_heads=3,
        crop_pct=1.0,
    )
    saved(
        "hf-siglip-vision",
        hf.SiglipVisionModel(hf.SiglipVisionConfig(**SHAPE)),
        siglip,
        family="hf_siglip",
        activation="gelu_tanh",
        map_pool=True,
        pooling="cls",
    )
    saved(
        "hf-siglip",
        hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=SHAPE)),
        siglip,
        family="hf_siglip",
        num_heads=3,
        mean=[0.5, 0.5, 0.5],
    )


def video() -> None:
    torch.manual_seed(0)
    config = hf.VJEPA2Config(
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        mlp_ratio=2,
        crop_size=32,
        patch_size=8,
        frames_per_clip=16,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
    )

    def features(model: Any, images: torch.Tensor) -> Mapping[str, torch.Tensor]:
        clip = images[:, None].expand(-1, 16, -1, -1, -1)
        out = model(clip, skip_predictor=True).last_hidden_state
        return {"mean@-1": out.mean(1), "patches@-1": out.unflatten(1, (8, *grid(images))).mean(1)}

    saved(
        "hf-vjepa2",
        hf.VJEPA2Model(config),
        features,
        sizes={"native": (32, 32)},
        family="hf_vjepa2",
        num_heads=3,
    )


if __name__ == "__main__":
    for part in (plain, dino, beit, towers, video):
        part()
