"""The unsupervised segmentation task on toy features: perfect, random, and everything a user can set."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from lmim_bench.bench.errors import TaskError
from lmim_bench.bench.types import Dataset, FeatureBank
from lmim_bench.tasks.unsup_seg import TASK, UnsupSegConfig

CLASSES = ("sky", "road", "tree", "car")
GRID = 8
MASK = 32  # pixels a side: 4 a patch
QUICK: dict[str, Any] = {"over_clusters": (20,), "seeds": 2, "nredo": 2, "hier_clusters": (4,)}
VOID = 255


@dataclass
class SegSplit:
    """Images and masks from arrays."""

    masks: np.ndarray
    labels: None = None

    @property
    def ids(self) -> list[str]:
        return [f"images/{i}.jpg" for i in range(len(self.masks))]

    def __len__(self) -> int:
        return len(self.masks)

    def image(self, i: int) -> np.ndarray:
        return np.full((40, 48, 3), (i % 256, 90, 140), dtype=np.uint8)

    def mask(self, i: int) -> np.ndarray:
        return np.asarray(self.masks[i])

    def subset(self, index: np.ndarray) -> SegSplit:
        return SegSplit(self.masks[index])


def patch_labels(images: int, seed: int = 0, classes: int = len(CLASSES)) -> np.ndarray:
    """Class of each patch (N, h, w): random blocks that are not the same from image to image."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(classes, size=(images, GRID // 2, GRID // 2))
    return coarse.repeat(2, axis=1).repeat(2, axis=2)


