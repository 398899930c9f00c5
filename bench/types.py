"""The types that every other module speaks: encoders, features, data sets, tasks, scores.

Nothing here imports torch at run time: the command line, the plan and the report use these types too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FiniteFloat

if TYPE_CHECKING:
    import torch
    from PIL import Image

Pooling = Literal["cls", "mean", "cls+mean"]
Interpolation = Literal["bicubic", "bilinear", "nearest"]
PosInterpolation = Literal["timm", "bicubic", "dino", "antialias"]
DataKind = Literal["classification", "segmentation", "video"]
Array = NDArray[Any]


class Frozen(BaseModel):
    """Base of all declared configuration: immutable, and unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


# ------------------------------------------------------------------------------------------- encoders


class EncoderSpec(Frozen):
    """How an encoder is built and how its images are prepared. Preprocessing belongs to the checkpoint.

    ``arch`` is what the builder needs (JSON only): ``{"builder": "vit", "embed_dim": 384, ...}`` for a
    plain vision transformer, ``{"builder": "timm", "name": ..., "kwargs": {...}}`` for a named timm model.
    """

    family: str
    arch: dict[str, Any]
    embed_dim: int
    depth: int
    patch_size: int
    image_size: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 0.875
    pooling: Pooling = "cls"
    final_norm: bool = True
    has_cls: bool = True
    """There is a global token: a class token, or what the family's own pooling makes of the tokens."""
    pos_interpolation: PosInterpolation = "timm"
    """How position embeddings are resampled to another grid, as the family's own code does."""


class TrainingPoint(Frozen):
    """When in its training a checkpoint was saved."""

    run: str
    """The same for all checkpoints of one training, and for no other training."""
    epoch: float
    """As the file says: some trainers count the epochs that were finished, others name the last one."""


class CheckpointInfo(Frozen):
    """What is known of a loaded checkpoint: where it came from, what was used, what was dropped."""

    source: str
    sha256: str | None
    format: str
    container: str
    parameters: int
    loaded_tensors: int
    encoder_tensors: int
    dropped: dict[str, str] = {}
    """Keys or key patterns of the file that were not used, each with the reason."""
    notes: tuple[str, ...] = ()
    """Choices and conversions that a reader should know (heads and their source, position tables...)."""
    random_weights: bool = False
    training: TrainingPoint | None = None
    """None where the file does not say at which epoch it was saved."""


@dataclass(frozen=True)
class Tap:
    """A place where features are read: the output of a block, with or without the final norm.

    ``layer`` counts from the end: -1 is the last block.
    """

    layer: int = -1
    norm: bool = True


@dataclass(frozen=True)
class Features:
    """Features of a batch at one tap.

    Attributes:
        cls: class token, (B, D), or None where the encoder has none.
        patches: patch tokens with their spatial axes, (B, h, w, D).
        mean: mean-pooled patches, (B, D), after the family's own norm of the mean where it has one.
    """

    cls: torch.Tensor | None
    patches: torch.Tensor
    mean: torch.Tensor


@runtime_checkable
class Encoder(Protocol):
    """An encoder as the tasks see it: normalised images in, features at the asked taps out."""

    spec: EncoderSpec
    info: CheckpointInfo
    fingerprint: str
    """Hash of the weights as loaded and of the spec; the feature cache is keyed by it."""

    def to(self, device: str | torch.device) -> Encoder:
        """Move to a device; returns self."""

    def __call__(
        self,
        images: torch.Tensor,
        taps: Sequence[Tap] = (Tap(),),
        pos_interpolation: PosInterpolation | None = None,
    ) -> dict[Tap, Features]:
        """Encode images (B, 3, H, W), H and W multiples of the patch size, in one forward pass.

        ``pos_interpolation`` names how position embeddings are resampled to another grid than the
        checkpoint's own: ``timm`` and ``antialias`` are bicubic with antialias, ``bicubic`` is without,
        ``dino`` is bicubic by scale factor with the 0.1 offset, no antialias. None means the spec's.
        """


# ------------------------------------------------------------------------------------------- features


@dataclass(frozen=True)
class View:
    """How an image becomes the encoder's input. ``crop``: short side to ``resize``, centre crop of
    ``size``. ``squash``: both sides to ``size``, the aspect ratio is lost.
    """

    mode: Literal["crop", "squash"]
    size: int
    resize: int
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @staticmethod
    def crop(spec: EncoderSpec, size: int | None = None, crop_pct: float | None = None) -> View:
        """The classification view: size and crop ratio are the checkpoint's unless given."""
        size = size or spec.image_size
        resize = max(size, round(size / (crop_pct or spec.crop_pct)))
        return View("crop", size, resize, spec.interpolation, spec.mean, spec.std)

    @staticmethod
    def squash(spec: EncoderSpec, size: int) -> View:
        """The dense view: a square of ``size`` pixels, rounded to a multiple of the patch size."""
        size = max(1, round(size / spec.patch_size)) * spec.patch_size
        return View("squash", size, size, "bilinear", spec.mean, spec.std)


@dataclass(frozen=True)
class Column:
    """One kind of feature kept for every image of a split: ``cls@-1``, ``mean@-4``, ``patches@-1:raw``."""

    kind: Literal["cls", "mean", "patches"]
    tap: Tap = field(default_factory=Tap)

    @property
    def id(self) -> str:
        """The name of the column in a bank and on disk."""
        return f"{self.kind}@{self.tap.layer}" + ("" if self.tap.norm else ":raw")


def pooled_columns(pooling: Pooling, tap: Tap) -> tuple[Column, ...]:
    """The columns that a pooling needs, in the order in which they are concatenated."""
    kinds: tuple[Literal["cls", "mean"], ...] = ("cls", "mean") if pooling == "cls+mean" else (pooling,)
    return tuple(Column(kind, tap) for kind in kinds)


