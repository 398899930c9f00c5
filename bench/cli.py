"""The command line. Heavy imports live inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from .cache import PARTS
from .checkpoint_commands import doctor, formats, inspect, selftest
from .errors import LmimBenchError, said_by_the_system
from .options import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    FOLDER,
    cache_option,
    command_line,
    debugging,
    device_option,
    limit_option,
    suite_option,
    task_names,
    tasks_option,
    terminated_as_interrupted,
)
from .references import FORMS
from .report_commands import compare, figures, table
from .training_commands import ablate, export, pretrain

if TYPE_CHECKING:
    from .config import RunConfig


class _Group(click.Group):
    """Turns the errors that a user can mend into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LmimBenchError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"lmim-bench: {error}", err=True)
            sys.exit(EXIT_USER_ERROR)
        except OSError as error:  # a full disk, a folder that may not be written
            # A library's own error has no number, and click ends on a pipe that was closed.
            if ctx.params.get("debug") or not error.errno or isinstance(error, BrokenPipeError):
                raise
            click.echo(f"lmim-bench: {said_by_the_system(error)}", err=True)
            sys.exit(EXIT_USER_ERROR)
        except KeyboardInterrupt:
            click.echo("lmim-bench: stopped; the same command goes on with what is not finished", err=True)
            sys.exit(EXIT_INTERRUPTED)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        from .errors import did_you_mean

        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            known = self.list_commands(ctx)
            raise click.UsageError(
                f"there is no command {args[0]!r}. {did_you_mean(args[0], known)}", ctx
            ) from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lmim-bench")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def cli(debug: bool) -> None:
    """Score any vision checkpoint on five downstream tasks: one command, one report."""


