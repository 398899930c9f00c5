"""How good predictions of hidden patches are: pure functions of predictions and targets."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .objectives import standardise_channels
from .patches import standardise
from .sections import ObjectiveConfig

TIE = 1e-6
"""Cosines that differ by no more are equal: fp32 cannot tell them apart."""


class Retrieved(NamedTuple):
    """What the P predictions of an image find among the tokens of all images.

    Attributes:
        hits: (P,) 1 where the own target is the most similar token of the own image; k tied ones share it.
        ahead: (P,) share of the tokens of other images at the own place that are less similar than the own
            target, ties half; a half where there are none.
        nearest: (P,) the most similar token of another image, as a row.
    """

    hits: torch.Tensor
    ahead: torch.Tensor
    nearest: torch.Tensor


def retrieve(
    cosines: torch.Tensor, own: torch.Tensor, places: torch.Tensor, first: int, last: int
) -> Retrieved:
    """What predictions find.

    Args:
        cosines: (P, C) of the predictions of one image with the tokens of all images.
        own: (P,) row of the target of each.
        places: (C,) where each token is in its image.
        first, last: the rows from ``first`` on and before ``last`` are of the own image; there are others.
    """
    mine = cosines.gather(1, own[:, None])
    inside = cosines[:, first:last]
    top = inside.amax(dim=1, keepdim=True)
    hits = (mine >= top - TIE).squeeze(1).double() / (inside >= top - TIE).sum(dim=1)
    outside = torch.cat([cosines[:, :first], cosines[:, last:]], dim=1)
    rivals = torch.cat([places[:first], places[last:]]) == places[own][:, None]
    won = (outside < mine - TIE).double() + (outside <= mine + TIE).double()
    ahead = (won * rivals).sum(dim=1) / (2 * rivals.sum(dim=1))
    nearest = outside.argmax(dim=1)
    return Retrieved(
        hits,
        ahead.nan_to_num(0.5),
        nearest + (nearest >= first) * (last - first),
    )


def directions(
    predictions: torch.Tensor, targets: torch.Tensor, config: ObjectiveConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both (B, T, D) as unit vectors, standardised first where the objective standardises them."""
    predictions, targets = predictions.float(), targets.float()
    if config.loss == "infonce" and config.standardise:
        predictions = standardise_channels(predictions)
    if config.loss == "norm_l2":
        targets = standardise(targets)
    return F.normalize(predictions, dim=-1), F.normalize(targets, dim=-1)


def pixel_errors(
    predictions: torch.Tensor, targets: torch.Tensor, visible: torch.Tensor | None
) -> torch.Tensor:
    """Squared errors of predicted pixels and of a guess, (B, 2), means over the pixels of an image.

    Args:
        predictions: (B, T, p*p*3).
        targets: (B, T, p*p*3).
        visible: (B, V, p*p*3), whose mean colour is the guess; None where each target is standardised, whose
            mean is 0.
    """
    guess = torch.zeros_like(targets)
    if visible is not None:
        colour = visible.reshape(len(visible), -1, 3).mean(dim=1)
        guess = colour.repeat(1, targets.shape[-1] // 3)[:, None].expand_as(targets)
    return torch.stack([(x - targets).square().mean(dim=(1, 2)) for x in (predictions, guess)], dim=1)


def mean_pair_cosine(units: torch.Tensor) -> torch.Tensor:
    """The mean cosine of different ones of unit vectors (T, D), a scalar; 1 where there is only one."""
    count = len(units)
    if count < 2:
        return units.new_ones(())
    return (units.sum(dim=0).square().sum() - units.square().sum()) / (count * (count - 1))
