"""Multinomial logistic regression along a path of C: L-BFGS where the problem is well conditioned.

Features of a vision transformer are nearly collinear (condition numbers of a standardised class token
reach 10^3 to 10^8), and plain L-BFGS then needs hundreds of steps at each C. Two exact changes of
variables mend that. The weights are taken in the basis of the singular vectors of the features, where the
penalty keeps its form and directions without variance drop out; and each direction is scaled by the root
of its expected curvature ``mean p (1 - p) * s^2 / n + 1 / (C n)``, the diagonal of the Hessian up to the
coupling of classes. Both are undone in the head that is returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...bench.types import Array

if TYPE_CHECKING:
    import torch

_RANK = 1e-6
"""Singular values below this share of the largest are dropped: below float32's resolution of the features."""
_CURVATURE_FLOOR = 1e-8
_STRIDE = 5
"""L-BFGS steps between two looks at the stopping rule."""


@dataclass(frozen=True)
class LinearHead:
    """A linear classifier over all classes of the data set. ``weight`` (C, D), ``bias`` (C,).

    A class that was absent from the training images has bias -inf and is never predicted.
    """

    weight: Array
    bias: Array
    converged: bool = True

    def logits(self, rows: Array) -> Array:
        """(N, D) -> (N, C)"""
        return np.asarray(rows @ self.weight.T + self.bias)


def fit_path(
    rows: Array,
    labels: Array,
    strengths: Sequence[float],
    n_classes: int,
    *,
    max_iter: int = 1000,
    tol: float = 1e-5,
    intercept: bool = True,
    device: str = "cpu",
) -> Iterator[LinearHead]:
    """One head for each C, in the order given; every fit starts from the one before.

    The objective is scikit-learn's multinomial one: C * sum of cross-entropies + |W|^2 / 2, the bias free.
    Two classes are a softmax too, where scikit-learn has a single logit: its head at 2 C is ours at C.

    Args:
        rows: features, float32 (N, D).
        labels: class indices (N,).
        strengths: values of C; rising ones make the warm starts cheap.
        n_classes: width of the heads that come out.
        max_iter: L-BFGS iterations a fit.
        tol: converged when half the squared gradient in the scaled variables, which estimates how far the
            objective is above its minimum, falls below this share of the objective.
        intercept: whether there is a bias.
        device: where the products with the features are computed, in float32.

    Raises:
        ValueError: fewer than two classes among ``labels``.
    """
    import torch

    known, targets = np.unique(labels, return_inverse=True)
    if len(known) < 2:
        raise ValueError("logistic regression needs images of two classes")
    x = torch.tensor(rows, dtype=torch.float32, device=device)
    centre = x.mean(0) if intercept else torch.zeros(x.shape[1], device=device)
    problem = _Problem(x - centre, torch.tensor(targets, device=device), len(known), intercept)
    for strength in strengths:
        converged = problem.solve(1 / (strength * len(rows)), max_iter, tol)
        weight = np.zeros((n_classes, rows.shape[1]), dtype=np.float32)
        bias = np.full(n_classes, -np.inf, dtype=np.float32)
        weight[known] = (problem.basis @ problem.weight).T.cpu().numpy()
        bias[known] = problem.bias.cpu().numpy() - weight[known] @ centre.cpu().numpy()
        yield LinearHead(weight, bias, converged)


class _Problem:
    """The features in their singular basis, and the current solution there."""

    def __init__(self, x: torch.Tensor, targets: torch.Tensor, n_classes: int, intercept: bool) -> None:
        import torch

        n, width = x.shape
        wide = x.double()
        # The smaller Gram matrix gives the same basis as the SVD, at a fraction of its cost.
        if width <= n:
            squares, basis = torch.linalg.eigh(wide.T @ wide)
        else:
            squares, left = torch.linalg.eigh(wide @ wide.T)
            basis = wide.T @ left
        kept = squares > squares[-1] * _RANK**2
        basis = basis[:, kept]
        self.basis = (basis / basis.norm(dim=0)).float()  # (D, r)
        self.rows = x @ self.basis  # (N, r)
        self.spread = squares[kept].float() / n  # (r,)
        self.targets = targets
        self.intercept = intercept
        self.weight = torch.zeros(len(self.spread), n_classes, device=x.device)
        self.bias = torch.zeros(n_classes, device=x.device)

    def solve(self, penalty: float, max_iter: int, tol: float) -> bool:
        """Minimise mean cross-entropy + penalty / 2 * |W|^2 from where we are; whether it converged."""
        import torch

        p = torch.softmax(self.rows @ self.weight + self.bias, dim=1)
        curvature = max(float((p * (1 - p)).mean()), _CURVATURE_FLOOR)
        scale = torch.sqrt(curvature * self.spread + penalty)[:, None]
        bias_scale = curvature**0.5
        # The steps are taken in double precision; only the products with the features are in float32.
        point = torch.cat([self.weight * scale, self.bias[None] * bias_scale]).double().requires_grad_()
        gap = loss = float("inf")

        def objective() -> float:
            nonlocal gap, loss
            weight, bias = self._unpack(point, scale, bias_scale)
            log_p = torch.log_softmax(torch.addmm(bias, self.rows, weight), dim=1)
            own = log_p.gather(1, self.targets[:, None])
            loss = float(-own.double().mean() + penalty / 2 * weight.double().square().sum())
            error = log_p.exp_()
            error.scatter_add_(1, self.targets[:, None], torch.full_like(own, -1.0)).div_(len(own))
            slope = (self.rows.T @ error).add_(weight, alpha=penalty).div_(scale)
            bias_slope = error.sum(0, keepdim=True) * (self.intercept / bias_scale)
            point.grad = torch.cat([slope, bias_slope]).double()
            gap = float(point.grad.square().sum()) / 2
            return loss

        optimiser = torch.optim.LBFGS(
            [point],
            max_iter=min(_STRIDE, max_iter),
            history_size=10,
            tolerance_grad=0,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )
        with torch.no_grad():
            for _ in range(0, max_iter, _STRIDE):
                optimiser.step(objective)  # type: ignore[no-untyped-call]
                if gap <= tol * loss:
                    break
            self.weight, self.bias = self._unpack(point, scale, bias_scale)
        return gap <= tol * loss

    @staticmethod
    def _unpack(
        point: torch.Tensor, scale: torch.Tensor, bias_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (r, C) and bias (C,) from the scaled variables (r + 1, C)."""
        single = point.detach().float()
        return single[:-1] / scale, single[-1] / bias_scale
