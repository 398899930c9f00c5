"""The studies that ``ablate`` runs, and what a budget makes of their recipes. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from ..bench.config import read_yaml, validate
from ..bench.errors import ConfigError, did_you_mean
from ..bench.types import Frozen
from .recipe import Recipe, changed_fields, idle_fields, load_recipe

Budget = Literal["tiny", "small", "full"]
_FILE = Path(__file__).with_name("studies.yaml")
_METHOD = ("target", "projector", "masking", "objective", "decoder")
"""The sections in which methods differ; the others say what is spent on them."""

_WIDTH = ("model.arch", "model.embed_dim", "model.num_heads")


class Row(Frozen):
    """One training of a study, or the random weights that it starts from."""

    label: str = Field(min_length=1, max_length=80)
    recipe: str | None = None
    set: tuple[str, ...] = ()


class Study(Frozen):
    """Trainings that differ in what the study is about."""

    name: str
    about: str
    rows: tuple[Row, ...] = Field(min_length=1)


class Scale(Frozen):
    """What is spent on each row: the encoder, the schedule, and the images that are scored."""

    arch: str
    depth: int
    batch_size: int
    learning_rate: float
    """Peak, for the batch as given, the same for every row."""
    epochs: float
    decoder_depth: int
    """The most that a decoder gets."""
    limit: int | None
    """Images a split in the evaluation."""
    looks: int
    """Times that k-NN and the collapse monitor run on the way."""


SCALES: dict[Budget, Scale] = {
    "tiny": Scale(
        arch="vit_tiny",
        depth=2,
        batch_size=64,
        learning_rate=1e-3,
        epochs=1,
        decoder_depth=1,
        limit=200,
        looks=1,
    ),
    "small": Scale(
        arch="vit_tiny",
        depth=6,
        batch_size=128,
        learning_rate=1.5e-3,
        epochs=4,
        decoder_depth=3,
        limit=5000,
        looks=4,
    ),
    "full": Scale(
        arch="vit_small",
        depth=12,
        batch_size=512,
        learning_rate=1e-3,
        epochs=100,
        decoder_depth=8,
        limit=None,
        looks=20,
    ),
}


def study_names() -> list[str]:
    """The studies, the headline one first."""
    return list(read_yaml(_FILE, "studies"))


def load_study(name: str) -> Study:
    """A study by name. Raises ConfigError where there is none."""
    studies = read_yaml(_FILE, "studies")
    if name not in studies:
        raise ConfigError(f"there is no study {name!r}. {did_you_mean(name, [*studies, 'all'])}")
    return validate(Study, {"name": name, **studies[name]}, str(_FILE.name))


def refuse_overruled(study: Study, scale: Scale, side: int, sets: Sequence[str]) -> None:
    """Refuse changes of what the rows of a study differ in: the labels would no longer say what was trained.

    Raises:
        ConfigError: a change of a method's field in which rows differ.
    """
    recipes = [row_recipe(row, scale, side, (), "cpu") for row in study.rows if row.recipe]
    for name in changed_fields(sets):
        section, _, field = name.partition(".")
        if section not in _METHOD or field not in type(getattr(recipes[0], section)).model_fields:
            continue
        values = {str(getattr(getattr(recipe, section), field)) for recipe in recipes}
        if len(values) > 1:
            raise ConfigError(
                f"--set {name}: the rows of the study {study.name} differ in it "
                f"({', '.join(sorted(values))}), and their labels say how; leave it out, or train one "
                "encoder by `lmim-bench pretrain`"
            )


def row_recipe(row: Row, scale: Scale, side: int, sets: Sequence[str], device: str) -> Recipe:
    """The recipe of a row at a scale.

    Every row gets the same encoder, schedule and images; widths that follow the encoder's in the published
    recipes keep their ratio to it, also where ``sets`` change it (decoder 2/3, projector 16/3, gap a quarter
    of a patch).

    Args:
        row: the row; one without recipe gets that of MAE, whose initial weights it is.
        scale: what is spent on it.
        side: side of the data's images, pixels.
        sets: the user's own changes, for all rows.
        device: where to train.
    """
    base = load_recipe(row.recipe or "mae")
    wide = [text for text in sets if changed_fields([text])[0] in _WIDTH]
    width = load_recipe("mae", [f"model.arch={scale.arch}", *wide]).model.shape[0]
    patch, size = grid_for(side)
    common = [
        f"model.arch={scale.arch}",
        f"model.depth={scale.depth}",
        f"model.patch_size={patch}",
        "model.pooling=mean",
        "model.final_norm=false",  # one way to read all rows, the one of Latent MIM's authors
        f"data.image_size={size}",
        f"optim.batch_size={scale.batch_size}",
        f"optim.base_lr={scale.learning_rate * 256 / scale.batch_size}",
        "optim.warmup=0.1",
        f"optim.epochs={scale.epochs}",
        f"decoder.width={width * 2 // 3}",
        f"decoder.num_heads={max(1, width * 2 // 3 // 32)}",
        f"decoder.depth={min(base.decoder.depth, scale.decoder_depth)}",
        f"projector.hidden_dim={width * 16 // 3}",
        # Published momenta are for many more steps than any budget here has: one schedule for all rows.
        "target.momentum=0.99",
        "target.momentum_end=1.0",
        "target.momentum_curve=cosine",
        f"target.top_blocks={min(base.target.top_blocks, max(1, scale.depth // 2))}",
        f"watch.evaluations={scale.looks}",
        f"watch.checkpoints={scale.looks}",
        "watch.knn_train=2000",
        "watch.knn_test=1000",
        f"engine.device={device}",
    ]
    if base.masking.gap:
        common.append(f"masking.gap={max(1, patch // 4)}")
    return load_recipe(row.recipe or "mae", [*common, *row.set, *sets])


def idle_reason(row: Row, recipe: Recipe) -> str | None:
    """Why none of what a row changes has an effect at its scale, or None where something has."""
    idle, changed = idle_fields(recipe), changed_fields(row.set)
    if not changed or not idle.keys() >= set(changed):
        return None
    return f"{changed[0]} changes nothing, as {idle[changed[0]]}"


def grid_for(side: int) -> tuple[int, int]:
    """Patch and image size for images of a side: 16 at 224 for large ones, else a grid of 8 x 8."""
    if side >= 224:
        return 16, 224
    patch = max(1, min(side, 96) // 8)
    return patch, 8 * patch
