"""Pictures of the unsupervised segmentation task: one strip of panels an image."""

from __future__ import annotations

import numpy as np

from ..bench.types import Array, Context

_LONGER_SIDE = 320
_REASONS = {"seeded": "Seeded choice", "best": "Best", "median": "Median", "worst": "Worst"}


def save_segments(
    ctx: Context,
    *,
    patches: Array,
    table: Array,
    predicted: Array,
    trees: Array | None,
    images: Array,
    score: Array,
) -> None:
    """Keep strips of an image that a seed chose, the same for every encoder, and of the best, the median and
    the worst one.

    Args:
        ctx: of the task.
        patches: (N, h, w, D), memory-mapped; only those of the images shown are read.
        table: from mask value to evaluated class, negative where void.
        predicted: matched class of each patch (N, h, w), negative where unmatched.
        trees: cluster ids (N, h, w) of each image's own tree, or None for no such panel.
        images: positions of the images to choose from.
        score: what they are ranked by, (N,): the mean IoU over the classes of an image.
    """
    from PIL import Image

    from ._math import colour

    order = images[np.argsort(score[images], kind="stable")]
    # First the one that every encoder shows, which a small split may have for another reason too.
    picks = {"seeded": ctx.rng("pictures").choice(images)}
    picks |= {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}
    shown = dict.fromkeys(int(row) for row in picks.values())
    tokens = np.stack([np.asarray(patches[row], dtype=np.float32) for row in shown])
    features = dict(zip(shown, colour.pca_colours(tokens), strict=True))

    bank, split = ctx.bank(ctx.data.test_split), ctx.data.splits[ctx.data.test_split]
    panels = ["Image", "truth", "k-means clusters in the colour of their class", "features by PCA"]
    if trees is not None:
        panels.append("clusters of this image alone")
    for why, row in picks.items():
        if int(row) not in shown:
            continue
        del shown[int(row)]  # a small split has one image for several reasons: it is kept once
        index = int(bank.index[row])
        picture = Image.fromarray(split.image(index))
        picture.thumbnail((_LONGER_SIDE, _LONGER_SIDE), Image.Resampling.BILINEAR)
        strip = colour.strip(
            np.asarray(picture),
            table[split.mask(index)],
            predicted[row],
            features[int(row)],
            None if trees is None else trees[row],
        )
        ctx.save_image(
            f"{why}-image",
            strip,
            f"{_REASONS[why]}: mean IoU {100 * score[row]:.1f}% ({bank.ids[row]})",
            " | ".join(panels) + ". Void and unmatched regions are dark.",
            downscale=_LONGER_SIDE,
        )
