"""Tasks: what one declares, what it is handed, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from pydantic import FiniteFloat

from .base import Array, DataKind, Frozen, PosInterpolation
from .data import Dataset
from .encoders import EncoderSpec, Features, Tap
from .features import FeatureBank, FeatureRequest

if TYPE_CHECKING:
    import torch


Statistic = Callable[[Array], Array]
"""From the summed (or averaged) per-item statistics, (R, F), to the metric's value, (R,)."""


def mean_statistic(means: Array) -> Array:
    """The plain mean of a single per-item number."""
    return means[:, 0]


@dataclass(frozen=True)
class Measurement:
    """One metric as a task measured it: the items, from which value and interval both follow.

    Attributes:
        metric: id with its parameters, ``top1@k=20``.
        items: (N,) or (N, F) per-item numbers. The value is ``statistic(items.mean(axis=0)[None])[0]``,
            so F > 1 serves ratios such as IoU (per-image intersections and unions). With ``crossed`` the
            array is (A, N) or (A, N, F): A draws by N items, whose values are averaged.
        statistic: see ``Statistic``; the default is the mean.
        clusters: (N,) ids of the groups that are resampled together (objects of one sequence), or None.
        crossed: both axes of ``items`` are random (few-shot draws or seeds of k-means x test images).
        chance: the value that a guess would reach, or None where that is not defined.
        bounds: the least and the greatest value that the metric can have, where its interval ends at the
            latest. A plain mean of items from 0 to 1 has those.
        detail: extra numbers kept in the result (chosen regularisation, standard deviation over seeds).
    """

    metric: str
    items: Array
    statistic: Statistic = mean_statistic
    clusters: Array | None = None
    crossed: bool = False
    chance: float | None = None
    bounds: tuple[float, float] | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


class Score(Frozen):
    """One metric of one cell with its 95% interval; fractions, where the unit is ``%``.

    ``low`` and ``high`` are None where a single item (or cluster) leaves nothing to resample.
    """

    metric: str
    value: FiniteFloat
    low: FiniteFloat | None
    high: FiniteFloat | None
    n: int
    chance: FiniteFloat | None = None
    detail: dict[str, Any] = {}


class Metric(Frozen):
    """A declared metric family. ``top1`` stands for every ``top1@...`` that the task returns."""

    id: str
    title: str
    unit: Literal["%", ""] = "%"
    higher_is_better: bool = True


class Artefact(Frozen):
    """Something for the report: a picture on disk, or numbers to draw.

    kind ``image``: ``files`` are PNG paths below the run folder, shown in order as one strip; where ``data``
    has a true ``sequence``, they are frames of a film that can be played; where it names a ``similarity``
    file, each image is followed by a map of it, which shows the similarity to a patch that a reader clicks.
    kind ``curve``: ``data`` is {"x": [...], "series": {name: [...]}, "x_label", "y_label", "log_x"}.
    kind ``bars``:  ``data`` is {"labels": [...], "values": [...], "y_label"}; drawn per checkpoint, and
    beside each other over checkpoints where labels agree.
    kind ``points``: ``data`` is {"x": [...], "y": [...], "group": [...], "groups": [names], "colours":
    ["#rrggbb", ...]}; positions have no scale, ``group`` counts into the other two; of the first seed.
    kind ``features``: ``files`` is one .npz with ``features`` (N, D) and the ``ids`` (N,) of their images;
    checkpoints are compared by CKA over the images that all of them have.
    """

    name: str
    kind: Literal["image", "curve", "bars", "points", "features"]
    title: str
    caption: str = ""
    files: tuple[str, ...] = ()
    data: dict[str, Any] = {}


class Progress(Protocol):
    """A running count of work done; a bar on a terminal, plain lines elsewhere."""

    def advance(self, n: int = 1) -> None: ...


