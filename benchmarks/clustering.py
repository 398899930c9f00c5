"""k-means over a data set's patches and its matching with classes, against Leopart's evaluation of one seed.

    python benchmarks/clustering.py [--peers DIR] [--images 1276] [--rounds 1] [--json FILE]

Input of both: reduced patch features, float32 (images * 28 * 28, 50), and label maps of 100 x 100 pixels
(1276 images are one million patches). Two clusterings: one cluster a class with Hungarian matching, and K =
500 with majority matching. Theirs is ``cluster`` (faiss, 100 iterations, 5 starts) and
``PredsmIoU.compute_miou``, which compares all pixels once for every pair of cluster and class on
``--threads`` processes. Ours is timed twice: ``same settings`` runs every iteration and start that Leopart
runs and must give its clusters bit for bit, hence its mIoU; ``defaults`` leaves settled starts and takes
one start for K = 500, as the task does, and must come to the same inertia within 0.5% and to the same mIoU
within what another seed would change. ``--peers DIR`` is a folder with a checkout of MkuuWaUjinga/leopart
named ``leopart``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import faiss
import numpy as np
import torch
from _patches import import_from
from _peer_code import clusters, compare, find_peer, options, start, write_json
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from lmim_bench.bench.types import Array
from lmim_bench.tasks._math import segmentation as seg
from lmim_bench.tasks._math.clustering import Lloyd, Reducer, cluster_rows

GRID, SIDE, WIDTH, VOID = 28, 100, 50, 255
SAME = (Lloyd(100, 5, 0.0), Lloyd(100, 5, 0.0))
DEFAULTS = (Lloyd(100, 5, 1e-3), Lloyd(100, 1, 1e-3))
INERTIA = 5e-3
MIOU = 0.02
PATCHES = (
    "skimage, which a function not used here imports, is an empty module",
    "PredsmIoU is made without torchmetrics' constructor (its arguments have changed); n_jobs is --threads",
    "its printing is silenced",
)

Found = dict[str, Any]


def inputs(args: argparse.Namespace) -> tuple[Array, Array]:
    """Features (N * h * w, d) whose classes are spatially smooth, and label maps (N, 100, 100) with void."""
    rng = np.random.default_rng(args.seed)
    coarse = rng.standard_normal((args.images, args.classes, 4, 4), dtype=np.float32)
    smooth = F.interpolate(torch.from_numpy(coarse), size=SIDE, mode="bilinear").argmax(1).numpy()
    masks = smooth.astype(np.uint8)
    cell = np.arange(GRID) * SIDE // GRID + SIDE // (2 * GRID)
    labels = smooth[:, cell][:, :, cell].reshape(-1)
    features, drawn = clusters(len(labels), WIDTH, args.classes, args.noise, args.seed)
    order = np.empty(
        len(labels), dtype=np.int64
    )  # features of a class go to patches of that class, as far as they go
    order[np.argsort(labels, kind="stable")] = np.argsort(drawn, kind="stable")
    masks[rng.random(masks.shape) < 0.05] = VOID
    return np.ascontiguousarray(features[order]), masks


def our_work(args: argparse.Namespace, how: tuple[Lloyd, Lloyd], data: Any = None) -> Callable[[], Found]:
    points, masks = data or inputs(args)
    ks = (args.classes, args.k)

    def work() -> Found:
        keep = Reducer(np.zeros(WIDTH, np.float32), np.ones(WIDTH, np.float32), None)
        table = seg.label_table(args.classes, {VOID})
        named = ((str(i), mask) for i, mask in enumerate(masks))
        labels = seg.count_labels(named, (GRID, GRID), table, eval_size=0, input_size=GRID)
        ids = cluster_rows(points, keep, ks, args.seed, how)
        score = seg.MeanIoU(args.classes)
        found: Found = {"ids": ids}
        for name, k, chosen in zip(("hungarian", "majority"), ks, ids, strict=True):
            confusion = labels.confusion(chosen, k)
            match = seg.majority(confusion) if name == "majority" else seg.hungarian(confusion, "iou")
            counts = labels.class_counts(match[chosen])
            found[name] = float(score(seg.iou_items(counts).mean(axis=0)[None])[0])
        return found

    return work


def their_work(args: argparse.Namespace, data: Any = None) -> Callable[[], Found]:
    points, masks = data or inputs(args)
    cluster, miou = leopart(args) if args.peers else (plain_cluster, plain_miou)
    gt = torch.from_numpy(masks)[:, None].float()

    def work() -> Found:
        found: Found = {"ids": []}
        seen = gt != VOID
        with silence():
            for name, k in (("hungarian", args.classes), ("majority", args.k)):
                maps = cluster(WIDTH, points, GRID, k, seed=args.seed)
                found["ids"].append(maps.reshape(-1).numpy())
                large = F.interpolate(maps.float(), size=(SIDE, SIDE), mode="nearest")
                target, chosen = (part[seen].numpy().astype(int) for part in (gt, large))
                many = name == "majority"
                found[name] = float(
                    miou(target, chosen, k, args.classes, many_to_one=many, precision_based=many)[0]
                )
        return found

    return work


def leopart(args: argparse.Namespace) -> tuple[Callable[..., torch.Tensor], Callable[..., Any]]:
    """Their clustering and their metric."""
    unused: Any = types.ModuleType("skimage.measure")
    unused.label = None
    absent = {"skimage": types.ModuleType("skimage"), "skimage.measure": unused}
    # Only these are taken away again: joblib, first imported here, finds itself in sys.modules later.
    added = {name: sys.modules.setdefault(name, module) for name, module in absent.items()}
    try:
        (code,) = import_from(args.peers / "leopart", "experiments.utils")
    finally:
        for name, module in added.items():
            if module is absent[name]:
                del sys.modules[name]
    metric = code.PredsmIoU.__new__(code.PredsmIoU)
    object.__setattr__(metric, "n_jobs", args.threads)
    return code.cluster, metric.compute_miou


def plain_cluster(width: int, points: Array, side: int, k: int, seed: int) -> torch.Tensor:
    """faiss's k-means with Leopart's settings, and the nearest centroid of every patch."""
    kmeans = faiss.Kmeans(width, k, niter=100, nredo=5, seed=seed)
    kmeans.train(points)
    return torch.from_numpy(kmeans.index.search(points, 1)[1].reshape(-1, 1, side, side))


def plain_miou(
    target: Array, chosen: Array, k: int, classes: int, *, many_to_one: bool, precision_based: bool
) -> tuple[float]:
    """Leopart's metric in plain words: a pass over all pixels for each pair, then for each class."""
    value = np.empty((k, classes))
    for cluster in range(k):
        for c in range(classes):
            a, b = chosen == cluster, target == c
            both = (a & b).sum()
            whole = both + (a & ~b).sum() + (0 if precision_based else (~a & b).sum())
            value[cluster, c] = both / max(whole, 1e-8)
    match = value.argmax(1)
    if not many_to_one:
        rows, columns = linear_sum_assignment(value, maximize=True)
        match = np.zeros(k, dtype=int)
        match[rows] = columns
    predicted = match[chosen]
    iou = []
    for c in range(classes):
        a, b = predicted == c, target == c
        iou.append((a & b).sum() / max((a | b).sum(), 1e-8))
    return (float(np.mean(iou)),)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """What is printed, by Python or by faiss, goes nowhere."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def inertia(points: Array, ids: Array, k: int) -> float:
    """Sum of squared distances from the means of the clusters."""
    total = float(np.einsum("nd,nd->", points, points, dtype=np.float64))
    sums = np.stack([np.bincount(ids, column, minlength=k) for column in points.T], axis=1)
    return total - float((sums**2 / np.maximum(np.bincount(ids, minlength=k), 1)[:, None]).sum())


def main() -> None:
    parser = options(__doc__, rounds=1, images=256, classes=21, k=500)
    parser.add_argument("--noise", type=float, default=1.5, help="of the features [1.5]")
    args = parser.parse_args()
    facts = start(args)
    if find_peer(args, "leopart", "experiments/utils.py", "MkuuWaUjinga/leopart"):
        print("patched: " + "; ".join(PATCHES))
    data = inputs(args)
    points = data[0]
    print(f"{len(points)} patches of {WIDTH} numbers, {args.classes} classes, K = {args.k}", flush=True)
    runs = {"same settings": SAME, "defaults": DEFAULTS}
    works = {name: our_work(args, how, data) for name, how in runs.items()}
    builds = partial(our_work, args, SAME), partial(their_work, args)
    comparisons, results, theirs = compare(works, their_work(args, data), args.rounds, builds, args.threads)
    answers = []
    for name, how in runs.items():
        ours, ratios = results[name], []
        for which, (matching, k) in enumerate((("hungarian", args.classes), ("majority", args.k))):
            ids = ours["ids"][which], theirs["ids"][which]
            ratio = inertia(points, ids[0], k) / inertia(points, ids[1], k)
            ratios.append(ratio)
            print(
                f"{name}, K = {k}, {matching}: "
                f"mIoU ours {ours[matching]:.6f}, theirs {theirs[matching]:.6f}; "
                f"inertia ours / theirs {ratio:.6f}; ids equal {np.mean(ids[0] == ids[1]):.4%}",
                flush=True,
            )
            allowed = (1e-9, 1e-9) if how is SAME else (MIOU, INERTIA)
            assert abs(ours[matching] - theirs[matching]) <= allowed[0], "the mIoU differs"
            assert ratio <= 1 + allowed[1], "our inertia is higher"
        answers.append({"name": name, "inertia_ratio": ratios, "miou": [ours["hungarian"], ours["majority"]]})
    write_json(args.json, facts, comparisons, answers=answers)


if __name__ == "__main__":
    main()
