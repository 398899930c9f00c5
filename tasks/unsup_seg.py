"""Unsupervised segmentation: patch features are clustered, and the clusters are compared with label maps.

Two questions, both without training anything:

1. Data-set level. k-means over the patch features of the whole test split. With one cluster a class,
   clusters and classes are matched one to one (Hungarian) and scored by mean IoU (``miou``) and pixel
   accuracy; with many clusters (``miou_over@k=500``), each takes its majority class. Protocol of Leopart
   (Ziegler and Asano, CVPR 2022, ``experiments/overcluster``), which NeCo uses too: square input of
   twice the pre-training size, last-layer patch tokens after the final norm, standardised, PCA to 50,
   ``faiss.Kmeans`` with 100 iterations, 5 starts and at most 256 points a centroid, seeds 0 to 4
   averaged, cluster ids to 100 x 100 by nearest neighbour, void left out, background a class. Two
   deviations save most of the time: settled starts are left (``tol``), and an over-clustering has one
   start (``over_nredo``). ``matching: count`` is that of PiCIE and STEGO. Labels serve the matching
   alone: the numbers say how well classes form clusters, not what a deployed system would reach.
2. Image level. The Latent MIM paper (Wei et al., ECCV 2024) shows hierarchical clusterings of the patch
   tokens of single images, and publishes neither code nor a score for them. Ours: Ward linkage on the
   L2-normalised tokens of each image, cut into k clusters (``mbo@k=8``); each class segment of the image
   takes its best IoU with any cluster; the mean over segments, then over images (mean best overlap).

``chance`` is the score of random cluster ids on the same patch grid; ``position_only`` in the details is
that of clusters of the patch coordinates, which never look at the image: the bar that features must pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from ..bench.errors import TaskError, did_you_mean
from ..bench.types import (
    Array,
    Column,
    Context,
    Dataset,
    EncoderSpec,
    FeatureRequest,
    Frozen,
    Measurement,
    Metric,
    Statistic,
    Tap,
    View,
    Work,
)
from . import task
from ._features import once
from ._image_trees import best_overlaps, grow_trees
from ._math import segmentation as seg
from ._math.trees import Linkage
from ._segments import save_segments


class UnsupSegConfig(Frozen):
    """Protocol of the unsupervised segmentation task; the defaults are Leopart's."""

    size: int | None = Field(
        None,
        ge=1,
        description="Side of the square input, rounded to a multiple of the patch size; none: twice the "
        "checkpoint's image size.",
    )
    layer: int = Field(-1, le=-1, description="Block whose patch tokens are clustered; -1 is the last.")
    final_norm: Literal["auto", "on", "off"] = Field(
        "auto", description="Whether the final norm is applied; auto: as the checkpoint's family does."
    )
    eval_size: int = Field(
        100, ge=0, description="Masks are scored on a square of this side; 0: on their own pixels."
    )
    standardise: bool = Field(True, description="Divide each channel by its standard deviation.")
    pca_dim: int = Field(
        50, ge=0, description="Principal components kept; 0 (or fewer channels than that): no PCA."
    )
    clusters: Literal["classes"] | Annotated[int, Field(ge=1)] = Field(
        "classes", description="Clusters that are matched one to one; classes: one for each class."
    )
    over_clusters: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (500,), description="Numbers of clusters for the many-to-one matching by majority; () for none."
    )
    min_points_per_centroid: int = Field(
        39,
        ge=1,
        description="Over-clusterings are cut back to this many patches a cluster (faiss warns below).",
    )
    max_points_per_centroid: int | None = Field(
        256, ge=1, description="k-means trains on a sample of this many patches a cluster; none: on all."
    )
    seeds: int = Field(5, ge=1, description="Runs of k-means that are averaged.")
    niter: int = Field(100, ge=1, description="Most iterations of k-means.")
    nredo: int = Field(
        5, ge=1, description="Random starts of the k-means matched one to one; the best is kept."
    )
    over_nredo: int = Field(
        1, ge=1, description="Random starts of each over-clustering, where starts differ little; Leopart: 5."
    )
    tol: float = Field(
        1e-3,
        ge=0,
        description="A start is left when ten iterations lower its objective by no more than this fraction; "
        "0 runs all iterations, as Leopart.",
    )
    matching: Literal["iou", "count"] = Field(
        "iou", description="What the one-to-one matching maximises: IoU (Leopart) or pixels (PiCIE, STEGO)."
    )
    absent_classes: Literal["zero", "skip"] = Field(
        "zero",
        description="A class without a pixel in the split counts 0 in the mean (Leopart), or is left out.",
    )
    ignore_classes: tuple[str, ...] = Field(
        (), description="Classes whose pixels are left out like void, for example background."
    )
    hier_clusters: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (4, 8, 16), description="Cuts of the per-image trees; () leaves the hierarchical part out."
    )
    hier_images: int | None = Field(
        None, ge=1, description="Images that get a tree (a seeded choice); none: all of them."
    )
    linkage: Linkage = Field(
        "ward", description="Linkage of the trees, on Euclidean distances of L2-normalised tokens."
    )
    tsne_tokens: int = Field(
        800, ge=0, description="Patches (a seeded choice) that the report shows by t-SNE; 0 for none."
    )
    tsne_perplexity: float = Field(30.0, gt=0, description="Perplexity of that t-SNE.")

    _once = field_validator("over_clusters", "hier_clusters")(once)

    def view(self, spec: EncoderSpec) -> View:
        """The square view that the encoder sees."""
        return View.squash(spec, self.size or 2 * spec.image_size)

    def column(self, spec: EncoderSpec) -> Column:
        """The patch tokens that are clustered."""
        norm = spec.final_norm if self.final_norm == "auto" else self.final_norm == "on"
        return Column("patches", Tap(self.layer, norm))