@dataclass(frozen=True)
class FeatureRequest:
    """What a task wants from the feature engine: these columns, of these splits, through this view."""

    splits: tuple[str, ...]
    view: View
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class FeatureBank:
    """Features of one split. ``columns`` maps a column id to an array, usually memory-mapped: (N, D) for
    ``cls`` and ``mean``, (N, h, w, D) for ``patches``. ``index`` maps rows to positions in the data split
    (they differ only where broken images were left out).
    """

    columns: Mapping[str, Array]
    ids: Sequence[str]
    labels: Array | None
    index: Array
    fingerprint: str = ""
    images_per_second: float | None = None
    """Speed of the encoder in the pass that made the bank, on the device of that pass."""

    def __len__(self) -> int:
        return len(self.index)

    def column(self, column: Column) -> Array:
        """The array of a column. Raises KeyError where the task did not ask for it."""
        return self.columns[column.id]

    def pooled(self, pooling: Pooling, tap: Tap) -> Array:
        """Global features (N, D), or (N, 2D) for ``cls+mean``."""
        parts = [self.column(column) for column in pooled_columns(pooling, tap)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


# ------------------------------------------------------------------------------------------- data sets


class ImageSplit(Protocol):
    """The images of one split; decoding happens on access, and must survive pickling to a worker."""

    ids: Sequence[str]
    """A stable name for each image: the path below the root of the data set."""
    labels: Array | None
    """Class index of each image, int64 (N,), or None."""

    def __len__(self) -> int: ...

    def image(self, i: int) -> Image.Image:
        """The decoded image, RGB. Raises DataError naming the file where it is broken."""

    def mask(self, i: int) -> Array:
        """The label map, uint8 (H, W), at the image's own size. Raises DataError where there is none."""

    def subset(self, index: Array) -> ImageSplit:
        """The split made of these positions, in this order."""


class VideoSequence(Protocol):
    """One video with label maps: 0 is background, 1..K are objects, 255 is void."""

    name: str
    frame_ids: Sequence[str]
    """File stems of the frames, in order; result PNGs carry them."""

    def __len__(self) -> int: ...

    def frame(self, i: int) -> Array:
        """RGB frame, uint8 (H, W, 3)."""

    def mask(self, i: int) -> Array:
        """Label map, uint8 (H, W). Raises DataError where the frame has none."""

    def head(self, n: int) -> VideoSequence:
        """The first n frames."""


@dataclass(frozen=True)
class Dataset:
    """A data set of one kind. Classification and segmentation have ``splits``, video has ``sequences``."""

    name: str
    kind: DataKind
    fingerprint: str
    classes: tuple[str, ...] = ()
    splits: Mapping[str, ImageSplit] = field(default_factory=dict)
    sequences: tuple[VideoSequence, ...] = ()
    void: tuple[int, ...] = (255,)
    """Labels that are no class: left out of every count (segmentation)."""
    train_split: str = "train"
    test_split: str = "val"
    path: str | None = None
    ignored: Mapping[str, int] = field(default_factory=dict)
    """Files beside the images that are images of types which are not read, counted by suffix."""

    def limited(self, n: int, seed: int = 0) -> Dataset:
        """At most ``n`` images a split (spread over the classes, seeded), or ``n`` frames a sequence.

        Fewer images than classes are of the same ``n`` classes in every split: what is scored has neighbours.
        Splits without a class in common (novel classes) are each spread over their own.
        """
        labels = [np.unique(split.labels) for split in self.splits.values() if split.labels is not None]
        classes = np.unique(np.concatenate(labels)) if labels else np.array([], dtype=np.int64)
        apart = sum(map(len, labels)) == len(classes)
        some = n < len(classes) and not apart
        kept = np.random.default_rng([seed, len(classes)]).permutation(classes)[:n] if some else None
        return replace(
            self,
            splits={name: _limit(split, n, seed, kept) for name, split in self.splits.items()},
            sequences=tuple(s.head(n) for s in self.sequences),
            fingerprint=f"{self.fingerprint}:limit={n}:seed={seed}" + (":classes" if some else ""),
        )

    def counts(self) -> dict[str, int]:
        """Images a split, or frames a sequence."""
        if self.kind == "video":
            return {s.name: len(s) for s in self.sequences}
        return {name: len(split) for name, split in self.splits.items()}


def ignored_files(counts: Mapping[str, int]) -> str:
    """What ``Dataset.ignored`` counts, in words: ``20 files ignored (.avif 18, .gif 2)``."""
    total = sum(counts.values())
    kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in counts.items())
    return f"{total:,} file{'' if total == 1 else 's'} ignored ({kinds})"


def _limit(split: ImageSplit, n: int, seed: int, classes: Array | None) -> ImageSplit:
    """At most ``n`` images of a split, of these classes alone where there are labels and some are given."""
    if classes is not None and split.labels is not None:
        split = split.subset(np.flatnonzero(np.isin(split.labels, classes)))
    if len(split) <= n:
        return split
    order = np.random.default_rng(seed).permutation(len(split))
    if split.labels is not None:
        # Round robin over the classes: the r-th image of each class comes before the (r+1)-th of any.
        labels = split.labels[order]
        by_class = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[by_class], labels[by_class])
        rank = np.empty(len(labels), dtype=np.int64)
        rank[by_class] = np.arange(len(labels)) - starts
        order = order[np.argsort(rank, kind="stable")]
    return split.subset(np.sort(order[:n]))


# ------------------------------------------------------------------------------------------- tasks

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
        """Features of already normalised images, at the run's device and precision (fp32 out)."""

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


ConfigT = TypeVar("ConfigT", bound=Frozen)


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
