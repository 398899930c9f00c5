"""The linear probe's two solvers behind one signature, and the choice of a setting on train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from ..bench.types import Array, Column, Context, FeatureBank
from ._math.logistic import LinearHead, fit_path
from ._math.normalise import Normaliser
from ._math.selection import Trial, cross_entropies

if TYPE_CHECKING:
    import torch

_BLOCK = 8192
_LOGITS = 1 << 25
"""Most logits at a time where many heads predict at once."""


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


def columns_of(choices: Sequence[FeatureChoice]) -> list[Column]:
    """Every column that a choice has, once."""
    return list(dict.fromkeys(column for choice in choices for column in choice.columns))


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
    """The heads of a feature choice, with what must be done to features before they see them."""

    choice: FeatureChoice
    normaliser: Normaliser
    strengths: Sequence[float]
    """Of each head: C of the logistic regression, or the learning rate."""
    heads: Sequence[LinearHead]

    def diverged(self) -> list[bool]:
        """Of each head, whether a weight is not finite; a class that train lacks has bias -inf."""
        return [
            not bool(np.isfinite(head.weight).all()) or bool(np.isnan(head.bias).any()) for head in self.heads
        ]

    def predict(self, bank: FeatureBank, index: Array, device: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits (n, heads, C) of these rows of a bank, in blocks, on the device that computes them."""
        import torch

        weight = torch.from_numpy(np.concatenate([head.weight for head in self.heads])).to(device)
        bias = torch.from_numpy(np.concatenate([head.bias for head in self.heads])).to(device)
        block = max(1, min(_BLOCK, _LOGITS // len(bias)))
        for start in range(0, len(index), block):
            rows = slice(start, min(start + block, len(index)))
            x = torch.from_numpy(self.normaliser(self.choice.rows(bank, index[rows]))).to(device)
            logits = torch.nn.functional.linear(x, weight, bias)
            yield rows, logits.view(len(x), len(self.heads), -1)


class Solver(Protocol):
    """Every head of a grid of feature choices and strengths, fitted on the rows ``index`` of train; the heads
    of a choice together.
    """

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
        for choice, normaliser in _normalisers(cfg, train.bank, choices, index).items():
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
            heads = []
            for head in path:
                heads.append(head)
                bar.advance()
            yield Fitted(choice, normaliser, strengths, heads)


def _normalisers(
    cfg: SolverSettings, bank: FeatureBank, choices: Sequence[FeatureChoice], index: Array
) -> Mapping[FeatureChoice, Normaliser]:
    """Of each choice at these rows; a column is read once, however many choices have it."""
    columns = {
        column: Normaliser.stream(
            cfg.normalise, (bank.column(column)[index[rows]] for rows in _blocks(len(index)))
        )
        for column in columns_of(choices)
    }
    return {choice: Normaliser.beside([columns[column] for column in choice.columns]) for choice in choices}


def _normalised(choice: FeatureChoice, normaliser: Normaliser, bank: FeatureBank, index: Array) -> Array:
    """Normalised features of these rows, (n, D): the one copy of them that is made."""
    width = sum(bank.column(column).shape[1] for column in choice.columns)
    out = np.empty((len(index), width), dtype=np.float32)
    for rows in _blocks(len(index)):
        out[rows] = normaliser(choice.rows(bank, index[rows]))
    return out


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))


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
    import torch

    from ._math.sgd_heads import train_heads

    normalisers = _normalisers(cfg, train.bank, choices, index)
    there = {choice: normaliser.on(ctx.device) for choice, normaliser in normalisers.items()}
    columns = columns_of(choices)

    def read(batch: Array) -> Iterator[torch.Tensor]:
        rows = index[batch]
        parts = {column: _upload(train.bank.column(column)[rows], ctx.device) for column in columns}
        for choice in choices:
            yield there[choice](torch.cat([parts[column] for column in choice.columns], dim=1))

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
    for (choice, normaliser), of_choice in zip(normalisers.items(), trained, strict=True):
        yield Fitted(choice, normaliser, strengths, of_choice)


def _upload(rows: Array, device: str) -> torch.Tensor:
    """Rows on a device; the next ones can be read while they are on their way to a GPU."""
    import torch

    there = torch.from_numpy(rows)
    return there.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else there


def judge(fitted: Fitted, train: TrainSplit, device: str) -> list[Trial]:
    """Each head as it does on the held-out part; accuracy 0 and infinite loss where it diverged."""
    import torch

    truth = torch.from_numpy(train.labels[train.held]).to(device)
    right, loss = (torch.zeros(len(fitted.heads), dtype=torch.float64, device=device) for _ in range(2))
    for rows, logits in fitted.predict(train.bank, train.held, device):
        labels = truth[rows, None].expand(-1, len(fitted.heads))
        right += (logits.argmax(-1) == labels).sum(0)
        loss += cross_entropies(logits, labels).sum(0, dtype=torch.float64)
    scores = zip((right / len(truth)).tolist(), (loss / len(truth)).tolist(), strict=True)
    return [
        Trial(fitted.choice.name, strength, 0.0, float("inf"), False)
        if diverged
        else Trial(fitted.choice.name, strength, accuracy, mean_loss, head.converged)
        for strength, head, diverged, (accuracy, mean_loss) in zip(
            fitted.strengths, fitted.heads, fitted.diverged(), scores, strict=True
        )
    ]
