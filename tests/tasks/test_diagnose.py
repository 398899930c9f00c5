"""Diagnostics: measures against slow statements of them, and the task on encoders whose state is known."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lmim_bench.bench.errors import TaskError
from lmim_bench.bench.stats import score
from lmim_bench.bench.types import Column, Features, Measurement, Tap
from lmim_bench.tasks import _patch_maps
from lmim_bench.tasks._math import representation as measure
from lmim_bench.tasks.diagnose import TASK, DiagnoseConfig

CASES = settings(deadline=None, derandomize=True, max_examples=25)
SEEDS = st.integers(0, 9999)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def rotation(seed, dim):
    return np.linalg.qr(normal(seed, dim, dim))[0]


def influence(items):
    return items - items.mean()


def leave_one_out(rows, value):
    """The jackknife's influence of each item on ``value(rows)``."""
    left_out = np.array([value(np.delete(rows, i, axis=0)) for i in range(len(rows))])
    return (len(rows) - 1) * (left_out.mean() - left_out)


def check_influence(items, rows, value, tolerance=0.12):
    expected = leave_one_out(rows, value)
    assert items.mean() == pytest.approx(value(rows), rel=1e-9)
    assert np.corrcoef(influence(items), expected)[0, 1] > 0.98
    assert influence(items).std() == pytest.approx(expected.std(), rel=tolerance)


# ------------------------------------------------------------------------------------------- cosines


@CASES
@given(SEEDS, st.integers(2, 7), st.integers(1, 5))
def test_mean_cosines_equal_a_loop_over_the_others(seed, n, dim):
    x = normal(seed, n, dim)
    pairs = {
        (i, j): x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])
        for i, j in itertools.permutations(range(n), 2)
    }
    expected = [np.mean([pairs[i, j] for j in range(n) if j != i]) for i in range(n)]
    np.testing.assert_allclose(measure.mean_cosines(x), expected, atol=1e-12)


@CASES
@given(SEEDS, st.floats(1e-3, 1e3))
def test_cosines_and_uniformity_do_not_change_with_rotation_and_length(seed, factor):
    x = normal(seed, 8, 5)
    y = (x * np.linspace(1, factor, 8)[:, None]) @ rotation(seed, 5)
    np.testing.assert_allclose(measure.mean_cosines(y), measure.mean_cosines(x), atol=1e-12)
    np.testing.assert_allclose(measure.uniformity_items(y), measure.uniformity_items(x), atol=1e-10)


def test_cosines_of_identical_opposite_orthogonal_and_empty_rows():
    assert measure.mean_cosines(np.tile([[3.0, 1, 2]], (4, 1))) == pytest.approx(np.ones(4))
    assert measure.mean_cosines(np.array([[1.0, 0], [-4.0, 0]])) == pytest.approx([-1, -1])
    assert measure.mean_cosines(np.eye(5)) == pytest.approx(np.zeros(5))
    assert measure.mean_cosines(np.zeros((3, 4))) == pytest.approx(np.ones(3))


def test_uniformity_equals_a_loop_and_known_values():
    x = normal(0, 9, 4)
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    potential = [np.exp(-2 * np.sum((a - b) ** 2)) for a, b in itertools.combinations(u, 2)]
    assert measure.uniformity_items(x).mean() == pytest.approx(np.log(np.mean(potential)), abs=1e-12)
    assert measure.uniformity_items(np.ones((4, 3))).mean() == pytest.approx(0)
    assert measure.uniformity_items(np.eye(4)).mean() == pytest.approx(-4)  # squared distance 2, t = 2


def test_items_of_pairs_have_the_spread_of_the_jackknife():
    x = normal(1, 60, 6) + 0.7
    check_influence(measure.pair_items(measure.mean_cosines(x)), x, lambda r: measure.mean_cosines(r).mean())
    check_influence(measure.uniformity_items(x), x, lambda r: measure.uniformity_items(r).mean())


