"""DINO, DINOv2, Franca, DINOv3 and CAPI, each by its own repository."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import OPTIMIZER, fresh, prefixed, token_features
from layouts import record

SHAPE: dict[str, Any] = {"patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3, "mlp_ratio": 4}
NORM = partial(nn.LayerNorm, eps=1e-6)
SIZES = {"native": (32, 32), "larger": (32, 48)}


def grid(images: torch.Tensor, patch: int = 8) -> tuple[int, int]:
    return images.shape[-2] // patch, images.shape[-1] // patch


def dino(peers: Path) -> None:
    fresh(peers / "dino")
    from vision_transformer import DINOHead, VisionTransformer

    def network() -> Any:
        model = nn.Module()
        model.backbone = VisionTransformer(img_size=[32], qkv_bias=True, norm_layer=NORM, **SHAPE)
        model.head = DINOHead(192, 16, hidden_dim=32, bottleneck_dim=8)
        return model.eval()

    def of(vit: Any) -> Any:
        def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
            first, last = vit.get_intermediate_layers(images, 2)
            return token_features(last, grid(images), 1) | {"cls@-2": first[:, 0]}

        return features

    student, teacher = network(), network()
    record(
        "dino",
        made_by="facebookresearch/dino 7c446df, vision_transformer.VisionTransformer (teacher)",
        files={
            "checkpoint.pth": {
                "student": prefixed("module.", student.state_dict()),
                "teacher": teacher.state_dict(),
                "optimizer": OPTIMIZER,
                "epoch": 100,
                "args": argparse.Namespace(arch="vit_tiny", patch_size=8),
                "dino_loss": {"center": torch.zeros(1, 16)},
                "fp16_scaler": {"scale": 65536.0},
            }
        },
        features=of(teacher.backbone),
        sizes=SIZES,
        load="checkpoint.pth",
        expect={"family": "dino", "num_heads": 3, "pooling": "cls", "container": "teacher.backbone"},
    )
    hub = network().backbone
    record(
        "dino-hub",
        made_by="facebookresearch/dino 7c446df, vision_transformer.VisionTransformer",
        files={"dino_deittiny8_pretrain.pth": hub.state_dict()},
        features=of(hub),
        sizes=SIZES,
        load="dino_deittiny8_pretrain.pth",
        expect={"family": "dino", "num_heads": 3, "pos_interpolation": "dino"},
    )


def dinov2(peers: Path) -> None:
    fresh(peers / "dinov2")
    import logging

    logging.disable(logging.INFO)
    from dinov2.layers import MemEffAttention, NestedTensorBlock
    from dinov2.models.vision_transformer import DinoVisionTransformer

    _dinov2_like(
        DinoVisionTransformer,
        partial(NestedTensorBlock, attn_class=MemEffAttention),
        "facebookresearch/dinov2 b8931f7, dinov2.models.vision_transformer.DinoVisionTransformer",
        "dinov2",
    )


def _dinov2_like(network: Any, block: Any, made_by: str, family: str) -> None:
    def build(**options: Any) -> Any:
        fields = {"img_size": 56, "init_values": 1e-5, "block_chunks": 0, "block_fn": block, **SHAPE}
        return network(**{**fields, "patch_size": 14, **options}).eval()

    def of(vit: Any) -> Any:
        def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
            out = vit.forward_features(images)
            inner = vit.get_intermediate_layers(images, 2, return_class_token=True)[0]
            patches = out["x_norm_patchtokens"].unflatten(1, grid(images, 14))
            return {"cls@-1": out["x_norm_clstoken"], "patches@-1": patches, "cls@-2": inner[1]}

        return features

    sizes = {"native": (56, 56), "larger": (56, 84)}
    if family == "franca":
        vit = build(ffn_layer="swiglu", block_chunks=2)
        teacher = prefixed("module.backbone.", vit.state_dict())
        teacher["module.dino_head.matryoshka_projections.0.weight"] = torch.zeros(4, 192)
        record(
            "franca",
            made_by=made_by,
            files={"franca_vitt14_In21K.pth": {"teacher": teacher}},
            features=of(vit),
            sizes=sizes,
            load="franca_vitt14_In21K.pth",
            expect={
                "family": "franca",
                "swiglu": True,
                "image_size": 224,
                "container": "teacher.module.backbone",
            },
        )
        return
    hub = {
        "dinov2": ({}, "dino"),
        "dinov2-registers": (
            {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0},
            "antialias",
        ),
    }
    for name, (options, rule) in hub.items():
        vit = build(**options)
        record(
            name,
            made_by=made_by,
            files={"dinov2_vitt14_pretrain.pth": vit.state_dict()},
            features=of(vit),
            sizes=sizes,
            load="dinov2_vitt14_pretrain.pth",
            expect={"family": "dinov2", "num_heads": 3, "pos_interpolation": rule, "image_size": 224},
        )
    # A grid whose patches less the five tokens before them are a square too.
    vit = build(img_size=42, **hub["dinov2-registers"][0])
    record(
        "dinov2-registers-3x3",
        made_by=made_by,
        files={"model.pth": vit.state_dict()},
        features=of(vit),
        sizes={"native": (42, 42), "larger": (42, 70)},
        load="model.pth",
        expect={"family": "dinov2", "no_embed_class": True},
    )
    vit = build(embed_dim=1536, depth=1, num_heads=24, mlp_ratio=0.05, ffn_layer="swiglufused")

    def giant(images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"cls@-1": vit.forward_features(images)["x_norm_clstoken"]}

    record(
        "dinov2-swiglu",
        made_by=made_by,
        files={"dinov2_vitg14_pretrain.pth": vit.state_dict()},
        features=giant,
        sizes=sizes,
        load="dinov2_vitg14_pretrain.pth",
        expect={"family": "dinov2", "num_heads": 24, "swiglu": True},
    )
    vit = build(block_chunks=2, ffn_layer="swiglufused")
    heads = {
        "dino_head.last_layer.weight_v": torch.zeros(8, 4),
        "ibot_head.mlp.0.weight": torch.zeros(8, 192),
    }
    record(
        "dinov2-teacher",
        made_by=made_by,
        files={"teacher_checkpoint.pth": {"teacher": prefixed("backbone.", vit.state_dict()) | heads}},
        features=of(vit),
        sizes=sizes,
        load="teacher_checkpoint.pth",
        expect={"family": "dinov2", "swiglu": True, "container": "teacher.backbone"},
    )


def franca(peers: Path) -> None:
    fresh(peers / "Franca")
    from franca.layers import MemEffAttention, NestedTensorBlock
    from franca.models.vision_transformer import DinoVisionTransformer

    _dinov2_like(
        DinoVisionTransformer,
        partial(NestedTensorBlock, attn_class=MemEffAttention),
        "valeoai/Franca 24f8c60, franca.models.vision_transformer.DinoVisionTransformer",
        "franca",
    )


def dinov3(peers: Path) -> None:
    fresh(peers / "dinov3")
    from dinov3.models.vision_transformer import DinoVisionTransformer

    # As the hub serves it: angles in float32, from periods that were once rounded to bfloat16. As the trainer
    # saves and evaluates it: all in bfloat16, and here with the other options that have keys of their own.
    trained = {"pos_embed_rope_dtype": "bf16", "n_storage_tokens": 0, "untie_cls_and_patch_norms": True}
    variants = {
        "dinov3": {},
        "dinov3-teacher": {**trained, "mask_k_bias": False},
        "dinov3-swiglu": {"ffn_layer": "swiglu"},
        "dinov3-7b-like": {
            "ffn_layer": "swiglu64",
            "qkv_bias": False,
            "untie_global_and_local_cls_norm": True,
        },
    }
    for name, options in variants.items():
        shape = {**SHAPE, "patch_size": 16, "ffn_ratio": 4, "layerscale_init": 1e-5, "n_storage_tokens": 4}
        fields = {"mask_k_bias": True, "norm_layer": "layernormbf16", "pos_embed_rope_dtype": "fp32"}
        del shape["mlp_ratio"]
        vit = DinoVisionTransformer(**{**shape, **fields, **options}).eval()
        vit.init_weights()
        vit.rope_embed.periods.copy_(vit.rope_embed.periods.bfloat16())

        def features(images: torch.Tensor, vit: Any = vit) -> dict[str, torch.Tensor]:
            out = vit.forward_features(images)
            patches = out["x_norm_patchtokens"].unflatten(1, grid(images, 16))
            inner = vit.get_intermediate_layers(images, n=2, return_class_token=True)[0][1]
            return {"cls@-1": out["x_norm_clstoken"], "patches@-1": patches, "cls@-2": inner}

        state = vit.state_dict()
        training = name in ("dinov3-7b-like", "dinov3-teacher")
        heads = {"dino_head.mlp.0.weight": torch.zeros(8, 192)}
        payload = {"teacher": prefixed("backbone.", state) | heads} if training else state
        record(
            name,
            made_by="facebookresearch/dinov3 6876159, dinov3.models.vision_transformer.DinoVisionTransformer",
            files={"model.pth": payload},
            features=features,
            sizes={"native": (64, 64), "larger": (64, 96)},
            load="model.pth",
            keep=r"(periods|bias_mask)$",
            expect={"family": "dinov3", "pooling": "cls", "image_size": 224},
        )


def capi(peers: Path) -> None:
    # jaxtyping only annotates; weight_norm belongs to the training head.
    shim = ModuleType("jaxtyping")
    shim.Float = shim.Int = type("Shape", (), {"__class_getitem__": lambda cls, item: torch.Tensor})  # type: ignore[attr-defined]
    utils = ModuleType("utils")
    utils.weight_norm = None  # type: ignore[attr-defined]
    fresh(peers / "capi")
    sys.modules |= {"jaxtyping": shim, "utils": utils, "omegaconf": ModuleType("omegaconf")}
    sys.modules["omegaconf"].OmegaConf = None  # type: ignore[attr-defined]
    from model import EncoderDecoder

    vit = EncoderDecoder(
        patch_size=14,
        transformers_kwargs={
            "embed_dim": 192,
            "drop_path_rate": 0.2,
            "block_kwargs": {"attn_kwargs": {"num_heads": 3}},
        },
        encoder_kwargs={"depth": 2},
        decoder_kwargs={"depth": 2},
    ).eval()
    vit.init_weights()

    def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        cls, _, patches = vit(images)
        return {"cls@-1": cls, "patches@-1": patches}

    record(
        "capi",
        made_by="facebookresearch/capi 98b4fa1, model.EncoderDecoder",
        files={
            "capi_vitl14.pth": prefixed("backbone.", vit.state_dict())
            | {"head.last_layer.weight_g": torch.zeros(4, 1), "head.last_layer.weight_v": torch.zeros(4, 192)}
        },
        features=features,
        sizes={"native": (56, 56), "larger": (56, 84)},
        load="capi_vitl14.pth",
        keep=r"freqs$",
        expect={"family": "capi", "num_heads": 3, "pooling": "cls", "registers": 16},
    )


if __name__ == "__main__":
    for recipe in (dino, dinov2, franca, dinov3, capi):
        recipe(Path(sys.argv[1]))
