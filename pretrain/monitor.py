"""Is it learning, or has it collapsed? Measures of representations, and a k-NN on held-out images.

Verdicts come from measures over *different* images: telling the
patches of one image apart can be solved by a code of their position, which no measure inside an image sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..bench.backbones import ViTEncoder
from ..bench.config import Precision
from ..bench.data.loading import iterate_batches
from ..bench.data.views import normalise
from ..bench.engine import Engine
from ..bench.errors import ConfigError
from ..bench.types import (
    Array,
    CheckpointInfo,
    Dataset,
    EncoderSpec,
    Features,
    ImageSplit,
    Tap,
    View,
    pooled_columns,
)
from ..bench.vit import build_vit
from ..tasks._math import knn
from ..tasks._math import representation as measure
from .encoder import build_projector
from .recipe import Recipe

MONITORED = 256
"""Held-out images that the measures are taken on."""
_PROJECTED = 32
"""Images that go through the projector at once: it is several times wider than the encoder."""


@dataclass(frozen=True)
class Health:
    """Measures of an encoder on held-out images.

    Attributes:
        pooled_cosine: mean cosine between the mean-pooled latents of *different* images: 1 when collapsed
            (the collapse measure of the Latent MIM paper, Table 1: 1.00 for the naive model, 0.50 with
            momentum).
        projected_cosine: the same behind the projector.
        effective_rank: RankMe of the mean-pooled latents.
        position_share: share of the variance of patch latents that their position alone explains.
    """

    pooled_cosine: float
    projected_cosine: float
    effective_rank: float
    position_share: float

    def warnings(self) -> list[str]:
        """What is wrong with the representations, in sentences; [] where nothing is."""
        found = []
        if self.projected_cosine > measure.COLLAPSED:
            whole = self.pooled_cosine > measure.COLLAPSED
            own = "" if whole else f"; the encoder's own, which tasks see, have {self.pooled_cosine:.3f}"
            found.append(
                f"the {'representations' if whole else 'projected latents'} have collapsed: latents of "
                f"different images have a cosine of {self.projected_cosine:.3f} on average{own} "
                f"(effective rank {self.effective_rank:.1f})"
            )
        if self.position_share > measure.POSITION_CODE:
            found.append(
                f"the latents are mostly a code of position: it explains {100 * self.position_share:.0f}% of "
                "the variance of patches"
            )
        return found


class Watcher:
    """Measures an encoder from time to time on the same held-out images.

    Args:
        recipe: k-NN and views.
        data: the training's data set; without labels there is no k-NN, without a test split the measures
            are taken on images of the training split.
        device: where to encode.
        precision: arithmetic of the encoder, the training's own.
    """

    def __init__(self, recipe: Recipe, data: Dataset, device: str, precision: Precision) -> None:
        self.recipe, self.device, self.precision, self.data = recipe, device, precision, data
        self.spec: EncoderSpec = recipe.spec()
        self._view = View.crop(self.spec)
        watch = recipe.watch
        test = data.splits.get(data.test_split)
        train = data.splits[data.train_split]
        labelled = test is not None and test.labels is not None and train.labels is not None
        limited = {}
        if labelled:
            limited["train"] = data.limited(watch.knn_train, recipe.seed).splits[data.train_split]
            limited["test"] = data.limited(watch.knn_test, recipe.seed).splits[data.test_split]
        else:
            seen = test if test is not None else train
            limited["test"] = seen.subset(np.arange(min(MONITORED, len(seen))))
        if len(limited["test"]) < 2:
            raise ConfigError(
                f"{data.name} holds one image to look at; --set watch.evaluations=0 leaves the monitor out"
            )
        self._splits: dict[str, ImageSplit] = limited
        self._images: dict[str, torch.Tensor] = {}

    def __call__(
        self, encoder: dict[str, torch.Tensor], projector: dict[str, torch.Tensor]
    ) -> tuple[Health, float | None]:
        """Health and k-NN accuracy (a fraction, or None) of an encoder's and a projector's weights."""
        vit = build_vit(self.spec.arch)
        vit.load_state_dict(encoder)
        mlp = build_projector(self.recipe.projector, self.spec.embed_dim)
        mlp.load_state_dict(projector)
        engine = Engine(ViTEncoder(vit, self.spec, _INFO), self.device, self.precision, None)
        health = self._health(engine, mlp.to(self.device).eval())
        return health, self._knn(engine) if "train" in self._splits else None

    @torch.inference_mode()
    def _health(self, engine: Engine, projector: nn.Module) -> Health:
        images = self._pixels("test")
        # Spread over the split, which lists one class after the other.
        chosen = torch.linspace(0, len(images) - 1, min(MONITORED, len(images))).long()
        found = [
            (tokens.cpu(), tokens.double().mean(dim=1).cpu(), projector(tokens).double().mean(dim=1).cpu())
            for features in self._encode(engine, images[chosen], Tap(-1))
            for tokens in torch.split(features.patches.flatten(1, 2), _PROJECTED)
        ]
        patches, pooled, projected = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
        spectrum = measure.spectrum(pooled, centre=False)
        return Health(
            pooled_cosine=float(measure.mean_cosines(pooled).mean()),
            projected_cosine=float(measure.mean_cosines(projected).mean()),
            effective_rank=measure.effective_rank(spectrum.values, measure.RANKME_EPS),
            position_share=float(measure.position_items(patches).mean()),
        )

    def _knn(self, engine: Engine) -> float:
        """Weighted k-NN from the training to the held-out images, as the task ``knn`` votes."""
        tap = Tap(-1, norm=self.spec.final_norm)
        rows = {}
        for name in ("train", "test"):
            found = self._encode(engine, self._pixels(name), tap)
            # Pooled batch by batch: the patches of all images need not fit.
            rows[name] = torch.cat([F.normalize(_pooled(f, self.spec), dim=-1) for f in found])
        k = min(self.recipe.watch.knn_k, len(rows["train"]))
        similarity, position = (rows["test"] @ rows["train"].T).topk(k, dim=1)
        labels = self._labels("train")[position.cpu().numpy()]
        weights = knn.exponential_weights(similarity.cpu().numpy(), 0.07)
        totals = knn.class_totals(weights, labels, len(self.data.classes))
        return float((knn.winner(totals, labels) == self._labels("test")).mean())

    def _labels(self, name: str) -> Array:
        labels = self._splits[name].labels
        assert labels is not None
        return labels

    def _pixels(self, name: str) -> torch.Tensor:
        """The images of a part through the evaluation's view, uint8 (N, 3, S, S), decoded once."""
        if name not in self._images:
            batches = iterate_batches(self._splits[name], self._view, 256)
            self._images[name] = torch.cat([batch.images for batch in batches])
        return self._images[name]

    def _encode(self, engine: Engine, images: torch.Tensor, tap: Tap) -> Iterator[Features]:
        """Features of images, uint8 (N, 3, S, S), a batch after the other."""
        for part in torch.split(images, engine.batch_for(*images.shape[-2:])):
            # As bytes to the device: a quarter of what it takes normalised.
            yield engine.encode(normalise(part.to(self.device), self._view), (tap,))[tap]


_INFO = CheckpointInfo(
    source="in training",
    sha256=None,
    format="lmim-bench",
    container="",
    parameters=0,
    loaded_tensors=0,
    encoder_tensors=0,
)


def _pooled(features: Features, spec: EncoderSpec) -> torch.Tensor:
    kinds = [column.kind for column in pooled_columns(spec.pooling, Tap())]
    return torch.cat([getattr(features, kind) for kind in kinds], dim=1)