def masks_of(labels: np.ndarray) -> np.ndarray:
    return labels.repeat(MASK // GRID, axis=1).repeat(MASK // GRID, axis=2).astype(np.uint8)


def one_hot(labels: np.ndarray, noise: float = 0.05, dim: int = 16) -> np.ndarray:
    rng = np.random.default_rng(9)
    features = 3 * np.eye(dim)[labels] + noise * rng.standard_normal((*labels.shape, dim))
    return np.asarray(features, dtype=np.float32)


@pytest.fixture
def build(toy: ModuleType) -> Callable[..., Any]:
    def make(
        features: np.ndarray,
        masks: np.ndarray,
        *,
        seed: int = 0,
        index: np.ndarray | None = None,
        **data: Any,
    ) -> Any:
        split = SegSplit(masks)
        index = np.arange(len(features)) if index is None else index
        columns = {"patches@-1": features, "patches@-1:raw": features, "patches@-2": features}
        bank = FeatureBank(columns, [split.ids[i] for i in index], None, index)
        fields = {"classes": CLASSES, "splits": {"val": split}} | data
        dataset = Dataset("toy", "segmentation", "toy", **fields)
        return toy.ToyContext(toy.toy_spec(), dataset, {"val": bank}, seed)

    return make


def test_importing_the_task_loads_no_heavy_library() -> None:
    code = (
        "import sys, lmim_bench.tasks.unsup_seg;"
        "print([m for m in ('torch', 'faiss', 'sklearn', 'scipy', 'cv2', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_request_is_the_square_view_of_the_test_split(toy: ModuleType) -> None:
    data = Dataset("toy", "segmentation", "toy", test_split="test")
    (request,) = TASK.features(UnsupSegConfig(), toy.toy_spec(image_size=224), data)
    assert (request.splits, request.view.mode, request.view.size) == (("test",), "squash", 448)
    assert [c.id for c in request.columns] == ["patches@-1"]
    config = UnsupSegConfig(size=100, layer=-2, final_norm="off")
    (request,) = TASK.features(config, toy.toy_spec(), data)
    assert request.view.size == 96  # the nearest multiple of the patch size
    assert [c.id for c in request.columns] == ["patches@-2:raw"]
    (request,) = TASK.features(UnsupSegConfig(), toy.toy_spec(final_norm=False), data)
    assert [c.id for c in request.columns] == ["patches@-1:raw"]


def test_defaults_are_leoparts() -> None:
    config = UnsupSegConfig()
    assert (config.eval_size, config.pca_dim, config.over_clusters) == (100, 50, (500,))
    assert (config.seeds, config.niter, config.nredo, config.max_points_per_centroid) == (5, 100, 5, 256)
    assert all(field.description for field in UnsupSegConfig.model_fields.values())
    with pytest.raises(ValidationError):
        UnsupSegConfig(layer=0)
    with pytest.raises(ValidationError):
        UnsupSegConfig(clusters=0)


def test_perfect_features_score_one(build: Callable[..., Any], toy: ModuleType) -> None:
    labels = patch_labels(20)
    ctx = build(one_hot(labels), masks_of(labels))
    found = ctx.run(TASK, **(QUICK | {"nredo": 5}))
    assert set(found) == {"miou", "pixel_acc", "miou_over@k=20", "pixel_acc_over@k=20", "mbo@k=4"}
    for metric, measurement in found.items():
        assert toy.value(measurement) == pytest.approx(1, abs=0.02), metric
        assert measurement.chance is not None
        assert measurement.chance < 0.6
        assert measurement.items.shape[measurement.crossed] == 20
    assert found["miou"].detail["per_class"] == pytest.approx(dict.fromkeys(CLASSES, 1), abs=0.05)
    assert found["miou"].detail["clusters"] == 4
    assert found["miou"].detail["position_only"] < 0.4


def test_random_features_score_near_chance(build: Callable[..., Any], toy: ModuleType) -> None:
    labels = patch_labels(60)
    features = np.random.default_rng(3).standard_normal((60, GRID, GRID, 16)).astype(np.float32)
    found = build(features, masks_of(labels)).run(TASK, **QUICK)
    for metric in ("miou", "pixel_acc", "miou_over@k=20", "pixel_acc_over@k=20", "mbo@k=4"):
        assert toy.value(found[metric]) == pytest.approx(found[metric].chance, abs=0.05), metric
    assert found["miou"].chance == pytest.approx(1 / 7, abs=0.03)  # IoU of independent quarters


def test_position_only_is_what_features_of_the_position_reach(
    build: Callable[..., Any], toy: ModuleType
) -> None:
    quarters = np.kron(np.array([[0, 1], [2, 3]]), np.ones((4, 4), dtype=int))
    labels = np.tile(quarters, (12, 1, 1))
    ctx = build(np.random.default_rng(0).normal(size=(12, 8, 8, 4)), masks_of(labels))
    found = ctx.run(TASK, **(QUICK | {"over_clusters": (64,), "min_points_per_centroid": 12, "nredo": 10}))
    assert (
        found["miou"].detail["position_only"] > 0.8
    )  # the best of ten starts may settle beside the quarters
    assert found["miou_over@k=64"].detail["position_only"] == pytest.approx(1)  # a cluster a position
    assert found["mbo@k=4"].detail["position_only"] == pytest.approx(1)
    assert toy.value(found["miou"]) < 0.3


def test_void_pixels_change_nothing(build: Callable[..., Any], toy: ModuleType) -> None:
    labels = patch_labels(12)
    masks = masks_of(labels)
    voided = masks.copy()
    wrong = one_hot(np.where(labels == 2, 0, labels))  # class 2 looks like class 0
    voided[masks == 2] = VOID
    full = build(wrong, masks).run(TASK, **QUICK, clusters=3)
    clean = build(wrong, voided).run(TASK, **QUICK, clusters=3)
    assert toy.value(full["pixel_acc"]) < 0.9
    assert toy.value(clean["pixel_acc"]) == pytest.approx(1)
    assert toy.value(clean["miou"]) == pytest.approx(0.75)  # the absent class counts zero
    skipped = build(wrong, voided).run(TASK, **QUICK, clusters=3, absent_classes="skip")
    assert toy.value(skipped["miou"]) == pytest.approx(1)
    assert set(skipped["miou"].detail["per_class"]) == {"sky", "road", "car"}


def test_ignored_class_is_left_out(build: Callable[..., Any], toy: ModuleType) -> None:
    labels = patch_labels(12)
    wrong = one_hot(np.where(labels == 2, 0, labels))
    found = build(wrong, masks_of(labels)).run(TASK, **QUICK, ignore_classes=("tree",))
    assert found["miou"].detail["clusters"] == 3
    assert toy.value(found["miou"]) == pytest.approx(1)
    with pytest.raises(TaskError, match="Did you mean 'tree'"):
        build(wrong, masks_of(labels)).run(TASK, ignore_classes=("tre",))


def test_an_image_without_labels_stays_out_of_the_overlap(build: Callable[..., Any]) -> None:
    labels = patch_labels(8)
    masks = masks_of(labels)
    masks[3] = VOID
    found = build(one_hot(labels), masks).run(TASK, **QUICK)
    assert len(found["mbo@k=4"].items) == 7
    assert found["miou"].items.shape[:2] == (2, 8)
    masks[:] = VOID
    with pytest.raises(TaskError, match="no mask of toy"):
        build(one_hot(labels), masks).run(TASK, **QUICK)


def test_broken_images_left_out_of_the_bank_keep_masks_aligned(
    build: Callable[..., Any], toy: ModuleType
) -> None:
    labels = patch_labels(12)
    index = np.array([0, 1, 3, 4, 6, 7, 9, 10, 11])
    ctx = build(one_hot(labels)[index], masks_of(labels), index=index)
    assert toy.value(ctx.run(TASK, **QUICK)["miou"]) == pytest.approx(1, abs=0.02)


def test_equal_seeds_repeat_and_the_order_of_images_does_not_matter(
    build: Callable[..., Any], toy: ModuleType
) -> None:
    labels = patch_labels(16)
    features, masks = one_hot(labels, noise=0.4), masks_of(labels)
    first = build(features, masks).run(TASK, **QUICK)
    again = build(features, masks).run(TASK, **QUICK)
    for metric, measurement in first.items():
        np.testing.assert_array_equal(measurement.items, again[metric].items)
        assert measurement.chance == again[metric].chance
    other = np.random.default_rng(0).permutation(16)
    moved = build(features[other], masks[other]).run(TASK, **QUICK)
    for metric in ("miou", "pixel_acc", "mbo@k=4"):
        assert toy.value(moved[metric]) == pytest.approx(toy.value(first[metric]), abs=1e-3), metric
    random = np.random.default_rng(1).standard_normal(features.shape)
    by_seed = [build(random, masks, seed=s).run(TASK, **QUICK)["miou"].detail["by_seed"] for s in (0, 1)]
    assert by_seed[0] != by_seed[1]


def test_value_is_the_mean_over_seeds(build: Callable[..., Any], toy: ModuleType) -> None:
    labels = patch_labels(12)
    random = np.random.default_rng(1).standard_normal((12, GRID, GRID, 16))
    found = build(random, masks_of(labels)).run(TASK, **(QUICK | {"seeds": 3}))
    for metric in ("miou", "pixel_acc", "miou_over@k=20"):
        assert len(set(found[metric].detail["by_seed"])) == 3
        assert toy.value(found[metric]) == pytest.approx(np.mean(found[metric].detail["by_seed"]))


def test_small_splits_cut_over_clustering_back_and_say_so(build: Callable[..., Any]) -> None:
    labels = patch_labels(8)
    ctx = build(one_hot(labels), masks_of(labels))
    found = ctx.run(TASK, **(QUICK | {"over_clusters": (10, 500)}))
    assert found["miou_over@k=500"].detail["clusters"] == 8 * GRID**2 // 39
    assert found["miou_over@k=10"].detail["clusters"] == 10
    assert any("k=500" in note for note in ctx.notes)
    with pytest.raises(TaskError, match="cannot form 1000 clusters"):
        ctx.run(TASK, **QUICK, clusters=1000)


def test_hierarchical_part_is_optional_and_can_be_bounded(build: Callable[..., Any]) -> None:
    labels = patch_labels(10)
    ctx = build(one_hot(labels), masks_of(labels))
    found = ctx.run(TASK, **(QUICK | {"hier_clusters": (2, 4, 8), "hier_images": 3}))
    assert len(found["mbo@k=4"].items) == 3
    assert any("3 of 10" in note for note in ctx.notes)
    assert ctx.saved["best-overlap"]["x"] == [2, 4, 8]
    ctx = build(one_hot(labels), masks_of(labels))
    assert not any(m.startswith("mbo") for m in ctx.run(TASK, **(QUICK | {"hier_clusters": ()})))
    assert all(len(strip) == 4 for strip in ctx.images.values())


def test_artefacts(build: Callable[..., Any]) -> None:
    labels = patch_labels(10)
    ctx = build(one_hot(labels, noise=1.0), masks_of(labels))
    ctx.run(TASK, **QUICK)
    assert ctx.saved["per-class"]["labels"] == list(CLASSES)
    assert next(iter(ctx.images)) == "seeded-image"
    assert len(ctx.images) >= 3
    assert set(ctx.images) <= {f"{why}-image" for why in ("seeded", "best", "median", "worst")}
    for strip in ctx.images.values():
        assert [panel.shape for panel in strip] == [(40, 48, 3)] * 5
    cloud = ctx.saved["t-sne"]
    assert len(cloud["x"]) == len(cloud["y"]) == len(cloud["group"]) == labels.size
    assert sorted(cloud["groups"]) == sorted(CLASSES[c] for c in np.unique(labels))
    single = build(one_hot(labels)[:1], masks_of(labels)[:1])
    single.run(TASK, **QUICK)
    assert len(single.images) == 1


def test_the_plane_keeps_classes_apart_and_is_seeded_and_optional(build: Callable[..., Any]) -> None:
    labels = patch_labels(10)
    clouds = []
    for _ in range(2):
        ctx = build(one_hot(labels, noise=0.3), masks_of(labels))
        ctx.run(TASK, **(QUICK | {"tsne_tokens": 60, "tsne_perplexity": 5.0}))
        clouds.append(ctx.saved["t-sne"])
    cloud = clouds[0]
    assert all(np.array_equal(cloud[key], clouds[1][key]) for key in ("x", "y", "group"))
    assert len(cloud["x"]) == 60
    plane = np.column_stack([cloud["x"], cloud["y"]])
    assert np.abs(plane).max() == 1
    distance = np.linalg.norm(plane[:, None] - plane, axis=-1) + np.diag(np.full(60, np.inf))
    assert (cloud["group"][distance.argmin(axis=1)] == cloud["group"]).mean() > 0.9
    none = build(one_hot(labels), masks_of(labels))
    none.run(TASK, **(QUICK | {"tsne_tokens": 0}))
    assert "t-sne" not in none.saved


def test_tokens_that_all_point_one_way_have_no_plane(build: Callable[..., Any]) -> None:
    labels = patch_labels(10)
    ctx = build(np.ones_like(one_hot(labels)), masks_of(labels))
    ctx.run(TASK, **QUICK)
    assert "t-sne" not in ctx.saved
    assert any("point one way" in note for note in ctx.notes)


@pytest.mark.parametrize(
    "options",
    [
        {"matching": "count"},
        {"eval_size": 0},
        {"pca_dim": 4},
        {"pca_dim": 0, "standardise": False},
        {"max_points_per_centroid": None, "tol": 0.0},
        {"linkage": "average"},
        {"layer": -2},
        {"over_clusters": ()},
    ],
)
def test_every_option_reaches_the_same_perfect_score(
    build: Callable[..., Any], toy: ModuleType, options: dict[str, Any]
) -> None:
    labels = patch_labels(12)
    found = build(one_hot(labels).astype(np.float16), masks_of(labels)).run(TASK, **(QUICK | options))
    for measurement in found.values():
        assert toy.value(measurement) == pytest.approx(1, abs=0.02)


def test_features_that_are_not_finite_are_refused(build: Callable[..., Any]) -> None:
    labels = patch_labels(4)
    features = one_hot(labels)
    features[1, 2, 3, 0] = np.inf
    with pytest.raises(TaskError, match="NaN or infinite"):
        build(features, masks_of(labels)).run(TASK, **QUICK)


def test_data_without_class_names_is_refused(build: Callable[..., Any]) -> None:
    labels = patch_labels(4)
    with pytest.raises(TaskError, match="names no class"):
        build(one_hot(labels), masks_of(labels), classes=()).run(TASK, **QUICK)


def test_bootstrap_interval_holds_the_value(build: Callable[..., Any], toy: ModuleType) -> None:
    from lmim_bench.bench.stats import score

    labels = patch_labels(16)
    mixed = np.where(np.random.default_rng(5).random(labels.shape) < 0.2, 0, labels)
    found = build(one_hot(mixed), masks_of(labels)).run(TASK, **QUICK)
    for measurement in found.values():
        result = score(measurement, np.random.default_rng(0))
        assert result.value == pytest.approx(toy.value(measurement))
        assert result.low is not None
        assert result.high is not None
        assert result.low < result.value < result.high
        assert result.high - result.low < 0.3
        assert replace(measurement).metric == result.metric
