"""What is trained and how: one declared recipe, from which model, schedule and data follow.

A recipe is a YAML file of sections; every field has a default, which is the final choice of the Latent MIM
paper where the paper makes one. ``--set section.field=value`` changes a field, and the recipe as resolved
travels inside the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from ..bench.config import coerce, read_yaml, validate
from ..bench.errors import ConfigError, did_you_mean
from ..bench.types import EncoderSpec, Frozen, Pooling

Arch = Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]
Positions = Literal["sincos", "latent_mim", "learned"]
TargetKind = Literal["pixels", "shared", "stop_gradient", "ema", "frozen", "projection"]
Loss = Literal["mse", "norm_l2", "smooth_l1", "cosine", "infonce"]
Curve = Literal["cosine", "linear", "constant"]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

# name: width, depth, heads (Dosovitskiy et al., ICLR 2021; Touvron et al., ICML 2021)
ARCHITECTURES: dict[Arch, tuple[int, int, int]] = {
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_huge": (1280, 32, 16),
}


class _Section(Frozen):
    model_config = ConfigDict(allow_inf_nan=False)


class ModelConfig(_Section):
    """The encoder: a plain vision transformer, and how it is evaluated afterwards."""

    arch: Arch = Field("vit_base", description="width, depth and heads")
    embed_dim: int | None = Field(None, gt=0, description="width; the architecture's unless given")
    depth: int | None = Field(None, gt=0, description="blocks; the architecture's unless given")
    num_heads: int | None = Field(None, gt=0, description="heads; the architecture's unless given")
    patch_size: int = Field(16, gt=0, description="side of a patch, pixels")
    class_token: bool = Field(True, description="a class token before the patches")
    registers: int = Field(0, ge=0, description="register tokens (Darcet et al., ICLR 2024)")
    positions: Positions = Field(
        "sincos",
        description="fixed sine-cosine as MAE, the same spread over the grid as Latent MIM, or learned",
    )
    init: Literal["xavier", "trunc_normal", "beit"] = Field(
        "xavier",
        description="of linear layers: Xavier-uniform (MAE), normal with deviation 0.02 (I-JEPA), the same "
        "with the output of block i divided by sqrt(2 i) (BEiT, data2vec)",
    )
    pooling: Pooling = Field("mean", description="global feature in evaluation")
    final_norm: bool = Field(True, description="whether evaluation reads features after the final norm")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Width, depth and heads."""
        width, depth, heads = ARCHITECTURES[self.arch]
        return self.embed_dim or width, self.depth or depth, self.num_heads or heads


class ProjectorConfig(_Section):
    """The latent projector: an MLP behind the online and the target encoder, dropped afterwards."""

    depth: int = Field(3, ge=0, description="linear layers; 0 leaves the projector out")
    hidden_dim: int = Field(4096, gt=0, description="width between its layers")


class TargetConfig(_Section):
    """What is predicted: pixels, or the latents of a target encoder; and how the two encoders are coupled."""

    kind: TargetKind = Field(
        "ema",
        description="pixels (MAE); shared: the online encoder with gradient on both sides (the naive one, "
        "collapses); stop_gradient: the online encoder; ema; frozen: a random encoder; projection: a frozen "
        "random projection of the pixels (Lite)",
    )
    momentum: float = Field(0.99, ge=0, le=1, description="of the moving average, at the start")
    momentum_end: float = Field(1.0, ge=0, le=1, description="and at the end")
    momentum_curve: Curve = Field("cosine", description="between the two")
    sees: Literal["masked", "all"] = Field("masked", description="patches that the target encoder is shown")
    top_blocks: int = Field(
        1, ge=1, description="average the normalised outputs of the last K blocks (data2vec); 1: the output"
    )
    normalise: bool = Field(False, description="layer norm without weights of the latents (I-JEPA, data2vec)")
    norm_pixels: bool = Field(True, description="standardise the pixels of each patch (pixels, projection)")


