"""The sections of a recipe: every field that decides a training, with its default, bounds and meaning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from ..bench.types import IMAGENET_MEAN, IMAGENET_STD, Frozen, Pooling

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


class Section(Frozen):
    """What all sections share: frozen, no field that nobody declared, no infinite number."""

    model_config = ConfigDict(allow_inf_nan=False)


class ModelConfig(Section):
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


class ProjectorConfig(Section):
    """The latent projector: an MLP behind the online and the target encoder, dropped afterwards."""

    depth: int = Field(3, ge=0, description="linear layers; 0 leaves the projector out")
    hidden_dim: int = Field(4096, gt=0, description="width between its layers")


class TargetConfig(Section):
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
    export: Literal["online", "target"] = Field(
        "online",
        description="the encoder that is kept, watched and scored: the trained one, or the moving average "
        "that is its target (I-JEPA)",
    )


class MaskingConfig(Section):
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
        "stochastic",
        description="offset of a patch inside its cell: random in 0..gap-1, or 0 (the same where gap is 1)",
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


class ObjectiveConfig(Section):
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


class DecoderConfig(Section):
    """What predicts the targets from the visible latents."""

    kind: Literal["self", "cross", "cross_self"] = Field(
        "cross_self",
        description="self-attention over all tokens (MAE), cross-attention to the visible ones, both",
    )
    depth: int = Field(3, ge=1, description="blocks")
    width: int = Field(512, gt=0, description="width")
    num_heads: int = Field(16, gt=0, description="attention heads")
    cues: bool = Field(True, description="mask tokens start from visible latents weighted by position")


class OptimConfig(Section):
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


class DataConfig(Section):
    """The images and their augmentation."""

    image_size: int = Field(224, gt=0, description="side of the images that the grid of patches covers")
    min_scale: float = Field(0.2, gt=0, le=1, description="smallest area of a random crop")
    aspect: tuple[Positive, Positive] = Field(
        (0.75, 1.3333333333333333), description="smallest and largest width to height of a crop"
    )
    flip: bool = Field(True, description="horizontal flips of half of the images")
    mean: tuple[float, float, float] = Field(IMAGENET_MEAN, description="of the colours")
    std: tuple[Positive, Positive, Positive] = Field(IMAGENET_STD, description="of the colours")
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


class EngineConfig(Section):
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
    cuda_graph: bool = Field(
        False,
        description="record forward and backward pass once, and replay them: where the CPU is the slower",
    )
    activation_checkpointing: bool = Field(False, description="less memory for a third more time")
    threads: int | None = Field(None, ge=1, description="CPU threads; torch's choice unless given")
    skip_broken: bool = Field(
        False, description="another image in the place of each broken one; the broken ones are listed"
    )


class WatchConfig(Section):
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
