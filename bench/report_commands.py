"""Commands that read finished runs: compare them, and write their tables for papers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from .options import FOLDER

if TYPE_CHECKING:
    from ..reports.verdicts import Comparison

_FOLDERS = click.argument(
    "folders", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path)
)


@click.command()
@_FOLDERS
@click.option("--baseline", "-b", metavar="LABEL", help="The checkpoint that the others are compared with.")
@click.option(
    "--out",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("comparison.html"),
    show_default=True,
    help="HTML file.",
)
@click.option(
    "--published", is_flag=True, help="Put the numbers that others publish beside the measured ones."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and write no HTML.")
def compare(
    folders: tuple[Path, ...], baseline: str | None, out: Path, published: bool, as_json: bool
) -> None:
    """Compare checkpoints of one run or of several: paired tests on the same items, one report.

    Only what was scored under one protocol on the same data is compared; for the rest it says what differs.
    """
    from ..reports.html import build_report
    from ..reports.model import read_report
    from ..reports.remarks import arithmetic
    from ..reports.verdicts import comparisons
    from .errors import ConfigError
    from .show import print_line

    report = read_report(folders)
    if len(report.checkpoints) < 2:
        raise ConfigError("these runs hold one checkpoint; give the run folder of another to compare it with")
    found = comparisons(report, baseline)
    if as_json:
        click.echo(json.dumps([_plain(comparison) for comparison in found], indent=1, ensure_ascii=False))
        return
    if report.limited:
        limits = " or ".join(map(str, report.limits))
        print_line(f"LIMITED RUN: at most {limits} images a split (or frames a sequence)")
    for remark in arithmetic(report):
        print_line(remark)
    for comparison in found:
        print_line(comparison.summary)
        for verdict in comparison.verdicts:
            print_line(f"  {verdict.column.name}: {verdict.sentence}")
        for gap in comparison.gaps:
            print_line(f"  not compared: {gap}")
    if (tests := sum(comparison.tested for comparison in found)) > 1:
        print_line(
            f"p is corrected for {tests} tests (Holm); each interval stands for itself, and may leave out "
            "zero where p does not reach 0.05"
        )
    click.echo(f"report   {build_report(folders, out, baseline, published=published)}")


def _plain(comparison: Comparison) -> dict[str, Any]:
    return {
        "reference": comparison.reference.label,
        "challenger": comparison.challenger.label,
        "columns": [
            {
                "task": verdict.column.task,
                "data": verdict.column.data.name,
                "variant": verdict.column.variant,
                "metric": verdict.row.id,
                "difference": verdict.found.value,
                "low": verdict.found.low,
                "high": verdict.found.high,
                "p": verdict.found.p,
                "p_holm": verdict.p,
                "effect": verdict.found.effect,
                "test": verdict.found.test,
                "items": verdict.found.items,
                "groups": verdict.found.independent,
                "clear": verdict.clear,
                "sentence": verdict.sentence,
            }
            for verdict in comparison.verdicts
        ],
        "not_compared": list(comparison.gaps),
    }


@click.command()
@_FOLDERS
@click.option(
    "--format", "-f", "form", type=click.Choice(["svg", "png", "pdf"]), default="svg", show_default=True
)
@click.option(
    "--out",
    "-o",
    type=FOLDER,
    help="Folder. [default: figures/ in the first run]",
)
def figures(folders: tuple[Path, ...], form: Literal["svg", "png", "pdf"], out: Path | None) -> None:
    """Write every figure of the report as a file, for papers and slides."""
    from ..reports.figure_files import write_figures
    from ..reports.model import read_report

    folder = out or folders[0] / "figures"
    written = write_figures(read_report(folders), folder, form)
    click.echo(f"figures  {len(written)} in {folder}")


@click.command()
@_FOLDERS
@click.option(
    "--format",
    "-f",
    "form",
    type=click.Choice(["md", "latex", "csv"]),
    default="md",
    show_default=True,
    help="csv has a line for every metric, with intervals; the others the headline of every task.",
)
@click.option("--out", "-o", type=click.Path(path_type=Path, dir_okay=False), help="File. [default: print]")
def table(folders: tuple[Path, ...], form: str, out: Path | None) -> None:
    """Write the scores of runs as a table for a paper, a README or a spreadsheet."""
    from ..reports.model import read_report
    from ..reports.tables import write_table
    from .atomic import atomic_write

    text = write_table(read_report(folders), form)
    if out is None:
        click.echo(text, nl=False)
        return
    with atomic_write(out) as stream:
        stream.write(text)
    click.echo(f"table    {out}")
