"""Hidden patches: what a masked image model predicts for what it does not see, and how often it is right.

The encoder is put back beside the decoder and the target that it was trained with, patches of a seeded choice
of test images are hidden as in its training, and the decoder predicts them. Nothing is trained, no label is
read. This is a diagnosis: it says how well a model solves its own task, which some targets and some masks
make easier than others.

content: is the target of a hidden patch more similar to its prediction than what other images have at the
same place? Position is of no help there. retrieval: among the hidden patches of the image, is the own
target the most similar one? That is what the Latent MIM objective trains (Wei et al., ECCV 2024), and can
be asked of predicted pixels too; targets that are a code of position make it easy. same_place: does the
most similar patch of another image stand at the own place, as it does where predictions are a code of
position? r2: how much of the hidden pixels is explained (MAE; He et al., CVPR 2022).

Pictures: the image, what the encoder sees, the predicted pixels where pixels are predicted, and each hidden
patch replaced by the most similar patch of another image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from pydantic import Field

from ..bench.errors import LmimBenchError, TaskError
from ..bench.types import Array, Context, Dataset, EncoderSpec, Frozen, Measurement, Metric, View, Work
from ..tasks import task
from .recipe import Recipe

if TYPE_CHECKING:
    from .hiding import Look
    from .trained import Trained

_ALIKE, _BY_PLACE = 0.99, 0.9
_ENOUGH = 100
"""Predictions that a point of a curve needs."""
_FLAT = 1e-6
"""Below this mean square there is nothing in the hidden pixels of an image to explain."""
_SIDE = 160


class HiddenPatchesConfig(Frozen):
    """What is looked at. What is hidden, and how, is the recipe's."""

    images: int = Field(256, ge=2, description="Test images (a seeded choice) of which patches are hidden.")
    crop_pct: float | None = Field(
        None, gt=0, le=1, description="Crop side over resized short side; none: the checkpoint's own."
    )
    pictures: int = Field(
        6, ge=0, description="Images shown: the best, the median and the worst one, and others (seeded)."
    )

    def view(self, recipe: Recipe) -> View:
        """The classification view at the size of the training crops, which gaps between patches enlarge."""
        return View.crop(recipe.spec(), recipe.crop_size, self.crop_pct)


def _without_decoder(reference: str) -> str | None:
    from .trained import find_companion

    try:
        find_companion(reference)
    except LmimBenchError as error:
        return str(error)
    return None


_PASSES = 2
"""Of the whole encoder, that cost as much as encoder, decoder and target on an image with hidden patches."""


