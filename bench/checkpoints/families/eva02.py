"""EVA-02 as the official code saves it (baaivision/EVA, EVA-02/asuka), also by DeepSpeed."""

from __future__ import annotations

from ..beit_layout import ANCHORS, CLIP, DROP, image_statistics, infer_beit
from ..family import Draft, Family, Root, Tensors


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    statistics, note = image_statistics(root, CLIP, "CLIP's, as in EVA-02's recipes", CLIP)
    draft = infer_beit("eva02", root, tensors, heads, notes=(note,), pooling="mean", **statistics)
    rotary = draft.spec.arch["rotary"]
    said = f"rotary positions span {rotary} places an axis at every image size, as the fine-tuning has it"
    return Draft(draft.tensors, draft.spec, (*draft.notes, said))


FAMILY = Family(
    name="eva02",
    title="EVA-02, official pre-training and fine-tuning",
    rank=80,
    anchors=(
        *ANCHORS,
        ("rope.freqs_cos", "blocks.0.attn.rope.freqs_cos"),
        ("blocks.0.mlp.w12.weight", "blocks.0.mlp.w1.weight"),
        "blocks.0.mlp.w3.weight",
    ),
    matches=lambda root: "visual" not in root.parts,
    draft=_draft,
    known_by="rope.freqs_cos and a SwiGLU (w1, w2, w3 or w12, w3)",
    evaluated="mean of the patches after the norm; fine-tuned: mean of the patches, then fc_norm",
    source="baaivision/EVA",
    prefer=("model", "module"),
    drop=DROP,
)
