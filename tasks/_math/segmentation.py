"""Scoring of cluster maps against label maps: counts, matchings, mean IoU, best overlap.

Cluster ids live on the patch grid and reach the pixels by nearest neighbour, so every pixel belongs to
one patch. How many pixels of each class lie under each patch (``PatchLabels``) is then all that any
score needs, whatever the size of the masks: each confusion matrix is one ``bincount`` over those counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...bench.errors import TaskError
from ...bench.types import Array

Counts = NDArray[np.int64]
AbsentClasses = Literal["zero", "skip"]
VOID = -1
UNKNOWN = -2


def label_table(classes: int, left_out: Iterable[int]) -> NDArray[np.int16]:
    """Look-up from mask values (256) to evaluated classes 0..C-1; ``VOID`` and ``UNKNOWN`` are negative."""
    table = np.full(256, UNKNOWN, dtype=np.int16)
    out = set(left_out)
    kept = [label for label in range(classes) if label not in out]
    table[kept] = np.arange(len(kept))
    table[sorted(out)] = VOID
    return table


def nearest(source: int, target: int) -> NDArray[np.int64]:
    """Index into ``source`` cells of each of ``target`` cells, floor(i * source / target): PyTorch's nearest,
    but for its rounding of places that are whole numbers.
    """
    return np.arange(target, dtype=np.int64) * source // target


def nearest_centre(source: int, target: int) -> NDArray[np.int64]:
    """The same for cell centres, floor((i + 1/2) * source / target): Pillow's NEAREST, with the
    same exception.
    """
    return (2 * np.arange(target, dtype=np.int64) + 1) * source // (2 * target)


@dataclass(frozen=True)
class PatchLabels:
    """Numbers of pixels of each class under each patch, as sparse entries.

    Attributes:
        patch: (E,) position of the patch in the flattened (N, h, w) grids, ascending.
        label: (E,) evaluated class.
        count: (E,) pixels.
        images: N.
        patches: patches an image, h * w.
        classes: number of evaluated classes, C.
    """

    patch: Counts
    label: Counts
    count: Counts
    images: int
    patches: int
    classes: int

    def confusion(self, assignment: NDArray[np.integer], clusters: int) -> Counts:
        """Pixels of each (cluster, class), (K, C), for cluster ids of all patches (N * h * w,)."""
        key = assignment.reshape(-1)[self.patch].astype(np.int64) * self.classes + self.label
        counts = np.bincount(key, weights=self.count, minlength=clusters * self.classes)
        return counts.astype(np.int64).reshape(clusters, self.classes)

    def confusion_per_image(self, assignment: NDArray[np.integer], clusters: int) -> Counts:
        """Pixels of each (image, cluster, class), (N, K, C)."""
        ids = assignment.reshape(self.images, -1) + clusters * np.arange(self.images)[:, None]
        return self.confusion(ids, self.images * clusters).reshape(self.images, clusters, self.classes)

    def majority(self) -> tuple[Counts, Counts]:
        """The patches that hold a labelled pixel, (P,) ascending, and the class that most of them have."""
        order = np.lexsort((self.label, -self.count, self.patch))
        patch = self.patch[order]
        first = np.concatenate([[True], patch[1:] != patch[:-1]]) if len(patch) else np.zeros(0, dtype=bool)
        return patch[first], self.label[order][first]

    def class_counts(self, predicted: NDArray[np.integer]) -> Counts:
        """Intersection, predicted and true pixels per image and class, (N, C, 3).

        ``predicted`` is the class of every patch (N * h * w,); -1 predicts none.
        """
        image = self.patch // self.patches
        guess = predicted.reshape(-1)[self.patch].astype(np.int64)
        shape = (self.images, self.classes)

        def count(label: Counts, chosen: NDArray[np.bool_]) -> Counts:
            key = (image * self.classes + label)[chosen]
            total = np.bincount(key, weights=self.count[chosen], minlength=shape[0] * shape[1])
            return total.astype(np.int64).reshape(shape)

        everywhere = np.ones(len(guess), dtype=bool)
        return np.stack(
            [count(self.label, guess == self.label), count(guess, guess >= 0), count(self.label, everywhere)],
            axis=-1,
        )


def count_labels(
    masks: Iterable[tuple[str, Array]],
    grid: tuple[int, int],
    table: NDArray[np.int16],
    *,
    eval_size: int,
    input_size: int,
) -> PatchLabels:
    """Count the pixels of each class under each patch.

    Args:
        masks: name and label map (H, W) of each image.
        grid: (h, w) patches an image.
        table: from ``label_table``.
        eval_size: masks are resampled to a square of this side, by nearest neighbour through
            ``input_size`` as Leopart does; 0 keeps each mask's own pixels.
        input_size: side of the encoder's square input.

    Raises:
        TaskError: a mask holds a label that is neither a class nor void; the image is named.
    """
    height, width = grid
    classes = int(table.max()) + 1
    found: list[Counts] = []
    images = 0
    for name, mask in masks:
        classified = table[mask]
        if (classified == UNKNOWN).any():
            value = int(mask[classified == UNKNOWN][0])
            raise TaskError(
                f"the mask of {name} holds the label {value}, which is neither a class nor void; "
                "name it in the data set's classes or void labels"
            )
        if eval_size:
            through = nearest(input_size, eval_size)
            rows, columns = (nearest_centre(side, input_size)[through] for side in mask.shape)
            classified = classified[np.ix_(rows, columns)]
        patch = nearest(height, classified.shape[0])[:, None] * width + nearest(width, classified.shape[1])
        seen = classified != VOID
        key = patch[seen] * classes + classified[seen]
        count = np.bincount(key, minlength=height * width * classes)
        key = np.flatnonzero(count)
        patch_of_entry = key // classes + images * height * width
        found.append(np.stack([patch_of_entry, key % classes, count[key]]))
        images += 1
    entries = np.concatenate(found, axis=1) if found else np.zeros((3, 0), dtype=np.int64)
    return PatchLabels(entries[0], entries[1], entries[2], images, height * width, classes)


# ------------------------------------------------------------------------------------------- matching


def iou_matrix(confusion: Counts) -> NDArray[np.float64]:
    """IoU of every cluster with every class, (..., K, C); 0 where both are empty."""
    clusters, classes = confusion.sum(axis=-1, keepdims=True), confusion.sum(axis=-2, keepdims=True)
    return np.asarray(confusion / np.maximum(clusters + classes - confusion, 1))


def hungarian(confusion: Counts, by: Literal["iou", "count"]) -> Counts:
    """One class for each cluster and one cluster for each class, the best such assignment: (K,).

    ``iou`` maximises the sum of IoU (Leopart), ``count`` the number of pixels that agree (PiCIE, STEGO).
    Clusters left over where K exceeds C get -1: their pixels are predictions of no class.
    """
    from scipy.optimize import linear_sum_assignment

    value = iou_matrix(confusion) if by == "iou" else confusion
    rows, columns = linear_sum_assignment(value, maximize=True)
    match = np.full(len(confusion), -1, dtype=np.int64)
    match[rows] = columns
    return match


def majority(confusion: Counts) -> Counts:
    """The most frequent class of each cluster, (K,): many clusters may share one class.

    The same as Leopart's greedy matching by precision, argmax over c of |p & g_c| / |p|, because |p|
    does not depend on c. The lower class wins a tie.
    """
    return np.asarray(confusion.argmax(axis=1), dtype=np.int64)


# ------------------------------------------------------------------------------------------- scores


def class_iou(counts: Array) -> NDArray[np.float64]:
    """IoU per class from (..., C, 3) intersection, predicted and true counts; 0 where there is nothing."""
    inter, predicted, true = (np.asarray(counts[..., i], dtype=np.float64) for i in range(3))
    union = predicted + true - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def iou_items(counts: Array) -> NDArray[np.float64]:
    """Counts (N, C, 3), one row an image: (N, C * 3), for ``MeanIoU``."""
    return counts.reshape(len(counts), -1).astype(np.float64)


def accuracy_items(counts: Array) -> NDArray[np.float64]:
    """Right pixels and pixels from counts (N, C, 3), one row an image: (N, 2), for ``pixel_accuracy``."""
    return np.stack([counts[..., column].sum(axis=1) for column in (0, 2)], axis=1).astype(np.float64)


@dataclass(frozen=True)
class MeanIoU:
    """The mean IoU over classes, from flattened counts (R, C * 3) to (R,).

    ``absent="zero"`` averages over all classes, one without any pixel counting 0; ``skip`` leaves
    classes without a true pixel out of the mean.
    """

    classes: int
    absent: AbsentClasses = "zero"

    def __call__(self, means: Array) -> Array:
        """The mean IoU of each row."""
        counts = np.asarray(means).reshape(len(means), self.classes, 3)
        iou = class_iou(counts)
        counted = np.ones(iou.shape, dtype=bool) if self.absent == "zero" else counts[..., 2] > 0
        return np.asarray((iou * counted).sum(-1) / np.maximum(counted.sum(-1), 1))


def pixel_accuracy(means: Array) -> Array:
    """Right pixels / pixels, from (R, 2) to (R,)."""
    return np.asarray(means[:, 0] / np.maximum(means[:, 1], 1e-12))


def best_overlap(confusion: Counts) -> NDArray[np.float64]:
    """Mean over an image's segments of the best IoU with a cluster, (N,), from (N, K, C) counts.

    A segment is all pixels of one class in the image. NaN for an image without a labelled pixel.
    """
    present = confusion.sum(axis=1) > 0  # (N, C)
    best = iou_matrix(confusion).max(axis=1)
    segments = present.sum(axis=1)
    mean = (best * present).sum(axis=1) / np.maximum(segments, 1)
    return np.where(segments > 0, mean, np.nan)


def mean_iou_per_image(counts: Array) -> NDArray[np.float64]:
    """Mean IoU over the classes present in each image, (N,), from (N, C, 3); NaN where there are none."""
    present = counts[..., 2] > 0
    mean = (class_iou(counts) * present).sum(axis=1) / np.maximum(present.sum(axis=1), 1)
    return np.where(present.any(axis=1), mean, np.nan)


def names_kept(classes: Sequence[str], table: NDArray[np.int16]) -> tuple[str, ...]:
    """The names of the evaluated classes, in the order of their new indices."""
    return tuple(name for label, name in enumerate(classes) if table[label] >= 0)