@pytest.mark.parametrize("name", ["collapse", "effective_rank"])
def test_the_interval_holds_what_new_images_give(name):
    """The spread of the value over fresh samples is that of the interval from one."""

    def items(seed):
        x = normal(seed, 150, 8) * np.linspace(0.3, 2, 8) + 0.4
        if name == "collapse":
            return measure.pair_items(measure.mean_cosines(x))
        return measure.rank_items(measure.spectrum(x, centre=True))

    values = np.array([items(seed).mean() for seed in range(150)])
    found = [score(Measurement(name, items(s)), np.random.default_rng(s)) for s in range(20)]
    widths = [s.high - s.low for s in found if s.low is not None and s.high is not None]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * values.std(), rel=0.15)


# ------------------------------------------------------------------------------------------- rank


@CASES
@given(SEEDS, st.integers(2, 12), st.integers(1, 12), st.booleans())
def test_the_spectrum_equals_numpy_and_its_shares_add_up(seed, n, dim, centre):
    x = normal(seed, n, dim) + 1
    found = measure.spectrum(x, centre=centre)
    y = x - x.mean(axis=0) * centre
    expected = np.linalg.svd(y, compute_uv=False)
    np.testing.assert_allclose(found.values, expected, atol=1e-6)
    kept = found.values > 0
    np.testing.assert_allclose(found.shares[:, kept].sum(axis=0), 1)
    # The rows' own lengths come back from their shares.
    np.testing.assert_allclose(found.shares[:, kept] @ found.values[kept] ** 2, (y**2).sum(1), atol=1e-9)


def test_explained_variance_equals_scikit_learn():
    from sklearn.decomposition import PCA

    x = normal(0, 40, 7) * np.arange(1, 8)
    np.testing.assert_allclose(
        measure.spectrum(x, centre=True).variance, PCA().fit(x).explained_variance_ratio_, atol=1e-12
    )


@CASES
@given(SEEDS, st.integers(1, 9), st.integers(1, 9), st.floats(1e-3, 1e3))
def test_the_rank_of_orthogonal_rows_is_their_number_and_of_one_direction_is_one(seed, dim, extra, factor):
    for x in (rotation(seed, dim), np.vstack([rotation(seed, dim), np.zeros((extra, dim))])):
        values = measure.spectrum(factor * x, centre=False).values
        assert measure.effective_rank(values) == pytest.approx(dim)
    line = np.outer(normal(seed, dim + extra), normal(seed + 1, dim))
    assert measure.effective_rank(measure.spectrum(factor * line, centre=False).values) == pytest.approx(1)


@CASES
@given(SEEDS, st.floats(1e-3, 1e3))
def test_the_rank_does_not_change_with_scale_rotation_and_order_nor_when_centred_with_shift(seed, factor):
    x = normal(seed, 12, 5)
    y = factor * x[::-1] @ rotation(seed, 5)
    for centre in (False, True):
        a, b = (measure.spectrum(rows, centre=centre).values for rows in (x, y))
        assert measure.effective_rank(b) == pytest.approx(measure.effective_rank(a), rel=1e-6)
    shifted = measure.spectrum(x + 10, centre=True).values
    assert measure.effective_rank(shifted) == pytest.approx(
        measure.effective_rank(measure.spectrum(x, centre=True).values), rel=1e-6
    )


def test_rankme_is_the_formula_of_its_paper():
    x = normal(3, 30, 6) + 2
    values = np.linalg.svd(x, compute_uv=False)
    shares = values / values.sum() + 1e-7
    expected = np.exp(-np.sum(shares * np.log(shares)))
    found = measure.spectrum(x, centre=False)
    assert measure.effective_rank(found.values, measure.RANKME_EPS) == pytest.approx(expected, rel=1e-12)
    assert measure.rank_items(found, measure.RANKME_EPS).mean() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("centre", [True, False])
