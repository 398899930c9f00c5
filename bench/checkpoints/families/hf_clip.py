"""Vision towers of CLIP and SigLIP as transformers saves them, alone or in the whole model.

CLIP's global token is the class token after ``post_layernorm``, before the projection to the space of the
texts. SigLIP's is the output of its attention pooling. Patch features are taken after ``post_layernorm``.
"""

from __future__ import annotations

from dataclasses import replace

from ...errors import CheckpointError
from ..family import Draft, Family, Root, Tensors
from ..hf import BLOCK, RANK, SOURCE, attention, hf_draft
from ..hf_images import CLIP, HALF

_ANCHORS = (
    "embeddings.patch_embedding.weight",
    "embeddings.position_embedding.weight",
    "encoder.layers.0.self_attn.q_proj.weight",
    "encoder.layers.0.layer_norm1.weight",
    "post_layernorm.weight",
)
_RENAME = (
    (r"embeddings\.patch_embedding\.(\w+)", r"patch_embed.proj.\1"),
    (r"embeddings\.class_embedding", "cls_token"),
    (r"embeddings\.position_embedding\.weight", "pos_embed"),
    (r"pre_layrnorm\.(\w+)", r"norm_pre.\1"),
    (r"post_layernorm\.(\w+)", r"norm.\1"),
    *attention(*(rf"self_attn\.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj"))),
    (rf"{BLOCK}layer_norm([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
    (rf"{BLOCK}mlp\.(fc[12])\.(\w+)", r"blocks.\1.mlp.\2.\3"),
)
_POOLING = (
    (r"head\.probe", "attn_pool.latent"),
    (r"head\.attention\.in_proj_(\w+)", r"attn_pool.qkv.\1"),
    (r"head\.attention\.out_proj\.(\w+)", r"attn_pool.proj.\1"),
    (r"head\.layernorm\.(\w+)", r"attn_pool.norm.\1"),
    (r"head\.mlp\.(fc[12])\.(\w+)", r"attn_pool.mlp.\1.\2"),
)
_SIBLINGS = {
    "text_model": "text tower",
    "text_projection": "text tower",
    "visual_projection": "projection to the space of the texts",
    "logit_scale": "scale of the similarities",
    "logit_bias": "scale of the similarities",
    "classifier": "classifier head",
}
_DROP = {r"embeddings\.position_ids": "buffer that counts up"}


def _timm_layout(tensors: Tensors) -> Tensors:
    """Tables with a leading axis, and the query of the attention pooling apart from keys and values."""
    named = dict(tensors)
    named["pos_embed"] = named["pos_embed"][None]
    if "cls_token" in named:
        named["cls_token"] = named["cls_token"].reshape(1, 1, -1)
    for kind in ("weight", "bias"):
        if (packed := named.pop(f"attn_pool.qkv.{kind}", None)) is not None:
            dim = packed.shape[0] // 3
            named[f"attn_pool.q.{kind}"], named[f"attn_pool.kv.{kind}"] = packed[:dim], packed[dim:]
    return named


def _siglip_draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    if tensors["patch_embed.proj.weight"].ndim == 2:
        raise CheckpointError(
            "this is SigLIP 2 for images of any shape (NaFlex), which is not supported; give a SigLIP 2 of a "
            "fixed size, such as siglip2-base-patch16-224"
        )
    says = (
        ()
        if "attn_pool.latent" in tensors
        else ("no attention pooling in the file: the mean of the patches",)
    )
    return hf_draft(
        "hf_siglip",
        eps=1e-6,
        activation="gelu_pytorch_tanh",
        preprocessing=lambda root, config: replace(HALF, crop_pct=1.0),
        prepare=_timm_layout,
        says=says,
        usual_heads={1536: 16},
        pos_interpolation="bicubic",
    )(root, tensors, heads)


FAMILIES = (
    Family(
        name="hf_clip",
        title="vision towers of CLIP of transformers",
        rank=RANK,
        anchors=(*_ANCHORS, "embeddings.class_embedding", "pre_layrnorm.weight"),
        draft=hf_draft(
            "hf_clip",
            eps=1e-5,
            activation="quick_gelu",
            preprocessing=lambda root, config: CLIP,
            prepare=_timm_layout,
            pos_interpolation="bicubic",
        ),
        known_by="embeddings.class_embedding and pre_layrnorm",
        evaluated="cls after post_layernorm, before the projection",
        source=SOURCE,
        rename=_RENAME,
        drop=_DROP,
        siblings=_SIBLINGS,
    ),
    Family(
        name="hf_siglip",
        title="vision towers of SigLIP and SigLIP 2 of transformers",
        rank=RANK,
        anchors=(*_ANCHORS, "embeddings.patch_embedding.bias"),
        matches=lambda root: "embeddings.class_embedding" not in root.tensors,
        draft=_siglip_draft,
        known_by="embeddings.patch_embedding with a bias and post_layernorm, without a class embedding",
        evaluated="attention pooling of the tokens after post_layernorm",
        source=SOURCE,
        rename=(*_RENAME, *_POOLING),
        drop=_DROP,
        siblings=_SIBLINGS,
    ),
)
