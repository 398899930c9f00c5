"""A training from names: open the data, claim or find the folder, train. What the command line calls."""

from __future__ import annotations

import os
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

from ..bench.cache import cache_folder
from ..bench.checkpoints import save_checkpoint
from ..bench.data import detect_layout, load_data, load_unlabelled
from ..bench.engine import resolve_device
from ..bench.errors import ConfigError, DataError
from ..bench.progress import Reporter
from ..bench.references import at_home
from ..bench.types import Dataset, ignored_files
from .monitor import Health, Watcher
from .outcome import Summary, Training, read_training
from .recipe import Recipe, idle_fields, load_recipe, make_recipe, named_fields
from .step import initial_model
from .trainer import train

MAY_CHANGE = ("engine", "watch")
"""The sections of a recipe that another sitting of the same training may change."""


def leading_process() -> bool:
    """Whether this is the only process, or the first of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


def make_reporter() -> Reporter:
    """Progress on standard error, from the leading process only."""
    from rich.console import Console

    return Reporter(None if leading_process() else Console(stderr=True, quiet=True))


def without_effect(recipe: Recipe, given: Sequence[str]) -> list[str]:
    """Of the fields that were given those that change nothing, a sentence each: a sweep over one would train
    the same model.
    """
    idle = idle_fields(recipe)
    lines = [f"{name} changes nothing: {idle[name]}" for name in given if name in idle]
    if "optim.no_decay" in given:
        names = [name for name, _ in initial_model(recipe).named_parameters()]
        lines += [
            f"optim.no_decay names {part!r}, and no parameter's name holds it"
            for part in recipe.optim.no_decay
            if not any(part in name for name in names)
        ]
    return lines


def changes_by_parts(recipe: Recipe, before: Recipe | None = None) -> list[str]:
    """What a loss over several images of a part makes of ``engine.accumulate``, in a sentence; [] where it
    makes nothing of it, or the batch is one part and was one ``before``.
    """
    parts = recipe.engine.accumulate
    earlier = parts if before is None else before.engine.accumulate
    if not recipe.over_parts or parts == earlier == 1:
        return []
    constrained = recipe.objective.similarity_weight > 0
    what = "objective.similarity_weight" if constrained else "objective.negatives=batch"
    changed = "" if parts == earlier else f" (before: {earlier})"
    return [
        f"{what} compares the images of one part, so that engine.accumulate={parts}{changed} changes what is "
        "learned; engine.activation_checkpointing=true saves memory without that"
    ]


def describe_cost(recipe: Recipe, data: Dataset | None = None) -> str:
    """What an image costs, in a line; with data what all of the training does, in another.

    Raises:
        ConfigError: the batch does not go with the data.
    """
    from .batches import plan_steps
    from .flops import training_flops

    flops = training_flops(recipe)
    total = recipe.grid**2
    shown = f"{recipe.visible_patches} of {total} patches visible"
    if recipe.masking.kind == "multiblock":
        shown = f"{recipe.masking.blocks} blocks of {total} patches hidden, the context without them visible"
    cost = (
        f"{shown}, crops of {recipe.crop_size} pixels; "
        f"{flops / 1e9:.2f} GFLOP an image, peak learning rate {recipe.learning_rate:.3g}"
    )
    if data is None:
        return cost
    images, processes = len(data.splits[data.train_split]), int(os.environ.get("WORLD_SIZE", "1"))
    plan = plan_steps(recipe, images, processes)
    return (
        f"{cost}\n{plan.total:,} steps of {plan.batch} images, {plan.per_epoch:,} an epoch of {images:,}; "
        f"{plan.total * plan.batch * flops / 1e15:.3g} PFLOP in all"
    )


def pretrain(
    recipe: str | Path | Recipe,
    data: str | Path,
    out: str | Path,
    *,
    sets: Sequence[str] = (),
    reporter: Reporter | None = None,
    cache_dir: Path | None = None,
    command: str = "lmim_bench.pretrain.api.pretrain(...)",
) -> Summary:
    """Train an encoder; ``out/encoder.pth`` is what ``run`` takes.

    Args:
        recipe: a recipe, the name of a built-in one, or a YAML file.
        data: a folder of images, shards, ``torchvision:NAME``, or an embedded set.
        out: a new folder.
        sets: ``section.field=value`` changes.
        reporter: where progress goes; standard error unless given.
        cache_dir: where decoded images and embedded data are kept.
        command: recorded in the folder.

    Raises:
        LmimBenchError: a recipe, data set or folder that cannot be used, or a loss that is not finite.
    """
    reporter, out = reporter or make_reporter(), at_home(out)
    if not isinstance(recipe, Recipe):
        name = str(recipe)
        recipe = load_recipe(name, sets)
        for line in without_effect(recipe, named_fields(name, recipe, sets)):
            reporter.line(f"WARNING: {line}")
    elif sets:
        raise ConfigError("sets change a recipe that is given by name; change a Recipe by model_copy")
    for line in changes_by_parts(recipe):
        reporter.line(f"WARNING: {line}")
    opened = open_images(data, reporter, cache_dir)
    # Whoever goes on with it may stand in another folder.
    reference = str(at_home(data).absolute()) if at_home(data).exists() else str(data)
    training = Training(recipe=recipe, data=reference, fingerprint=opened.fingerprint, command=command)
    return train(training, opened, out, reporter, cache_dir, begin=True)


def resume(
    out: str | Path,
    *,
    recipe: str | None = None,
    sets: Sequence[str] = (),
    reporter: Reporter | None = None,
    cache_dir: Path | None = None,
    data: Dataset | str | None = None,
) -> Summary:
    """Go on with the training of a folder, exactly where its last state is.

    Args:
        out: the folder.
        recipe: must have the name of the folder's own, which stays; a line says where they differ.
        sets: changes of ``engine`` and ``watch``; whatever else decides the training stays as it was.
        reporter: where progress goes; standard error unless given.
        cache_dir: where decoded images and embedded data are kept.
        data: the same images, opened or by reference, wherever they lie now.

    Raises:
        LmimBenchError: no training there, another recipe, or as ``pretrain`` does.
    """
    reporter, out = reporter or make_reporter(), Path(out)
    training = read_training(out)
    if recipe is not None:
        named = load_recipe(recipe)
        if named.name != training.recipe.name:
            raise ConfigError(
                f"{out} is a training of {training.recipe.name}, not of {recipe}; leave --recipe out"
            )
        if others := _differences(training.recipe, named, named_fields(recipe, named, ())):
            reporter.line(f"WARNING: {recipe} is not what {out} is trained by, which stays: {others}")
    for text in sets:
        if text.partition(".")[0] not in MAY_CHANGE:
            raise ConfigError(
                f"--set {text} would make it another training; a resumed one takes changes of "
                f"{' and '.join(MAY_CHANGE)} only"
            )
    before = training.recipe
    if sets:
        training = training.model_copy(update={"recipe": make_recipe(before.model_dump(mode="json"), sets)})
    for line in changes_by_parts(training.recipe, before):
        reporter.line(f"WARNING: {line}")
    if data is None:
        try:
            data = open_images(training.data, reporter, cache_dir)
        except DataError as error:
            raise DataError(f"{error}; --data says where the images of {out} lie now") from error
    opened = open_images(data, reporter, cache_dir) if isinstance(data, str) else data
    return train(training, opened, out, reporter, cache_dir)


def _differences(kept: Recipe, file: Recipe, named: Sequence[str]) -> str:
    """The fields named in a file that the recipe which is kept has otherwise, with both values."""
    pairs = {name: (attrgetter(name)(kept), attrgetter(name)(file)) for name in ("seed", *named)}
    return ", ".join(f"{name} {own} (not {new})" for name, (own, new) in pairs.items() if own != new)


def save_random_weights(recipe: Recipe, data: Dataset, out: Path) -> Health:
    """The encoder that a recipe starts from, as ``out/encoder.pth``, and the collapse monitor's measures."""
    encoder = initial_model(recipe).exported
    weights, projector = encoder.vit.state_dict(), encoder.projector.state_dict()
    health, _ = Watcher(recipe, data, resolve_device(recipe.engine.device), "fp32")(weights, projector)
    facts = {"recipe": recipe.model_dump(mode="json"), "step": 0}
    notes = [f"random weights, seed {recipe.seed}: not a trained model"]
    save_checkpoint(out / "encoder.pth", recipe.spec(), weights, {**facts, "notes": notes})
    return health


