"""Pictures of nearest neighbours: a query, and what the encoder finds most like it."""

from __future__ import annotations

import numpy as np

from ..bench.types import Array, Context, FeatureBank

_SHOWN = 6
_SIDE = 112
_BORDER = 5
_QUERY, _RIGHT, _WRONG = (110, 110, 110), (46, 139, 87), (200, 55, 45)


def save_gallery(
    ctx: Context,
    train: FeatureBank,
    test: FeatureBank,
    hits: Array,
    nearest: Array,
    names: list[str],
) -> None:
    """Keep strips of test images, the same for every encoder (seeded), with their neighbours.

    Args:
        hits: (N,) whether the vote was right, for each test row.
        nearest: (N, m) train rows, nearest first.
    """
    assert train.labels is not None
    assert test.labels is not None
    test_images, train_images = ctx.data.splits[ctx.data.test_split], ctx.data.splits[ctx.data.train_split]
    for number, row in enumerate(np.sort(ctx.rng("gallery").permutation(len(hits))[:_SHOWN])):
        truth = int(test.labels[row])
        strip = [_framed(test_images.image(int(test.index[row])), _QUERY)]
        for found in nearest[row]:
            colour = _RIGHT if int(train.labels[found]) == truth else _WRONG
            strip.append(_framed(train_images.image(int(train.index[found])), colour))
        found_names = ", ".join(names[int(train.labels[found])] for found in nearest[row])
        ctx.save_image(
            f"neighbours-{number + 1}",
            strip,
            f"Nearest neighbours of {names[truth]} (grey frame): green of its class, red of another",
            f"Vote {'right' if hits[row] else 'wrong'}: {found_names}.",
        )


def _framed(image: Array, colour: tuple[int, int, int]) -> Array:
    """The centre square of a picture, uint8 (H, W, 3), at a fixed side, in a coloured frame."""
    from PIL import Image, ImageOps

    square = ImageOps.fit(Image.fromarray(image), (_SIDE, _SIDE), Image.Resampling.BICUBIC)
    return np.asarray(ImageOps.expand(square, border=_BORDER, fill=colour))
