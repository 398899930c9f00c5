"""The commands that train and convert encoders: ``pretrain``, ``ablate``, ``export``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import EXIT_FAILED, FOLDER, cache_option, command_line, device_option, terminated_as_interrupted

if TYPE_CHECKING:
    from ..pretrain.outcome import Summary
    from ..pretrain.studies import Budget
    from .export import ExportFormat

_skip_broken = click.option(
    "--skip-broken", is_flag=True, help="Train with another image in the place of each broken one."
)
_set = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="SECTION.FIELD=VALUE",
    help="Change a field of the recipe: model.depth=6; repeats.",
)


@click.command()
@click.option("--recipe", "-r", help="A built-in recipe (--list) or a YAML file.")
@click.option(
    "--data",
    "-d",
    help="Folder of images or shards, torchvision:NAME, or an embedded set; with --resume: its place now.",
)
@click.option("--out", "-o", type=FOLDER, help="Folder of the training. [default: runs/<recipe>]")
@click.option("--resume", "resumed", type=FOLDER, help="Go on with the training of this folder.")
@_set
@click.option("--device", help="auto, cpu, cuda or cuda:N; the same as --set engine.device=...")
@_skip_broken
@cache_option
@click.option("--list", "listing", is_flag=True, help="List the built-in recipes and stop.")
@click.option("--dry-run", is_flag=True, help="Print every field of the recipe and what it costs, and stop.")
def pretrain(
    recipe: str | None,
    data: str | None,
    out: Path | None,
    resumed: Path | None,
    sets: tuple[str, ...],
    device: str | None,
    skip_broken: bool,
    cache_dir: Path | None,
    listing: bool,
    dry_run: bool,
) -> None:
    """Train an encoder by a recipe: MAE, Latent MIM and its variants, I-JEPA, data2vec.

    What it writes is what `run --ckpt` takes. Ctrl-C or SIGTERM saves and exits with 0; --resume goes on
    exactly there. For several GPUs: torchrun --nproc-per-node 8 -m lmim_bench pretrain ...
    """
    if listing:
        _list_recipes()
        return
    if device:
        sets += (f"engine.device={device}",)
    if skip_broken:
        sets += ("engine.skip_broken=true",)
    if resumed and out:
        raise click.UsageError("--resume knows its folder; leave out --out")
    if resumed and dry_run:
        raise click.UsageError("--dry-run is for a training that starts; --resume goes on with one as it is")
    if not resumed and not recipe:
        raise click.UsageError("give --recipe NAME (--list shows them) or --resume FOLDER")
    from ..pretrain import api
    from ..pretrain.recipe import load_recipe, named_fields

    reporter = api.make_reporter()
    if resumed:
        with terminated_as_interrupted():  # before and after the steps, which save
            summary = api.resume(
                resumed, recipe=recipe, sets=sets, reporter=reporter, cache_dir=cache_dir, data=data
            )
        _say_training(summary, resumed)
        return
    assert recipe is not None
    chosen = load_recipe(recipe, sets)
    if dry_run:
        from .show import print_recipe

        opened = api.open_images(data, reporter, cache_dir) if data else None
        print_recipe(chosen, api.describe_cost(chosen, opened))
        for line in api.without_effect(chosen, named_fields(recipe, chosen, sets)):
            click.echo(f"WARNING  {line}")
        return
    if not data:
        raise click.UsageError("give --data: a folder of images, or `scenes` for the embedded ones")
    out = out or Path("runs") / chosen.name
    with terminated_as_interrupted():
        summary = api.pretrain(
            recipe, data, out, sets=sets, reporter=reporter, cache_dir=cache_dir, command=command_line()
        )
    _say_training(summary, out)


def _list_recipes() -> None:
    from ..pretrain.recipe import load_recipe, recipe_names
    from .show import print_table

    rows = [(name, load_recipe(name).about) for name in recipe_names()]
    print_table(("recipe", "what"), rows)


def _say_training(summary: Summary, out: Path) -> None:
    from ..pretrain.api import leading_process

    if not leading_process():
        return
    if not summary.finished:
        saved = " and saved" if summary.step else ""
        click.echo(
            f"stopped at step {summary.step} of {summary.steps}{saved}; go on with: "
            f"lmim-bench pretrain --resume {shlex.quote(str(out))}"
        )
        return
    speed, work, waiting = summary.images_per_second, summary.flops_per_second, summary.waiting
    if speed is not None and work is not None and waiting is not None:
        used = "" if summary.utilisation is None else f", {100 * summary.utilisation:.1f}% of the peak"
        click.echo(
            f"{speed:,.0f} images/s, {work / 1e12:.3g} TFLOP/s{used}, "
            f"{100 * waiting:.1f}% of the time waiting for data"
        )
    for warning in summary.warnings:
        click.echo(f"WARNING  {warning}")
    encoder = out / "encoder.pth"
    click.echo(f"encoder  {encoder}\nscore    lmim-bench run --ckpt {shlex.quote(str(encoder))} --tasks all")


@click.command()
@click.option(
    "--study", "-s", "names", multiple=True, help="Study by name, or all; repeats. --list shows them."
)
@click.option("--data", "-d", help="Classification data: trained on, and scored on.")
@click.option(
    "--budget",
    "-b",
    type=click.Choice(["tiny", "small", "full"]),
    default="small",
    show_default=True,
    help="tiny: two blocks, one epoch, to try; small: hours on a CPU; full: an H100.",
)
@click.option("--out", "-o", type=FOLDER, help="Folder of all trainings and reports. [default: runs/ablate]")
@_set
@device_option
@click.option(
    "--jobs",
    "-j",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Trainings at a time, each a process with its share of the cores; several GPUs in turn.",
)
@_skip_broken
@cache_option
@click.option("--list", "listing", is_flag=True, help="List the studies with their rows and stop.")
def ablate(
    names: tuple[str, ...],
    data: str | None,
    budget: Budget,
    out: Path | None,
    sets: tuple[str, ...],
    device: str,
    jobs: int,
    skip_broken: bool,
    cache_dir: Path | None,
    listing: bool,
) -> None:
    """Run studies along the axes of the Latent MIM paper: train every row alike, score all, one report each.

    Finished trainings are kept, an interrupted one goes on: the same command continues the study. Exit code
    1: some cell could not be scored.
    """
    from ..pretrain.studies import study_names

    if listing:
        _list_studies()
        return
    if not names or not data:
        raise click.UsageError(f"give --study ({', '.join(study_names())} or all) and --data")
    from ..pretrain.api import make_reporter
    from .ablation import run_studies

    with terminated_as_interrupted():
        found = run_studies(
            names,
            data,
            budget,
            out or Path("runs") / "ablate",
            sets=sets,
            device=device,
            jobs=jobs,
            skip_broken=skip_broken,
            cache_dir=cache_dir,
            reporter=make_reporter(),
            command=command_line(),
        )
    if any(result.status == "failed" for study in found.values() for result in study.results):
        sys.exit(EXIT_FAILED)


def _list_studies() -> None:
    from ..pretrain.studies import load_study, study_names
    from .show import print_table

    for name in study_names():
        study = load_study(name)
        rows = [(row.label, row.recipe or "-", " ".join(row.set)) for row in study.rows]
        print_table(("row", "recipe", "changes"), rows, f"{name}: {study.about}")


@click.command()
@click.argument("reference")
@click.option(
    "--format", "layout", type=click.Choice(["timm", "hf", "mae"]), required=True, help="The layout."
)
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path),
    required=True,
    help="File (mae, timm) or folder (timm, hf).",
)
def export(reference: str, layout: ExportFormat, out: Path) -> None:
    """Write an encoder in the layout of timm, of transformers, or of MAE's official code."""
    from .export import export_encoder

    summary = export_encoder(reference, layout, out)
    for path in summary.paths:
        click.echo(f"wrote    {path}")
    click.echo(f"tensors  {summary.tensors} ({summary.parameters:,} numbers)\nload     {summary.how_to_load}")
    for note in summary.notes:
        click.echo(f"note     {note}")
