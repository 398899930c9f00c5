"""What the doctor finds of a data set: a sample is decoded, masks fit, tasks can use the labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from .data import Detected
from .data.files import IMAGE_SUFFIXES
from .data.shard_sets import absent_parts
from .data.splits import spread
from .doctor_system import Check, Subject
from .errors import DataError
from .progress import Reporter
from .types import Array, Dataset, ImageSplit, VideoSequence, ignored_files, mask_values

SAMPLE = 32
"""Images that are decoded of each split, or frames of all videos together (of each at least two)."""
_SHOWN = 4
_FEWEST_FRAMES = 3

Look = Callable[[], object]


def data_checks(subject: Subject, data: Dataset, found: Detected, reporter: Reporter) -> Iterator[Check]:
    """Counts, a sample of images (and masks, with their sizes and labels), and what the labels hold."""
    yield subject.passes(f"{found.kind}, {found.layout} ({found.reason}): {_counted(data)}")
    if data.ignored:
        mend = f"convert them to a type that is read ({', '.join(IMAGE_SUFFIXES)}), or remove them"
        yield subject.warns(ignored_files(data.ignored), mend)
    if found.layout == "parquet" and data.path and (absent := absent_parts(Path(data.path))):
        what = f"{len(absent)} shards that the names of others count are not there: {_few(absent)}"
        yield subject.warns(what, "fetch them, or score what is there as a part of the data set")
    looks = list(_looks(data))
    faults = []
    with reporter.progress(len(looks), f"images of {subject.name}") as bar:
        for look in looks:
            try:
                look()
            except DataError as error:
                faults.append(str(error))
            bar.advance()
    unit = "frames" if data.kind == "video" else "images"
    if faults:
        mend = f"{faults[0]}; mend or remove it"
        if data.kind == "classification":
            mend += ", or leave broken images out with --skip-broken"
        yield subject.fails(f"{len(faults)} of {len(looks)} {unit} looked at cannot be used", mend)
    else:
        yield subject.passes(f"{len(looks)} {unit} looked at, all whole")
    if data.kind == "video":
        yield from _sequence_checks(subject, data)
    for name, split in data.splits.items():
        if not len(split):
            yield subject.fails(f"{name} holds no image", "fill the split, or remove it")
        elif data.kind == "segmentation":
            yield _mask_check(subject, name, split, data)
        else:
            yield _class_check(subject, name, split, data.classes)


def _counted(data: Dataset) -> str:
    if data.kind == "video":
        frames = sum(map(len, data.sequences))
        return f"{len(data.sequences)} sequences, {frames:,} frames, masks hold {mask_values(data)}"
    counts = ", ".join(f"{name} {n:,}" for name, n in data.counts().items())
    return f"{counts} images, {len(data.classes)} classes"


def _looks(data: Dataset) -> Iterator[Look]:
    """What decodes an image, or a frame, with the mask that belongs to it."""

    def image(split: ImageSplit, i: int) -> Look:
        masked = data.kind == "segmentation"
        return lambda: (split.image(i), split.mask(i) if masked else None)

    def frame(sequence: VideoSequence, i: int) -> Look:
        return lambda: (sequence.frame(i), sequence.mask(i))

    for split in data.splits.values():
        yield from (image(split, i) for i in spread(len(split), SAMPLE))
    for sequence in data.sequences:
        most = max(2, SAMPLE // len(data.sequences))
        yield from (frame(sequence, i) for i in spread(len(sequence), most))


def _class_check(subject: Subject, name: str, split: ImageSplit, classes: tuple[str, ...]) -> Check:
    labels: Array = np.asarray(split.labels)
    if labels.min() < 0 or labels.max() >= len(classes):
        found = f"{name}: labels {labels.min()} to {labels.max()}, and there are {len(classes)} classes"
        return subject.fails(found, "labels count from 0; correct them, or the list of classes")
    counts = np.bincount(labels, minlength=len(classes))
    empty = [classes[i] for i in np.flatnonzero(counts == 0)]
    if empty:
        found = f"{name}: {len(empty)} of {len(classes)} classes have no image: {_few(empty)}"
        return subject.warns(found, "add images of them, or leave these classes out of every split")
    return subject.passes(f"{name}: {counts.min():,} to {counts.max():,} images a class")


def _mask_check(subject: Subject, name: str, split: ImageSplit, data: Dataset) -> Check:
    seen: set[int] = set()
    for i in spread(len(split), SAMPLE):
        with suppress(DataError):  # counted already
            seen |= set(np.unique(split.mask(i)).tolist())
    seen -= set(data.void)
    if not seen:
        return subject.warns(
            f"{name}: the masks looked at hold no label but void", "check how they are written"
        )
    return subject.passes(f"{name}: labels {min(seen)} to {max(seen)} of {len(data.classes)} classes in them")


def _sequence_checks(subject: Subject, data: Dataset) -> Iterator[Check]:
    from ..tasks._math.davis_metrics import object_ids

    short = [s.name for s in data.sequences if len(s) < _FEWEST_FRAMES]
    if short:
        yield subject.fails(f"{_few(short)}: fewer than {_FEWEST_FRAMES} frames", "leave these sequences out")
    still, white = [], False
    for sequence in data.sequences:
        with suppress(DataError):  # counted already
            first = sequence.mask(0)
            if not object_ids(first):
                still.append(sequence.name)
                white |= bool((first == 255).any())
    if still:
        found = f"{_few(still)}: no object in the first mask, so that nothing is scored there"
        mend = "annotate the first frame, or leave these sequences out"
        if white:
            mend += "; where 255 is the object: layout: davis2016 in a suite, and no other value in any mask"
        yield subject.warns(found, mend)


def _few(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
