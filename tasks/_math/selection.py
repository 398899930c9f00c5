"""Choosing hyper-parameters on a held-out part of train, so that test is touched once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...bench.types import Array

if TYPE_CHECKING:
    import torch

_WORST = -math.log(1e-30)


@dataclass(frozen=True)
class Trial:
    """One setting of the grid as it scored on the held-out part of train."""

    feature: str
    strength: float
    """C of the logistic regression, or the learning rate."""
    accuracy: float
    loss: float
    """Mean cross-entropy; infinite where training diverged."""
    converged: bool = True


def best(trials: Sequence[Trial]) -> Trial:
    """The trial of highest held-out accuracy; among equals the one of lowest held-out cross-entropy."""
    return max(trials, key=lambda trial: (trial.accuracy, -trial.loss))


def random_rank(labels: Array, rng: np.random.Generator) -> Array:
    """A random order inside every class: each class of n images gets the ranks 0 to n - 1, (N,)."""
    order = rng.permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    rank = np.empty(len(labels), dtype=np.int64)
    rank[by_class] = np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels[by_class]]
    return rank


def stratified_holdout(labels: Array, fraction: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Positions (kept, held out), sorted: of each class round(fraction * n), yet at least one image.

    A class of a single image gives none. Raises ValueError where no class has two images.
    """
    counts = np.bincount(labels)
    quota = np.minimum(np.maximum(np.rint(fraction * counts).astype(np.int64), 1), counts - 1)
    out = random_rank(labels, rng) < quota[labels]
    if not out.any():
        raise ValueError("no class has two images")
    return np.flatnonzero(~out), np.flatnonzero(out)


def label_ranks(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Rank of the true class among logits (..., C), 0 is the first; ties to the lower class index, (...).

    A class of logit -inf (unknown to the head) is never predicted, nor is one of logit NaN: its rank is C.
    """
    import torch

    classes = logits.shape[-1]
    own = logits.gather(-1, labels[..., None])
    lower = torch.arange(classes, device=logits.device) < labels[..., None]
    rank = ((logits > own) | ((logits == own) & lower)).sum(-1)
    own = own[..., 0]
    return rank.masked_fill_(torch.isneginf(own) | torch.isnan(own), classes)


def cross_entropies(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (..., C), (...), at most that of a probability of 1e-30.

    The bound keeps losses comparable where the true class is unknown to the head (logit -inf).
    """
    own = logits.gather(-1, labels[..., None])[..., 0]
    return (logits.logsumexp(-1) - own).clamp_(max=_WORST)
