"""A folder that transformers' ViTModel loads, with its preprocessing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..backbones import ViTEncoder
from ..checkpoints.exported import global_feature
from ..types import EncoderSpec, Pooling, View
from .plain import Draft, plain_arch, plain_state, require

# The names of transformers 4, which version 5 renames as it loads.
_HF_NAMES = (
    (r"cls_token$", "embeddings.cls_token"),
    (r"pos_embed$", "embeddings.position_embeddings"),
    (r"patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"blocks\.(\d+)\.norm1\.", r"encoder.layer.\1.layernorm_before."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"blocks\.(\d+)\.norm2\.", r"encoder.layer.\1.layernorm_after."),
    (r"blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
    (r"blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
    (r"norm\.", "layernorm."),
)
_HF_POOLED: dict[Pooling, str] = {
    "cls": "last_hidden_state[:, 0]",
    "mean": "last_hidden_state[:, 1:].mean(1)",
    "cls+mean": "last_hidden_state[:, 0] and last_hidden_state[:, 1:].mean(1)",
}
_PIL_RESAMPLING = {"nearest": 0, "bilinear": 2, "bicubic": 3}


def draft_hf(encoder: ViTEncoder, weights: Path) -> Draft:
    """An encoder for ``ViTModel.from_pretrained``. Raises CheckpointError for what ViTModel lacks."""
    spec = encoder.spec
    arch = plain_arch(encoder.model, spec.image_size)
    require(
        {
            "encoder without a class token": not arch.class_token,
            "register tokens": arch.reg_tokens > 0,
            "layer scale": arch.init_values is not None,
            "norm after the mean of patches": arch.fc_norm,
        },
        "transformers' ViTModel",
    )
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": arch.embed_dim,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.num_heads,
        "intermediate_size": round(arch.embed_dim * arch.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": arch.eps,
        "image_size": arch.image_size,
        "patch_size": arch.patch_size,
        "num_channels": 3,
        "qkv_bias": arch.qkv_bias,
        **global_feature(spec),
    }
    return Draft(
        dict(_hf_tensors(plain_state(encoder, class_row=True))),
        {"config.json": config, "preprocessor_config.json": _hf_preprocessing(spec)},
        "from transformers import ViTModel; "
        f"model = ViTModel.from_pretrained({str(weights.parent)!r}, add_pooling_layer=False)",
        (
            f"the global feature here ({spec.pooling}): {_HF_POOLED[spec.pooling]}; "
            "ViTModel's own pooler has no weights in this export",
            "images of other sizes: interpolate_pos_encoding=True, whose rule is not timm's (no antialias)",
        ),
    )


def _hf_tensors(state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in the names of transformers; the rows of a fused qkv are query, key and value."""
    for name, tensor in state.items():
        if fused := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name):
            block, kind = fused.groups()
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                yield f"encoder.layer.{block}.attention.attention.{part}.{kind}", rows.clone()
            continue
        pattern, replacement = next(pair for pair in _HF_NAMES if re.match(pair[0], name))
        yield re.sub(f"^{pattern}", replacement, name), tensor


def _hf_preprocessing(spec: EncoderSpec) -> dict[str, Any]:
    """The classification view. ViT's own processor cannot crop; the one of BiT (and DINOv2) can."""
    view = View.crop(spec)
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": view.resize},
        "resample": _PIL_RESAMPLING[view.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": view.size, "width": view.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(view.mean),
        "image_std": list(view.std),
    }
