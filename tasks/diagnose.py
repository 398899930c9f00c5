"""Diagnostics: has the encoder collapsed, how many dimensions does it use, what do its patches hold?

Nothing is trained and no label is read. These numbers explain scores, and are none: a random projection of
the pixels has a high rank and no use, and a good encoder may keep much of its variance in few dimensions.

Of the global feature of a seeded choice of test images: the mean cosine between different images (the
collapse indicator of the Latent MIM paper: 1 is collapsed), uniformity (Wang and Isola, ICML 2020), effective
rank (Roy and Vetterli, EUSIPCO 2007; centred) and RankMe (Garrido et al., ICML 2023; not centred), in % of
the largest rank that so many images allow. Of their patch tokens: the mean cosine inside an image, the share
of variance that position alone explains (an encoder that ignores its input reaches 1), both ranks, and the
share of tokens of outlying norm before the final norm (Darcet et al., ICLR 2024). Of the layers: debiased
linear CKA (Kornblith et al., ICML 2019). Pictures: patch features by PCA, and similarity to one patch, for
the same images whatever the checkpoint.

Which way is better is set for the extremes: towards collapse, towards a code of position, towards artefacts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from ..bench.errors import TaskError
from ..bench.types import (
    Array,
    Column,
    Context,
    Dataset,
    EncoderSpec,
    FeatureBank,
    FeatureRequest,
    Measurement,
    Metric,
    Tap,
    View,
    Work,
    pooled_columns,
)
from . import task
from ._features import PooledConfig, pooled_rows, require_finite
from ._math import representation as measure
from ._patch_maps import save_heat, save_patch_maps

_ARTEFACTS, _LONG = 0.005, 3.0
"""Above this share of outliers, of which one is this many medians long, they speak of artefact tokens."""
_KEPT = 256
_COSINES = np.round(np.linspace(-1, 1, 41), 3)
_NORMS = 2.0 ** np.arange(-3, 5.25, 0.25)


class DiagnoseConfig(PooledConfig):
    """What is measured, and on how many images."""

    images: int = Field(
        512, ge=2, description="Test images (a seeded choice) whose global features are read."
    )
    patch_images: int = Field(128, ge=2, description="Images, of those, whose patch tokens are read.")
    outlier_mad: float = Field(
        6.0, gt=0, description="A norm this many median absolute deviations above the median is an outlier."
    )
    layers: int = Field(6, ge=0, description="Blocks compared by CKA, evenly spaced; 0 or 1 compares none.")
    pictures: int = Field(6, ge=0, description="Images shown with their patch features; 0 for none.")

    def blocks(self, spec: EncoderSpec) -> list[Tap]:
        """The blocks that CKA compares, the one that is read last."""
        own = self.tap(spec)
        top = spec.depth + own.layer
        places = np.linspace(0, top, min(self.layers, top + 1)).round().astype(int).tolist()
        return [Tap(place - spec.depth, own.norm) for place in places]

    def columns(self, spec: EncoderSpec) -> tuple[Column, ...]:
        """The global features of the block that is read and of those compared with it."""
        taps = dict.fromkeys((self.tap(spec), *self.blocks(spec)))
        return tuple(column for tap in taps for column in pooled_columns(self.pooled(spec), tap))


def _features(cfg: DiagnoseConfig, spec: EncoderSpec, data: Dataset) -> Sequence[FeatureRequest]:
    return [FeatureRequest((data.test_split,), cfg.view(spec), cfg.columns(spec))]


def _work(cfg: DiagnoseConfig, spec: EncoderSpec, data: Dataset) -> Work:
    side = cfg.view(spec).size
    images = min(cfg.images, len(data.splits[data.test_split]))
    seen, tokens = min(cfg.patch_images, images), (side // spec.patch_size) ** 2
    return Work(
        {
            "start": 0.8,
            "images": 1e-7 * images**2
            + 1e-11 * images * spec.embed_dim * (images + spec.embed_dim) * cfg.layers,
            "patches": 1e-9 * seen * tokens * (tokens + spec.embed_dim),
        },
        encoded={(side, side): 2 * seen},
        memory=12.0 * seen * tokens * spec.embed_dim,
    )


@task(
    "diagnose",
    version=2,
    title="Diagnostics",
    data="classification",
    config=DiagnoseConfig,
    metrics=(
        Metric(id="collapse", title="cosine between different images", unit="", higher_is_better=False),
        Metric(id="uniformity", title="uniformity, t = 2", unit="", higher_is_better=False),
        Metric(id="effective_rank", title="effective rank"),
        Metric(id="rankme", title="RankMe"),
        Metric(id="patch_cosine", title="cosine inside an image", unit="", higher_is_better=False),
        Metric(id="position_share", title="patch variance by position", higher_is_better=False),
        Metric(id="patch_effective_rank", title="effective rank of patches"),
        Metric(id="patch_rankme", title="RankMe of patches"),
        Metric(id="outliers", title="patches of outlying norm", higher_is_better=False),
    ),
    headline=lambda cfg: "collapse",
    features=_features,
    scored=False,
    work=_work,
)
def TASK(ctx: Context, cfg: DiagnoseConfig) -> Sequence[Measurement]:  # noqa: N802
    """Measure the global features, then the patch tokens of some of the images."""
    bank = _chosen(ctx, cfg)
    rows = pooled_rows(bank, cfg.pooled(ctx.spec), cfg.tap(ctx.spec))
    result, global_spectrum = _globals(rows)
    cosines = measure.unit(rows) @ measure.unit(rows).T
    between = _histogram(cosines[np.triu_indices(len(rows), 1)], _COSINES)

    tokens = _encode(ctx, cfg, bank.index[: cfg.patch_images])
    spectra, similarity = {"global feature": global_spectrum}, {"global features, different images": between}
    if tokens.patches.shape[1] * tokens.patches.shape[2] > 1:
        measured, spectra["patch tokens"], similarity["patch tokens, same image"] = _patches(ctx, cfg, tokens)
        result += measured
    else:
        ctx.note("the encoder has one patch token an image: patches were not measured")
    _verdict(ctx, {m.metric: m for m in result}, len(rows))

    _save_spectra(ctx, spectra)
    _save_histogram(
        ctx, "similarity", "Similarity of features", similarity, (_COSINES[1:] + _COSINES[:-1]) / 2, "cosine"
    )
    _save_layers(ctx, cfg, bank)
    ctx.save_features(
        "features",
        rows[:_KEPT],
        bank.ids[:_KEPT],
        "Likeness of checkpoints",
        "Debiased linear CKA of the global features: 1 alike but for rotation and scale, 0 unrelated.",
    )
    save_patch_maps(ctx, tokens.pixels, tokens.patches)
    return result


def _chosen(ctx: Context, cfg: DiagnoseConfig) -> FeatureBank:
    """The bank of the images that are looked at: the same ones, in the same order, for every checkpoint."""
    bank = ctx.bank(ctx.data.test_split)
    if len(bank) < 2:
        raise TaskError(
            f"the {ctx.data.test_split} split of {ctx.data.name} holds {len(bank)} of the 2 images or more "
            "that diagnostics compare"
        )
    rows = ctx.rng("images").permutation(len(bank))[: cfg.images]
    return FeatureBank(
        {column.id: np.asarray(bank.column(column)[rows]) for column in cfg.columns(ctx.spec)},
        [bank.ids[row] for row in rows],
        None,
        np.asarray(bank.index)[rows],
    )


# ------------------------------------------------------------------------------------------- measures


def _globals(rows: Array) -> tuple[list[Measurement], measure.Spectrum]:
    centred = measure.spectrum(rows, centre=True)
    return [
        Measurement("collapse", measure.pair_items(measure.mean_cosines(rows))),
        Measurement("uniformity", measure.uniformity_items(rows)),
        _rank("effective_rank", centred, rows.shape, lost=1),
        _rank("rankme", measure.spectrum(rows, centre=False), rows.shape, eps=measure.RANKME_EPS),
    ], centred


def _rank(
    name: str, found: measure.Spectrum, shape: tuple[int, ...], *, eps: float = 0.0, lost: int = 0
) -> Measurement:
    """A rank as a share of the largest that there can be; centring loses one row."""
    most = max(1, min(shape[1], shape[0] - lost))
    rank = measure.effective_rank(found.values, eps)
    detail = {"rank": rank, "largest possible": most, "dimension": shape[1]}
    return Measurement(name, measure.rank_items(found, eps) / most, bounds=(0, 1), detail=detail)


@dataclass(frozen=True)
class _Tokens:
    """Patch tokens of M images.

    Attributes:
        patches: (M, h, w, D).
        norms: their lengths before the final norm, (M, h * w).
        pixels: what the encoder saw, uint8 (S, S, 3), of the images that are shown.
    """

    patches: Array
    norms: Array
    pixels: list[Array]


def _encode(ctx: Context, cfg: DiagnoseConfig, positions: Array) -> _Tokens:
    """Encode some images of the test split again: a bank would keep the patches of all of them."""
    import torch

    from ..bench.data.views import normalise

    tap, view = cfg.tap(ctx.spec), cfg.view(ctx.spec)
    patches, norms, shown = [], [], []
    ids = ctx.data.splits[ctx.data.test_split].ids
    step = max(1, ctx.batch_size * 224 * 224 // view.size**2)
    with ctx.progress(len(positions), "patch tokens") as bar, torch.inference_mode():
        for start in range(0, len(positions), step):
            pixels = list(_pixels(ctx, view, positions[start : start + step]))
            shown += pixels[: max(0, cfg.pictures - start)]
            images = normalise(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), view)
            images = images.to(ctx.device)
            found = ctx.encode(images, tap).patches
            raw = ctx.encode(images, Tap(tap.layer, norm=False)).patches if tap.norm else found
            patches.append(found.cpu().numpy())
            norms.append(raw.double().norm(dim=-1).flatten(1).cpu().numpy())
            names = [ids[position] for position in positions[start : start + step]]
            for numbers in (patches[-1], norms[-1]):
                require_finite(numbers.reshape(len(names), -1), names, "patch tokens")
            bar.advance(len(pixels))
    return _Tokens(np.concatenate(patches), np.concatenate(norms), shown)


def _pixels(ctx: Context, view: View, positions: Array) -> Iterator[Array]:
    from ..bench.data.views import view_pixels

    split = ctx.data.splits[ctx.data.test_split]
    for position in positions:
        yield view_pixels(split.image(int(position)), view)


def _patches(
    ctx: Context, cfg: DiagnoseConfig, tokens: _Tokens
) -> tuple[list[Measurement], measure.Spectrum, Array]:
    """The measurements of patches, their spectrum, and the histogram of cosines inside an image."""
    images, height, width, dim = tokens.patches.shape
    count = height * width
    patches = tokens.patches.reshape(images, count, dim)
    upper = np.triu_indices(count, 1)
    cosine, histogram = np.empty(images), np.zeros(len(_COSINES) - 1)
    with ctx.progress(images, "patch similarity") as bar:
        for i, image in enumerate(patches):
            cosine[i] = measure.mean_cosines(image).mean()
            directions = measure.unit(image)
            histogram += _histogram((directions @ directions.T)[upper], _COSINES) / images
            bar.advance()

    outliers = measure.norm_outliers(tokens.norms, cfg.outlier_mad)
    _save_histogram(
        ctx,
        "norms",
        "Norms of patch tokens",
        {"patch tokens": _histogram(np.clip(outliers.norms, _NORMS[0], _NORMS[-1]), _NORMS)},
        np.sqrt(_NORMS[1:] * _NORMS[:-1]).round(4),
        "norm before the final norm, over the median",
    )
    rows = patches.reshape(-1, dim)
    centred = measure.spectrum(rows, centre=True, group=count)
    plain = measure.spectrum(rows, centre=False, group=count)
    detail = {
        "threshold over median": outliers.threshold,
        "largest over median": float(outliers.norms.max()),
        "median norm": float(np.median(tokens.norms)),
    }
    return (
        [
            Measurement("patch_cosine", cosine),
            Measurement("position_share", measure.position_items(patches), bounds=(0, 1)),
            _rank("patch_effective_rank", centred, rows.shape, lost=1),
            _rank("patch_rankme", plain, rows.shape, eps=measure.RANKME_EPS),
            Measurement("outliers", outliers.share, detail=detail),
        ],
        centred,
        histogram,
    )


def _verdict(ctx: Context, found: dict[str, Measurement], images: int) -> None:
    """What the numbers mean, in a sentence each."""
    values = {name: float(np.mean(m.items)) for name, m in found.items()}
    rank = found["effective_rank"].detail
    spread = (
        f"different images have a cosine of {values['collapse']:.3f} on average, and {images} images span "
        f"{rank['rank']:.1f} effective dimensions of at most {rank['largest possible']} about their mean"
    )
    if values["collapse"] > measure.COLLAPSED:
        ctx.note(f"WARNING: the global feature has collapsed: {spread}")
    else:
        ctx.note(f"the global feature has not collapsed: {spread}")
    if "position_share" not in values:
        return
    if values["position_share"] > measure.POSITION_CODE:
        ctx.note(
            f"patch tokens are mostly a code of position, which explains {values['position_share']:.0%} of "
            "their variance whatever the image"
        )
    if values["patch_cosine"] > measure.COLLAPSED:
        ctx.note(
            f"patch maps are nearly uniform: a mean cosine of {values['patch_cosine']:.3f} inside an image"
        )
    longest = found["outliers"].detail["largest over median"]
    if values["outliers"] > _ARTEFACTS and longest > _LONG:
        ctx.note(
            f"{values['outliers']:.1%} of the patch tokens are norm outliers, up to {longest:.1f} times the "
            "median: artefact tokens, as Darcet et al. found in encoders without registers"
        )


# ------------------------------------------------------------------------------------------- exhibits


def _histogram(values: Array, edges: Array) -> Array:
    """Share of the values in each bin, (len(edges) - 1,); rounding errors beyond the ends count inside."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return np.asarray(counts / max(1, values.size))