class MaskingConfig(_Section):
    """How correlated visible and target patches are: how many are seen, and where the patches lie."""

    kind: Literal["random", "block", "multiblock"] = Field(
        "random", description="uniform; BEiT's rectangles; I-JEPA's target blocks and context"
    )
    visible: float = Field(
        0.103,
        gt=0,
        description="visible patches: a share below 1, a number from 1 on (Latent MIM: 0.103, 20 of 196)",
    )
    gap: int = Field(0, ge=0, description="pixels between the cells that patches are cut from")
    placement: Literal["stochastic", "contiguous"] = Field(
        "stochastic", description="offset of a patch inside its cell: random in 0..gap-1, or 0"
    )
    blocks: int = Field(4, ge=1, description="target blocks (multiblock)")
    block_scale: tuple[Share, Share] = Field((0.15, 0.2), description="share of the grid of a target block")
    block_aspect: tuple[Positive, Positive] = Field(
        (0.75, 1.5), description="height to width of a target block"
    )
    context_scale: tuple[Positive, Positive] = Field(
        (0.85, 1.0), description="share of the grid of the context"
    )
    min_context: int = Field(10, ge=1, description="context patches that are kept at least (multiblock)")


class ObjectiveConfig(_Section):
    """How predictions are compared with targets."""

    loss: Loss = Field("infonce", description="direct regression, or patch discrimination (infonce)")
    beta: float = Field(1.0, gt=0, description="of smooth L1")
    tau: float = Field(0.2, gt=0, description="temperature of patch discrimination")
    standardise: bool = Field(True, description="predictions standardised over the patches of their image")
    negatives: Literal["image", "batch"] = Field("image", description="where negatives come from")
    num_negatives: int | None = Field(None, ge=1, description="negatives of a patch; all unless given")
    similarity_weight: float = Field(0.0, ge=0, description="of the pairwise-similarity constraint")
    similarity_start: float = Field(0.75, ge=-1, le=1, description="mean cosine aimed at, at the start")
    similarity_end: float = Field(0.25, ge=-1, le=1, description="and at the end (cosine schedule)")


class DecoderConfig(_Section):
    """What predicts the targets from the visible latents."""

    kind: Literal["self", "cross", "cross_self"] = Field(
        "cross_self",
        description="self-attention over all tokens (MAE), cross-attention to the visible ones, both",
    )
    depth: int = Field(3, ge=1, description="blocks")
    width: int = Field(512, gt=0, description="width")
    num_heads: int = Field(16, gt=0, description="attention heads")
    cues: bool = Field(True, description="mask tokens start from visible latents weighted by position")


class OptimConfig(_Section):
    """AdamW and its schedule."""

    batch_size: int = Field(4096, ge=2, description="images a step, over all processes and accumulations")
    base_lr: float = Field(1.5e-4, gt=0, description="peak learning rate for 256 images a step")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the schedule")
    warmup_from: float = Field(0.0, ge=0, le=1, description="where warm-up starts, as a share of the peak")
    floor: float = Field(0.0, ge=0, le=1, description="where the cosine ends, as a share of the peak")
    weight_decay: float = Field(0.05, ge=0, description="of the weight matrices")
    weight_decay_end: float | None = Field(None, ge=0, description="cosine to this value; constant if none")
    no_decay: tuple[str, ...] = Field(
        ("cls_token", "reg_token", "mask_token", "pos_embed"),
        description="parts of parameter names without decay; vectors and biases never have any",
    )
    betas: tuple[Share, Share] = Field((0.9, 0.95), description="of AdamW")
    clip: float | None = Field(None, gt=0, description="largest norm of the gradient")
    epochs: float = Field(800, gt=0, description="passes over the data; the schedule spans them")
    steps: int | None = Field(None, ge=1, description="optimiser steps, in place of epochs")