def _features(cfg: UnsupSegConfig, spec: EncoderSpec, data: Dataset) -> Sequence[FeatureRequest]:
    return (FeatureRequest((data.test_split,), cfg.view(spec), (cfg.column(spec),)),)


_USUAL_ITERATIONS = 40
"""Of a start of k-means until it has settled; only an estimate needs to know."""


def _work(cfg: UnsupSegConfig, spec: EncoderSpec, data: Dataset) -> Work:
    images, classes = len(data.splits[data.test_split]), max(1, len(data.classes))
    tokens = (cfg.view(spec).size // spec.patch_size) ** 2
    patches, width = images * tokens, spec.embed_dim
    dim = cfg.pca_dim if 0 < cfg.pca_dim < width else width
    first = classes if cfg.clusters == "classes" else cfg.clusters
    starts = {first: cfg.nredo, **dict.fromkeys(cfg.over_clusters, cfg.over_nredo)}
    iterations = min(cfg.niter, _USUAL_ITERATIONS) if cfg.tol else cfg.niter
    sampled = {
        k: min(patches, k * cfg.max_points_per_centroid) if cfg.max_points_per_centroid else patches
        for k in starts
    }
    trees = min(images, cfg.hier_images or images) if cfg.hier_clusters else 0
    return Work(
        {
            "start": 1.0,
            "masks": 8e-4 * images,
            "reading": 1e-9 * patches * width * (1 + cfg.seeds),
            "axes": 2e-11 * patches * width * (width + cfg.seeds * dim),
            "k-means": 1.6e-11
            * cfg.seeds
            * dim
            * sum(starts[k] * iterations * sampled[k] * (k + 30) for k in starts),
            "assignment": 1e-11 * cfg.seeds * dim * patches * sum(starts),
            "counts": 1e-8 * patches * len(starts) * (2 * cfg.seeds + 1),
            "trees": 2.6e-9 * trees * tokens * (tokens * 10 + width),
            "intervals": 0.1 + 6e-9 * classes * cfg.seeds * len(starts) * (images + 1000),
            "t-sne": 1e-3 * cfg.tsne_tokens,
        },
        memory=40e6 + 8.0 * dim * max(sampled.values()) + 60.0 * patches + 12.0 * tokens**2 * bool(trees),
    )


@task(
    "unsup_seg",
    version=2,
    title="Unsupervised segmentation",
    data="segmentation",
    config=UnsupSegConfig,
    metrics=(
        Metric(id="miou", title="mIoU, one cluster a class"),
        Metric(id="pixel_acc", title="pixel accuracy, one cluster a class"),
        Metric(id="miou_over", title="mIoU, over-clustering"),
        Metric(id="pixel_acc_over", title="pixel accuracy, over-clustering"),
        Metric(id="mbo", title="mean best overlap of per-image trees"),
    ),
    headline=lambda cfg: "miou",
    features=_features,
    work=_work,
)
def TASK(ctx: Context, cfg: UnsupSegConfig) -> Sequence[Measurement]:  # noqa: N802
    """Cluster the data set, then each image; every score comes from the label counts under the patches."""
    patches = ctx.bank(ctx.data.test_split).column(cfg.column(ctx.spec))  # (N, h, w, D)
    side = cfg.view(ctx.spec).size
    if cfg.size not in (None, side):
        ctx.note(f"size {cfg.size} became {side}, a multiple of the patch size {ctx.spec.patch_size}")
    table = _table(ctx.data, cfg)
    classes = seg.names_kept(ctx.data.classes, table)
    labels = _count_labels(ctx, cfg, table, patches.shape[1:3])
    absent = len(classes) - len(np.unique(labels.label))
    if absent and cfg.absent_classes == "zero":
        ctx.note(
            f"{absent} of {len(classes)} classes have no pixel in these masks, and each counts as an IoU of "
            "0 (absent_classes=skip leaves them out)"
        )

    result, counts, predicted = _data_set_level(ctx, cfg, patches, labels, classes)
    images, trees = np.arange(len(patches)), None
    if cfg.hier_clusters:
        images, cuts = grow_trees(ctx, patches, cfg.hier_clusters, cfg.linkage, cfg.hier_images)
        result += best_overlaps(ctx, labels, patches.shape[1:3], images, cuts, cfg.hier_clusters, cfg.linkage)
        trees = cuts[len(cuts) // 2].reshape(patches.shape[:3])
    _embed(ctx, cfg, patches, labels, classes)
    score = seg.mean_iou_per_image(counts)
    save_segments(
        ctx,
        patches=patches,
        table=table,
        predicted=predicted.reshape(patches.shape[:3]),
        trees=trees,
        images=images[~np.isnan(score[images])],
        score=score,
    )
    return result


def _table(data: Dataset, cfg: UnsupSegConfig) -> Array:
    """From mask value to evaluated class."""
    for name in cfg.ignore_classes:
        if name not in data.classes:
            raise TaskError(
                f"{data.name} has no class {name!r} to ignore. {did_you_mean(name, data.classes)}"
            )
    ignored = {data.classes.index(name) for name in cfg.ignore_classes}
    table = seg.label_table(len(data.classes), {*data.void, *ignored})
    if table.max() < 0:
        raise TaskError(f"{data.name} names no class to score; give the data set its class names")
    return table


def _count_labels(ctx: Context, cfg: UnsupSegConfig, table: Array, grid: tuple[int, int]) -> seg.PatchLabels:
    name = ctx.data.test_split
    bank, split = ctx.bank(name), ctx.data.splits[name]
    with ctx.progress(len(bank), "masks") as bar:

        def masks() -> Iterator[tuple[str, Array]]:
            for i in bank.index:
                yield split.ids[int(i)], split.mask(int(i))
                bar.advance()

        side = cfg.view(ctx.spec).size
        labels = seg.count_labels(masks(), grid, table, eval_size=cfg.eval_size, input_size=side)
    if not len(labels.count):
        raise TaskError(f"no mask of {ctx.data.name} ({name}) holds a labelled pixel")
    return labels


# ------------------------------------------------------------------------------------------- data set


def _data_set_level(
    ctx: Context, cfg: UnsupSegConfig, patches: Array, labels: seg.PatchLabels, classes: tuple[str, ...]
) -> tuple[list[Measurement], Array, Array]:
    """k-means over all patches.

    Returns:
        The measurements; and of the first seed, one cluster a class, the counts (N, C, 3) and the matched
        class of every patch (N * h * w,).
    """
    from ._math.clustering import Lloyd, cluster_grid, cluster_rows, fit_reducer

    rows = patches.reshape(-1, patches.shape[-1])
    ks = _numbers_of_clusters(ctx, cfg, len(rows), len(classes))
    names = ["", *(f"_over@k={k}" for k in cfg.over_clusters)]
    one_to_one: Callable[[Array], Array] = partial(seg.hungarian, by=cfg.matching)
    matchers = [one_to_one, *([seg.majority] * (len(ks) - 1))]
    first = Lloyd(cfg.niter, cfg.nredo, cfg.tol, cfg.max_points_per_centroid)
    how = [first, *([replace(first, nredo=cfg.over_nredo)] * (len(ks) - 1))]
    try:
        reduce = fit_reducer(rows, standardise=cfg.standardise, pca_dim=cfg.pca_dim)
    except FloatingPointError as error:
        raise TaskError(f"{error} in the patches of {ctx.data.name}; try --precision fp32") from error

    def predict(which: int, ids: Array) -> Array:
        return np.asarray(matchers[which](labels.confusion(ids, ks[which]))[ids])

    runs: list[list[Array]] = [[] for _ in ks]
    blind: list[list[Array]] = [[] for _ in ks]
    shown = np.empty(0, dtype=np.int64)
    with ctx.progress(cfg.seeds, "k-means") as bar:
        for run in range(cfg.seeds):
            seed = ctx.seed * 1000 + run  # seed 0 of a run is the published 0, 1, 2...
            for which, ids in enumerate(cluster_rows(rows, reduce, ks, seed, how)):
                predicted = predict(which, ids)
                shown = predicted if run == which == 0 else shown
                runs[which].append(labels.class_counts(predicted))
                position = np.tile(
                    cluster_grid(patches.shape[1:3], ks[which], seed, how[which]), len(patches)
                )
                blind[which].append(labels.class_counts(predict(which, position)))
            bar.advance()

    result: list[Measurement] = []
    for which, k in enumerate(ks):
        random = ctx.rng("random", k).integers(k, size=len(rows))
        guess = labels.class_counts(predict(which, random))
        detail = {"clusters": k, "matching": "majority" if which else cfg.matching}
        result += _measure(names[which], cfg, classes, runs[which], blind[which], guess, detail)
    per_class = result[0].detail["per_class"]
    ctx.save_data(
        "per-class",
        "bars",
        "IoU of each class",
        {"labels": list(per_class), "values": list(per_class.values()), "y_label": "IoU"},
        f"One cluster a class, mean over {cfg.seeds} seeds of k-means.",
    )
    return result, runs[0][0], shown


def _numbers_of_clusters(ctx: Context, cfg: UnsupSegConfig, patches: int, classes: int) -> list[int]:
    """The number that is matched one to one, then those of the over-clusterings, as the split allows."""
    first = classes if cfg.clusters == "classes" else cfg.clusters
    if patches < first:
        raise TaskError(f"{patches} patches cannot form {first} clusters; use more images or a larger size")
    most = max(1, patches // cfg.min_points_per_centroid)
    wanted = list(dict.fromkeys(cfg.over_clusters))
    short = [str(k) for k in wanted if k > most]
    if short:
        ctx.note(
            f"over-clustering k={','.join(short)}: {patches} patches are fewer than "
            f"{cfg.min_points_per_centroid} a cluster, so {most} clusters were made"
        )
    return [first, *(min(k, most) for k in wanted)]


def _measure(
    suffix: str,
    cfg: UnsupSegConfig,
    classes: tuple[str, ...],
    runs: Sequence[Array],
    blind: Sequence[Array],
    guess: Array,
    detail: dict[str, Any],
) -> list[Measurement]:
    """Mean IoU and pixel accuracy from the counts (N, C, 3) of each seed.

    ``blind`` are the counts of clusters of the coordinates, ``guess`` those of random clusters. Seeds of
    k-means and images are both samples; the matching is inside the counts, as the whole split made it.
    """
    mean_iou = seg.MeanIoU(len(classes), cfg.absent_classes)
    result = []
    for name, to_items, statistic in (
        ("miou", seg.iou_items, mean_iou),
        ("pixel_acc", seg.accuracy_items, seg.pixel_accuracy),
    ):
        by_seed, position = ([_value(statistic, to_items(run)) for run in each] for each in (runs, blind))
        found = {
            **detail,
            "by_seed": by_seed,
            "std_over_seeds": float(np.std(by_seed)),
            "position_only": float(np.mean(position)),
        }
        if statistic is mean_iou:
            total = np.stack([run.sum(axis=0) for run in runs])  # (S, C, 3)
            counted = (total[0, :, 2] > 0) | (cfg.absent_classes == "zero")
            iou = seg.class_iou(total).mean(axis=0)
            found["per_class"] = {classes[c]: float(iou[c]) for c in np.flatnonzero(counted)}
        items = np.stack([to_items(run) for run in runs])
        result.append(
            Measurement(
                name + suffix,
                items if len(runs) > 1 else items[0],
                statistic,
                crossed=len(runs) > 1,
                chance=_value(statistic, to_items(guess)),
                bounds=(0, 1),
                detail=found,
            )
        )
    return result


def _value(statistic: Statistic, items: Array) -> float:
    return float(statistic(items.mean(axis=0)[None])[0])


def _embed(
    ctx: Context, cfg: UnsupSegConfig, patches: Array, labels: seg.PatchLabels, classes: tuple[str, ...]
) -> None:
    """t-SNE of the tokens of some labelled patches."""
    from ._embedding import save_embedding
    from ._math.colour import distinct_colours

    if not cfg.tsne_tokens:
        return
    place, label = labels.majority()
    chosen = np.sort(ctx.rng("t-sne tokens").permutation(len(place))[: cfg.tsne_tokens])
    image, token = np.divmod(place[chosen], labels.patches)
    row, column = np.divmod(token, patches.shape[2])
    tokens = np.asarray(patches[image, row, column], dtype=np.float32)
    save_embedding(ctx, tokens, label[chosen], classes, distinct_colours(len(classes)), cfg.tsne_perplexity)
