"""The image level of unsupervised segmentation: a tree over the tokens of each image, and its overlap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..bench.errors import TaskError
from ..bench.types import Array, Context, Measurement
from ._math import segmentation as seg
from ._math.trees import Linkage, cut_tree, merge_tree

_MOST_TOKENS = 10_000
"""A tree is built from the distances of all pairs of an image's tokens."""


def grow_trees(
    ctx: Context, patches: Array, clusters: Sequence[int], linkage: Linkage, most_images: int | None
) -> tuple[Array, Array]:
    """Cut a tree over the unit tokens of each image.

    Args:
        ctx: of the task.
        patches: (N, h, w, D), memory-mapped; one image is read at a time.
        clusters: numbers of clusters that each tree is cut into.
        linkage: of the trees.
        most_images: that get a tree, a seeded choice; None for all.

    Returns:
        Positions of the images that got a tree, and their cluster ids (cuts, N, h * w), 0 elsewhere.

    Raises:
        TaskError: too many tokens an image.
    """
    from ._math.normalise import unit_rows

    images, tokens = len(patches), patches.shape[1] * patches.shape[2]
    if tokens > _MOST_TOKENS:
        raise TaskError(
            f"{tokens} tokens an image are too many for trees; lower size or "
            "--set 'unsup_seg.hier_clusters=[]'"
        )
    chosen = np.arange(images)
    if most_images is not None and most_images < images:
        chosen = np.sort(ctx.rng("trees").permutation(images)[:most_images])
        ctx.note(f"trees were built for {len(chosen)} of {images} images (hier_images)")
    ids = np.zeros((len(clusters), images, tokens), dtype=np.int32)
    with ctx.progress(len(chosen), "trees") as bar:
        for i in chosen:
            tree = merge_tree(unit_rows(patches[i].reshape(tokens, -1)), linkage)
            ids[:, i] = cut_tree(tree, clusters)
            bar.advance()
    return chosen, ids


def best_overlaps(
    ctx: Context,
    labels: seg.PatchLabels,
    grid: tuple[int, int],
    images: Array,
    cuts: Array,
    clusters: Sequence[int],
    linkage: Linkage,
) -> list[Measurement]:
    """Mean best overlap at each cut of the trees of ``images``, grown by ``grow_trees`` with these settings.

    Raises:
        TaskError: none of the images holds a labelled pixel.
    """
    from ._math.clustering import grid_coordinates

    def overlaps(ids: Array, k: int) -> Array:
        best = seg.best_overlap(labels.confusion_per_image(ids, k))[images]
        return best[~np.isnan(best)]

    blind = cut_tree(merge_tree(grid_coordinates(grid), linkage), clusters)
    result = []
    for k, ids, position in zip(clusters, cuts, blind, strict=True):
        items = overlaps(ids, k)
        if not len(items):
            raise TaskError("no image that got a tree holds a labelled pixel; raise hier_images")
        random = overlaps(ctx.rng("random-trees", k).integers(k, size=ids.shape), k)
        detail = {
            "linkage": linkage,
            "position_only": float(overlaps(np.tile(position, (labels.images, 1)), k).mean()),
        }
        result.append(Measurement(f"mbo@k={k}", items, chance=float(random.mean()), detail=detail))
    series = {
        "features": [float(m.items.mean()) for m in result],
        "position only": [m.detail["position_only"] for m in result],
        "random": [m.chance for m in result],
    }
    ctx.save_data(
        "best-overlap",
        "curve",
        "Best overlap of per-image clusters",
        {
            "x": list(clusters),
            "series": series,
            "x_label": "clusters an image",
            "y_label": "mean best overlap",
            "log_x": True,
        },
        "Each class segment of an image takes its best IoU with any cluster of that image.",
    )
    return result
