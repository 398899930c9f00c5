"""What is trained and how: one declared recipe, from which model, schedule and data follow.

A recipe is a YAML file of sections, of which every field has a default; the recipe ``latent-mim`` has the
choices of its authors. ``--set section.field=value`` changes a field, and the recipe as resolved
travels inside the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from ..bench.config import coerce, read_yaml, validate
from ..bench.errors import ConfigError, did_you_mean
from ..bench.types import EncoderSpec
from .sections import (
    DataConfig,
    DecoderConfig,
    EngineConfig,
    MaskingConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ProjectorConfig,
    Section,
    TargetConfig,
    WatchConfig,
)


class Recipe(Section):
    """A whole training."""

    name: str = Field("latent-mim", min_length=1, description="of the recipe")
    about: str = Field("", description="one line on what it is")
    seed: int = Field(0, ge=0, lt=2**63, description="of the weights, the order, the crops and the masks")
    model: ModelConfig = ModelConfig()
    projector: ProjectorConfig = ProjectorConfig()
    target: TargetConfig = TargetConfig()
    masking: MaskingConfig = MaskingConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    decoder: DecoderConfig = DecoderConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    engine: EngineConfig = EngineConfig()
    watch: WatchConfig = WatchConfig()

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.data.image_size // self.model.patch_size

    @property
    def cell(self) -> int:
        """Side of the cell that a patch is cut from, pixels."""
        return self.model.patch_size + self.masking.gap

    @property
    def crop_size(self) -> int:
        """Side of the training crops, pixels: a cell a patch."""
        return self.grid * self.cell

    @property
    def visible_patches(self) -> int:
        """Patches that the online encoder sees (random and block masking)."""
        visible, total = self.masking.visible, self.grid**2
        # 0.29 of 100 are 29, which binary fractions miss by a hair.
        return round(visible) if visible >= 1 else int(total * visible + 1e-9)

    @property
    def smallest_block(self) -> int:
        """Patches of the smallest target block that multi-block masking draws, at the ends of its aspects and
        between.
        """
        area = int(self.grid * self.grid * self.masking.block_scale[0])
        low, high = self.masking.block_aspect
        sides = [(math.sqrt(area * a), math.sqrt(area / a)) for a in (low, min(max(1.0, low), high), high)]
        return min(max(1, round(height)) * max(1, round(width)) for height, width in sides)

    @property
    def latent(self) -> bool:
        """Whether the target is made by an encoder."""
        return self.target.kind in ("shared", "stop_gradient", "ema", "frozen")

    @property
    def learning_rate(self) -> float:
        """The peak learning rate."""
        return self.optim.base_lr * self.optim.batch_size / 256

    @property
    def over_parts(self) -> bool:
        """Whether the loss depends on how a batch is cut into parts: it compares images of one part."""
        discriminates = self.objective.loss == "infonce" and self.objective.negatives == "batch"
        return discriminates or self.objective.similarity_weight > 0

    def spec(self) -> EncoderSpec:
        """The encoder that the recipe trains, and how its images are prepared.

        Raises:
            CheckpointError: the numbers do not go together.
        """
        from ..bench.vit import vit_spec

        width, depth, heads = self.model.shape
        return vit_spec(
            "lmim-bench",
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            patch_size=self.model.patch_size,
            image_size=self.data.image_size,
            class_token=self.model.class_token,
            reg_tokens=self.model.registers,
            pooling=self.model.pooling,
            final_norm=self.model.final_norm,
            mean=self.data.mean,
            std=self.data.std,
        )

    @model_validator(mode="after")
    def _goes_together(self) -> Recipe:
        total = self.grid**2
        width, _, heads = self.model.shape
        if self.data.image_size % self.model.patch_size:
            raise ValueError(
                f"data.image_size {self.data.image_size} is not a multiple of model.patch_size "
                f"{self.model.patch_size}"
            )
        for name, dim, count in (
            ("model", width, heads),
            ("decoder", self.decoder.width, self.decoder.num_heads),
        ):
            if dim % count:
                raise ValueError(f"{name}.num_heads {count} does not divide the width {dim}")
            if dim % 4:
                raise ValueError(
                    f"the width {dim} of the {name} is not a multiple of 4, which positions need"
                )
        if self.masking.kind != "multiblock" and not 1 <= self.visible_patches < total:
            raise ValueError(
                f"masking.visible {self.masking.visible} leaves {self.visible_patches} of {total} patches "
                "visible; at least one must be seen and one hidden"
            )
        if self.engine.cuda_graph and self.masking.kind == "multiblock":
            raise ValueError(
                "engine.cuda_graph=true is not for masking.kind=multiblock, which hides another number of "
                "patches in each step; leave it out"
            )
        hides_one = self.masking.kind != "multiblock" and self.visible_patches == total - 1
        within = self.objective.negatives == "image" or self.objective.standardise
        if self.masking.visible > 1 and self.masking.visible % 1:
            raise ValueError(
                f"masking.visible {self.masking.visible} is neither a share below 1 nor a number of patches"
            )
        if hides_one and within and self.objective.loss == "infonce":
            raise ValueError(
                "objective.loss infonce tells the hidden patches of an image apart, and masking.visible "
                f"{self.masking.visible} hides one; hide more, or set objective.loss=mse"
            )
        if self.masking.kind == "multiblock":
            self._check_target_blocks()
        for name, (low, high) in {
            "data.aspect": self.data.aspect,
            "masking.block_scale": self.masking.block_scale,
            "masking.block_aspect": self.masking.block_aspect,
            "masking.context_scale": self.masking.context_scale,
        }.items():
            if low > high:
                raise ValueError(f"{name} goes from {low} down to {high}; name the smaller one first")
        if not self.model.class_token and "cls" in self.model.pooling:
            raise ValueError("model.pooling asks for a class token, which model.class_token leaves out")
        if self.latent and self.target.top_blocks > self.model.shape[1]:
            raise ValueError(f"target.top_blocks {self.target.top_blocks} is more than the encoder's blocks")
        if self.latent and self.target.top_blocks > 1 and self.projector.depth:
            raise ValueError("target.top_blocks averages blocks of the encoder; set projector.depth=0")
        if self.target.export == "target" and self.target.kind != "ema":
            raise ValueError(
                "target.export=target keeps the moving average of the encoder, and target.kind "
                f"{self.target.kind} has none; set target.export=online"
            )
        if self.target.kind == "pixels" and self.objective.similarity_weight:
            raise ValueError("objective.similarity_weight is for latent targets, and target.kind is pixels")
        return self

    def _check_target_blocks(self) -> None:
        if self.grid < 4:
            raise ValueError(
                f"masking.kind multiblock needs a grid of at least 4 x 4 patches, got {self.grid}"
            )
        if self.latent and self.target.sees != "all":
            raise ValueError("masking.kind multiblock needs target.sees=all: its blocks may overlap")
        if self.objective.loss != "infonce":
            return
        if self.smallest_block < 2:
            raise ValueError(
                "objective.loss infonce tells the patches of a block apart, and a block of "
                f"masking.block_scale {self.masking.block_scale} on {self.grid} x {self.grid} patches may "
                "be of one; set a larger masking.block_scale, or objective.loss=mse"
            )
        if self.objective.negatives == "batch":
            raise ValueError(
                "objective.negatives batch would take the same patch of an overlapping block for a negative "
                "of itself; set objective.negatives=image, or another masking.kind"
            )


def named_fields(reference: str, recipe: Recipe, sets: Sequence[str]) -> tuple[str, ...]:
    """The ``section.field`` names that a user gave: by ``sets``, and in a file that is no built-in recipe."""
    sections = () if reference in recipe_names() else SECTIONS
    in_file = [
        f"{one}.{field}" for one in sections for field in sorted(getattr(recipe, one).model_fields_set)
    ]
    return tuple(dict.fromkeys([*in_file, *changed_fields(sets)]))


def changed_fields(sets: Sequence[str]) -> tuple[str, ...]:
    """The ``section.field`` names that changes name, in their order."""
    return tuple(dict.fromkeys(text.partition("=")[0].strip().replace("-", "_") for text in sets))


def idle_fields(recipe: Recipe) -> dict[str, str]:
    """The fields that change nothing in a recipe, each with the reason."""
    target, masking, objective = recipe.target, recipe.masking, recipe.objective
    infonce, multiblock = objective.loss == "infonce", masking.kind == "multiblock"
    rules: tuple[tuple[bool, str, str, tuple[str, ...]], ...] = (
        (recipe.projector.depth < 2, "projector", "projector.depth is below 2", ("hidden_dim",)),
        (
            target.kind != "ema",
            "target",
            f"target.kind is {target.kind}",
            ("momentum", "momentum_end", "momentum_curve"),
        ),
        (
            target.momentum_curve == "constant",
            "target",
            "target.momentum_curve is constant",
            ("momentum_end",),
        ),
        (not recipe.latent, "target", f"target.kind is {target.kind}", ("sees", "top_blocks", "normalise")),
        (recipe.latent, "target", f"target.kind is {target.kind}", ("norm_pixels",)),
        (multiblock, "masking", "masking.kind is multiblock", ("visible",)),
        (masking.gap < 2, "masking", f"masking.gap is {masking.gap}", ("placement",)),
        (
            not multiblock,
            "masking",
            f"masking.kind is {masking.kind}",
            ("blocks", "block_scale", "block_aspect", "context_scale", "min_context"),
        ),
        (objective.loss != "smooth_l1", "objective", f"objective.loss is {objective.loss}", ("beta",)),
        (
            not infonce,
            "objective",
            f"objective.loss is {objective.loss}",
            ("tau", "standardise", "negatives", "num_negatives"),
        ),
        (
            not objective.similarity_weight,
            "objective",
            "objective.similarity_weight is 0",
            ("similarity_start", "similarity_end"),
        ),
        (recipe.optim.steps is not None, "optim", "optim.steps is given", ("epochs",)),
        (not recipe.optim.warmup, "optim", "optim.warmup is 0", ("warmup_from",)),
        (recipe.data.cache != "auto", "data", f"data.cache is {recipe.data.cache}", ("cache_limit_gb",)),
        (
            not recipe.watch.evaluations,
            "watch",
            "watch.evaluations is 0",
            ("knn_train", "knn_test", "knn_k"),
        ),
    )
    return {f"{section}.{name}": reason for idle, section, reason, names in rules if idle for name in names}


SECTIONS = tuple(name for name, field in Recipe.model_fields.items() if field.annotation not in (str, int))
RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """The built-in recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(reference: str, sets: Sequence[str] = ()) -> Recipe:
    """A built-in recipe by name or a YAML file, with ``section.field=value`` changes applied.

    Raises:
        ConfigError: no such recipe, not YAML, an unknown section or field, or a wrong value.
    """
    path = Path(reference)
    if not path.suffix and not path.is_file():
        path = RECIPES / f"{reference}.yaml"
        if not path.is_file():
            raise ConfigError(f"there is no recipe {reference!r}. {did_you_mean(reference, recipe_names())}")
    payload = read_yaml(path, "recipe")
    return make_recipe({"name": path.stem, **payload}, sets, f"recipe {path.stem}")


def make_recipe(payload: Mapping[str, Any], sets: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """A validated recipe from plain fields. Raises ConfigError naming what is wrong."""
    fields = {name: dict(value) if isinstance(value, Mapping) else value for name, value in payload.items()}
    for text in sets:
        path, equals, raw = text.partition("=")
        section, dot, field = path.strip().replace("-", "_").partition(".")
        if not equals or bool(dot) == (section == "seed"):
            raise ConfigError(f"--set takes SECTION.FIELD=VALUE (model.depth=6), got {text!r}")
        if section == "seed":
            fields["seed"] = raw
            continue
        if section not in SECTIONS:
            raise ConfigError(f"a recipe has no section {section!r}. {did_you_mean(section, SECTIONS)}")
        given = fields.get(section, {})
        if not isinstance(given, Mapping):
            raise ConfigError(f"{where}: the section {section} must be a mapping of fields, got {given!r}")
        fields[section] = {**given, field: coerce(type(getattr(_DEFAULT, section)), field, raw)}
    return validate(Recipe, fields, where)


_DEFAULT = Recipe()
