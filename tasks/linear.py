"""Linear probe: one linear layer on frozen, cached features. Nothing is chosen on test.

Protocol:
    1. Features: the choices of DINOv2's ``eval/linear.py`` (class token of the last block or of the last
       four, with or without the mean of the last block's patch tokens), and means alone (of the last
       block and of the last four), which is all there is without a class token.
    2. Choice: a stratified tenth of *train* is held out (seeded; at least one image of every class that
       has two). Every feature choice x strength is fitted on the rest; the setting of highest held-out
       accuracy wins, ties to the lowest held-out cross-entropy.
    3. The chosen setting is fitted again on all of train, and predicts test once.

Solvers:
    ``lbfgs``: multinomial logistic regression, each C started from those before; the grid is 10^-5 to
        10^1 by half decades, every second value of the part of DINOv2's ``log_regression.py`` grid
        10^linspace(-6, 5, 45) that standardised features have a use for. Its edge is noted when chosen.
    ``sgd``: DINOv2's sweep in one pass: all feature choices x 13 learning rates (scaled by batch / 256),
        momentum 0.9, no weight decay, cosine every step, N(0, 0.01) initial weights.
    ``auto``: ``lbfgs`` up to ``lbfgs_max_train`` train images, ``sgd`` above.

Deviations, all from working on cached features of the centre crop: no random crops or flips in training
(DINO issue 141 saw 74.5 instead of 75.3 for a ResNet-50), and the best setting is not picked on the
reported split as DINO, DINOv2's ``linear.py`` and MAE do. ``normalise=batchnorm`` is MAE's BatchNorm without
affine at the statistics of the whole of train; it is the default because encoders differ by orders of
magnitude in the scale of their features, and one grid of C or learning rates must mean the same for all.
``none`` is what DINOv2 does. MAE's LARS recipe is not reproduced.

Chance: share of the most common test class for top-1 (of the five for top-5), among the classes that train
has; 1/C for the class mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, field_validator

from ..bench.errors import TaskError
from ..bench.types import (
    Array,
    Column,
    Context,
    Dataset,
    EncoderSpec,
    FeatureRequest,
    Measurement,
    Metric,
    Tap,
    Work,
)
from . import task
from ._features import (
    BlockConfig,
    class_names,
    labelled,
    majority_share,
    mean_class_items,
    once,
    require_finite,
    require_known_classes,
    require_two_classes,
    save_per_class,
)

if TYPE_CHECKING:
    from ._math.selection import Trial
    from ._probe import FeatureChoice, Fitted, TrainSplit

FeatureName = Literal["cls", "mean", "cls+mean", "4xcls", "4xmean", "4xcls+mean"]
_SEVERAL = 4


class LinearConfig(BlockConfig):
    """Protocol of the linear probe."""

    features: tuple[FeatureName, ...] = Field(
        ("cls", "mean", "cls+mean", "4xcls", "4xmean", "4xcls+mean"),
        min_length=1,
        description="Feature choices to select from; 4x: of the last four blocks, concatenated.",
    )
    normalise: Literal["batchnorm", "l2", "none"] = Field(
        "batchnorm", description="batchnorm: MAE's, without affine, at train statistics; l2: unit length."
    )
    holdout: float = Field(
        0.1, gt=0, lt=1, description="Part of train, stratified by class, that the setting is chosen on."
    )
    solver: Literal["auto", "lbfgs", "sgd"] = Field(
        "auto", description="auto: lbfgs up to lbfgs_max_train train images, sgd above."
    )
    lbfgs_max_train: int = Field(100_000, gt=0, description="Largest train split that auto gives to lbfgs.")
    c: tuple[float, ...] = Field(
        tuple(10 ** (e / 2) for e in range(-10, 3)),
        min_length=1,
        description="lbfgs: inverse regularisations C.",
    )
    max_iter: int = Field(1000, gt=0, description="lbfgs: iterations a fit.")
    tol: float = Field(
        1e-5, gt=0, description="lbfgs: estimated distance from the minimum, as a share of it."
    )
    lr: tuple[float, ...] = Field(
        (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
        min_length=1,
        description="sgd: learning rates at a batch of 256.",
    )
    batch: int = Field(1024, gt=0, description="sgd: images a step.")
    steps: int = Field(12_500, gt=0, description="sgd: optimiser steps.")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd: momentum.")

    @field_validator("c", "lr")
    @classmethod
    def _ascending(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if min(values) <= 0:
            raise ValueError("every value must be above 0")
        return tuple(sorted(set(values)))

    _once = field_validator("features")(once)

    def uses_lbfgs(self, train: int) -> bool:
        """Whether so many train images are given to ``lbfgs``."""
        return self.solver == "lbfgs" or (self.solver == "auto" and train <= self.lbfgs_max_train)


def _choices(cfg: LinearConfig, spec: EncoderSpec) -> list[FeatureChoice]:
    """The feature choices that this encoder offers, in the order of the config."""
    from ._probe import FeatureChoice

    last = cfg.tap(spec)
    taps = [Tap(layer, last.norm) for layer in range(last.layer - _SEVERAL + 1, last.layer + 1)]
    offered = []
    for name in cfg.features:
        blocks = taps if name.startswith("4x") else [last]
        if -blocks[0].layer > spec.depth or ("cls" in name and not spec.has_cls):
            continue
        if "cls" in name:
            columns = [Column("cls", tap) for tap in blocks]
            columns += [Column("mean", last)] if name.endswith("+mean") else []
        else:
            columns = [Column("mean", tap) for tap in blocks]
        offered.append(FeatureChoice(name, tuple(columns)))
    if not offered:
        raise TaskError(
            f"this encoder offers none of the features {','.join(cfg.features)} (depth {spec.depth}, "
            f"{'a' if spec.has_cls else 'no'} class token); add mean"
        )
    return offered


def _features(cfg: LinearConfig, spec: EncoderSpec, data: Dataset) -> Sequence[FeatureRequest]:
    from ._probe import columns_of

    require_known_classes(data)
    columns = columns_of(_choices(cfg, spec))
    return [FeatureRequest((data.train_split, data.test_split), cfg.view(spec), tuple(columns))]


def _work(cfg: LinearConfig, spec: EncoderSpec, data: Dataset) -> Work:
    from ._probe import columns_of

    train, test = (len(data.splits[name]) for name in (data.train_split, data.test_split))
    classes = max(2, len(data.classes))
    choices = _choices(cfg, spec)
    widths = [spec.embed_dim * len(choice.columns) for choice in choices]
    total, widest = sum(widths), max(widths)
    once = spec.embed_dim * len(columns_of(choices))
    reading = 2e-9 * (train * (once + total) + test * widest)
    if cfg.uses_lbfgs(train):
        held = cfg.holdout * train
        return Work(
            {
                "start": 1.5,
                "reading": reading,
                "basis": sum(2e-11 * train * width**2 + 1.2e-10 * width**3 for width in widths),
                "products": 8.5e-11 * len(cfg.c) * train * (classes + 30) * total,
                "steps": len(cfg.c) * (0.03 * len(widths) + 5e-8 * classes * total),
                "softmax": 1e-9 * len(cfg.c) * len(widths) * train * classes,
                "choice": 1e-11 * len(cfg.c) * held * classes * total,
            },
            on_device=("basis", "products", "steps", "softmax", "choice"),
            memory=60e6 + 8 * train * widest + 12 * train * classes + 16 * widest**2,
        )
    heads, images = len(cfg.lr) * classes, cfg.steps * min(cfg.batch, train)
    return Work(
        {
            "start": 1.0,
            "reading": reading,
            "products": 1.9e-11 * images * heads * total,
            "softmax": 7e-10 * images * heads * len(widths),
            "updates": 1.1e-9 * cfg.steps * heads * total,
            "choice": 1.5e-11 * cfg.holdout * train * heads * total,
        },
        on_device=("products", "softmax", "updates", "choice"),
        memory=120e6 + 8 * heads * total + 24 * min(cfg.batch, train) * heads,
    )


@task(
    "linear",
    version=4,
    title="Linear probe",
    data="classification",
    config=LinearConfig,
    metrics=(
        Metric(id="top1", title="top-1"),
        Metric(id="top5", title="top-5"),
        Metric(id="top1_mean_class", title="top-1, mean over classes"),
    ),
    headline=lambda cfg: "top1",
    features=_features,
    work=_work,
)
def TASK(ctx: Context, cfg: LinearConfig) -> Sequence[Measurement]:  # noqa: N802
    """Choose on train, fit on all of train, and only then read test."""
    import torch

    from ._math.selection import label_ranks
    from ._probe import columns_of

    train, choices = _train_split(ctx, cfg), _offered(ctx, cfg)
    for column in columns_of(choices):
        require_finite(train.bank.column(column), train.bank.ids)
    fitted, detail = _fit(ctx, cfg, train, choices)

    test, truth = labelled(ctx, ctx.data.test_split)
    for column in fitted.choice.columns:
        require_finite(test.column(column), test.ids)
    ranks = np.empty(len(test), dtype=np.int64)
    for rows, logits in fitted.predict(test, np.arange(len(test)), ctx.device):
        labels = torch.tensor(truth[rows], device=ctx.device)
        ranks[rows] = label_ranks(logits[:, 0], labels).cpu().numpy()
    return _measure(
        ctx, ranks, truth, np.unique(train.labels), class_names(ctx.data, train.labels, truth), detail
    )


def _offered(ctx: Context, cfg: LinearConfig) -> list[FeatureChoice]:
    choices = _choices(cfg, ctx.spec)
    left_out = [name for name in cfg.features if name not in {choice.name for choice in choices}]
    if left_out:
        ctx.note(f"features left out, since the encoder does not offer them: {', '.join(left_out)}")
    return choices


def _train_split(ctx: Context, cfg: LinearConfig) -> TrainSplit:
    from ._math.selection import stratified_holdout
    from ._probe import TrainSplit

    bank, labels = labelled(ctx, ctx.data.train_split)
    n_classes = max(len(ctx.data.classes), int(labels.max()) + 1)
    require_two_classes(ctx, labels, "a linear probe")
    seen = len(np.unique(labels))
    if seen < n_classes:
        ctx.note(f"{n_classes - seen} of {n_classes} classes have no train image and are never predicted")
    try:
        kept, held = stratified_holdout(labels, cfg.holdout, ctx.rng("holdout"))
    except ValueError as error:
        raise TaskError(f"nothing can be held out of train of {ctx.data.name}: {error}") from error
    return TrainSplit(bank, labels, kept, held, n_classes)


def _fit(
    ctx: Context, cfg: LinearConfig, train: TrainSplit, choices: Sequence[FeatureChoice]
) -> tuple[Fitted, dict[str, object]]:
    """Choose the setting on the held-out part and fit it on all of train; test is not in reach here."""
    from ._math.selection import best
    from ._probe import Solver, fit_lbfgs, fit_sgd, judge

    small = cfg.uses_lbfgs(len(train.labels))
    solve: Solver = fit_lbfgs if small else fit_sgd
    grid, strength = (cfg.c, "C") if small else (cfg.lr, "learning rate")
    trials: list[Trial] = []
    for candidate in solve(ctx, cfg, train, choices, grid, train.kept):
        trials += judge(candidate, train, ctx.device)
        if best(trials).feature == candidate.choice.name:
            favourite = candidate
    chosen = best(trials)
    start = favourite.heads[grid.index(chosen.strength)]
    (fitted,) = solve(ctx, cfg, train, [favourite.choice], [chosen.strength], train.everything, start)
    (head,) = fitted.heads
    if any(fitted.diverged()):
        raise TaskError(
            f"the linear probe diverged at {strength} {chosen.strength:g}; set smaller ones (linear.lr)"
        )

    _tell(ctx, trials, chosen, grid, strength, head.converged)
    series = {c.name: [round(t.accuracy, 6) for t in trials if t.feature == c.name] for c in choices}
    axes = {"x_label": strength, "y_label": "held-out accuracy", "log_x": True, "unit": "%"}
    ctx.save_data(
        "choice",
        "curve",
        "Choice of the setting",
        {"x": list(grid), "series": series, **axes},
        f"Accuracy on the held-out part of train ({len(train.held)} images), by feature choice.",
    )
    return fitted, {
        "solver": "lbfgs" if small else "sgd",
        "feature": chosen.feature,
        strength.replace(" ", "_"): chosen.strength,
        "heldout_accuracy": chosen.accuracy,
        "heldout_images": len(train.held),
        "converged": head.converged,
    }


def _tell(
    ctx: Context,
    trials: Sequence[Trial],
    chosen: Trial,
    grid: Sequence[float],
    strength: str,
    converged: bool,
) -> None:
    """Say what a reader of the number should know about how the setting was found."""
    if len(grid) > 1 and chosen.strength in (grid[0], grid[-1]):
        ctx.note(f"the chosen {strength} {chosen.strength:g} is at the edge of the grid; widen it")
    stopped = sum(not trial.converged for trial in trials)
    if stopped:
        ctx.note(f"{stopped} of {len(trials)} fits of the grid did not converge")
    if not converged:
        ctx.note("the final fit did not converge; raise max_iter")


def _measure(
    ctx: Context, ranks: Array, truth: Array, known: Array, names: list[str], detail: dict[str, object]
) -> list[Measurement]:
    """From ranks of the true class to measurements and bars; ``known`` are the classes that train has."""
    top1 = (ranks == 0).astype(np.float32)
    save_per_class(ctx, top1, truth, names, "linear probe")
    result = [Measurement("top1", top1, chance=majority_share(truth, known), detail=detail)]
    if len(names) >= 5:
        top5 = (ranks < 5).astype(np.float32)
        result.append(Measurement("top5", top5, chance=majority_share(truth, known, top=5)))
    by_class = mean_class_items(top1, truth)
    chance = float(np.isin(truth, known).any()) / len(np.unique(truth))
    result.append(Measurement("top1_mean_class", by_class, chance=chance, bounds=(0, 1)))
    return result
