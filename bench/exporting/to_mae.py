"""``{"model": ...}`` as facebookresearch/mae saves it, for its models_vit.py and main_finetune.py."""

from __future__ import annotations

from pathlib import Path

from ..backbones import ViTEncoder
from ..checkpoints.plain_vit import infer_heads
from ..errors import CheckpointError
from ..types import IMAGENET_MEAN, IMAGENET_STD
from ..vit import VitArch
from .plain import Draft, keywords, plain_arch, plain_state, require

MAE_EPS = 1e-6
_MAE_MODELS = {
    (768, 12, 12, 16): "vit_base_patch16",
    (1024, 24, 16, 16): "vit_large_patch16",
    (1280, 32, 16, 14): "vit_huge_patch14",
}


def draft_mae(encoder: ViTEncoder, weights: Path) -> Draft:
    """An encoder for models_vit.py. Raises CheckpointError for what its models lack."""
    spec = encoder.spec
    arch = plain_arch(encoder.model, spec.image_size)
    require(
        {
            "encoder without a class token": not arch.class_token,
            "register tokens": arch.reg_tokens > 0,
            "layer scale": arch.init_values is not None,
            "attention without a bias of queries, keys and values": not arch.qkv_bias,
            f"norms of eps {arch.eps:g} (its models have {MAE_EPS:g})": arch.eps != MAE_EPS,
        },
        "the official code of MAE",
    )
    notes = []
    try:
        heads, _ = infer_heads(arch.embed_dim, arch.depth, None)
    except CheckpointError:
        heads = 0
    if heads != arch.num_heads:
        notes.append(f"the layout does not say the number of heads: lmim-bench needs #heads={arch.num_heads}")
    if not arch.fc_norm and spec.pooling != "cls":
        notes.append(f"the global feature here is {spec.pooling}; models_vit.py returns the class token")
    if (spec.mean, spec.std) != (IMAGENET_MEAN, IMAGENET_STD):
        mean, std = (":".join(f"{value:g}" for value in values) for values in (spec.mean, spec.std))
        notes.append(f"the layout does not say the normalisation: lmim-bench needs #mean={mean},std={std}")
    if arch.fc_norm:
        notes.append(
            "this is the layout of a fine-tuned model without its head: main_finetune.py --finetune takes "
            "pre-trained ones only"
        )
    if weights.suffix == ".safetensors":
        notes.append("main_finetune.py reads torch files only; export to .pth for it")
    return Draft(plain_state(encoder, class_row=True), {}, mae_line(arch, weights), tuple(notes))


def mae_line(arch: VitArch, weights: Path) -> str:
    """The line that loads an export with models_vit.py, in the folder of the official code."""
    path = str(weights)
    size = {} if arch.image_size == 224 else {"img_size": arch.image_size}
    common = keywords({**size, "num_classes": 0, "global_pool": arch.fc_norm})
    name = _MAE_MODELS.get((arch.embed_dim, arch.depth, arch.num_heads, arch.patch_size))
    if name and arch.mlp_ratio == 4:
        imports, model = "torch, models_vit", f"models_vit.{name}({common})"
    else:
        shape = keywords(
            {
                "patch_size": arch.patch_size,
                "embed_dim": arch.embed_dim,
                "depth": arch.depth,
                "num_heads": arch.num_heads,
                "mlp_ratio": arch.timm_ratio,
                "qkv_bias": True,
            }
        )
        imports = "functools, torch, models_vit"
        norm = f"functools.partial(torch.nn.LayerNorm, eps={MAE_EPS:g})"
        model = f"models_vit.VisionTransformer({shape}, norm_layer={norm}, {common})"
    if weights.suffix == ".safetensors":
        imports, state = f"{imports}, safetensors.torch", f"safetensors.torch.load_file({path!r})"
    else:
        state = f"torch.load({path!r}, map_location='cpu')['model']"
    return f"import {imports}; model = {model}; model.load_state_dict({state})"
