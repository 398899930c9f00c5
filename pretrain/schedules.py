"""Values that change over the training, as functions of the share of it that is done (0 to 1)."""

from __future__ import annotations

import math

from .sections import Curve, OptimConfig, TargetConfig


def between(start: float, end: float, done: float, curve: Curve) -> float:
    """A value on its way from ``start`` to ``end``."""
    if curve == "constant":
        return start
    left = 1 - done if curve == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return end + (start - end) * left


def learning_rate(config: OptimConfig, peak: float, done: float) -> float:
    """Linear warm-up from ``warmup_from``, then half a cosine to ``floor``, both as shares of the peak."""
    if done < config.warmup:
        return peak * between(config.warmup_from, 1.0, done / config.warmup, "linear")
    return peak * between(1.0, config.floor, (done - config.warmup) / (1 - config.warmup), "cosine")


def weight_decay(config: OptimConfig, done: float) -> float:
    """Weight decay, constant or on a cosine to ``weight_decay_end``."""
    end = config.weight_decay if config.weight_decay_end is None else config.weight_decay_end
    return between(config.weight_decay, end, done, "cosine")


def momentum(config: TargetConfig, done: float) -> float:
    """Momentum of the EMA target."""
    return between(config.momentum, config.momentum_end, done, config.momentum_curve)


def milestones(total: int, count: int) -> set[int]:
    """``count`` steps, or all if there are fewer, spread evenly over ``total``; the last is the last step."""
    count = min(count, total)
    return {math.ceil(total * (i + 1) / count) for i in range(count)}
