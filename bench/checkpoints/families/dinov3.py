"""DINOv3 transformers: hub files and the teachers that its trainer saves (facebookresearch/dinov3).

Heads, registers and the kind of MLP all follow from the tensors. The bias of the keys is masked out by a
buffer beside it (``bias_mask``), which is multiplied into it here. Hub files are evaluated with rotary angles
in float32; what the trainer saves is evaluated as it was trained, in bfloat16 where the periods are so.
"""

from __future__ import annotations

import torch

from ...errors import CheckpointError
from ...networks.dinov3 import dinov3_spec
from ..family import Draft, Family, Root, Tensors
from ..plain_vit import depth_of, patches_of, refuse_without_scale

_SATELLITE = (
    "ImageNet's mean and std, as for web images (LVD-1689M); models of satellite images (SAT-493M) need "
    "#mean=0.430:0.411:0.296,std=0.213:0.156:0.143, which the file does not say"
)


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    (dim, patch), periods = patches_of(tensors), tensors["rope.periods"]
    n_heads, rest = divmod(dim, 4 * periods.numel()) if periods.numel() else (0, 1)
    if rest:
        raise CheckpointError(f"{periods.numel()} rotary periods do not go with a width of {dim}")
    if heads not in (None, n_heads):
        raise CheckpointError(f"the rotary periods say {n_heads} heads exactly; leave out heads={heads}")
    refuse_without_scale("dinov3", tensors)
    tensors, masked = _mask_key_bias(tensors)
    swiglu = "blocks.0.mlp.fc1_g.weight" in tensors
    trained = "teacher" in root.parts or "student" in root.parts
    half = trained and periods.dtype == torch.bfloat16
    spec = dinov3_spec(
        embed_dim=dim,
        depth=depth_of(tensors),
        num_heads=n_heads,
        patch_size=patch,
        hidden=tensors[f"blocks.0.mlp.{'fc1_g' if swiglu else 'fc1'}.weight"].shape[0],
        swiglu=swiglu,
        registers=tensors["reg_token"].shape[1] if "reg_token" in tensors else 0,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        layer_scale="blocks.0.ls1.gamma" in tensors,
        untied_norm="norm.prefix.weight" in tensors,
        rope_dtype="bfloat16" if half else "float32",
    )
    if spec.arch["untied_norm"]:
        tensors = {_patch_norm(name): tensor for name, tensor in tensors.items()}
    notes = (
        f"{n_heads} heads, exactly from the rotary periods",
        *(("the bias of the keys is masked out, as the file's bias_mask says",) if masked else ()),
        "rotary positions: any image size; the periods are the file's"
        + (", and the angles in bfloat16 as in its training" if half else ""),
        "norm eps 1e-5, as in the published models",
        _SATELLITE,
    )
    return Draft(tensors, spec, notes)


def _mask_key_bias(tensors: Tensors) -> tuple[dict[str, torch.Tensor], bool]:
    """The tensors with every ``qkv.bias_mask`` multiplied into the bias, and whether there was one."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(".bias_mask")}
    masks = {name.removesuffix("_mask"): tensor for name, tensor in tensors.items() if name not in kept}
    for name, mask in masks.items():
        if name not in kept or kept[name].shape != mask.shape:
            raise CheckpointError(f"{name}_mask has no bias of its shape beside it")
        kept[name] = kept[name] * mask.to(kept[name].dtype)
    return kept, bool(masks)


def _patch_norm(name: str) -> str:
    return name.replace("norm.", "norm.patches.") if name in ("norm.weight", "norm.bias") else name


FAMILY = Family(
    name="dinov3",
    title="DINOv3 transformers, hub files and teachers of its trainer",
    rank=82,
    anchors=(
        "patch_embed.proj.weight",
        "cls_token",
        "rope_embed.periods",
        "blocks.0.attn.qkv.weight",
        ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.w1.weight"),
    ),
    draft=_draft,
    known_by="rope_embed.periods",
    evaluated="cls after the norm, at 224 pixels",
    source="facebookresearch/dinov3",
    prefer=("teacher", "model_ema", "student"),
    rename=(
        (r"storage_tokens", "reg_token"),
        (r"rope_embed\.periods", "rope.periods"),
        (r"cls_norm\.(\w+)", r"norm.prefix.\1"),
        (r"blocks\.(\d+)\.mlp\.w1\.(\w+)", r"blocks.\1.mlp.fc1_g.\2"),
        (r"blocks\.(\d+)\.mlp\.w2\.(\w+)", r"blocks.\1.mlp.fc1_x.\2"),
        (r"blocks\.(\d+)\.mlp\.w3\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    ),
    drop={
        r"mask_token": "mask token of the pre-training",
        r"local_cls_norm\..*": "norm of the small crops in training",
    },
    siblings={
        "dino_head": "projection head",
        "ibot_head": "projection head",
        "student": "the other network of the pair",
        "teacher": "the other network of the pair",
        "model_ema": "the other network of the pair",
        "gram_teacher": "the teacher of the Gram loss",
    },
)
