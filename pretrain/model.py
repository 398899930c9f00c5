"""One masked image model for all methods: encoder, target, decoder and objective put together."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .decoders import Decoder
from .encoder import PatchEncoder
from .masking import Masks, Runs
from .objectives import mean_cosine, reconstruction_loss, similarity_constraint, without_autocast
from .patches import cut_patches, standardise, take
from .recipe import Recipe


class Fed(NamedTuple):
    """What the model is fed of a step, or of an accumulated part of it; see ``MaskedImageModel.forward``."""

    images: torch.Tensor
    offsets: torch.Tensor | None
    masks: Masks
    runs: Runs = ()


class Losses(NamedTuple):
    """What a step came to, scalars: the loss, and what it is made of (detached)."""

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]


class MaskedImageModel(nn.Module):
    """MAE, Latent MIM in all its variants, I-JEPA and data2vec, as the recipe says.

    ``encoder`` is trained. ``target_encoder`` is there for an EMA or frozen target only; nothing in it ever
    has a gradient. ``exported`` is the one of the two that is kept and scored.
    """

    random_projection: torch.Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.encoder = PatchEncoder(recipe)
        width = int(self.encoder.vit.embed_dim)
        pixels = 3 * recipe.model.patch_size**2
        self.target_encoder: PatchEncoder | None = None
        if recipe.target.kind in ("ema", "frozen"):
            self.target_encoder = PatchEncoder(recipe)
            if recipe.target.kind == "ema":
                self.target_encoder.load_state_dict(self.encoder.state_dict())
            self.target_encoder.requires_grad_(False)
        if recipe.target.kind == "projection":
            self.register_buffer("random_projection", torch.randn(pixels, width) / pixels**0.5)
        out = pixels if recipe.target.kind == "pixels" else width
        self.decoder = Decoder(recipe, width, out, self.encoder.prefix)

    @property
    def exported(self) -> PatchEncoder:
        """The encoder that ``target.export`` names."""
        target = self.target_encoder if self.recipe.target.export == "target" else None
        return target or self.encoder

    def forward(
        self,
        images: torch.Tensor,
        offsets: torch.Tensor | None,
        masks: Masks,
        similarity_aim: float | torch.Tensor,
        runs: Runs = (),
    ) -> Losses:
        """The loss of normalised crops (B, 3, S, S).

        Args:
            images: cells of patches, S = grid * (patch + gap).
            offsets: (B, N, 2) place of each patch in its cell; None where there is no gap.
            masks: what is seen and what is predicted.
            similarity_aim: mean cosine that the similarity constraint aims at now.
            runs: which images see as many patches; all see V unless given.
        """
        config = self.recipe
        patches = cut_patches(images, config.model.patch_size, offsets)
        latents, predictions = self.predict(patches, masks, runs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.target.kind == "shared"):
            targets = self.targets(patches, masks)
        loss = reconstruction_loss(predictions, targets.reshape(predictions.shape), config.objective)
        terms = {"reconstruction": loss.detach()}
        weight = config.objective.similarity_weight
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
            cosines = {
                "cosine_predictions": mean_cosine(predictions),
                "cosine_visible": mean_cosine(*(run[:, self.encoder.prefix :] for run in latents)),
                "cosine_targets": mean_cosine(targets.detach()),
            }
        if weight:
            constrained = [cosines["cosine_predictions"], cosines["cosine_visible"]]
            loss = loss + weight * similarity_constraint(constrained, similarity_aim)
        return Losses(loss, {**terms, **{name: value.detach() for name, value in cosines.items()}})

    def predict(
        self, patches: torch.Tensor, masks: Masks, runs: Runs = ()
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Latents of what is seen of patches (B, N, p*p*3), a tensor (b, prefix + v, D) a run, and the
        predictions from them, (B*M, T, out).
        """
        groups = masks.hidden.shape[1]
        latents, predictions, first = [], [], 0
        for images, seen in runs or [(len(masks.visible), masks.visible.shape[1])]:
            run = slice(first, first + images)
            visible = masks.visible[run, :seen]
            latents.append(self.encoder(take(patches[run], visible), visible))
            predictions.append(
                self.decoder(
                    latents[-1].repeat_interleave(groups, 0),
                    visible.repeat_interleave(groups, 0),
                    masks.hidden[run].flatten(0, 1),
                )
            )
            first += images
        return latents, torch.cat(predictions)

    def targets(self, patches: torch.Tensor, masks: Masks) -> torch.Tensor:
        """What is to be predicted, (B, M*T, out), from all patches (B, N, p*p*3) of the images."""
        config = self.recipe.target
        hidden = masks.hidden.flatten(1)  # (B, M*T)
        if config.kind in ("pixels", "projection"):
            pixels = take(patches, hidden)
            pixels = standardise(pixels) if config.norm_pixels else pixels
            if config.kind == "pixels":
                return pixels
            with without_autocast(pixels):
                return pixels @ self.random_projection
        encoder = self.target_encoder or self.encoder
        seen, shown = patches, torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)
        if config.sees == "masked":
            seen, shown = take(patches, hidden), hidden
        if config.top_blocks > 1:
            latents = encoder.top_blocks(seen, shown, config.top_blocks)
        else:
            latents = encoder(seen, shown)
        latents = latents[:, encoder.prefix :]
        if config.sees == "all":
            latents = take(latents, hidden)
        return F.layer_norm(latents.float(), latents.shape[-1:]) if config.normalise else latents

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """Move the EMA target towards the online encoder: momentum * target + (1 - momentum) * online."""
        if self.recipe.target.kind != "ema" or self.target_encoder is None:
            return
        pairs = list(zip(self.target_encoder.parameters(), self.encoder.parameters(), strict=True))
        torch._foreach_lerp_([_local(t) for t, _ in pairs], [_local(o) for _, o in pairs], 1 - momentum)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """The part of a sharded parameter that this process holds, or the parameter itself."""
    to_local = getattr(parameter, "to_local", None)
    local: torch.Tensor = to_local() if to_local is not None else parameter
    return local.detach()
