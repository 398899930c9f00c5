"""Masks as bits: boundaries, dilation by a disk and counts, 64 pixels a machine word.

A stack of masks (n, H, W) becomes words (n, H, ceil(W / 64)): bit b of word i of a row is column 64 i + b,
and bits beyond the last column are 0. A step up or down is a slice, a step sideways a shift with the carry of
the neighbouring word, so that one operation of NumPy moves hundreds of thousands of pixels.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

WORD = 64

Words = NDArray[np.uint64]


def words_across(width: int) -> int:
    """How many words hold a row of so many pixels."""
    return -(-width // WORD)


def pack(masks: NDArray[np.bool_]) -> Words:
    """Masks (n, H, W), W a multiple of 64, as words (n, H, W / 64)."""
    bits: Words = np.packbits(masks, bitorder="little").view("<u8").reshape(*masks.shape[:2], -1)
    return bits


def count(words: Words) -> int:
    """How many bits are set."""
    # bitwise_count of NumPy is not in all versions that are supported, and not as fast.
    return int(cv2.norm(np.ascontiguousarray(words).view(np.uint8).ravel(), cv2.NORM_HAMMING))


def bounding_box(words: Words) -> tuple[slice, slice] | None:
    """The rows and the words across outside of which a mask (H, words) is empty; None if it is."""
    filled: Any = (words != 0).view(np.uint8)
    x, y, width, height = cv2.boundingRect(filled)
    return (slice(y, y + height), slice(x, x + width)) if height else None


def boundaries(masks: Words, width: int) -> Words:
    """Pixels that differ from their right, lower or lower right neighbour; those at the border have fewer.

    Args:
        masks: (n, H, words).
        width: columns of the frame counted from the first word; more than the words hold where they are cut
            out of a wider frame, whose columns beyond must be empty then.
    """
    after = _left(masks, 1)
    right = masks ^ after
    below = masks[:, :-1] ^ after[:, 1:]
    if width <= masks.shape[-1] * WORD:
        word, bit = divmod(width - 1, WORD)
        others = np.uint64(~(1 << bit) & 0xFFFF_FFFF_FFFF_FFFF)
        right[..., word] &= others
        below[..., word] &= others
    below |= masks[:, :-1] ^ masks[:, 1:]
    right[:, :-1] |= below
    return right


def dilate(masks: Words, radius: int) -> Words:
    """Pixels at most ``radius`` away from a set one, in masks (n, H, words); radius at least 1.

    The disk is made of horizontal runs. Going from its tip to its centre they only become longer, so each
    grows out of the one before, and is laid down above and below.
    """
    # Empty rows between the masks and empty words between the rows catch what leaves a mask, so that the
    # whole stack is one line of words.
    _, height, across = masks.shape
    padded = np.zeros((len(masks), height + radius, across + words_across(radius)), dtype=np.uint64)
    padded[:, :height, :across] = masks
    run = padded.ravel()
    near, grown, carry = np.zeros_like(run), np.empty_like(run), np.empty_like(run)
    half = 0
    for away in range(radius, -1, -1):
        longest = math.isqrt(radius * radius - away * away)
        while half < longest:
            step = min(longest - half, 2 * half + 1, WORD - 1)  # a larger one would leave gaps
            inside, across_words = np.uint64(step), np.uint64(WORD - step)
            np.left_shift(run, inside, out=grown)
            np.right_shift(run, across_words, out=carry)
            grown[1:] |= carry[:-1]
            np.right_shift(run, inside, out=carry)
            grown |= carry
            np.left_shift(run, across_words, out=carry)
            grown[:-1] |= carry[1:]
            run |= grown
            half += step
        rows = away * padded.shape[-1]
        near[rows:] |= run[: len(run) - rows]
        near[: len(run) - rows] |= run[rows:]
    return near.reshape(padded.shape)[:, :height, :across]


def _left(words: Words, step: int) -> Words:
    """Every pixel's neighbour ``step`` columns to the right, in its place."""
    moved = words >> np.uint64(step)
    moved[..., :-1] |= words[..., 1:] << np.uint64(WORD - step)
    return moved
