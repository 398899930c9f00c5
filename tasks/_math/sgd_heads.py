"""Many linear heads trained in one pass over the features: every feature choice x every learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...bench.types import Array
from .logistic import LinearHead

if TYPE_CHECKING:
    import torch

Reader = Callable[[Array], Iterable["torch.Tensor"]]
"""From row positions (B,) to their features on the device, (B, D_s) float32 for each feature choice."""


def shuffled_batches(n: int, batch: int, steps: int, rng: np.random.Generator) -> Iterator[Array]:
    """``steps`` batches of sorted positions; every image comes once before any comes again."""
    batch = min(batch, n)
    pool = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        if len(pool) < batch:
            pool = np.concatenate([pool, rng.permutation(n)])
        yield np.sort(pool[:batch])
        pool = pool[batch:]


def train_heads(
    read: Reader,
    labels: Array,
    rates: Sequence[float],
    n_classes: int,
    *,
    steps: int,
    batch: int,
    momentum: float,
    rng: np.random.Generator,
    device: str,
    advance: Callable[[int], None],
) -> list[list[LinearHead]]:
    """SGD with momentum on the sum of the heads' mean cross-entropies; cosine to zero, every step.

    The heads share no parameter, so the sum trains each as if alone. All heads of one feature choice are
    one matrix (D, heads * C): a step is two matrix products a choice, however many rates there are. The
    gradient of softmax cross-entropy is written out, which spares autograd its copies.

    Args:
        read: features of a batch, one array for each feature choice.
        labels: class indices of the rows that ``read`` can be asked for, (N,).
        rates: learning rates, the same for each feature choice, at a batch of 256 (DINOv2's scaling rule).
        n_classes: classes of each head.
        steps: optimiser steps.
        batch: images a step, at most N.
        momentum: of plain SGD, no weight decay.
        rng: source of the initial weights, N(0, 0.01), and of the order of images.
        device: where heads are trained.
        advance: called with the number of steps done.

    Returns:
        Heads by feature choice and rate, on the CPU, at the float32 that they were trained in. A class that
        is not among ``labels`` has bias -inf.
    """
    import torch

    batch = min(batch, len(labels))
    widths = [features.shape[1] for features in read(np.zeros(1, dtype=np.int64))]
    targets = torch.tensor(labels, device=device)
    scaled = torch.tensor(rates, dtype=torch.float32, device=device) * (batch / 256)
    scale = scaled.repeat_interleave(n_classes)
    weights, biases = [], []
    for width in widths:
        initial = rng.normal(0, 0.01, (width, len(scale))).astype(np.float32)
        weights.append(torch.from_numpy(initial).to(device))
        biases.append(torch.zeros(len(scale), device=device))
    weight_speed = [torch.zeros_like(w) for w in weights]
    bias_speed = [torch.zeros_like(b) for b in biases]

    with torch.inference_mode():
        for step, rows in enumerate(shuffled_batches(len(labels), batch, steps, rng)):
            decay = 0.5 * (1 + math.cos(math.pi * step / steps))
            truth = targets[torch.from_numpy(rows).to(device)]
            for s, features in enumerate(read(rows)):
                error = _softmax_error(torch.addmm(biases[s], features, weights[s]), truth, n_classes)
                weight_speed[s].addmm_(features.T, error, beta=momentum)
                bias_speed[s].mul_(momentum).add_(error.sum(0))
                weights[s].addcmul_(weight_speed[s], scale, value=-decay)
                biases[s].addcmul_(bias_speed[s], scale, value=-decay)
            advance(1)

    absent = np.setdiff1d(np.arange(n_classes), labels)
    heads = []
    for weight, bias in zip(weights, biases, strict=True):
        columns = weight.T.reshape(len(rates), n_classes, -1).cpu().numpy()
        offsets = bias.reshape(len(rates), n_classes).cpu().numpy()
        offsets[:, absent] = -np.inf
        heads.append([LinearHead(w, b) for w, b in zip(columns, offsets, strict=True)])
    return heads


def _softmax_error(logits: torch.Tensor, truth: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Gradient of the mean cross-entropy with respect to the logits, (B, heads * C)."""
    import torch

    by_head = logits.view(len(truth), -1, n_classes)
    error = torch.softmax(by_head, dim=2)
    index = truth[:, None, None].expand(-1, error.shape[1], 1)
    error.scatter_add_(2, index, torch.full(index.shape, -1.0, device=error.device))
    return error.div_(len(truth)).view(len(truth), -1)
