"""V-JEPA 2 as the official code saves it (facebookresearch/vjepa2, app/vjepa/train.py), as an image
encoder.

The official image evaluation (evals/image_classification_frozen) repeats an image 16 times as a video,
reads the target encoder, and has no class token: the mean over all tokens stands for the image.
"""

from __future__ import annotations

from ...errors import CheckpointError
from ...networks.vjepa2 import vjepa2_spec
from ..family import Draft, Family, Root, Tensors
from ..plain_vit import depth_of, infer_heads

# The repository builds a table of positions that models with rotary embeddings never read.
_DROP = {r"pos_embed": "position table that rotary models do not use"}


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    weight = tensors["patch_embed.proj.weight"]
    if weight.shape[1] != 3 or weight.shape[3] != weight.shape[4]:
        raise CheckpointError(
            f"patch_embed.proj.weight has shape {tuple(weight.shape)}; expected (D, 3, t, p, p) for videos"
        )
    depth = depth_of(tensors)
    n_heads, note = infer_heads(weight.shape[0], depth, heads, usual={1408: 22, 1664: 26})
    spec = vjepa2_spec(
        embed_dim=weight.shape[0],
        depth=depth,
        num_heads=n_heads,
        patch_size=weight.shape[3],
        tubelet=weight.shape[2],
        hidden=tensors["blocks.0.mlp.fc1.weight"].shape[0],
    )
    said = (
        "an image is repeated 16 times as a video, as the official image evaluation does",
        "rotary positions: any image size; 256 pixels are assumed, set #image_size= for models of 384",
    )
    return Draft(tensors, spec, (note, *said))


FAMILY = Family(
    name="vjepa2",
    title="V-JEPA 2, official pre-training, as an image encoder",
    rank=84,
    anchors=("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"),
    matches=lambda root: (
        root.tensors["patch_embed.proj.weight"].ndim == 5 and "cls_token" not in root.tensors
    ),
    draft=_draft,
    known_by="a patch embedding of videos (D, 3, t, p, p) and no class token",
    evaluated="mean of all tokens after the norm of the target encoder; the image repeated 16 times",
    source="facebookresearch/vjepa2",
    prefer=("target_encoder", "encoder"),
    drop=_DROP,
    siblings={
        "encoder": "the other network of the pair",
        "target_encoder": "the other network of the pair",
        "predictor": "predictor",
    },
)
