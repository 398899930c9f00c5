"""DAVIS video object segmentation by label propagation, without training.

The masks of a video's first frame are carried through it by nearest neighbours between patch features, and
scored by region similarity J and boundary accuracy F (Pont-Tuset et al. 2017). The protocol is DINO's
(Caron et al. 2021, ``eval_video_segmentation.py``): short side 480, features of the last block after the
final norm, the first frame and the 7 preceding ones as context, a window of radius 12, the 5 most similar
tokens, temperature 0.1. Small departures from it move the score by many points, so all of them are fields
here. ``preset`` names a set of values; fields that are given besides win over it.

The scores are those of davis2017-evaluation, semi-supervised: mean over objects (not over sequences), first
and last frame left out. Result PNGs are kept in its layout. On DAVIS-2016, whose masks are binary, the one
object of a sequence carries label 1 there.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from ..bench.cores import usable_cores
from ..bench.errors import TaskError
from ..bench.types import (
    IMAGENET_STD,
    Context,
    Dataset,
    EncoderSpec,
    Frozen,
    Measurement,
    Metric,
    PosInterpolation,
    Progress,
    Tap,
    VideoSequence,
    Work,
)
from . import task
from ._frames import Clip, Pixels, embed
from ._tracks import Track, Values, save_strips

if TYPE_CHECKING:
    import torch

Preset = Literal["dino-480", "dinov3-notebook", "crw-like"]

DINO_VOS_STD = (0.228, 0.224, 0.225)

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The defaults of the fields below are this preset.
    "dino-480": {},
    # facebookresearch/dinov3, notebooks/segmentation_tracking.ipynb. A demonstration, not the script
    # behind the DAVIS table of that paper, which is not public.
    "dinov3-notebook": {
        "size": 960,
        "size_rule": "patch-ceil",
        "resize": "pil-bicubic",
        "std": "encoder",
        "pos_interpolation": "timm",
        "window": "circle",
        "temperature": 0.2,
        "upsample": "nearest",
    },
    # ajabri/videowalk: its propagation. It runs a ResNet at the video's own size and opens with the first
    # frame repeated; those two are not followed, hence "like". Its circle is strict (distance < 12).
    "crw-like": {
        "size_rule": "patch-ceil",
        "std": "encoder",
        "pos_interpolation": "timm",
        "context": 20,
        "window": "circle",
        "radius": 11.99,
        "first_frame_window": False,
        "topk": 10,
        "temperature": 0.05,
        "label_resize": "bilinear",
        "normalise": "none",
    },
}


class VosConfig(Frozen):
    """Protocol of the task. The values as resolved, preset included, are what a result records."""

    preset: Preset = Field("dino-480", description="set of values for all fields that are not given")
    size: int = Field(480, ge=1, description="short side of the frames at the encoder, in pixels")
    size_rule: Literal["dino64", "patch-ceil"] = Field(
        "dino64",
        description="dino64: long side floored to a multiple of 64, then both sides up to the patch size "
        "where it does not divide them; patch-ceil: both sides up to a multiple of the patch size",
    )
    resize: Literal["cv2-bilinear", "pil-bicubic"] = Field(
        "cv2-bilinear", description="how frames are resized; cv2-bilinear does not smooth"
    )
    std: Literal["dino-vos", "encoder"] = Field(
        "dino-vos",
        description="colour standard deviation: the checkpoint's own, or DINO's script's 0.228 for red in "
        "place of ImageNet's 0.229 (checkpoints with another normalisation than ImageNet's keep theirs)",
    )
    layer: int = Field(-1, le=-1, description="block whose patch tokens are used, from the end")
    final_norm: bool = Field(True, description="apply the encoder's final norm to the tokens")
    pos_interpolation: PosInterpolation = Field(
        "dino", description="how position embeddings are resampled to the frame's grid"
    )
    context: int = Field(7, ge=0, description="preceding frames that are looked at")
    first_frame: bool = Field(True, description="the first frame is looked at from every frame")
    first_frame_window: bool = Field(True, description="the window holds for the first frame too")
    window: Literal["square", "circle", "none"] = Field("square", description="shape of the window")
    radius: float = Field(12, ge=0, description="radius of the window in tokens, inclusive; 0: no window")
    topk: int = Field(5, ge=1, description="neighbours a token, over all context frames together")
    temperature: float = Field(0.1, gt=0, description="divides the cosine similarities")
    label_resize: Literal["nearest", "bilinear"] = Field(
        "nearest", description="how the first frame's masks reach the token grid"
    )
    upsample: Literal["bilinear", "nearest"] = Field(
        "bilinear",
        description="bilinear: soft labels enlarged by the patch size, strongest label, then nearest to the "
        "frame's size; nearest: strongest label of each token, straight to the frame's size",
    )
    normalise: Literal["minmax", "none"] = Field(
        "minmax", description="stretch each label's map to 0..1 over the frame before the strongest is taken"
    )

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        preset = given.get("preset", "dino-480")
        return {**PRESETS.get(preset, {}), **given} if isinstance(preset, str) else given

    @model_validator(mode="after")
    def _consistent(self) -> VosConfig:
        if self.size_rule == "dino64" and self.size < 64:
            raise ValueError(
                f"vos.size is {self.size}, but size_rule dino64 floors the long side to a multiple of 64; "
                "use a size of at least 64, or size_rule=patch-ceil"
            )
        if self.context == 0 and not self.first_frame:
            raise ValueError("vos.context is 0 and vos.first_frame is off: no frame is left to look at")
        return self


METRICS = (
    Metric(id="jf_mean", title="J&F mean"),
    Metric(id="j_mean", title="J mean"),
    Metric(id="j_recall", title="J recall"),
    Metric(id="j_decay", title="J decay", higher_is_better=False),
    Metric(id="f_mean", title="F mean"),
    Metric(id="f_recall", title="F recall"),
    Metric(id="f_decay", title="F decay", higher_is_better=False),
)


def _work(config: VosConfig, spec: EncoderSpec, data: Dataset) -> Work:
    from ._math.davis_frames import network_size
    from ._math.davis_metrics import object_ids

    patch, reach = spec.patch_size, int(config.radius)
    seconds = dict.fromkeys(("start", "products", "nearest", "labels", "scores", "frames"), 0.0)
    seconds["start"] = 0.1
    encoded: Counter[tuple[int, int]] = Counter()
    memory = 0.0
    for sequence in data.sequences:
        first = sequence.mask(0)
        height, width = network_size(first.shape[0], first.shape[1], config.size, config.size_rule, patch)
        rows, columns = height // patch, width // patch
        windowed = config.window != "none" and reach > 0
        seen = min(rows, 2 * reach + 8) * min(columns, 2 * reach + 8) if windowed else rows * columns
        looked_at = min(config.context, len(sequence)) + config.first_frame
        pairs = len(sequence) * rows * columns * looked_at * seen
        labels, pixels = 1 + len(object_ids(first)), len(sequence) * first.size
        encoded[height, width] += len(sequence)
        seconds["products"] += 8.5e-12 * pairs * spec.embed_dim
        seconds["nearest"] += 4e-10 * pairs
        seconds["labels"] += 1e-9 * len(sequence) * height * width * labels
        seconds["scores"] += 5e-9 * pixels * (labels - 1)
        seconds["frames"] += 3.5e-8 * pixels
        memory = max(
            memory, 8.0 * rows * columns * spec.embed_dim * looked_at + 12.0 * height * width * labels
        )
    return Work(seconds, on_device=("products", "nearest", "labels"), encoded=encoded, memory=memory)


@task(
    "vos",
    version=2,
    title="DAVIS label propagation",
    data="video",
    config=VosConfig,
    metrics=METRICS,
    headline=lambda config: "jf_mean",
    work=_work,
)
def TASK(ctx: Context, config: VosConfig) -> Sequence[Measurement]:  # noqa: N802 - the registry's name
    """Propagate, score and keep every sequence; one item an object, grouped by sequence.

    ``detail`` of every metric holds ``static_mask``, the same metric for the first frame's mask kept
    unmoved through the video: what no encoder at all would score.
    """
    clips = [clip for sequence in ctx.data.sequences if (clip := _open(ctx, config, sequence))]
    if not clips:
        raise TaskError(f"{ctx.data.name} has no sequence with an object in its first frame")
    tracks: list[Track] = []
    begun: deque[Callable[[], Track]] = deque()
    total = sum(len(clip.sequence) for clip in clips)
    threads = min(_THREADS[ctx.device.split(":")[0]], len(usable_cores()))
    with (
        ThreadPoolExecutor(1) as writer,
        ThreadPoolExecutor(threads) as pool,
        ctx.progress(total, "frames") as progress,
    ):
        run = _Run(ctx, config, pool, writer)
        features = _features(run, clips)
        for clip in clips:
            begun.append(_propagate(run, clip, islice(features, len(clip.sequence)), progress))
            if len(begun) > 1:  # the pool had the time of this sequence to end the one before
                tracks.append(begun.popleft()())
        tracks.append(begun.popleft()())
    save_strips(ctx, tracks)
    clusters = np.repeat(np.arange(len(tracks)), [len(track.clip.objects) for track in tracks])
    return [
        Measurement(
            metric.id,
            np.concatenate([track.propagated[metric.id] for track in tracks]),
            clusters=clusters,
            detail={
                "static_mask": float(np.concatenate([track.static[metric.id] for track in tracks]).mean())
            },
        )
        for metric in METRICS
    ]


_THREADS = {"cpu": 4, "cuda": 16}
"""At most. A CPU has the encoder to run as well."""


@dataclass(frozen=True)
class _Run:
    """What all sequences share. Decoding, scoring and compression run in the pool, beside the encoder; files
    are written by one thread alone, since a Context need not bear several.
    """

    ctx: Context
    config: VosConfig
    pool: ThreadPoolExecutor
    writer: ThreadPoolExecutor


@dataclass(frozen=True)
class _Frame:
    """A frame that was propagated: its PNG, on the way to the disk, and (J, F, J of the static mask, F of it)
    by object where it is scored.
    """

    png: bytes
    written: Future[None]
    scores: tuple[Values, ...]


def _open(ctx: Context, config: VosConfig, sequence: VideoSequence) -> Clip | None:
    from ._math.davis_frames import network_size
    from ._math.davis_metrics import object_ids

    if len(sequence) < 3:
        raise TaskError(
            f"{ctx.data.name}: {sequence.name} has {len(sequence)} frames; the first and the last are not "
            "scored, so at least 3 are needed (a larger --limit?)"
        )
    first = sequence.mask(0)
    objects = object_ids(first)
    if not objects:
        # 255 alone is how DAVIS 2016 writes its object.
        hint = " (255 is void there: layout: davis2016 if it is the object)" if (first == 255).any() else ""
        ctx.note(f"WARNING: {sequence.name} has no object in its first frame{hint} and was left out")
        return None
    patch = ctx.spec.patch_size
    if config.size_rule == "dino64" and (config.size % patch or 64 % patch):
        ctx.note(f"patch size {patch} does not fit DINO's frame sizes: sides were rounded up to its multiple")
    height, width = first.shape
    return Clip(sequence, first, objects, network_size(height, width, config.size, config.size_rule, patch))


def _colour_std(ctx: Context, config: VosConfig) -> tuple[float, float, float]:
    if config.std == "encoder":
        return ctx.spec.std
    if np.allclose(ctx.spec.std, IMAGENET_STD, atol=1e-4):
        return DINO_VOS_STD
    ctx.note(
        f"the colour standard deviation is the checkpoint's own, {ctx.spec.std}: DINO's 0.228 stands in for "
        "ImageNet's 0.229 only"
    )
    return ctx.spec.std


def _propagate(
    run: _Run, clip: Clip, features: Iterator[torch.Tensor], progress: Progress
) -> Callable[[], Track]:
    """Propagate one sequence. The pool scores its frames and hands them to the writer; what is returned waits
    for both.
    """
    from ._math.davis_frames import indexed_png
    from ._math.davis_metrics import frame_scores, scored_frames

    def finish(i: int, label_map: Callable[[], Pixels]) -> _Frame:
        predicted = label_map()
        png = indexed_png(predicted)
        name = f"results/{clip.sequence.name}/{clip.sequence.frame_ids[i]}.png"
        written = run.writer.submit(run.ctx.save_file, name, png)
        if i not in scored:
            return _Frame(png, written, ())
        truth = clip.sequence.mask(i)
        clip.check(i, truth, "mask")
        propagated = frame_scores(truth, predicted, clip.objects)
        static = frame_scores(truth, clip.first, clip.objects)
        return _Frame(png, written, (*propagated, *static))

    scored = scored_frames(len(clip.sequence))
    frames = []
    for i, label_map in enumerate(_label_maps(run, clip, features)):
        frames.append(run.pool.submit(finish, i, label_map))
        progress.advance()
    return partial(_end, clip, frames)


def _end(clip: Clip, finished: Sequence[Future[_Frame]]) -> Track:
    """Wait until the frames of a sequence are scored and written, and sum them up."""
    from ._math.davis_metrics import statistics

    frames = [future.result() for future in finished]
    for frame in frames:
        frame.written.result()
    values = np.array([frame.scores for frame in frames if frame.scores])  # (frames, 4, objects)

    def summary(region: Values, boundary: Values) -> dict[str, Values]:
        j, f = statistics(region.T), statistics(boundary.T)
        columns = (j.mean + f.mean) / 2, j.mean, j.recall, j.decay, f.mean, f.recall, f.decay
        return {metric.id: column for metric, column in zip(METRICS, columns, strict=True)}

    return Track(
        clip,
        propagated=summary(values[:, 0], values[:, 1]),
        static=summary(values[:, 2], values[:, 3]),
        pngs=[frame.png for frame in frames],
    )


def _label_maps(run: _Run, clip: Clip, features: Iterator[torch.Tensor]) -> Iterator[Callable[[], Pixels]]:
    """What gives the label map of each frame at its own size; that of the first frame is the given one.

    To be called in another thread: a GPU may still be at work on it, and goes on with the next frames.
    """
    import torch

    from ._math.davis_frames import resize_labels, spread_labels, token_labels
    from ._math.propagation import Propagator, harden

    ctx, config, patch = run.ctx, run.config, run.ctx.spec.patch_size
    bilinear = config.upsample == "bilinear"
    grid = clip.size[0] // patch, clip.size[1] // patch
    labels = token_labels(clip.first, clip.objects, grid, config.label_resize)
    for k, label in enumerate(clip.objects, start=1):
        if not labels[..., k].any():
            ctx.note(f"object {label} of {clip.sequence.name} covers no token of the first frame")
    ids = np.array((0, *clip.objects), dtype=np.uint8)

    def restored(hard: torch.Tensor) -> Pixels:
        resize = resize_labels if bilinear else spread_labels
        return resize(ids[hard.cpu().numpy()], clip.first.shape)

    first = next(features)
    propagator = Propagator(
        first,
        torch.from_numpy(labels).to(first.device),
        context=config.context,
        first_frame=config.first_frame,
        first_frame_window=config.first_frame_window,
        window=config.window,
        radius=config.radius,
        topk=config.topk,
        temperature=config.temperature,
    )
    yield lambda: clip.first
    for frame in features:
        soft = propagator.step(frame)
        hard = harden(soft, scale=patch if bilinear else 1, normalise=config.normalise == "minmax")
        yield partial(restored, hard)


def _features(run: _Run, clips: Sequence[Clip]) -> Iterator[torch.Tensor]:
    from ._math.davis_frames import resize_frame

    ctx, config = run.ctx, run.config
    tap = Tap(config.layer, config.final_norm)
    return embed(
        ctx,
        clips,
        run.pool,
        partial(resize_frame, how=config.resize),
        _colour_std(ctx, config),
        lambda images: ctx.encode(images, tap, config.pos_interpolation),
    )
