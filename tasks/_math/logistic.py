"""Multinomial logistic regression by L-BFGS along a path of C (scikit-learn underneath)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...bench.types import Array

_FEW = "The number of unique classes is greater than 50%"
"""scikit-learn takes one image a class for a mistake; here it is the protocol."""


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
    tol: float = 1e-4,
    intercept: bool = True,
) -> Iterator[LinearHead]:
    """One head for each C, in the order given; every fit starts from the one before.

    The objective is scikit-learn's: C * sum of cross-entropies + |W|^2 / 2, with the bias free.

    Args:
        rows: features, float32 (N, D); the fit keeps their precision.
        labels: class indices (N,).
        strengths: values of C; rising ones make the warm starts cheap.
        n_classes: width of the heads that come out.
        max_iter: L-BFGS iterations a fit.
        tol: the fit has converged when no gradient entry of the mean loss exceeds it.
        intercept: whether there is a bias.

    Raises:
        ValueError: fewer than two classes among ``labels``.
    """
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=max_iter, tol=tol, fit_intercept=intercept, warm_start=True)
    for strength in strengths:
        model.set_params(C=strength)
        yield _head(model, _fit(model, rows, labels), n_classes)


def _fit(model: object, rows: Array, labels: Array) -> bool:
    """Fit in place; whether the solver converged. Other warnings than its own pass through."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(rows, labels)  # type: ignore[attr-defined]
    for warning in caught:
        expected = issubclass(warning.category, ConvergenceWarning) or _FEW in str(warning.message)
        if not expected:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def _head(model: object, converged: bool, n_classes: int) -> LinearHead:
    known, coefficients = model.classes_, model.coef_  # type: ignore[attr-defined]
    intercept = np.broadcast_to(model.intercept_, len(coefficients))  # type: ignore[attr-defined]
    if len(known) == 2:  # scikit-learn keeps one row for two classes: the logit of the second
        coefficients = np.concatenate([np.zeros_like(coefficients), coefficients])
        intercept = np.concatenate([np.zeros_like(intercept), intercept])
    weight = np.zeros((n_classes, coefficients.shape[1]), dtype=coefficients.dtype)
    bias = np.full(n_classes, -np.inf, dtype=coefficients.dtype)
    weight[known], bias[known] = coefficients, intercept
    return LinearHead(weight, bias, converged)