def test_items_of_the_rank_have_the_spread_of_the_jackknife(centre):
    x = normal(4, 200, 10) * np.linspace(0.5, 3, 10) + 1
    check_influence(
        measure.rank_items(measure.spectrum(x, centre=centre)),
        x,
        lambda r: measure.effective_rank(measure.spectrum(r, centre=centre).values),
    )


def test_rank_items_of_groups_are_the_means_of_their_rows():
    x = normal(5, 60, 4)
    single = measure.rank_items(measure.spectrum(x, centre=True))
    grouped = measure.rank_items(measure.spectrum(x, centre=True, group=6))
    np.testing.assert_allclose(grouped, single.reshape(10, 6).mean(axis=1))


def test_rows_that_do_not_vary_have_rank_one():
    found = measure.spectrum(np.ones((9, 4)), centre=True)
    assert not found.values.any()
    assert not found.variance.any()
    np.testing.assert_array_equal(measure.rank_items(found, measure.RANKME_EPS), np.ones(9))


@pytest.mark.parametrize("images", [20, 200])
def test_the_rounding_of_a_constant_has_no_rank_and_no_position(images):
    rows = np.ones((images, 16)) + 3e-8 * normal(0, images, 16)
    found = measure.spectrum(rows, centre=True)
    assert measure.effective_rank(found.values) == 1
    assert not measure.position_items(rows.reshape(images // 4, 4, 16)).any()
    # Small differences that are none of rounding count.
    assert measure.effective_rank(measure.spectrum(1 + 1e-3 * normal(0, images, 16), centre=True).values) > 10


# ------------------------------------------------------------------------------------------- patches


def position_share(x):
    mean = x.mean(axis=(0, 1))
    return ((x.mean(axis=0) - mean) ** 2).sum(1).mean() / ((x - mean) ** 2).sum(2).mean()


@CASES
@given(SEEDS, st.integers(2, 6), st.integers(2, 5), st.integers(1, 4))
def test_the_position_share_equals_the_ratio_of_variances(seed, images, patches, dim):
    x = normal(seed, images, patches, dim)
    assert measure.position_items(x).mean() == pytest.approx(position_share(x), rel=1e-9)


def test_the_position_share_of_a_code_of_nothing_and_of_images():
    assert measure.position_items(np.tile(normal(0, 1, 9, 4), (5, 1, 1))) == pytest.approx(np.ones(5))
    assert measure.position_items(np.ones((4, 3, 2))) == pytest.approx(np.zeros(4))
    assert measure.position_items(np.tile(normal(0, 6, 1, 4), (1, 9, 1))).mean() == pytest.approx(0)


def test_items_of_the_position_share_have_the_spread_of_the_jackknife():
    x = normal(6, 80, 5, 3) * np.linspace(0.5, 2, 80)[:, None, None] + 1.5 * normal(7, 1, 5, 3)
    check_influence(measure.position_items(x), x, position_share)


def test_norm_outliers_are_those_beyond_the_deviations():
    norms = np.concatenate([np.linspace(9, 11, 38), [13.4, 50.0]]).reshape(8, 5)
    found = measure.norm_outliers(norms, 6)
    centre = np.median(norms)
    assert found.threshold * centre == pytest.approx(centre + 6 * np.median(np.abs(norms - centre)))
    assert found.share.tolist() == [0] * 7 + [0.4]
    scaled = measure.norm_outliers(1000 * norms, 6)
    np.testing.assert_allclose(scaled.norms, found.norms)


def test_rounding_errors_of_equal_norms_are_no_outliers():
    norms = 5 + 1e-6 * normal(0, 50, 20) ** 3
    assert measure.norm_outliers(norms, 6).share.sum() == 0
    assert measure.norm_outliers(np.zeros((3, 4)), 6).share.sum() == 0


# ------------------------------------------------------------------------------------------- layers


def hsic(k, m):
    """The unbiased estimator of Song et al. (2012), equation 5, as it stands there."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    ones = np.ones(n)
    cross = ones @ k @ ones * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + cross - 2 / (n - 2) * ones @ k @ m @ ones) / (n * (n - 3))


@CASES
@given(SEEDS, st.integers(4, 12), st.integers(2, 8))
def test_cka_equals_the_formula(seed, n, dim):
    x, y = normal(seed, n, dim) + 1, normal(seed + 1, n, dim + 2)
    k, m = x @ x.T, y @ y.T
    own = hsic(k, k) * hsic(m, m)
    expected = hsic(k, m) / np.sqrt(own)
    found = measure.cka([x, y])
    assert found[0, 1] == found[1, 0] == pytest.approx(expected, abs=1e-8)
    assert np.diagonal(found) == pytest.approx([1, 1])


@CASES
@given(SEEDS, st.floats(1e-3, 1e3))
def test_cka_does_not_see_rotation_scale_and_shift(seed, factor):
    x = normal(seed, 20, 4)
    assert measure.cka([x, factor * x @ rotation(seed, 4) + 3])[0, 1] == pytest.approx(1)


def test_cka_of_independent_features_is_nought_even_in_many_dimensions():
    values = [measure.cka([normal(s, 40, 400), normal(s + 99, 40, 400)])[0, 1] for s in range(10)]
    assert abs(np.mean(values)) < 0.03
    x, y = (normal(s, 40, 400) - normal(s, 40, 400).mean(axis=0) for s in (0, 99))
    biased = np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    assert biased > 0.8  # what the plain estimator says of the same features


def test_cka_with_a_constant_is_nought():
    np.testing.assert_array_equal(measure.cka([normal(0, 6, 3), np.full((6, 3), 0.1)])[0], [1, 0])


# ------------------------------------------------------------------------------------------- task


class Pictures:
    """Noise pictures of the size of the toy encoder's input."""

    labels = None

    def __init__(self, n):
        self.ids = [f"val/{i:04d}.png" for i in range(n)]

    def __len__(self):
        return len(self.ids)

    def image(self, i):
        return np.random.default_rng(i).integers(0, 255, (32, 32, 3)).astype(np.uint8)


def context(toy, patches, seed=0, features=None, **spec):
    """A toy context whose encoder gives these patches (N, h, w, D) for the N pictures of the test split."""
    n = len(patches)
    split = Pictures(n)
    rows = patches.mean(axis=(1, 2)) if features is None else features
    rows = rows.astype(np.float32)
    found = toy.toy_context(
        (rows, None), (rows, None), seed=seed, n_classes=1, spec=toy.toy_spec(**({"crop_pct": 1.0} | spec))
    )
    found.data.splits["val"] = split
    seen = {split.image(i).tobytes(): i for i in range(n)}
    asked = []

    def encode(images, tap, pos_interpolation=None):
        std, mean = (torch.tensor(values).view(3, 1, 1) for values in (found.spec.std, found.spec.mean))
        pixels = ((images * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        index = [seen[pixel.tobytes()] for pixel in pixels]
        asked.extend((i, tap) for i in index)
        scale = 1.0 if tap.norm else 10.0
        tokens = torch.from_numpy(scale * patches[index].astype(np.float32))
        return Features(cls=None, patches=tokens, mean=tokens.mean(dim=(1, 2)))

    found.encode = encode
    return found, asked


def test_every_metric_of_the_task_equals_its_definition(toy):
    patches = normal(0, 20, 3, 3, 16) + 0.5
    held, _ = context(toy, patches)
    found = held.run(TASK, outlier_mad=3)
    rows = patches.mean(axis=(1, 2)).astype(np.float32).astype(np.float64)
    tokens = patches.reshape(-1, 16)

    def rank(x, eps=0.0):
        s = np.linalg.svd(x, compute_uv=False)
        p = s / s.sum()
        p = p[p > 1e-12] + eps
        return np.exp(-np.sum(p * np.log(p)))

    def cosine(x):
        return np.mean(
            [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.combinations(x, 2)]
        )

    norms = np.linalg.norm(tokens, axis=1)
    limit = np.median(norms) + 3 * np.median(np.abs(norms - np.median(norms)))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    potential = [np.exp(-2 * np.sum((a - b) ** 2)) for a, b in itertools.combinations(unit, 2)]
    expected = {
        "collapse": cosine(rows),
        "uniformity": np.log(np.mean(potential)),
        "effective_rank": rank(rows - rows.mean(0)) / 16,
        "rankme": rank(rows, 1e-7) / 16,
        "patch_cosine": np.mean([cosine(p.reshape(9, 16)) for p in patches]),
        "position_share": position_share(patches.reshape(20, 9, 16)),
        "patch_effective_rank": rank(tokens - tokens.mean(0)) / 16,
        "patch_rankme": rank(tokens, 1e-7) / 16,
        "outliers": (norms > limit).mean(),
    }
    assert set(found) == set(expected)
    for name, number in expected.items():
        assert toy.value(found[name]) == pytest.approx(number, rel=1e-5), name
        assert len(found[name].items) == 20
    assert found["effective_rank"].detail["rank"] == pytest.approx(16 * expected["effective_rank"], rel=1e-5)


def test_a_healthy_encoder_gets_no_complaint(toy):
    held, _ = context(toy, normal(0, 20, 3, 3, 16) + normal(1, 20, 1, 1, 16))
    held.run(TASK)
    (note,) = held.notes
    assert "has not collapsed" in note
    assert "effective dimensions of at most 16" in note


@pytest.mark.parametrize(
    ("patches", "complaint"),
    [
        (normal(0, 1, 3, 3, 16) + 1 + 1e-3 * normal(1, 20, 3, 3, 16), "the global feature has collapsed"),
        (normal(0, 1, 3, 3, 16) + 1e-1 * normal(1, 20, 3, 3, 16), "a code of position, which explains 9"),
        (normal(0, 20, 1, 1, 16) + 1e-3 * normal(1, 20, 3, 3, 16), "nearly uniform"),
        (
            normal(0, 20, 3, 3, 16) * np.where(np.arange(180).reshape(20, 3, 3, 1) % 20 == 0, 30, 1),
            "are norm outliers, up to",
        ),
    ],
)
def test_the_notes_name_what_is_wrong(toy, patches, complaint):
    held, _ = context(toy, patches)
    held.run(TASK)
    assert any(complaint in note for note in held.notes), held.notes


def test_norms_are_read_before_the_final_norm(toy):
    held, asked = context(toy, normal(0, 6, 2, 2, 16))
    found = held.run(TASK, patch_images=4)
    assert {tap for _, tap in asked} == {Tap(-1, True), Tap(-1, False)}
    with_norm, asked = context(toy, normal(0, 6, 2, 2, 16), final_norm=False)
    plain = with_norm.run(TASK, patch_images=4)
    assert {tap for _, tap in asked} == {Tap(-1, False)}
    assert plain["outliers"].detail == found["outliers"].detail


def test_the_same_images_are_chosen_for_every_encoder_and_others_for_another_seed(toy):
    held, asked = context(toy, normal(0, 30, 2, 2, 16))
    found = held.run(TASK, images=12, patch_images=5)
    other, asked_other = context(toy, normal(1, 30, 4, 4, 24), patch_size=8, embed_dim=24)
    other.run(TASK, images=12, patch_images=5)
    assert [i for i, _ in asked] == [i for i, _ in asked_other]
    assert len({i for i, _ in asked}) == 5
    assert len(found["collapse"].items) == 12
    assert len(found["patch_cosine"].items) == 5
    seeded, asked_seeded = context(toy, normal(0, 30, 2, 2, 16), seed=1)
    seeded.run(TASK, images=12, patch_images=5)
    assert [i for i, _ in asked_seeded] != [i for i, _ in asked]
    first = held.images["pca-0"][0]
    np.testing.assert_array_equal(first, other.images["pca-0"][0])
    shown = Image.fromarray(Pictures(30).image(asked[0][0])).resize((160, 160), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(first, np.asarray(shown))


def test_the_batch_changes_nothing(toy):
    patches = normal(0, 60, 2, 2, 16)
    runs = []
    for size in (1, 8):  # meant for images of 224 pixels: 49 and 392 of 32 pixels
        held, _ = context(toy, patches)
        held.batch_size = size
        runs.append((held.run(TASK), held))
    (a, first), (b, second) = runs
    for name in a:
        np.testing.assert_array_equal(a[name].items, b[name].items)
    for name, panels in first.images.items():
        np.testing.assert_array_equal(panels, second.images[name])


def test_what_is_kept_can_be_drawn(toy):
    held, _ = context(toy, normal(0, 20, 3, 3, 16))
    held.run(TASK)
    assert set(held.saved) == {"norms", "spectrum", "explained", "similarity", "cka"}
    assert list(held.images) == ["cka", "pca-0", "pca-1", "similar-0", "similar-1"]
    assert {len(held.images[name]) for name in ("pca-0", "pca-1")} == {6}
    for name in ("pca-0", "pca-1"):
        cosines = held.similarities[name]
        patches = int(np.prod(cosines.shape[1:3]))
        flat = cosines.reshape(len(cosines), patches, patches)
        np.testing.assert_allclose(flat, flat.transpose(0, 2, 1), atol=1e-12)
        np.testing.assert_allclose(np.diagonal(flat, axis1=1, axis2=2), 1)
    for name, data in held.saved.items():
        assert all(len(values) == len(data["x"]) for values in data["series"].values()), name
    for name in ("norms", "similarity"):
        for shares in held.saved[name]["series"].values():
            assert np.sum(shares) == pytest.approx(1, abs=1e-4)
    explained = held.saved["explained"]
    assert explained["x"] == [1, 2, 4, 8, 16]
    assert explained["series"]["global feature"][-1] == pytest.approx(1)
    assert held.saved["spectrum"]["series"]["patch tokens"][0] == 0


def test_similarity_is_brightest_where_patches_are_like_the_marked_one(toy):
    """All patches of the left half are alike in every image, and so are those of the right half."""
    halves = np.where(np.arange(4)[None, None, :, None] < 2, normal(0, 16), normal(1, 16))
    held, _ = context(toy, np.broadcast_to(halves, (20, 4, 4, 16)) + 1e-4 * normal(2, 20, 4, 4, 16))
    held.run(TASK)
    own, other = (held.images["similar-0"][i].astype(int).sum(axis=2) for i in (1, 3))
    for picture in (own, other):
        left, right = picture[:, :80], picture[:, 80:]
        assert min(left.min(), right.min()) + 200 < max(left.min(), right.min())
        assert left.std() < 10
        assert right.std() < 10
    np.testing.assert_allclose(own, other, atol=10)


def test_layers_are_compared_by_cka(toy):
    held, _ = context(toy, normal(0, 20, 3, 3, 16))
    for layer, noise in ((-6, 30.0), (-5, 30.0), (-4, 0.4), (-3, 0.2), (-2, 0.05)):
        rows = held.banks["val"].columns["cls@-1"]
        held.banks["val"].columns[f"cls@{layer}"] = rows + noise * normal(-layer, 20, 16)
    held.run(TASK)
    curve = held.saved["cka"]
    assert curve["x"] == [1, 2, 3, 4, 5, 6]
    values = curve["series"]["global feature"]
    assert values[-1] == pytest.approx(1)
    assert values[-2] > 0.9 > values[-3] > values[-4] > 0.3 > max(values[0], values[1])
    assert held.images["cka"][0][0, 0].tolist() == [253, 231, 37]


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, [-6, -5, -4, -3, -2, -1]),
        ({"layers": 3}, [-6, -4, -1]),
        ({"layers": 2, "layer": -2}, [-6, -2]),
        ({"layers": 1}, [-6]),
        ({"layers": 0}, []),
    ],
)
def test_blocks_are_spaced_up_to_the_one_that_is_read(toy, options, layers):
    config = DiagnoseConfig(**options)
    assert [tap.layer for tap in config.blocks(toy.toy_spec())] == layers
    assert Column("cls", config.tap(toy.toy_spec())) in config.columns(toy.toy_spec())


def test_one_layer_is_compared_with_none(toy):
    held, _ = context(toy, normal(0, 20, 3, 3, 16), depth=1)
    held.run(TASK)
    assert "cka" not in held.saved
    assert "cka" not in held.images


def test_features_are_kept_for_a_later_comparison(toy):
    patches = 1e6 * normal(0, 300, 2, 2, 16)
    held, _ = context(toy, patches)
    held.run(TASK, pictures=0)
    assert not [name for name in held.images if name != "cka"]
    features, ids = held.kept["features"]
    assert features.shape == (256, 16)
    rows = patches.mean(axis=(1, 2))[[int(name[4:8]) for name in ids]]
    assert measure.cka([features, rows])[0, 1] == pytest.approx(1, abs=1e-4)


def test_few_images_say_what_was_left_out(toy):
    held, _ = context(toy, normal(0, 3, 2, 2, 16))
    found = held.run(TASK)
    assert "CKA between layers is left out: it needs 4 images, and there are 3" in held.notes
    assert found["effective_rank"].detail["largest possible"] == 2
    alone, _ = context(toy, normal(0, 1, 2, 2, 16))
    with pytest.raises(TaskError, match="holds 1 of the 2 images or more"):
        alone.run(TASK)


def test_one_patch_an_image_leaves_the_patches_out(toy):
    held, _ = context(toy, normal(0, 8, 1, 1, 16))
    assert set(held.run(TASK)) == {"collapse", "uniformity", "effective_rank", "rankme"}
    assert any("one patch token an image" in note for note in held.notes)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_features_that_never_vary_are_collapsed_of_rank_one_and_finite(toy, value):
    held, _ = context(toy, np.full((9, 2, 2, 16), value))
    found = held.run(TASK)
    assert toy.value(found["collapse"]) == pytest.approx(1)
    assert found["effective_rank"].detail["rank"] == 1
    assert all(np.isfinite(m.items).all() for m in found.values())
    assert "the global feature has collapsed" in held.notes[0]


def test_features_that_are_not_finite_name_the_image(toy):
    rows = normal(0, 9, 16)
    rows[4, 2] = np.nan
    held, _ = context(toy, normal(0, 9, 2, 2, 16), features=rows)
    with pytest.raises(TaskError, match=r"the features of val/0004\.png hold NaN"):
        held.run(TASK)


def test_patches_that_are_not_finite_name_the_image(toy):
    patches = normal(0, 9, 2, 2, 16)
    patches[4, 1, 0, 2] = np.inf
    held, _ = context(toy, patches, features=normal(1, 9, 16))
    with pytest.raises(
        TaskError, match=r"the patch tokens of val/0004\.png hold NaN or infinity; try --prec"
    ):
        held.run(TASK)


def test_long_grids_are_averaged_over_blocks_for_the_page():
    tokens = np.random.default_rng(0).normal(size=(2, 37, 5, 3))
    coarse = _patch_maps._coarse(tokens)
    assert coarse.shape == (2, 16, 5, 3)
    edges = [i * 37 // 16 for i in range(17)]
    expected = [tokens[:, a:b].mean(axis=1) for a, b in itertools.pairwise(edges)]
    np.testing.assert_allclose(coarse, np.stack(expected, axis=1))
