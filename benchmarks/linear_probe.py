"""The linear probe and its grid of C, against scikit-learn's ``LogisticRegression`` over the same grid.

    python benchmarks/linear_probe.py [--train 50000] [--tols 1e-4 1e-5 1e-6] [--rounds 1] [--json FILE]

Both sides: the same tenth of train held out, a fit at each of the 13 C on the rest, the C of highest
held-out accuracy fitted again on all of train, test predicted once. Ours is the whole task on features in
memory. Theirs is ``LogisticRegression(C=C, max_iter=1000, tol=...)`` (L-BFGS) in float32 on features
standardised by the same statistics, once for every ``--tols``. scikit-learn's default of 1e-4 leaves large
C far above the minimum (the objectives that each reaches are printed), so it does less work for another
accuracy; the comparison that counts is the loosest at which both choose the same C and their accuracies
agree within 0.1 points.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from _peer_code import clusters, compare, options, start, toy_context, value, write_json
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from lmim_bench.bench.types import Array
from lmim_bench.tasks._math.logistic import fit_path
from lmim_bench.tasks._math.normalise import Normaliser
from lmim_bench.tasks.linear import TASK, LinearConfig, _train_split

TOLERANCE = 1e-3
MAX_ITER = 1000
GRID = LinearConfig().c


def inputs(args: argparse.Namespace) -> Any:
    """The Context over train and test, and the config."""
    train, test = (
        clusters(rows, args.width, args.classes, args.noise, args.seed, decay=args.decay, part=part)
        for part, rows in enumerate((args.train, args.test))
    )
    settings = {"features": ("cls",), "solver": "lbfgs", "max_iter": MAX_ITER, "c": tuple(args.grid)}
    return train, test, LinearConfig(**settings), settings


def our_work(args: argparse.Namespace, data: Any = None) -> Callable[[], dict[str, Any]]:
    train, test, _, settings = data or inputs(args)

    def work() -> dict[str, Any]:
        found = toy_context(train, test, seed=args.seed).run(TASK, **settings)
        detail = found["top1"].detail
        return {"C": detail["C"], "accuracy": value(found["top1"]), "heldout": detail["heldout_accuracy"]}

    return work


def their_work(args: argparse.Namespace, tol: float, data: Any = None) -> Callable[[], dict[str, Any]]:
    train, test, cfg, _ = data or inputs(args)
    (rows, labels), (queries, truth) = train, test
    split = _train_split(toy_context(train, test, seed=args.seed), cfg)

    def fit(index: Array, c: float) -> tuple[Normaliser, LogisticRegression]:
        norm = Normaliser.fit(cfg.normalise, rows[index])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return norm, _theirs(c, tol).fit(norm(rows[index]), labels[index])

    def work() -> dict[str, Any]:
        scores, steps = [], []
        for c in cfg.c:
            norm, model = fit(split.kept, c)
            scores.append(model.score(norm(rows[split.held]), labels[split.held]))
            steps.append(int(model.n_iter_.max()))
        best = cfg.c[int(np.argmax(scores))]
        norm, model = fit(split.everything, best)
        accuracy = model.score(norm(queries), truth)
        return {
            "C": best,
            "accuracy": accuracy,
            "heldout": max(scores),
            "scores": scores,
            "iterations": steps,
        }

    return work


def _theirs(c: float, tol: float) -> LogisticRegression:
    return LogisticRegression(C=c, max_iter=MAX_ITER, tol=tol)


def objectives(data: Any, strengths: Sequence[float], tol: float) -> list[dict[str, float]]:
    """What each side reaches on all of train: (mean cross-entropy + penalty) in double precision."""
    (rows, labels), _, cfg, _ = data
    x = Normaliser.fit(cfg.normalise, rows)(rows)
    heads = fit_path(x, labels, strengths, int(labels.max()) + 1, max_iter=MAX_ITER, tol=cfg.tol)
    found = []
    for c, head in zip(strengths, heads, strict=True):
        theirs = _theirs(c, tol).fit(x, labels)
        values = {"C": c}
        for side, weight, bias in (
            ("ours", head.weight, head.bias),
            ("theirs", theirs.coef_, theirs.intercept_),
        ):
            logits = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
            logits -= logits.max(axis=1, keepdims=True)
            loss = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(x)), labels]
            values[side] = float(loss.mean() + (weight.astype(np.float64) ** 2).sum() / (2 * c * len(x)))
        found.append(values)
    return found


def main() -> None:
    parser = options(__doc__, peers=False, rounds=1, train=10_000, test=10_000, width=768, classes=100)
    parser.add_argument("--noise", type=float, default=8.0, help="of the synthetic classes [8]")
    parser.add_argument("--decay", type=float, default=0.7, help="exponent of their spectrum [0.7]")
    parser.add_argument(
        "--grid", type=float, nargs="+", default=list(GRID), help="values of C [the task's 13]"
    )
    parser.add_argument(
        "--tols", type=float, nargs="+", default=[1e-4, 1e-5, 1e-6], help="of scikit-learn [1e-4 1e-5 1e-6]"
    )
    args = parser.parse_args()
    facts = start(args)
    data = inputs(args)
    ours = our_work(args, data)
    one = argparse.Namespace(**(vars(args) | {"grid": [1.0]}))  # memory does not depend on the grid
    comparisons: list[Any] = []
    details: list[dict[str, Any]] = []
    for tol in args.tols:
        theirs = their_work(args, tol, data)
        builds = None if comparisons else (partial(our_work, one), partial(their_work, one, tol))
        name = f"whole grid, scikit-learn at tol {tol:g}"
        found, results, their_result = compare({name: ours}, theirs, args.rounds, builds, args.threads)
        our_result = results[name]
        print(f"  ours   {our_result}\n  theirs {their_result}")
        apart = our_result["accuracy"] - their_result["accuracy"]
        agree = our_result["C"] == their_result["C"] and abs(apart) <= TOLERANCE + 1e-9
        print(f"  ours - theirs {apart * 100:+.2f} points: {'' if agree else 'not '}the same answer")
        for row in objectives(data, (our_result["C"],), tol):
            print(
                f"  objective at C = {row['C']:g}: ours {row['ours']:.7f}, theirs {row['theirs']:.7f}",
                flush=True,
            )
        comparisons += found
        details.append({"tol": tol, "ours": our_result, "theirs": their_result, "agree": agree})
        if agree:
            break
    write_json(args.json, facts, comparisons, results=details)
    assert details[-1]["agree"], "no tolerance of --tols gives the same answer on both sides"


if __name__ == "__main__":
    main()