def _save_histogram(
    ctx: Context, name: str, title: str, series: dict[str, Array], centres: Array, x_label: str
) -> None:
    data = {
        "x": centres.round(4),
        "series": {key: shares.round(6) for key, shares in series.items()},
        "x_label": x_label,
        "y_label": "share of tokens" if name == "norms" else "share of pairs",
        "unit": "%",
        "log_x": name == "norms",
    }
    ctx.save_data(name, "curve", title, data)


def _save_spectra(ctx: Context, spectra: dict[str, measure.Spectrum]) -> None:
    """Variance of each component, both axes logarithmic, and how much 1, 2, 4... of them explain."""
    longest = max(len(found.values) for found in spectra.values())
    places = np.unique(np.geomspace(1, longest, 24).round().astype(int))
    doubled = [2**i for i in range(longest.bit_length())]
    decay: dict[str, list[float | None]] = {}
    explained: dict[str, list[float | None]] = {}
    for name, found in spectra.items():
        variance = found.variance
        top, total = variance[0], np.cumsum(variance)
        inside = [variance[k - 1] if k <= len(variance) else 0.0 for k in places]
        decay[name] = [round(float(np.log10(v / top)), 4) if v > 0 else None for v in inside]
        explained[name] = [round(float(total[k - 1]), 6) if k <= len(total) else None for k in doubled]
    if any(value is not None for values in decay.values() for value in values):
        data = {
            "x": places,
            "series": decay,
            "x_label": "component",
            "y_label": "log10 of variance over the first's",
            "unit": "",
            "log_x": True,
        }
        ctx.save_data("spectrum", "curve", "Spectrum", data, "Principal components of centred features.")
    data = {
        "x": doubled,
        "series": explained,
        "x_label": "components",
        "y_label": "variance explained",
        "unit": "%",
        "log_x": True,
    }
    ctx.save_data(
        "explained", "curve", "Explained variance", data, "Principal components, the largest first."
    )


def _save_layers(ctx: Context, cfg: DiagnoseConfig, bank: FeatureBank) -> None:
    """CKA between blocks as a heat map, and of each with the one that is read as a curve."""
    taps, pooling = cfg.blocks(ctx.spec), cfg.pooled(ctx.spec)
    if len(taps) < 2:
        return
    if len(bank) < 4:
        ctx.note(f"CKA between layers is left out: it needs 4 images, and there are {len(bank)}")
        return
    values = measure.cka([pooled_rows(bank, pooling, tap) for tap in taps])
    numbers = [ctx.spec.depth + tap.layer + 1 for tap in taps]
    save_heat(
        ctx,
        "cka",
        values,
        "CKA between layers",
        f"Global features of blocks {', '.join(map(str, numbers))}, from the top and from the left.",
    )
    data = {
        "x": numbers,
        "series": {"global feature": values[-1].round(4)},
        "x_label": "block",
        "y_label": "CKA",
        "unit": "",
    }
    ctx.save_data("cka", "curve", "CKA with the block that is read", data, "Debiased linear CKA.")
