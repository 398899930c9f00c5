"""Franca: teachers as its trainer saves and its hub serves them (valeoai/Franca).

The network is DINOv2's, cut into chunks and with a SwiGLU at every width; the nested (matryoshka) projection
heads are what tells the file apart.
"""

from __future__ import annotations

from ..family import Draft, Family, Root, Tensors
from . import dinov2

# From the constructors of the repository, whose largest models have heads of width 128.
_HEADS = {2688: 21, 3072: 24, 3584: 28, 4096: 32}


def _matches(root: Root) -> bool:
    nested = any("matryoshka_projections" in name.split(".") for name in root.tree.tensors)
    return dinov2.is_dinov2(root) and (nested or root.tree.stem.startswith("franca_"))


def _draft(root: Root, tensors: Tensors, heads: int | None) -> Draft:
    return dinov2.draft("franca", root, tensors, heads, _HEADS)


FAMILY = Family(
    name="franca",
    title="Franca, hub files and teachers of its trainer",
    rank=79,
    anchors=dinov2.ANCHORS,
    matches=_matches,
    draft=_draft,
    known_by="DINOv2's keys with heads of matryoshka_projections, or a file called franca_*",
    evaluated="cls after the norm, at 224 pixels",
    source="valeoai/Franca",
    prefer=("teacher", "student"),
    rename=dinov2.RENAME,
    drop=dinov2.DROP,
    siblings=dinov2.SIBLINGS,
)