def _run_options(command: Any) -> Any:
    options = [
        click.option(
            "--data",
            "-d",
            multiple=True,
            help="Data folder (its layout says what it is) or torchvision:NAME; repeats.",
        ),
        suite_option,
        click.option(
            "--set",
            "sets",
            multiple=True,
            metavar="TASK.FIELD=VALUE",
            help="Override a protocol field: knn.k=1,10,20; repeats.",
        ),
        click.option(
            "--out",
            "-o",
            type=FOLDER,
            help="Run folder. [default: runs/<labels>]",
        ),
        limit_option,
        device_option,
        click.option(
            "--precision",
            type=click.Choice(["fp32", "bf16", "fp16"]),
            default="fp32",
            show_default=True,
            help="Arithmetic of the encoder.",
        ),
        click.option(
            "--seed", "seeds", multiple=True, type=int, help="One set of cells a seed; repeats. [default: 0]"
        ),
        click.option("--workers", type=int, help="Decoding processes."),
        click.option("--batch-size", type=int, help="Images a batch at 224 x 224; scaled with the area."),
        click.option("--skip-broken", is_flag=True, help="Leave broken images out, count and list them."),
        click.option(
            "--keep-pixels", is_flag=True, help="Keep decoded images in the cache, for other checkpoints."
        ),
        click.option("--download", is_flag=True, help="Fetch torchvision data sets that are not there."),
        cache_option,
        click.option(
            "--cache-size",
            "cache_size_gb",
            type=float,
            default=50.0,
            show_default=True,
            metavar="GB",
            help="Bound of the feature cache.",
        ),
        click.option(
            "--overwrite",
            type=click.Choice(["only-missing", "never", "always"]),
            default="only-missing",
            show_default=True,
            help="Cells that --out holds: only-missing keeps them, always scores them again, never stops.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@click.option(
    "--ckpt",
    "-c",
    "ckpts",
    multiple=True,
    required=True,
    metavar="[LABEL=]REF",
    help=f"{FORMS[0].upper()}{FORMS[1:]}; repeats.",
)
@tasks_option
@_run_options
@click.option("--dry-run", is_flag=True, help="Print the plan and what it will take, and stop.")
@click.pass_context
def run(
    ctx: click.Context, /, ckpts: tuple[str, ...], tasks: tuple[str, ...], dry_run: bool, **options: Any
) -> None:
    """Score checkpoints on tasks, and write results and report.

    Issued again into the same --out, only what is missing runs. Exit code 0: every cell was scored;
    1: some cell failed (with --dry-run: will fail); 2: nothing could be done as asked (wrong input, a folder
    in use, a full disk); 130: interrupted by Ctrl-C or SIGTERM.
    """
    from .api import make_config
    from .config import parse_override

    overrides: dict[str, dict[str, Any]] = {}
    for text in options.pop("sets"):
        task, field, value = parse_override(text)
        overrides.setdefault(task, {})[field] = value
    options = {name: value for name, value in options.items() if value not in (None, ())}
    config = make_config(list(ckpts), tasks=task_names(tasks), overrides=overrides, **options)
    _run(config, dry_run=dry_run, debug=debugging(ctx))


def _run(config: RunConfig, *, dry_run: bool = False, debug: bool = False) -> None:
    from .plan import make_plan
    from .progress import Reporter

    plan, reporter, command = make_plan(config), Reporter(), command_line()
    if dry_run:
        from shutil import disk_usage

        from .doctor_system import existing
        from .estimate import Estimator, resident_peak
        from .opening import open_run
        from .show import print_estimate, print_plan

        opened = open_run(plan, reporter, command, debug)
        print_plan(opened)
        if opened.pending():
            steps = list(Estimator(opened).steps())
            free = disk_usage(existing(opened.store.root)).free
            print_estimate(steps, resident_peak(), free)
            if any(step.failure for step in steps):
                sys.exit(EXIT_FAILED)
        return
    from rich.console import Console

    from ..reports.text import print_summary
    from .api import run_plan

    with terminated_as_interrupted():
        finished = run_plan(plan, reporter, command, debug)
    print_summary(finished, plan.out, Console())
    click.echo(f"results  {plan.out / 'results.json'}\nreport   {plan.out / 'report.html'}")
    planned = plan.cell_ids()
    if any(result.status == "failed" for result in finished.results if result.cell in planned):
        sys.exit(EXIT_FAILED)


@cli.command()
@click.option(
    "--out",
    "-o",
    type=FOLDER,
    default=Path("runs/demo"),
    show_default=True,
    help="Run folder.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=180,
    show_default=True,
    help="Optimiser steps of each training.",
)
@device_option
@cache_option
@limit_option
@click.pass_context
def demo(
    ctx: click.Context, out: Path, steps: int, limit: int | None, device: str, cache_dir: Path | None
) -> None:
    """Train a tiny MAE and a tiny Latent MIM on the embedded scenes; compare them with random weights."""
    from .demo import demo_config
    from .progress import Reporter

    config = demo_config(out, steps, limit, device, cache_dir, Reporter(), command_line())
    _run(config, debug=debugging(ctx))


@cli.command()
def tasks() -> None:
    """List the tasks, with the headline metric and the kind of data that each needs."""
    from ..tasks import registry
    from .show import print_table

    found, broken = registry()
    rows = [(t.name, t.title, t.data, t.headline(t.config()), t.version, t.origin) for t in found.values()]
    print_table(("task", "what", "data", "headline", "version", "from"), rows)
    for name, reason in broken.items():
        click.echo(f"{name}: could not be loaded: {reason}", err=True)


@cli.command()
@click.argument("task_name", metavar="TASK")
def describe(task_name: str) -> None:
    """Print a task's protocol: what it does, and every field with its default."""
    from ..tasks import get_task
    from .show import print_protocol

    print_protocol(get_task(task_name))


@cli.command()
@click.argument("reference", metavar="[FOLDER]", required=False)
@cache_option
def data(reference: str | None, cache_dir: Path | None) -> None:
    """List the known data sets and layouts; or say what a FOLDER is and what it holds."""
    from .cache import cache_folder
    from .data import catalogue, detect_layout, load_data
    from .show import print_fields, print_table
    from .types import ignored_files, mask_values

    if not reference:
        print_table(("--data", "kind", "what"), catalogue())
        return
    found = detect_layout(reference)
    loaded = load_data(reference, cache_dir=cache_folder(cache_dir))
    print_fields(
        {
            "layout": f"{found.layout} ({found.reason})",
            "kind": loaded.kind,
            "scored": loaded.test_split if loaded.splits else "every sequence",
            "masks": mask_values(loaded) if loaded.kind == "video" else None,
            "void": ", ".join(map(str, loaded.void)) if loaded.kind == "segmentation" else None,
            "counts": ", ".join(f"{name} {n}" for name, n in loaded.counts().items()),
            "not read": ignored_files(loaded.ignored) if loaded.ignored else None,
            "classes": f"{len(loaded.classes)}: {', '.join(loaded.classes)}" if loaded.classes else "-",
            "fingerprint": loaded.fingerprint,
        }
    )


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    help="HTML file. [default: FOLDER/report.html]",
)
def report(folder: Path, out: Path | None) -> None:
    """Write the HTML report of a run folder again, and print its summary."""
    from rich.console import Console

    from ..reports.html import build_report
    from ..reports.text import print_summary
    from .results import load_run

    finished = load_run(folder)
    written = build_report(folder, out)
    print_summary(finished, folder, Console())
    click.echo(f"report   {written}")


@cli.command()
@click.option(
    "--clear",
    "part",
    is_flag=False,
    flag_value="all",
    type=click.Choice(["all", *PARTS]),
    help="Delete a part of the cache, or all of it but what was downloaded (torchvision).",
)
@click.option("--cache-dir", type=FOLDER, help="The cache folder.")
def cache(part: str | None, cache_dir: Path | None) -> None:
    """Show what the cache holds, or clear it."""
    from . import cache as store

    root = store.cache_folder(cache_dir)
    if part:
        freed, left = store.clear(root, None if part == "all" else part)
        click.echo(f"freed {freed / 1e6:.1f} MB in {root}")
        if left and part == "all":
            click.echo(f"left {', '.join(left)} (downloads, what is being written, or not of lmim-bench)")
        return
    click.echo(f"{root}{'' if store.usage(root) else ' (empty)'}")
    for name, (entries, size) in store.usage(root).items():
        click.echo(f"{name:<12} {entries:>6} entries {size / 1e6:>10.1f} MB")


for command in (inspect, formats, doctor, selftest, pretrain, ablate, export, compare, table, figures):
    cli.add_command(command)


def main() -> None:
    """Entry point of the ``lmim-bench`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not of UTF-8 gets question marks
    cli()


if __name__ == "__main__":
    main()
