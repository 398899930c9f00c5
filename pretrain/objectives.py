"""How predictions are compared with targets: pure functions of (B, T, D), B images with T hidden patches."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .patches import standardise
from .sections import ObjectiveConfig


def reconstruction_loss(
    predictions: torch.Tensor, targets: torch.Tensor, config: ObjectiveConfig
) -> torch.Tensor:
    """The loss of predictions (B, T, D) against targets (B, T, D), a scalar, in fp32.

    ``mse``; ``norm_l2``: targets standardised over their channels, as in the official code; ``smooth_l1``
    with ``beta``; ``cosine``: 2 - 2 cos; ``infonce``: see ``patch_discrimination``.
    """
    predictions, targets = predictions.float(), targets.float()
    with without_autocast(predictions):
        if config.loss == "mse":
            return F.mse_loss(predictions, targets)
        if config.loss == "norm_l2":
            return F.mse_loss(predictions, standardise(targets))
        if config.loss == "smooth_l1":
            return F.smooth_l1_loss(predictions, targets, beta=config.beta)
        if config.loss == "cosine":
            return 2 - 2 * F.cosine_similarity(predictions, targets, dim=-1).mean()
        return patch_discrimination(predictions, targets, config)


def without_autocast(x: torch.Tensor) -> torch.autocast:
    """Inside, operations on the device of ``x`` compute in the precision of what they are given."""
    # Tensors without content, by which FLOPs are counted, have no autocast to turn off.
    return torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False)


def patch_discrimination(
    predictions: torch.Tensor, targets: torch.Tensor, config: ObjectiveConfig
) -> torch.Tensor:
    """InfoNCE: each prediction has to pick its own target among others, times 2 tau
    (yibingwei-1/LatentMIM, ``infonce_patches``).

    Predictions are first standardised, each channel over the patches of the image (unbiased, + 1e-4), where
    ``standardise`` says so; both sides are L2-normalised and the logits are cosines over ``tau``.

    ``negatives``: ``image`` takes the other hidden patches of the same image, ``batch`` those of the whole
    micro-batch of this process. With ``num_negatives`` = K, a patch is told apart from the K targets after
    it (in a circle) alone: of its image, which masks list in random order (but for I-JEPA's blocks), or of
    the batch, where the next K images come first, each with one patch.
    """
    if config.standardise:
        predictions = standardise_channels(predictions)
    predictions, targets = F.normalize(predictions, dim=-1), F.normalize(targets, dim=-1)
    if config.negatives == "batch":
        predictions, targets = (x.transpose(0, 1).flatten(0, 1)[None] for x in (predictions, targets))
    logits = predictions @ targets.transpose(1, 2) / config.tau  # (B, T, T)
    n = logits.shape[-1]
    places = torch.arange(n, device=logits.device)
    if config.num_negatives is not None and config.num_negatives < n - 1:
        ahead = (places - places[:, None]) % n
        logits = logits.masked_fill(ahead > config.num_negatives, -torch.inf)
    return 2 * config.tau * F.cross_entropy(logits.flatten(0, 1), places.repeat(len(logits)))


def standardise_channels(predictions: torch.Tensor) -> torch.Tensor:
    """Predictions (B, T, D), each channel standardised over the patches of its image (unbiased, + 1e-4)."""
    mean = predictions.mean(dim=1, keepdim=True)
    deviation = predictions.std(dim=1, keepdim=True) if predictions.shape[1] > 1 else 1.0
    return (predictions - mean) / (deviation + 1e-4)


def mean_cosine(*runs: torch.Tensor) -> torch.Tensor:
    """The mean cosine of all pairs of patches of the same image, each with itself included, over the images
    of runs (B, T, D), of which T may differ: the squared length of the mean unit vector.
    """
    return torch.cat([F.normalize(x.float(), dim=-1).mean(dim=1).square().sum(-1) for x in runs]).mean()


def similarity_constraint(cosines: list[torch.Tensor], aim: float | torch.Tensor) -> torch.Tensor:
    """The sum of (mean cosine - aim)^2 over predictions and visible latents.

    The mean is over the images of all processes: the square of a mean is not the mean of squares, and the
    curves of one and of several processes are to agree.
    """
    return torch.stack([(_over_processes(c) - aim) ** 2 for c in cosines]).sum()


def _over_processes(value: torch.Tensor) -> torch.Tensor:
    """The mean over processes, whose gradient is this process's own: DDP averages the gradients."""
    if value.is_meta:  # FLOPs are counted without content, which older versions of torch do not reduce
        return value
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size() + (value - value.detach())