class DataConfig(_Section):
    """The images and their augmentation."""

    image_size: int = Field(224, gt=0, description="side of the images that the grid of patches covers")
    min_scale: float = Field(0.2, gt=0, le=1, description="smallest area of a random crop")
    aspect: tuple[Positive, Positive] = Field(
        (0.75, 1.3333333333333333), description="smallest and largest width to height of a crop"
    )
    flip: bool = Field(True, description="horizontal flips of half of the images")
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="of the colours")
    std: tuple[Positive, Positive, Positive] = Field((0.229, 0.224, 0.225), description="of the colours")
    store_size: int | None = Field(
        None,
        gt=0,
        description="side of the stored images; unless given 16/7 of the crop, or 8/7 where only that fits "
        "the cache, at most the images' own",
    )
    cache: Literal["auto", "always", "never"] = Field(
        "auto", description="keep decoded images on disk: where they fit, always, or decode in every epoch"
    )
    cache_limit_gb: float = Field(40.0, gt=0, description="what fits, for auto")
    workers: int | None = Field(None, ge=0, description="decoding processes; by the machine unless given")


class EngineConfig(_Section):
    """Where and how the training runs. Nothing here changes what is learned, but for the precision, and for
    losses over more than an image (``Recipe.over_parts``), which see one part of the batch at a time.
    """

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="bf16 on a GPU, fp32 on the CPU"
    )
    strategy: Literal["auto", "ddp", "fsdp2"] = Field("auto", description="of several processes (torchrun)")
    accumulate: int = Field(1, ge=1, description="parts that a process cuts its share of the batch into")
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile of blocks and projectors"
    )
    activation_checkpointing: bool = Field(False, description="less memory for a third more time")
    threads: int | None = Field(None, ge=1, description="CPU threads; torch's choice unless given")


class WatchConfig(_Section):
    """What is looked at on the way, and what is kept."""

    log_every: int = Field(10, ge=1, description="steps between lines of the metrics file")
    evaluations: int = Field(
        10, ge=0, description="times that k-NN and the collapse monitor run, evenly spaced"
    )
    knn_train: int = Field(5000, ge=1, description="labelled images that vote in the online k-NN")
    knn_test: int = Field(2000, ge=2, description="held-out images that it scores")
    knn_k: int = Field(20, ge=1, description="neighbours")
    checkpoints: int = Field(10, ge=1, description="times that the training is saved, evenly spaced")
    save_minutes: float = Field(30.0, gt=0, description="most minutes between two saves")
    keep: int = Field(2, ge=1, description="training states that are kept")
    keep_encoders: bool = Field(False, description="keep an encoder at every save, for curves over epochs")
    tensorboard: bool = Field(True, description="also write TensorBoard's files")


class Recipe(_Section):
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
        if self.masking.kind == "multiblock" and self.grid < 4:
            raise ValueError(
                f"masking.kind multiblock needs a grid of at least 4 x 4 patches, got {self.grid}"
            )
        if self.masking.kind == "multiblock" and self.latent and self.target.sees != "all":
            raise ValueError("masking.kind multiblock needs target.sees=all: its blocks may overlap")
        if (
            self.masking.kind == "multiblock"
            and self.objective.loss == "infonce"
            and self.objective.negatives == "batch"
        ):
            raise ValueError(
                "objective.negatives batch would take the same patch of an overlapping block for a negative "
                "of itself; set objective.negatives=image, or another masking.kind"
            )
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
        if self.target.kind == "pixels" and self.objective.similarity_weight:
            raise ValueError("objective.similarity_weight is for latent targets, and target.kind is pixels")
        return self


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
        (not recipe.latent, "target", f"target.kind is {target.kind}", ("sees", "top_blocks", "normalise")),
        (recipe.latent, "target", f"target.kind is {target.kind}", ("norm_pixels",)),
        (multiblock, "masking", "masking.kind is multiblock", ("visible",)),
        (not masking.gap, "masking", "masking.gap is 0", ("placement",)),
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
