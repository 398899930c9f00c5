"""V-JEPA 2 as transformers saves it (VJEPA2Model), as an image encoder: see the family vjepa2."""

from __future__ import annotations

from dataclasses import replace

from ...errors import CheckpointError
from ...networks.vjepa2 import vjepa2_spec
from ..family import Draft, Family, Root, Tensors
from ..hf import IMAGENET, RANK, SOURCE, attention, fuse_qkv, prepared, stated_heads, vision_config
from ..plain_vit import depth_of, infer_heads

_BLOCK = r"layer\.(\d+)\."


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    tensors = fuse_qkv(tensors)
    weight, depth = tensors["patch_embed.proj.weight"], depth_of(tensors)
    if weight.ndim != 5 or weight.shape[1] != 3 or weight.shape[3] != weight.shape[4]:
        raise CheckpointError(
            f"the patch embedding has shape {tuple(weight.shape)}; expected (D, 3, t, p, p) for RGB videos"
        )
    config = vision_config(root, weight.shape[0], depth)
    stated = stated_heads(config, weight.shape[0])
    n_heads, note = infer_heads(weight.shape[0], depth, heads, stated, {1408: 22, 1664: 26})
    size = config.get("crop_size", 256)
    spec = vjepa2_spec(
        image_size=size if isinstance(size, int) and size >= weight.shape[3] else 256,
        embed_dim=weight.shape[0],
        depth=depth,
        num_heads=n_heads,
        patch_size=weight.shape[3],
        tubelet=weight.shape[2],
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
