"""V-JEPA 2 as transformers saves it (VJEPA2Model), as an image encoder: see the family vjepa2."""

from __future__ import annotations

from dataclasses import replace

from ...networks.vjepa2 import vjepa2_spec
from ..family import Draft, Family, Root, Tensors
from ..hf import RANK, SOURCE, attention, fuse_qkv, stated_heads, vision_config
from ..hf_images import IMAGENET, prepared
from ..plain_vit import depth_of, infer_heads, patches_of

_BLOCK = r"layer\.(\d+)\."


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    tensors = fuse_qkv(tensors)
    (dim, patch), depth = patches_of(tensors, videos=True), depth_of(tensors)
    config = vision_config(root, tensors)
    stated = stated_heads(config, dim)
    n_heads, note = infer_heads(dim, depth, heads, stated, {1408: 22, 1664: 26})
    size = config.get("crop_size", 256)
    spec = vjepa2_spec(
        image_size=size if isinstance(size, int) and size >= patch else 256,
        embed_dim=dim,
        depth=depth,
        num_heads=n_heads,
        patch_size=patch,
        tubelet=tensors["patch_embed.proj.weight"].shape[2],
        hidden=tensors["blocks.0.mlp.fc1.weight"].shape[0],
    )
    spec, said = prepared(
        spec.model_copy(update={"family": "hf_vjepa2"}), root, replace(IMAGENET, interpolation="bilinear")
    )
    video = "an image is repeated 16 times as a video, as the official image evaluation does"
    return Draft(tensors, spec, (note, said, video, "rotary positions: any image size"))


FAMILY = Family(
    name="hf_vjepa2",
    title="V-JEPA 2 of transformers, as an image encoder",
    rank=RANK,
    anchors=(
        "embeddings.patch_embeddings.proj.weight",
        "layer.0.attention.query.weight",
        "layer.0.norm1.weight",
        "layernorm.weight",
    ),
    draft=_draft,
    known_by="encoder.embeddings.patch_embeddings.proj and layer.0.attention.query",
    evaluated="mean of all tokens after the norm; the image repeated 16 times",
    source=SOURCE,
    rename=(
        (r"embeddings\.patch_embeddings\.proj\.(\w+)", r"patch_embed.proj.\1"),
        *attention(r"attention\.query", r"attention\.key", r"attention\.value", r"attention\.proj"),
        (rf"{_BLOCK}(norm[12]|mlp\.fc[12])\.(\w+)", r"blocks.\1.\2.\3"),
        (r"layernorm\.(\w+)", r"norm.\1"),
    ),
    siblings={"predictor": "predictor", "pooler": "attentive pooler", "classifier": "classifier head"},
)
