"""k-NN at seven k and by both votes from one search, against DINO's ``knn_classifier`` run once for each k.

    python benchmarks/knn.py [--peers DIR] [--train 50000] [--test 50000] [--rounds 3] [--json FILE]

Ours is the whole task on features that lie in memory (checks, search, weighted and majority votes, top-1
and top-5, what the report gets), without the leave-one-out part that DINO has not. Theirs is the function
of ``eval_knn.py`` at the same k, one call each, as its main loop does; it gives the weighted vote alone, so
``one k`` also compares our whole task with a single call of theirs. Features are of unit length for both.
Top-1 must agree within 0.02 points: ties are broken differently, and products round differently. ``--peers
DIR`` is a folder with a checkout of facebookresearch/dino named ``dino``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _patches import import_from
from _peer_code import clusters, compare, find_peer, options, start, toy_context, value, write_json

from lmim_bench.tasks._math.normalise import unit_rows
from lmim_bench.tasks.knn import TASK

KS = (1, 5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07
CHUNKS = 100
TOLERANCE = 2e-4

Scores = dict[int, float]


def inputs(args: argparse.Namespace) -> tuple[Any, Any]:
    """(features, labels) of train and test, unit length."""
    made = (
        clusters(rows, args.width, args.classes, noise=1.5, seed=args.seed, part=part)
        for part, rows in enumerate((args.train, args.test))
    )
    train, test = ((unit_rows(x), labels) for x, labels in made)
    return train, test


def our_work(args: argparse.Namespace, data: Any = None) -> Callable[[], Scores]:
    train, test = data or inputs(args)

    def work() -> Scores:
        context = toy_context(train, test, n_classes=args.classes)
        found = context.run(TASK, k=KS, temperature=TEMPERATURE, leave_one_out=False)
        return {k: value(found[f"top1@k={k}"]) for k in KS}

    return work


def their_work(args: argparse.Namespace, data: Any = None, ks: tuple[int, ...] = KS) -> Callable[[], Scores]:
    train, test = ([torch.from_numpy(part) for part in pair] for pair in data or inputs(args))
    classify: Callable[..., Any] = (
        import_from(args.peers / "dino", "eval_knn")[0].knn_classifier if args.peers else plain_classifier
    )

    def work() -> Scores:
        return {k: float(classify(*train, *test, k, TEMPERATURE, args.classes)[0]) / 100 for k in ks}

    return work


@torch.no_grad()
def plain_classifier(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    test: torch.Tensor,
    test_labels: torch.Tensor,
    k: int,
    T: float,  # noqa: N803
    num_classes: int,
) -> tuple[float, float]:
    """DINO's function in plain words: for each chunk all similarities, top k, one-hot, sum, sort."""
    hits = [0, 0]
    size = max(1, len(test) // CHUNKS)
    for rows, truth in zip(torch.split(test, size), torch.split(test_labels, size), strict=True):
        similarity, position = (rows @ train.T).topk(k)
        one_hot = torch.nn.functional.one_hot(train_labels[position], num_classes).float()
        score = (one_hot * (similarity / T).exp()[..., None]).sum(1)
        right = score.argsort(1, descending=True) == truth[:, None]
        hits[0] += int(right[:, :1].sum())
        hits[1] += int(right[:, : min(5, k)].sum())
    return hits[0] * 100 / len(test), hits[1] * 100 / len(test)


def main() -> None:
    parser = options(__doc__, train=50_000, test=50_000, width=768, classes=1000)
    args = parser.parse_args()
    facts = start(args)
    find_peer(args, "dino", "eval_knn.py", "facebookresearch/dino")
    data = inputs(args)
    ours, theirs = our_work(args, data), their_work(args, data)
    builds = partial(our_work, args), partial(their_work, args, ks=KS[-1:])
    found, results, their_scores = compare({"seven k": ours}, theirs, args.rounds, builds, args.threads)
    our_scores = results["seven k"]
    apart = max(abs(our_scores[k] - their_scores[k]) for k in KS)
    print(f"top-1 of ours by k: {', '.join(f'{k}: {score:.2%}' for k, score in our_scores.items())}")
    print(f"largest difference of top-1: {apart * 100:.4f} points (allowed {TOLERANCE * 100:g})")
    assert apart <= TOLERANCE, "the two sides do not agree"
    single, _, _ = compare({"one k": ours}, their_work(args, data, (20,)), 1)
    write_json(args.json, facts, found + single, top1=our_scores, largest_difference=apart)


if __name__ == "__main__":
    main()