class Context(Protocol):
    """The only thing a task is handed. It never sees argv or the output folder."""

    spec: EncoderSpec
    reference: str
    """Of the checkpoint, as it was given: for a task that needs what lies beside the encoder."""
    data: Dataset
    seed: int
    device: str
    batch_size: int

    def bank(self, split: str) -> FeatureBank:
        """The features the task asked for, of one split."""

    def encode(
        self, images: torch.Tensor, tap: Tap, pos_interpolation: PosInterpolation | None = None
    ) -> Features:
        """Features of already normalised images, at the run's device and precision (fp32 out).

        An encoder that resamples positions by its own rule alone follows that, and a note says so.
        """

    def rng(self, *purpose: str | int) -> np.random.Generator:
        """A generator derived from (seed, task, purpose): the order of tasks never changes a number."""

    def progress(self, total: int, label: str) -> AbstractContextManager[Progress]:
        """Report work of ``total`` steps."""

    def note(self, text: str) -> None:
        """A remark that belongs beside the score: something left out, a fall-back that was named."""

    def save_image(
        self,
        name: str,
        images: Sequence[Array],
        title: str,
        caption: str = "",
        downscale: int = 320,
        sequence: bool = False,
        similarity: Array | None = None,
    ) -> None:
        """Keep uint8 RGB pictures (H, W, 3) for the report, the longer side at most ``downscale``.

        Of a ``sequence`` the page makes a film. ``similarity``: cosines (n, h, w, h, w) between the patches
        of n images, where the pictures are n pairs of an image and a map of it; the page turns the map into
        the similarity to a patch that is clicked.
        """

    def save_data(
        self,
        name: str,
        kind: Literal["curve", "bars", "points"],
        title: str,
        data: dict[str, Any],
        caption: str = "",
    ) -> None:
        """Keep numbers for the report to draw."""

    def save_features(
        self, name: str, features: Array, ids: Sequence[str], title: str, caption: str = ""
    ) -> None:
        """Keep features (N, D) of some images, for the report to compare checkpoints by CKA."""

    def save_file(self, relative: str, content: bytes) -> None:
        """Keep a file of the task's own below its artefact folder (result PNGs of the VOS task)."""


@dataclass(frozen=True)
class Work:
    """What a task costs beside the features that it asks for, foreseen from its protocol and its data.

    Attributes:
        seconds: by part of the work, on the reference machine of ``bench/estimate.py``.
        on_device: the parts that run where the encoder does; the others run on the CPU.
        encoded: images that the task itself passes through the encoder, by their (height, width).
        memory: bytes at the peak, beside the encoder and mapped features.
    """

    seconds: Mapping[str, float]
    on_device: tuple[str, ...] = ()
    encoded: Mapping[tuple[int, int], int] = field(default_factory=dict)
    memory: float = 0.0


@dataclass(frozen=True)
class Step:
    """A step of a plan, as it is foreseen. What is not known is None.

    Attributes:
        checkpoint: label.
        what: in words.
        images: that pass through the encoder in it.
        seconds: that it takes.
        memory: bytes at its peak, beside encoder and mapped features.
        disk: bytes that it adds to the cache.
        failure: why it will fail, where that is known beforehand.
    """

    checkpoint: str
    what: str
    images: int = 0
    seconds: float | None = None
    memory: float | None = None
    disk: int = 0
    failure: str = ""


@dataclass(frozen=True)
class TaskSpec:
    """A declared evaluation; made by the ``@task`` decorator."""

    name: str
    version: int
    title: str
    data: DataKind
    config: type[Frozen]
    metrics: tuple[Metric, ...]
    headline: Callable[[Any], str]
    """From the config to the id of the metric that stands for the task."""
    features: Callable[[Any, EncoderSpec, Dataset], Sequence[FeatureRequest]]
    """What the task needs extracted; empty for a task that encodes by itself through ``ctx.encode``."""
    run: Callable[[Context, Any], Sequence[Measurement]]
    scored: bool = True
    """False for a diagnosis: it explains scores, and no summary, ranking or comparison counts it as one."""
    doc: str = ""
    origin: str = "lmim-bench"
    """Distribution and version that supplied the task."""
    applies: Callable[[str], str | None] = lambda reference: None
    """From the reference of a checkpoint to the reason why the task says nothing about it, or None."""
    work: Callable[[Any, EncoderSpec, Dataset], Work] | None = None
    """From (config, encoder spec, data set) to what the task costs; None where nobody has counted."""

    def metric(self, metric_id: str) -> Metric:
        """The declared family of a metric id. Raises KeyError where the task did not declare it."""
        family = metric_id.split("@")[0]
        for metric in self.metrics:
            if metric.id == family:
                return metric
        raise KeyError(metric_id)
