"""10,000 five-way episodes from cached features, against EASY's loop over the same number.

    python benchmarks/few_shot.py [--peers DIR] [--episodes 10000] [--shots 1] [--rounds 1] [--json FILE]

Ours: drawing the episodes and nearest class mean on all of them, as the task does. Theirs: ``define_runs``
and ``ncm`` of ``few_shot_eval.py`` with its own batches of 20 episodes and features of unit length
(preprocessing ``E``), as its ``main.py --test-features`` runs them. Features are those of a few-shot test
split: 20 classes of 600 images. On the *same* episodes our accuracies must be those of EASY's
``ncm_cosine`` one by one, except where rounding decides between two means; on its own episodes EASY's
``ncm`` (Euclidean distance to means that are not brought to unit length) must give an interval that meets
ours. ``--peers DIR`` is a folder with a checkout of ybendou/easy named ``easy``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from _patches import import_from
from _peer_code import clusters, compare, find_peer, options, start, write_json

from lmim_bench.bench.types import Array
from lmim_bench.tasks._math.few_shot import episode_hits, plan_episodes, sample_episodes
from lmim_bench.tasks._math.normalise import unit_rows

WAY, QUERIES, BATCH = 5, 15, 20
PATCHES = (
    "its options are read from the command line on import: they are --device cpu --n-runs EPISODES "
    "--preprocessing E, and its defaults",
)

Found = tuple[float, float]
"""Mean accuracy and half of its 95% interval."""


def inputs(args: argparse.Namespace) -> tuple[Array, Array]:
    """Unit features ordered by class (C * images, D), and labels."""
    rows, labels = clusters(args.classes * args.images, args.width, args.classes, args.noise, args.seed)
    order = np.argsort(labels, kind="stable")
    return unit_rows(rows[order]), labels[order]


def our_work(args: argparse.Namespace, data: Any = None) -> Callable[[], Found]:
    rows, labels = data or inputs(args)

    def work() -> Found:
        plan = plan_episodes(np.bincount(labels), WAY, args.shots, QUERIES)
        assert plan is not None
        picks = sample_episodes(labels, plan, args.episodes, np.random.default_rng(args.seed))
        accuracy = episode_hits(rows, picks, args.shots).mean(axis=(1, 2))
        return float(accuracy.mean()), float(1.96 * accuracy.std(ddof=1) / len(accuracy) ** 0.5)

    return work


def easy(args: argparse.Namespace) -> Any:
    """Their module, made for the CPU and this number of episodes."""
    options = [
        "--device",
        "cpu",
        "--dataset-path",
        "none",
        "--n-runs",
        str(args.episodes),
        "--preprocessing",
        "E",
    ]
    with mock.patch.object(sys, "argv", ["main.py", *options, "--seed", str(args.seed)]):
        (code,) = import_from(args.peers / "easy", "few_shot_eval")
    print()  # its modules print without a new line
    return code


class Plain:
    """EASY's loop in plain words: a draw for each class of each episode, batches, Euclidean nearest mean."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.episodes = args.episodes

    def define_runs(self, way: int, shots: int, queries: int, classes: int, images: list[int]) -> Any:
        chosen = torch.stack([torch.randperm(classes)[:way] for _ in range(self.episodes)])
        within = torch.stack(
            [
                torch.stack([torch.randperm(images[c])[: shots + queries] for c in episode])
                for episode in chosen.tolist()
            ]
        )
        return chosen, within

    def ncm(self, _: Any, features: torch.Tensor, chosen: Any, within: Any, shots: int) -> Found:
        return self._run(features, chosen, within, shots, unit=False)

    def ncm_cosine(self, _: Any, features: torch.Tensor, chosen: Any, within: Any, shots: int) -> Found:
        return self._run(features, chosen, within, shots, unit=True)

    def _run(self, features: torch.Tensor, chosen: Any, within: Any, shots: int, unit: bool) -> Found:
        scores = []
        for c, i in zip(chosen.split(BATCH), within.split(BATCH), strict=True):
            episodes = features[c[:, :, None], i]
            means = episodes[:, :, :shots].mean(2)
            means = torch.nn.functional.normalize(means, dim=-1) if unit else means
            distance = torch.cdist(episodes[:, :, shots:].flatten(1, 2), means)
            truth = torch.arange(WAY).repeat_interleave(QUERIES)
            scores.append((distance.argmin(-1) == truth).float().mean(1))
        accuracy = torch.cat(scores)
        return float(accuracy.mean()), float(1.96 * accuracy.std() / len(accuracy) ** 0.5)


def their_work(args: argparse.Namespace, data: Any = None) -> Callable[[], Found]:
    rows, _ = data or inputs(args)
    features = torch.from_numpy(rows).view(args.classes, args.images, -1)
    code: Any = easy(args) if args.peers else Plain(args)

    def work() -> Found:
        runs = code.define_runs(WAY, args.shots, QUERIES, args.classes, [args.images] * args.classes)
        mean, half = code.ncm(torch.zeros(0, 0, 0), features, *runs, args.shots)
        return float(mean), float(half)

    return work


def same_episodes(args: argparse.Namespace, data: tuple[Array, Array]) -> tuple[float, float]:
    """Mean accuracy of ours and of their cosine variant on episodes that they drew."""
    rows, _ = data
    features = torch.from_numpy(rows).view(args.classes, args.images, -1)
    code: Any = easy(args) if args.peers else Plain(args)
    chosen, within = code.define_runs(WAY, args.shots, QUERIES, args.classes, [args.images] * args.classes)
    picks = (chosen[:, :, None] * args.images + within).numpy()
    theirs, _ = code.ncm_cosine(torch.zeros(0, 0, 0), features, chosen, within, args.shots)
    return float(episode_hits(rows, picks, args.shots).mean()), float(theirs)


def main() -> None:
    parser = options(__doc__, rounds=1, episodes=10_000, shots=1, classes=20, images=600, width=768)
    parser.add_argument("--noise", type=float, default=2.5, help="of the synthetic classes [2.5]")
    args = parser.parse_args()
    facts = start(args)
    if find_peer(args, "easy", "few_shot_eval.py", "ybendou/easy"):
        print("patched: " + "; ".join(PATCHES))
    data = inputs(args)
    ours, theirs = same_episodes(args, data)
    print(f"same episodes: ours {ours:.6%}, their cosine {theirs:.6%}", flush=True)
    assert abs(ours - theirs) <= 1e-5, "the two sides disagree on the same episodes"
    few = argparse.Namespace(**(vars(args) | {"episodes": 10 * BATCH}))  # their memory is that of a batch
    builds = partial(our_work, args), partial(their_work, few)
    name = f"{args.episodes} episodes"
    found, results, their_score = compare(
        {name: our_work(args, data)}, their_work(args, data), args.rounds, builds, args.threads
    )
    our_score = results[name]
    print(
        f"own episodes: ours {our_score[0]:.4%} +- {our_score[1]:.4%}, "
        f"theirs {their_score[0]:.4%} +- {their_score[1]:.4%}"
    )
    assert abs(our_score[0] - their_score[0]) <= our_score[1] + their_score[1], "the intervals do not meet"
    write_json(args.json, facts, found, same_episodes=[ours, theirs], ours=our_score, theirs=their_score)


if __name__ == "__main__":
    main()
