"""The linear probe's two solvers behind one signature, and the choice of a setting on train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from ..bench.types import Array, Column, Context, FeatureBank
from ._math.logistic import LinearHead, fit_path
from ._math.normalise import Normaliser
from ._math.selection import Trial, cross_entropies, label_ranks

_BLOCK = 8192


class SolverSettings(Protocol):
    """The protocol fields that the solvers read."""

    @property
    def normalise(self) -> Literal["batchnorm", "l2", "none"]: ...
    @property
    def max_iter(self) -> int: ...
    @property
    def tol(self) -> float: ...
    @property
    def batch(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def momentum(self) -> float: ...


@dataclass(frozen=True)
class FeatureChoice:
    """A feature choice that the encoder offers, and the columns that it concatenates."""

    name: str
    columns: tuple[Column, ...]

    def rows(self, bank: FeatureBank, index: Array | slice = slice(None)) -> Array:
        """Features of these rows of a bank, (n, D)."""
        return np.concatenate([bank.column(column)[index] for column in self.columns], axis=1)

    def blocks(self, bank: FeatureBank, index: Array) -> Iterator[Array]:
        """The same a block after the other."""
        return (self.rows(bank, index[start : start + _BLOCK]) for start in range(0, len(index), _BLOCK))


@dataclass(frozen=True)
class TrainSplit:
    """All that choosing and fitting may see: the train split, and which part of it is held out."""

    bank: FeatureBank
    labels: Array
    kept: Array
    held: Array
    n_classes: int

    @property
    def everything(self) -> Array:
        """Positions of all train images."""
        return np.arange(len(self.labels))


@dataclass(frozen=True)
class Fitted:
    """A head with what must be done to features before it sees them."""

    choice: FeatureChoice
    strength: float
    """C of the logistic regression, or the learning rate."""
    normaliser: Normaliser
    head: LinearHead

    @property
    def diverged(self) -> bool:
        """Whether a weight is not finite; the bias of a class that train does not show is -inf."""
        return not bool(np.isfinite(self.head.weight).all()) or bool(np.isnan(self.head.bias).any())

    def predict(self, bank: FeatureBank, index: Array) -> Iterator[tuple[slice, Array]]:
        """Logits (n, C) of these rows of a bank, in blocks."""
        start = 0
        for rows in self.choice.blocks(bank, index):
            yield slice(start, start + len(rows)), self.head.logits(self.normaliser(rows))
            start += len(rows)


class Solver(Protocol):
    """Every head of a grid of feature choices and strengths, fitted on the rows ``index`` of train."""

    def __call__(
        self,
        ctx: Context,
        cfg: SolverSettings,
        train: TrainSplit,
        choices: Sequence[FeatureChoice],
        strengths: Sequence[float],
        index: Array,
        start: LinearHead | None = None,
    ) -> Iterator[Fitted]: ...


def fit_lbfgs(
    ctx: Context,
    cfg: SolverSettings,
    train: TrainSplit,
    choices: Sequence[FeatureChoice],
    strengths: Sequence[float],
    index: Array,
    start: LinearHead | None = None,
) -> Iterator[Fitted]:
    """Multinomial logistic regression at every C of every feature choice, each from ``start``, if any."""
    labels = train.labels[index]
    with ctx.progress(len(choices) * len(strengths), "logistic regression") as bar:
        for choice in choices:
            normaliser = Normaliser.stream(cfg.normalise, choice.blocks(train.bank, index))
            path = fit_path(
                _normalised(choice, normaliser, train.bank, index),
                labels,
                strengths,
                train.n_classes,
                max_iter=cfg.max_iter,
                tol=cfg.tol,
                device=ctx.device,
                start=start,
            )
            for strength, head in zip(strengths, path, strict=True):
                yield Fitted(choice, strength, normaliser, head)
                bar.advance()


def _normalised(choice: FeatureChoice, normaliser: Normaliser, bank: FeatureBank, index: Array) -> Array:
    """Normalised features of these rows, (n, D): the one copy of them that is made."""
    width = sum(bank.column(column).shape[1] for column in choice.columns)
    out = np.empty((len(index), width), dtype=np.float32)
    start = 0
    for rows in choice.blocks(bank, index):
        out[start : start + len(rows)] = normaliser(rows)
        start += len(rows)
    return out


def fit_sgd(
    ctx: Context,
    cfg: SolverSettings,
    train: TrainSplit,
    choices: Sequence[FeatureChoice],
    strengths: Sequence[float],
    index: Array,
    start: LinearHead | None = None,
) -> Iterator[Fitted]:
    """One pass of SGD that trains a head for every learning rate of every feature choice.

    Its schedule belongs to its own initial weights, whatever ``start`` is.
    """
    from ._math.sgd_heads import train_heads

    normalisers = [Normaliser.stream(cfg.normalise, choice.blocks(train.bank, index)) for choice in choices]

    def read(batch: Array) -> list[Array]:
        return [
            normaliser(choice.rows(train.bank, index[batch]))
            for choice, normaliser in zip(choices, normalisers, strict=True)
        ]

    heads = len(choices) * len(strengths)
    with ctx.progress(cfg.steps, f"{heads} linear heads") as bar:
        trained = train_heads(
            read,
            train.labels[index],
            strengths,
            train.n_classes,
            steps=cfg.steps,
            batch=cfg.batch,
            momentum=cfg.momentum,
            rng=ctx.rng("sgd", heads),
            device=ctx.device,
            advance=bar.advance,
        )
    for choice, normaliser, of_choice in zip(choices, normalisers, trained, strict=True):
        for strength, head in zip(strengths, of_choice, strict=True):
            yield Fitted(choice, strength, normaliser, head)


def judge(fitted: Fitted, train: TrainSplit) -> Trial:
    """The setting as it does on the held-out part; accuracy 0 and infinite loss where it diverged."""
    name, strength = fitted.choice.name, fitted.strength
    if fitted.diverged:
        return Trial(name, strength, 0.0, float("inf"), False)
    right = loss = 0.0
    truth = train.labels[train.held]
    for rows, logits in fitted.predict(train.bank, train.held):
        right += float(np.count_nonzero(label_ranks(logits, truth[rows]) == 0))
        loss += float(cross_entropies(logits, truth[rows]).sum())
    return Trial(name, strength, right / len(truth), loss / len(truth), fitted.head.converged)
