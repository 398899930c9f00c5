"""Region similarity J and boundary accuracy F of DAVIS, with their statistics, on uint8 label maps.

The definitions are those of davisvideochallenge/davis2017-evaluation (``metrics.py``, ``utils.py``), the
semi-supervised track; the numbers are equal to it, not merely close. The arithmetic is arranged
differently: masks are bits, 64 pixels a word (``bitmaps.py``), and only the box around an object is looked
at, which no boundary outside can touch.

- J is intersection over union of a frame's object; 1 where both masks are empty.
- F is the harmonic mean of boundary precision and recall, where a boundary pixel is matched by one of the
  other boundary at most ``ceil(0.008 * diagonal)`` pixels away. Both empty: 1. One empty: 0.
- Void (255) and every label that is no object of the sequence count as background.

One difference by intent: the official decay of sequences with more than 256 scored frames is wrong, since
its quarters are numbered in uint8. Here they are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .bitmaps import WORD, Words, boundaries, bounding_box, count, dilate, pack, words_across

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
    height, width = truth.shape
    masks = np.zeros((2, height, words_across(width) * WORD), dtype=np.bool_)
    scores = np.empty((2, len(objects)))
    for k, label in enumerate(objects):
        np.equal(truth, label, out=masks[0, :, :width])
        np.equal(predicted, label, out=masks[1, :, :width])
        scores[:, k] = _score(pack(masks), width)
    return scores[0], scores[1]


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


def tolerance(height: int, width: int) -> int:
    """The distance in pixels within which two boundaries match, for frames of that size."""
    return int(np.ceil(BOUNDARY_TOLERANCE * np.linalg.norm((height, width))))


def _score(masks: Words, width: int) -> tuple[float, float]:
    """J and F of one object, from its true and its predicted mask as bits (2, H, words)."""
    box = bounding_box(masks[0] | masks[1])
    if box is None:
        return 1.0, 1.0
    # A boundary lies on the mask or one pixel up or left of it: one row or word more on those sides. One row
    # more below keeps the rule of the frame's last row for masks that do reach it, and only for those.
    rows, words = box
    rows, words = slice(max(0, rows.start - 1), rows.stop + 1), slice(max(0, words.start - 1), words.stop)
    radius = tolerance(masks.shape[1], width)
    masks = masks[:, rows, words]
    region = count(masks[0] & masks[1]) / count(masks[0] | masks[1])
    edges = boundaries(masks, width - words.start * WORD)
    in_truth, in_predicted = count(edges[0]), count(edges[1])
    if in_truth == 0 or in_predicted == 0:
        return region, float(in_truth == in_predicted)
    near = dilate(edges, radius)
    recall = count(edges[0] & near[1]) / in_truth
    precision = count(edges[1] & near[0]) / in_predicted
    if precision + recall == 0:
        return region, 0.0
    return region, 2 * precision * recall / (precision + recall)