def open_images(reference: str | Path, reporter: Reporter, cache_dir: Path | None = None) -> Dataset:
    """The images to train on. Where they have no labelled train and test split, all of them without labels,
    and a line says so; another says which were left out, as masks or as those of a test.

    Raises:
        DataError: no images, or a data set of masks or videos.
    """
    try:
        kind = detect_layout(reference).kind
        labelled = kind == "classification"
        opened = load_data(reference, cache_dir=cache_folder(cache_dir)) if labelled else None
    except DataError as error:
        if not at_home(reference).is_dir():
            raise  # torchvision:NAME, an embedded set, or no folder: there is nothing to take as it is
        reason = str(error).partition(". ")[0]  # after which the known layouts are listed
        opened = found = load_unlabelled(reference, cache_dir=cache_folder(cache_dir))
        reporter.line(
            f"{len(found.splits[found.train_split])} images without labels, so no k-NN on the way ({reason})"
        )
        if found.left_out:
            folders = ", ".join(f"{name} {count:,}" for name, count in found.left_out.items())
            reporter.line(f"left out, as masks or as a split for a test: {folders} (images by folder)")
    if opened is None:
        raise DataError(f"{reference} is a {kind} data set; name the folder that holds its images alone")
    if opened.ignored:
        reporter.line(f"{reference}: {ignored_files(opened.ignored)}")
    return opened
