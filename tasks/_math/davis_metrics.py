"""Region similarity J and boundary accuracy F of DAVIS, with their statistics, on uint8 label maps.

The definitions are those of davisvideochallenge/davis2017-evaluation (``metrics.py``, ``utils.py``), the
semi-supervised track; the numbers are equal to it, not merely close. The arithmetic is arranged
differently: one joint count a frame gives J of all objects, and F looks only at the pixels around an
object, which no boundary outside can touch.

- J is intersection over union of a frame's object; 1 where both masks are empty.
- F is the harmonic mean of boundary precision and recall, where a boundary pixel is matched by one of the
  other boundary at most ``ceil(0.008 * diagonal)`` pixels away. Both empty: 1. One empty: 0.
- Void (255) and every label that is no object of the sequence count as background.

One difference by intent: the official decay of sequences with more than 256 scored frames is wrong, since
its quarters are numbered in uint8. Here they are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

VOID = 255
BOUNDARY_TOLERANCE = 0.008

LabelMap = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """Mean, recall (share of frames above 0.5) and decay (first quarter less last quarter), one an object."""

    mean: Values
    recall: Values
    decay: Values


def object_ids(first: LabelMap) -> tuple[int, ...]:
    """The objects of a sequence: the labels of its first annotated frame, without background and void.

    The official tool takes 1..max instead, which is the same wherever the labels have no gap.
    """
    present = np.flatnonzero(np.bincount(first.ravel(), minlength=256))
    return tuple(int(i) for i in present if i not in (0, VOID))


def scored_frames(length: int) -> range:
    """The frames that count: all but the first, which is given, and the last."""
    return range(1, length - 1)


def frame_scores(truth: LabelMap, predicted: LabelMap, objects: tuple[int, ...]) -> tuple[Values, Values]:
    """J and F of every object in one frame.

    Args:
        truth: ground truth, uint8 (H, W).
        predicted: prediction, uint8 (H, W).
        objects: the K object ids of the sequence.

    Returns:
        J (K,) and F (K,).

    Raises:
        ValueError: the two maps differ in size.
    """
    if truth.shape != predicted.shape or truth.ndim != 2:
        raise ValueError(f"label maps of one size are compared, got {truth.shape} and {predicted.shape}")
    index = np.zeros(256, dtype=np.uint8)
    index[list(objects)] = np.arange(1, len(objects) + 1)
    truth, predicted = index[truth], index[predicted]
    return _regions(truth, predicted, len(objects)), _boundaries(truth, predicted, len(objects))


def sequence_scores(
    truth: NDArray[np.uint8], predicted: NDArray[np.uint8], objects: tuple[int, ...] | None = None
) -> tuple[Values, Values]:
    """J and F of every object in every scored frame of a sequence: two arrays (K, T - 2).

    Args:
        truth: ground truth of all frames, uint8 (T, H, W).
        predicted: prediction of all frames, uint8 (T, H, W); the first and the last are not looked at.
        objects: object ids; those of the first frame unless given.
    """
    objects = object_ids(truth[0]) if objects is None else objects
    pairs = [frame_scores(truth[t], predicted[t], objects) for t in scored_frames(len(truth))]
    empty = np.empty((len(objects), 0))
    region = np.stack([j for j, _ in pairs], axis=1) if pairs else empty
    boundary = np.stack([f for _, f in pairs], axis=1) if pairs else empty
    return region, boundary


def statistics(values: Values) -> Statistics:
    """Mean, recall and decay of per-frame values (K, T) of K objects, T at least 1.

    The quarters share their border frames, and their ends are rounded as in the official code.
    """
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"per-frame values (objects, frames) are expected, got shape {values.shape}")
    values = np.ascontiguousarray(values)  # numpy adds in another order otherwise: equal to the last bit
    # The 1e-10 settles halves upwards before numpy rounds them to the even neighbour.
    ends = (np.round(np.linspace(1, values.shape[1], 5) + 1e-10) - 1).astype(np.intp)
    first, last = values[:, ends[0] : ends[1] + 1], values[:, ends[3] : ends[4] + 1]
    return Statistics(
        mean=values.mean(axis=1),
        recall=(values > 0.5).mean(axis=1),
        decay=first.mean(axis=1) - last.mean(axis=1),
    )


def boundary_map(mask: Mask) -> Mask:
    """Boundary pixels of a mask: those that differ from their right, lower or lower right neighbour.

    The last row and column have one neighbour only, the last pixel none.
    """
    edge = np.zeros_like(mask)
    right = mask[:, :-1] ^ mask[:, 1:]
    below = mask[:-1] ^ mask[1:]
    edge[:, :-1] |= right
    edge[:-1] |= below
    edge[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return edge


@lru_cache(maxsize=16)
def disk(radius: int) -> NDArray[np.uint8]:
    """All pixels at most ``radius`` away from the centre, as skimage.morphology.disk has them."""
    squares = np.arange(-radius, radius + 1) ** 2
    return (squares[:, None] + squares[None, :] <= radius * radius).astype(np.uint8)


def tolerance(height: int, width: int) -> int:
    """The distance in pixels within which two boundaries match, for frames of that size."""
    return int(np.ceil(BOUNDARY_TOLERANCE * np.linalg.norm((height, width))))


def _regions(truth: LabelMap, predicted: LabelMap, count: int) -> Values:
    labels = count + 1
    joint = np.bincount(
        (truth.astype(np.intp) * labels + predicted).ravel(), minlength=labels * labels
    ).reshape(labels, labels)
    intersection = np.diag(joint)[1:]
    union = joint.sum(axis=0)[1:] + joint.sum(axis=1)[1:] - intersection
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0)


def _boundaries(truth: LabelMap, predicted: LabelMap, count: int) -> Values:
    element = disk(tolerance(*truth.shape))
    return np.array([_boundary(truth == k, predicted == k, element) for k in range(1, count + 1)])


def _boundary(truth: Mask, predicted: Mask, element: NDArray[np.uint8]) -> float:
    either = truth | predicted
    rows, columns = np.flatnonzero(either.any(axis=1)), np.flatnonzero(either.any(axis=0))
    if not len(rows):
        return 1.0
    # A boundary lies on the mask or one pixel up or left of it. One pixel on every side keeps the rule of
    # the last row and column for masks that do reach the frame's edge, and only for those.
    window = (
        slice(max(0, rows[0] - 1), rows[-1] + 2),
        slice(max(0, columns[0] - 1), columns[-1] + 2),
    )
    edges = boundary_map(truth[window]), boundary_map(predicted[window])
    n_truth, n_predicted = (int(np.count_nonzero(edge)) for edge in edges)
    if n_truth == 0 or n_predicted == 0:
        return float(n_truth == n_predicted)
    near_truth, near_predicted = (cv2.dilate(edge.astype(np.uint8), element) > 0 for edge in edges)
    precision = np.count_nonzero(edges[1] & near_truth) / n_predicted
    recall = np.count_nonzero(edges[0] & near_predicted) / n_truth
    if precision + recall == 0:
        return 0.0
    return float(2 * precision * recall / (precision + recall))