def _work(cfg: HiddenPatchesConfig, spec: EncoderSpec, data: Dataset) -> Work:
    images = min(cfg.images, len(data.splits[data.test_split]))
    pairs = images * (spec.image_size // spec.patch_size) ** 2 * images
    return Work(
        {"start": 0.5, "retrieval": 5e-12 * pairs * spec.embed_dim},
        encoded={(spec.image_size, spec.image_size): _PASSES * images},
    )


@task(
    "hidden_patches",
    version=1,
    title="Hidden patches",
    data="classification",
    config=HiddenPatchesConfig,
    metrics=(
        Metric(id="content", title="own target ahead of other images at its place"),
        Metric(id="retrieval", title="own target nearest in its image"),
        Metric(id="same_place", title="nearest of other images at its place", higher_is_better=False),
        Metric(id="r2", title="hidden pixels explained"),
    ),
    headline=lambda cfg: "content",
    scored=False,
    applies=_without_decoder,
    work=_work,
)
def TASK(ctx: Context, cfg: HiddenPatchesConfig) -> Sequence[Measurement]:  # noqa: N802
    """Hide, predict, retrieve, show."""
    from .trained import load_trained

    trained = load_trained(ctx.reference)
    looks = _look_all(ctx, cfg, trained)
    answers = _answers(ctx, looks)
    result = _measurements(looks, answers, trained.recipe)
    _notes(ctx, looks, answers, trained)
    _save_distances(ctx, looks, answers, trained.recipe)
    _save_strips(ctx, cfg, looks, answers, trained.recipe)
    return result


# ------------------------------------------------------------------------------------------- predictions


def _look_all(ctx: Context, cfg: HiddenPatchesConfig, trained: Trained) -> list[Look]:
    """The images, the same ones in the same order for every checkpoint."""
    import torch

    from .hiding import STEP, look_at

    split = ctx.data.splits[ctx.data.test_split]
    if len(split) < 2:
        raise TaskError(
            f"the {ctx.data.test_split} split of {ctx.data.name} holds {len(split)} of the 2 images or more "
            "whose hidden patches are told apart"
        )
    chosen = ctx.rng("images").permutation(len(split))[: cfg.images]
    trained.model.to(ctx.device)
    looks: list[Look] = []
    with ctx.progress(len(chosen), "predictions") as bar, torch.inference_mode():
        for step, start in enumerate(range(0, len(chosen), STEP)):
            positions = chosen[start : start + STEP]
            looks += look_at(ctx, cfg.view(trained.recipe), trained, step, positions)
            bar.advance(len(positions))
    return looks


# ------------------------------------------------------------------------------------------- measures


class _Answer(NamedTuple):
    """What the P predictions of an image find.

    Attributes:
        content, retrieval: (P,) ``ahead`` and ``hits`` of ``retrieval.Retrieved``.
        image: (U,) the image that the most similar patch of another image is of, for each hidden place.
        place: (U,) where it is there.
        same_place: (P,) whether it is at the own place.
        chance_place: (P,) share of the patches of other images that are there.
        own_cosine: mean cosine of prediction and target.
    """

    content: Array
    retrieval: Array
    image: Array
    place: Array
    same_place: Array
    chance_place: Array
    own_cosine: float


def _answers(ctx: Context, looks: Sequence[Look]) -> list[_Answer]:
    """Retrieve among all hidden patches of all images."""
    import torch

    from .retrieval import retrieve

    tokens = torch.cat([look.targets for look in looks])
    device = tokens.device
    image = np.repeat(np.arange(len(looks)), [len(look.places) for look in looks])
    place = np.concatenate([look.places for look in looks])
    many, places = np.bincount(place), torch.from_numpy(place).to(device)
    answers, first = [], 0
    with ctx.progress(len(looks), "retrieval") as bar:
        for look in looks:
            last = first + len(look.places)
            own = torch.from_numpy(first + look.own).to(device)
            cosines = look.predictions @ tokens.T
            found = retrieve(cosines, own, places, first, last)
            nearest = found.nearest.cpu().numpy()
            asked = look.asked
            shown = np.unique(look.own, return_index=True)[1]
            answers.append(
                _Answer(
                    found.ahead.cpu().numpy(),
                    found.hits.cpu().numpy(),
                    image[nearest[shown]],
                    place[nearest[shown]],
                    place[nearest] == asked,
                    (many[asked] - 1) / (len(tokens) - (last - first)),
                    float(cosines.gather(1, own[:, None]).mean()),
                )
            )
            first = last
            bar.advance()
    return answers


def _measurements(looks: Sequence[Look], answers: Sequence[_Answer], recipe: Recipe) -> list[Measurement]:
    detail = {
        "patches": recipe.grid**2,
        "visible patches": float(np.mean([len(look.visible) for look in looks])),
        "hidden patches": float(np.mean([len(look.places) for look in looks])),
        "cosine of prediction and target": float(np.mean([answer.own_cosine for answer in answers])),
        "cosine of the targets of an image": _alikeness(looks),
    }
    result = [
        Measurement("content", _means(answers, "content"), chance=0.5, detail=detail),
        Measurement("retrieval", _means(answers, "retrieval"), chance=_chance(looks)),
        Measurement(
            "same_place",
            _means(answers, "same_place"),
            chance=float(_means(answers, "chance_place").mean()),
        ),
    ]
    errors = [look.errors for look in looks if look.errors is not None]
    if errors:
        result.append(Measurement("r2", np.array(errors), statistic=_explained, chance=0.0))
    return result


def _means(answers: Sequence[_Answer], name: str) -> Array:
    """The mean over the predictions of each image, (n,)."""
    return np.array([getattr(answer, name).mean() for answer in answers])


def _explained(errors: Array) -> Array:
    """1 - error / error of the guess, from (R, 2)."""
    return np.asarray(1 - errors[:, 0] / np.maximum(errors[:, 1], 1e-12))


def _chance(looks: Sequence[Look]) -> float:
    return float(np.mean([1 / len(look.places) for look in looks]))


def _alikeness(looks: Sequence[Look]) -> float:
    from .retrieval import mean_pair_cosine

    return float(np.mean([float(mean_pair_cosine(look.targets)) for look in looks]))


def _notes(ctx: Context, looks: Sequence[Look], answers: Sequence[_Answer], trained: Trained) -> None:
    from .hiding import STEP
    from .masking import GROUP

    recipe, look = trained.recipe, looks[0]
    gap = f", cells {recipe.masking.gap} pixels apart" if recipe.masking.gap else ""
    ctx.note(
        f"decoder of step {trained.step} by the recipe {recipe.name}: {recipe.masking.kind} masking{gap}, "
        f"{len(look.visible)} of {recipe.grid**2} patches seen (of the first image)"
    )
    if recipe.masking.kind == "multiblock":
        ctx.note(
            f"{STEP} images see as many patches as the poorest of them, in the training "
            f"{min(GROUP, recipe.optim.batch_size)} do"
        )
    alike, same = _alikeness(looks), float(_means(answers, "same_place").mean())
    if recipe.latent and alike > _ALIKE:
        ctx.note(
            f"WARNING: the targets of an image are nearly the same, with a mean cosine of {alike:.3f}: there "
            "is little to predict"
        )
    if same > _BY_PLACE:
        ctx.note(
            f"WARNING: the predictions are a code of position: for {same:.0%} the most similar patch of "
            "another image is at the same place, so that retrieval says nothing of content"
        )


# ------------------------------------------------------------------------------------------- exhibits


def _save_distances(ctx: Context, looks: Sequence[Look], answers: Sequence[_Answer], recipe: Recipe) -> None:
    """How good predictions are by the distance to the nearest patch that is seen."""
    distances = np.concatenate([_distances(look, recipe.grid) for look in looks])
    counts = np.bincount(distances)
    kept = np.flatnonzero(counts >= _ENOUGH)
    if len(kept) < 2:
        return
    series = {}
    for name in ("content", "retrieval"):
        values = np.concatenate([getattr(answer, name) for answer in answers])
        series[name] = (np.bincount(distances, weights=values)[kept] / counts[kept]).round(5)
    data = {
        "x": kept,
        "series": series,
        "x_label": "patches to the nearest one seen",
        "y_label": "own target ahead, or nearest",
        "unit": "%",
    }
    ctx.save_data(
        "distance",
        "curve",
        "By distance from what is seen",
        data,
        f"Steps to any of eight neighbours; distances of fewer than {_ENOUGH} predictions are left out.",
    )


def _distances(look: Look, grid: int) -> Array:
    """Of each prediction's place to the nearest visible one, king's moves, (P,)."""
    asked, seen = (np.stack(np.divmod(x, grid), axis=1) for x in (look.asked, look.visible))
    return np.asarray(np.abs(asked[:, None] - seen).max(axis=-1).min(axis=1))


def _save_strips(
    ctx: Context,
    cfg: HiddenPatchesConfig,
    looks: Sequence[Look],
    answers: Sequence[_Answer],
    recipe: Recipe,
) -> None:
    """Best, median and worst image, then others in their seeded order."""
    pixels, side = recipe.target.kind == "pixels", recipe.model.patch_size
    value = _means(answers, "content")
    if pixels:
        errors = np.array([look.errors for look in looks])
        value = np.where(errors[:, 1] > _FLAT, _explained(errors), np.nan)
    order = np.argsort(-value, kind="stable")
    order = order[: np.isfinite(value).sum() or None]
    picked = [("best", int(order[0])), ("median", int(order[len(order) // 2])), ("worst", int(order[-1]))]
    picked += [(f"seeded {i + 1}", i) for i in range(min(len(looks), max(0, cfg.pictures - 3)))]
    chance = _chance(looks)
    for name, i in picked[: cfg.pictures]:
        look, answer = looks[i], answers[i]
        panels = [look.pixels, look.painted(side)]
        caption = f"The image; what is seen of it ({len(look.visible)} of {recipe.grid**2} patches); "
        if look.drawn is not None:
            panels.append(look.painted(side, look.drawn))
            back = ", true mean and deviation of each put back" if recipe.target.norm_pixels else ""
            caption += f"what is predicted{back}; "
        retrieved = [
            looks[image].patch(place, side) for image, place in zip(answer.image, answer.place, strict=True)
        ]
        panels.append(look.painted(side, retrieved))
        caption += (
            "the most similar patches of other images. "
            f"Own target ahead at its place {answer.content.mean():.0%} (by chance 50%), "
            f"nearest in its image {answer.retrieval.mean():.0%} ({chance:.1%})"
        )
        if pixels and np.isfinite(value[i]):
            caption += f", hidden pixels explained {value[i]:.0%}"
        size = max(1, _SIDE // recipe.crop_size)
        ctx.save_image(
            name.replace(" ", "-"),
            [np.repeat(np.repeat(panel, size, axis=0), size, axis=1) for panel in panels],
            f"Hidden patches, {name if name.startswith('seeded') else f'{name} of {len(looks)} images'}",
            f"{caption}.",
        )
