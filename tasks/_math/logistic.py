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
    tol: float = 1e-3,
    intercept: bool = True,
    device: str = "cpu",
) -> Iterator[LinearHead]:
    """One head for each C, in the order given; every fit starts from the one before.

    The objective is scikit-learn's multinomial one: C * sum of cross-entropies + |W|^2 / 2, the bias free.
    Two classes are a softmax too, where scikit-learn has a single logit: the same head at its 2 C.

    Args:
        rows: features, float32 (N, D).
        labels: class indices (N,).
        strengths: values of C; rising ones make the warm starts cheap.
        n_classes: width of the heads that come out.
        max_iter: L-BFGS iterations a fit.
        tol: converged when no entry of the gradient of (objective / (C N)), in the scaled variables,
            exceeds it; the mean loss is then within about its square of the optimum.
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
        from scipy.optimize import minimize

        p = torch.softmax(self.rows @ self.weight + self.bias, dim=1)
        curvature = max(float((p * (1 - p)).mean()), _CURVATURE_FLOOR)
        scale = torch.sqrt(curvature * self.spread + penalty)[:, None]
        bias_scale = curvature**0.5
        shape = (len(self.spread) + 1, len(self.bias))

        def unpack(flat: Array) -> tuple[torch.Tensor, torch.Tensor]:
            both = torch.from_numpy(flat.astype(np.float32)).to(self.rows.device).view(shape)
            return both[:-1] / scale, both[-1] / bias_scale

        def objective(flat: Array) -> tuple[float, Array]:
            weight, bias = unpack(flat)
            log_p = torch.log_softmax(torch.addmm(bias, self.rows, weight), dim=1)
            own = log_p.gather(1, self.targets[:, None])
            loss = -own.double().mean() + penalty / 2 * weight.double().square().sum()
            error = log_p.exp_()
            error.scatter_add_(1, self.targets[:, None], torch.full_like(own, -1.0)).div_(len(own))
            slope = (self.rows.T @ error).add_(weight, alpha=penalty).div_(scale)
            bias_slope = error.sum(0) * (self.intercept / bias_scale)
            gradient = torch.cat([slope, bias_slope[None]]).double().cpu().numpy()
            return float(loss), gradient.ravel()

        start = torch.cat([self.weight * scale, self.bias[None] * bias_scale]).double().cpu().numpy()
        options = {"maxiter": max_iter, "maxfun": 10 * max_iter, "gtol": tol, "ftol": 1e-12, "maxls": 50}
        found = minimize(objective, start.ravel(), jac=True, method="L-BFGS-B", options=options)
        self.weight, self.bias = unpack(found.x)
        return bool(found.success)
