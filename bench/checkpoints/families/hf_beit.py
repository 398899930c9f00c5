"""BEiT, BEiT v2 and data2vec for images as transformers saves them (BeitModel, Data2VecVisionModel, ...).

The network is that of the official code, but for norms of another epsilon and tables of relative positions
that are resampled bilinearly. With ``use_mean_pooling`` the norm belongs to the pooler, and a model without a
pooler has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import CheckpointError
from ..beit_layout import BLOCK_TABLE, SHARED_TABLE, infer_beit
from ..family import Draft, Family, Root, Tensors
from ..hf import (
    BLOCK,
    CLASSIFIERS,
    RANK,
    SOURCE,
    config_note,
    fuse_qkv,
    stated_activation,
    stated_eps,
    stated_heads,
    vision_config,
)
from ..hf_images import HALF, IMAGENET, prepared
from .hf_vit import ANCHORS, BLOCKS, EMBEDDINGS, is_beit

_TABLE = r"relative_position_bias\.relative_position_bias_table"
_RENAME = (
    (rf"{BLOCK}attention\.(?:attention\.query|q_proj)\.bias", r"blocks.\1.attn.q_bias"),
    (rf"{BLOCK}attention\.(?:attention\.value|v_proj)\.bias", r"blocks.\1.attn.v_bias"),
    (rf"{BLOCK}(?:attention\.attention\.)?{_TABLE}", r"blocks.\1.attn.relative_position_bias_table"),
    (r"(?:encoder\.relative|shared)_position_bias\.relative_position_bias_table", SHARED_TABLE),
    (rf"{BLOCK}lambda_([12])", r"blocks.\1.gamma_\2"),
    (r"pooler\.layernorm\.(\w+)", r"fc_norm.\1"),
    *EMBEDDINGS,
    *BLOCKS,
)
_DROP = {
    r"embeddings\.mask_token": "mask token",
    r"(.*\.)?relative_position_index": "buffer that follows from the grid",
    r"lm_head\..*": "head of the pretext task",
}


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    tensors = fuse_qkv(tensors)
    dim = tensors["patch_embed.proj.weight"].shape[0]
    config = vision_config(root, tensors)
    eps = stated_eps(config, 1e-12)
    if stated_activation(config, "gelu") != "gelu":
        raise CheckpointError(f"config.json says the activation {config['hidden_act']!r}, which no BEiT has")
    stated = stated_heads(config, dim)
    if heads is None and stated and not {BLOCK_TABLE, SHARED_TABLE} & tensors.keys():
        heads = stated[0]
    normed = "norm.weight" in tensors or "fc_norm.weight" in tensors
    data2vec = _is_data2vec(root, config)
    draft = infer_beit(
        "hf_beit",
        root,
        tensors,
        heads,
        options={"eps": eps, "bilinear": True, "final_norm": normed},
        pooling="mean" if data2vec else "cls+mean",
        final_norm=False,
    )
    spec, note = prepared(draft.spec, root, IMAGENET if data2vec else HALF)
    notes = (*draft.notes, config_note(config, eps, "gelu"), note)
    if not normed:
        notes = (
            *notes,
            "the file has no final norm (transformers keeps it in the pooler): features carry none",
        )
    return Draft(tensors, spec, notes)


def _is_data2vec(root: Root, config: Mapping[str, Any]) -> bool:
    return "data2vec" in str(config.get("model_type")) or root.parts[-1:] == ("data2vec_vision",)


FAMILIES = (
    Family(
        name="hf_beit",
        title="BEiT, BEiT v2 and data2vec for images of transformers",
        rank=RANK,
        anchors=ANCHORS,
        matches=is_beit,
        draft=_draft,
        known_by="embeddings.patch_embeddings.projection, and a bias for queries but none for keys",
        evaluated="cls and mean of the patches (data2vec: the mean), without norm; fine-tuned: mean, norm",
        source=SOURCE,
        rename=_RENAME,
        drop=_DROP,
        siblings=CLASSIFIERS,
    ),
    # The norm stands beside the encoder, so the root is above both.
    Family(
        name="hf_beit_mim",
        title="BEiT of transformers with the head of its pre-training",
        rank=RANK + 1,
        anchors=("lm_head.weight", "layernorm.weight", "beit.embeddings.patch_embeddings.projection.weight"),
        draft=_draft,
        known_by="beit.embeddings beside lm_head and its norm",
        evaluated="cls and mean of the patches, without the norm",
        source=SOURCE,
        rename=tuple((rf"(?:beit\.)?{pattern}", target) for pattern, target in _RENAME),
        drop={rf"(?:beit\.)?{pattern}": reason for pattern, reason in _DROP.items()},
    ),
)
