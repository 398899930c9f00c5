"""DINOv3 transformers as transformers saves them (DINOv3ViTModel).

The rotary periods are not in the file. transformers computes them in float32 from ``rope_theta``, where the
original's are rounded to bfloat16; its features are what is given here.
"""

from __future__ import annotations

import torch

from ...errors import CheckpointError
from ...networks.dinov3 import dinov3_spec
from ..family import Draft, Family, Root, Tensors
from ..hf import (
    ATTENTION,
    BLOCK,
    RANK,
    SOURCE,
    config_note,
    fuse_qkv,
    stated_eps,
    stated_heads,
    vision_config,
)
from ..hf_images import IMAGENET, prepared
from ..plain_vit import depth_of, infer_heads, patches_of

# Published widths whose number of heads is not that of other transformers.
_HEADS = {1152: 18, 1280: 20}


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    (dim, patch), depth = patches_of(tensors), depth_of(tensors)
    config = vision_config(root, tensors)
    n_heads, note = infer_heads(dim, depth, heads, stated_heads(config, dim), _HEADS)
    swiglu = "blocks.0.mlp.gate.weight" in tensors
    eps = stated_eps(config, 1e-5)
    # The published gated models say silu in config.json; transformers would follow any other name.
    activation = config.get("hidden_act", "silu" if swiglu else "gelu")
    if activation != ("silu" if swiglu else "gelu"):
        raise CheckpointError(
            f"config.json says the activation {activation!r}, which no {'gated ' if swiglu else ''}DINOv3 has"
        )
    named = {_mlp_name(name, swiglu): tensor for name, tensor in fuse_qkv(tensors, without_bias="k").items()}
    steps = torch.arange(dim // n_heads // 4, dtype=torch.float32) / (dim // n_heads // 4)
    theta = config.get("rope_theta", 100.0)
    if not isinstance(theta, int | float) or theta <= 0:
        raise CheckpointError(f"config.json says rope_theta {theta!r}; expected a positive number")
    named["rope.periods"] = float(theta) ** steps
    registers = named["reg_token"].shape[1] if "reg_token" in named else 0
    if not registers:
        named.pop("reg_token", None)
    spec = dinov3_spec(
        embed_dim=dim,
        depth=depth,
        num_heads=n_heads,
        patch_size=patch,
        hidden=named["blocks.0.mlp.fc2.weight"].shape[1],
        swiglu=swiglu,
        registers=registers,
        qkv_bias="blocks.0.attn.qkv.bias" in named,
        layer_scale="blocks.0.ls1.gamma" in named,
        eps=eps,
    )
    spec, said = prepared(spec.model_copy(update={"family": "hf_dinov3"}), root, IMAGENET)
    rotary = (
        "rotary positions: any image size; periods in float32 as transformers has them (Meta's own files are "
        "rounded to bfloat16, which changes features a little)"
    )
    return Draft(named, spec, (note, config_note(config, eps, activation), said, rotary))


def _mlp_name(name: str, swiglu: bool) -> str:
    return name.replace(".mlp.gate.", ".mlp.fc1_g.").replace(".mlp.up.", f".mlp.fc1{'_x' if swiglu else ''}.")


FAMILY = Family(
    name="hf_dinov3",
    title="DINOv3 transformers of transformers",
    rank=RANK,
    anchors=(
        "embeddings.patch_embeddings.weight",
        "embeddings.cls_token",
        ("layer.0.attention.q_proj.weight", "model.layer.0.attention.q_proj.weight"),
    ),
    draft=_draft,
    known_by="embeddings.patch_embeddings.weight and layer.0.attention.q_proj",
    evaluated="cls after the norm, at 224 pixels",
    source=SOURCE,
    rename=(
        (r"embeddings\.patch_embeddings\.(\w+)", r"patch_embed.proj.\1"),
        (r"embeddings\.cls_token", "cls_token"),
        (r"embeddings\.register_tokens", "reg_token"),
        *ATTENTION,
        (rf"{BLOCK}norm([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
        (rf"{BLOCK}layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
        (rf"{BLOCK}mlp\.gate_proj\.(\w+)", r"blocks.\1.mlp.gate.\2"),
        (rf"{BLOCK}mlp\.up_proj\.(\w+)", r"blocks.\1.mlp.up.\2"),
        (rf"{BLOCK}mlp\.down_proj\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    ),
    drop={r"embeddings\.mask_token": "mask token of the pre-training"},
    siblings={"classifier": "classifier head"},
)
