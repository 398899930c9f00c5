"""J and F of label maps at the size of DAVIS (480 x 854): ours against davis2017-evaluation.

    python benchmarks/davis_metrics.py [--peers DIR] [--frames 67] [--rounds 7] [--growth] [--json FILE]

``in memory``: ours is ``sequence_scores`` on label maps; theirs is ``db_eval_iou`` and ``db_eval_boundary``
on Boolean masks that were split by object beforehand, as ``DAVISEvaluation`` calls them. Three sequences,
whose objects cover 2, 8 and 25% of a frame, each alone and all together; in some frames an object is missing
from one side or from both. Both sides run in one thread of Python.
``from files``: PNGs to mean, recall and decay of every object; theirs is ``DAVISEvaluation.evaluate``, ours
reads and scores as many frames at once as there are ``--threads``.
All values must agree within 1e-9. The peak of memory is that of a process of its own beyond its inputs.
``--peers DIR`` is a folder with a checkout of davisvideochallenge/davis2017-evaluation named
``davis2017-evaluation`` (it needs scikit-image); ``from files`` is not measured without it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from _growth import growth
from _patches import import_from
from _peer_code import compare, find_peer, options, start, write_json
from numpy.typing import NDArray

from lmim_bench.tasks._math.davis_frames import indexed_png, read_indexed_png
from lmim_bench.tasks._math.davis_metrics import (
    frame_scores,
    object_ids,
    scored_frames,
    sequence_scores,
    statistics,
)

HEIGHT, WIDTH = 480, 854
AREAS = (0.02, 0.08, 0.25)
TOLERANCE = 1e-9
GROWTH_FRAMES = (16, 32, 64, 128)

Labels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Values = NDArray[np.float64]


def sequence(frames: int, objects: int, area: float, seed: int) -> tuple[Labels, Labels]:
    """Truth and prediction (T, H, W): wavy discs that drift, the predicted ones a little apart."""
    rng = np.random.default_rng([seed, int(1000 * area)])
    centres = rng.uniform(0.3, 0.7, (objects, 2)) * (WIDTH, HEIGHT)
    drifts = rng.uniform(-1, 1, (objects, 2))
    waves = np.arange(2, 8)
    phases, heights = rng.uniform(0, 6, (objects, len(waves))), rng.uniform(0, 0.1, (objects, len(waves)))
    angles = np.linspace(0, 2 * np.pi, 720)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)

    def draw(t: int, error: float) -> Labels:
        labels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        for k in range(objects):
            turned = waves * angles[:, None] + phases[k] + 0.05 * t + 0.2 * error
            radius = np.sqrt(area * HEIGHT * WIDTH / np.pi) * (1 + np.cos(turned) @ heights[k])
            outline = centres[k] + drifts[k] * t + error + radius[:, None] * directions
            cv2.fillPoly(labels, [outline.round().astype(np.int32)], k + 1)
        return labels

    truth = np.stack([draw(t, 0) for t in range(frames)])
    predicted = np.stack([draw(t, 1 + t % 10) for t in range(frames)])
    truth[3][truth[3] == objects] = 0
    predicted[3:5][predicted[3:5] == objects] = 0
    return truth, predicted


def sequences(args: argparse.Namespace) -> list[tuple[Labels, Labels]]:
    return [sequence(args.frames, args.objects, area, args.seed) for area in AREAS]


def our_work(args: argparse.Namespace, data: Any = None) -> Callable[[], Values]:
    data = data or sequences(args)

    def work() -> Values:
        scores = [sequence_scores(truth, predicted) for truth, predicted in data]
        return np.concatenate([np.array(pair).reshape(2, -1) for pair in scores], axis=1)

    return work


def their_work(args: argparse.Namespace, data: Any = None) -> Callable[[], Values]:
    split = [
        [np.stack([maps[1:-1] == label for label in object_ids(truth[0])]) for maps in (truth, predicted)]
        for truth, predicted in data or sequences(args)
    ]
    cv2.setNumThreads(args.threads)
    region, boundary = plain_region, plain_boundary
    if args.peers:
        metrics = import_from(args.peers / "davis2017-evaluation", "davis2017.metrics")[0]
        region, boundary = metrics.db_eval_iou, metrics.db_eval_boundary
    boundary(*np.zeros((2, 1, 4, 4), dtype=bool))  # imports scikit-image

    def work() -> Values:
        found = []
        with np.errstate(invalid="ignore"):  # they divide by an empty union and mend it afterwards
            for truth, predicted in split:
                for metric in (region, boundary):
                    found.append(np.concatenate([metric(truth[k], predicted[k]) for k in range(len(truth))]))
        return np.stack([np.concatenate(found[::2]), np.concatenate(found[1::2])])

    return work


def plain_region(truth: Mask, predicted: Mask) -> Values:
    """Intersection over union of one object in all frames at once."""
    union = (truth | predicted).sum(axis=(1, 2))
    return np.where(union > 0, (truth & predicted).sum(axis=(1, 2)) / np.maximum(union, 1), 1.0)


def plain_boundary(truth: Mask, predicted: Mask) -> Values:
    """Boundary accuracy of one object frame by frame, on whole frames, dilated by all pixels of the disk."""
    radius = int(np.ceil(0.008 * np.hypot(*truth.shape[1:])))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = (x * x + y * y <= radius * radius).astype(np.uint8)
    scores = np.empty(len(truth))
    for t, masks in enumerate(zip(truth, predicted, strict=True)):
        edges = []
        for mask in masks:
            near = np.pad(mask, (0, 1), mode="edge")
            edges.append((mask != near[:-1, 1:]) | (mask != near[1:, :-1]) | (mask != near[1:, 1:]))
        reached = [cv2.dilate(edge.astype(np.uint8), disk) > 0 for edge in edges]
        sizes = [edge.sum() for edge in edges]
        if not all(sizes):
            scores[t] = float(not any(sizes))
            continue
        recall, precision = (edges[0] & reached[1]).sum() / sizes[0], (edges[1] & reached[0]).sum() / sizes[1]
        scores[t] = 2 * precision * recall / (precision + recall) if precision + recall else 0
    return scores


def write_files(args: argparse.Namespace, data: list[tuple[Labels, Labels]], folder: Path) -> None:
    """The sequences in the layout of DAVIS, and the results beside them."""
    (folder / "ImageSets/2017").mkdir(parents=True)
    names = [f"area-{area}" for area in AREAS]
    (folder / "ImageSets/2017/val.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    for name, pair in zip(names, data, strict=True):
        for where, maps in zip(("Annotations/480p", "results"), pair, strict=True):
            (folder / where / name).mkdir(parents=True)
            for t, labels in enumerate(maps):
                (folder / where / name / f"{t:05d}.png").write_bytes(indexed_png(labels))
        pictures = folder / "JPEGImages/480p" / name
        pictures.mkdir(parents=True)
        for t in range(len(pair[0])):
            (pictures / f"{t:05d}.jpg").touch()  # theirs lists the pictures and opens none


def our_files(args: argparse.Namespace, folder: Path) -> Callable[[], Values]:
    cv2.setNumThreads(args.threads)

    def score(name: str, frame: str, objects: tuple[int, ...]) -> tuple[Values, Values]:
        truth, predicted = (
            read_indexed_png((folder / where / name / frame).read_bytes())
            for where in ("Annotations/480p", "results")
        )
        return frame_scores(truth, predicted, objects)

    def work() -> Values:
        found = []
        with ThreadPoolExecutor(args.threads) as pool:
            for name in (folder / "ImageSets/2017/val.txt").read_text().split():
                frames = sorted(path.name for path in (folder / "Annotations/480p" / name).iterdir())
                objects = object_ids(
                    read_indexed_png((folder / "Annotations/480p" / name / frames[0]).read_bytes())
                )
                jobs = [pool.submit(score, name, frames[t], objects) for t in scored_frames(len(frames))]
                scores = np.array([job.result() for job in jobs]).transpose(1, 2, 0)  # (J and F, objects, T)
                found.append([(s.mean, s.recall, s.decay) for s in map(statistics, scores)])
        return np.concatenate(found, axis=2)  # (J and F, three statistics, objects)

    return work


def their_files(args: argparse.Namespace, folder: Path) -> Callable[[], Values]:
    module = import_from(args.peers / "davis2017-evaluation", "davis2017.evaluation")[0]
    import skimage.morphology  # noqa: F401  it is imported inside of their function otherwise

    cv2.setNumThreads(args.threads)

    def work() -> Values:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            evaluation = module.DAVISEvaluation(str(folder), "semi-supervised", "val")
            found = evaluation.evaluate(str(folder / "results"))
        return np.array([[found[metric][key] for key in "MRD"] for metric in "JF"])

    return work


def agree(ours: Values, theirs: Values) -> float:
    """The largest difference; more than the tolerance is an error."""
    apart = float(np.abs(ours - theirs).max())
    print(f"{ours.size} values, largest difference {apart:.1e} (allowed {TOLERANCE:g})", flush=True)
    assert apart <= TOLERANCE, "the two sides do not agree"
    return apart


def main() -> None:
    parser = options(__doc__, rounds=7, frames=67, objects=2)
    parser.add_argument("--growth", action="store_true", help="time and memory at several lengths as well")
    args = parser.parse_args()
    facts = start(args)
    peer = find_peer(
        args, "davis2017-evaluation", "davis2017/metrics.py", "davisvideochallenge/davis2017-evaluation"
    )
    data = sequences(args)
    apart = agree(our_work(args, data)(), their_work(args, data)())
    comparisons = []
    for area, pair in zip(AREAS, data, strict=True):
        sides = our_work(args, [pair]), their_work(args, [pair])
        comparisons += compare({f"in memory, objects of {area:.0%}": sides[0]}, sides[1], args.rounds)[0]
    sides = our_work(args, data), their_work(args, data)
    builds = partial(our_work, args), partial(their_work, args)
    comparisons += compare({"in memory": sides[0]}, sides[1], args.rounds, builds, args.threads)[0]
    if peer:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_files(args, data, folder)
            files = partial(our_files, args, folder), partial(their_files, args, folder)
            works = files[0](), files[1]()
            agree(works[0](), works[1]())
            rounds = min(3, args.rounds)
            comparisons += compare({"from files": works[0]}, works[1], rounds, files, args.threads)[0]
    grown = []
    if args.growth:
        for side, name in ((our_work, "ours"), (their_work, "theirs")):
            grown.append(growth(name, GROWTH_FRAMES, partial(of_length, side, args), args.threads, "frames"))
    write_json(args.json, facts, comparisons, largest_difference=apart, growth=grown)


def of_length(side: Callable[..., Any], args: argparse.Namespace, frames: int) -> partial[Any]:
    """The work of a side on sequences of so many frames, to be prepared."""
    return partial(side, argparse.Namespace(**{**vars(args), "frames": frames}))


if __name__ == "__main__":
    main()
