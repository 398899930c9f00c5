"""What becomes of a video: its scores by object, and the films of some in the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..bench.types import Context
from ._frames import Clip

Values = NDArray[np.float64]

_REASONS = {"seeded": "a seeded choice", "best": "best", "median": "median", "worst": "worst"}
_SHOWN = 9
"""Frames of a sequence in the report: a strip that can be read, and a film that can be followed."""


@dataclass(frozen=True)
class Track:
    """A scored sequence: values of each metric by object, as propagated and for the mask that stays."""

    clip: Clip
    propagated: dict[str, Values]
    static: dict[str, Values]
    pngs: list[bytes]


def save_strips(ctx: Context, tracks: Sequence[Track]) -> None:
    """Bars of J&F by sequence, and strips of a seeded choice, the best, the median and the worst sequence."""
    from ._math.davis_frames import overlay, read_indexed_png

    by_sequence = [float(track.propagated["jf_mean"].mean()) for track in tracks]
    ctx.save_data(
        "sequences",
        "bars",
        "J&F by sequence",
        {"labels": [t.clip.sequence.name for t in tracks], "values": by_sequence, "y_label": "J&F mean"},
        "Mean over the objects of each sequence.",
    )
    order = np.argsort(by_sequence, kind="stable").tolist()
    # First the sequence that every encoder shows, whatever its score.
    places = {int(ctx.rng("pictures").integers(len(tracks))): "seeded"}
    places.setdefault(order[-1], "best")
    places.setdefault(order[len(order) // 2], "median")
    places.setdefault(order[0], "worst")
    for number, place in places.items():
        track, clip = tracks[number], tracks[number].clip
        frame, mask = clip.sequence.frame, clip.sequence.mask
        shown = np.unique(np.linspace(0, len(clip.sequence) - 2, _SHOWN).round().astype(int)).tolist()
        ctx.save_image(
            f"{place}-sequence",
            [overlay(frame(i), read_indexed_png(track.pngs[i]), mask(i), clip.objects) for i in shown],
            f"{clip.sequence.name}: {_REASONS[place]} of {len(tracks)}, J&F {100 * by_sequence[number]:.1f}",
            "Propagated masks in colour, outlines of the true masks in white; the first frame is given.",
            sequence=True,
        )
