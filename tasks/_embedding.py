"""Patch tokens in the plane by t-SNE, coloured by what they show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..bench.types import Array, Context

_GROUPS = 10
"""Classes that get a colour of their own, the most frequent ones; more cannot be told apart."""
_FEWEST = 10
_OTHER = "#8c8c8c"


def save_embedding(
    ctx: Context, tokens: Array, labels: Array, classes: Sequence[str], colours: Array, perplexity: float
) -> None:
    """Keep a t-SNE (van der Maaten and Hinton, JMLR 2008) of patch tokens for the report.

    Args:
        ctx: of the task.
        tokens: (n, D); compared by direction alone.
        labels: (n,) class of each.
        classes: their names.
        colours: uint8 (len(classes), 3).
        perplexity: of the neighbourhoods; less where there are few tokens.
    """
    from sklearn.manifold import TSNE

    from ._math.normalise import unit_rows

    if len(tokens) < _FEWEST:
        return
    directions = np.asarray(unit_rows(tokens), dtype=np.float64)
    if np.ptp(directions, axis=0).max() < 1e-6:
        ctx.note("all patch tokens point one way: there is nothing for t-SNE to show")
        return
    seed = int(ctx.rng("t-sne").integers(2**31))
    perplexity = min(perplexity, (len(tokens) - 1) / 3)
    with ctx.progress(1, "t-SNE") as bar:
        plane = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(directions)
        bar.advance()
    plane = plane / np.abs(plane).max()
    counts = np.bincount(labels, minlength=len(classes))
    shown = [int(c) for c in np.argsort(-counts, kind="stable")[:_GROUPS] if counts[c]]
    place = np.full(len(classes), len(shown))
    place[shown] = np.arange(len(shown))
    names = [classes[c] for c in shown]
    paints = ["#{:02x}{:02x}{:02x}".format(*colours[c]) for c in shown]
    if counts.sum() > counts[shown].sum():
        names.append(f"{np.count_nonzero(counts) - len(shown)} more classes")
        paints.append(_OTHER)
    ctx.save_data(
        "t-sne",
        "points",
        "Patch tokens by t-SNE",
        {
            "x": plane[:, 0].round(4),
            "y": plane[:, 1].round(4),
            "group": place[labels],
            "groups": names,
            "colours": paints,
        },
        f"{len(tokens):,} patches of the split, a seeded choice, in the colour of the class of most of their "
        f"pixels; perplexity {perplexity:g}. Distances between groups and their sizes mean little.",
    )
