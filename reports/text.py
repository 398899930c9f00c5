"""The summary that the command line prints at the end of a run: headline metrics by checkpoint and task."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..bench.results import RunFile
from .model import Cell, Column, Report, make_report, reason
from .readings import clean
from .remarks import arithmetic, changed, left_out
from .verdicts import Pairings

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

Grid = list[list[str]]
"""Texts by row, the first of which is the head."""


def summary_table(run: RunFile, folder: Path) -> SummaryTable:
    """What a run in a folder found, for ``rich``: a row a checkpoint, a column a task and data set, reasons
    below.

    A terminal too narrow for that gets a row a task instead; a pipe or file gets plain aligned lines (see
    ``print_summary``, which keeps them whole).
    """
    return SummaryTable(Pairings(make_report([(run, folder)])))


def print_summary(run: RunFile, folder: Path, console: Console) -> None:
    """Print what a run found. Lines for a pipe or file are not cut at the width of an absent terminal."""
    console.print(summary_table(run, folder), crop=console.is_terminal)


@dataclass(frozen=True)
class SummaryTable:
    """A renderable of the headline metrics; ``str`` of it is the plain form."""

    pairings: Pairings

    @property
    def report(self) -> Report:
        """What the table is of."""
        return self.pairings.report

    @cached_property
    def summaries(self) -> tuple[tuple[Cell, ...], ...]:
        """The cells of each column."""
        return tuple(self.pairings.summary(column) for column in self.report.summarised)

    def __str__(self) -> str:
        return "\n".join(self._plain())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.segment import Segment
        from rich.text import Text

        if not console.is_terminal:
            for line in self._plain():
                yield Segment(line)
                yield Segment.line()
            return
        for line in self._warning():
            yield Text(line, style="bold yellow")
        table = self._table(self._grid())
        if console.measure(table, options=options.update(max_width=10_000)).maximum > options.max_width:
            table = self._table(_transposed(self._grid()))
        yield table
        for line in self._reasons():
            yield Text(line, style="red")
        for line in self._legend():
            yield Text(line, style="dim")

    def _grid(self) -> Grid:
        grid = [["checkpoint", *(_head(column) for column in self.report.summarised)]]
        for checkpoint in self.report.checkpoints:
            cells = (_cell(summary[checkpoint.index]) for summary in self.summaries)
            grid.append([_line(checkpoint.label), *cells])
        return grid

    def _table(self, grid: Grid) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for number, head in enumerate(grid[0]):
            table.add_column(Text(head), overflow="fold", no_wrap=number == 0)
        for row in grid[1:]:
            table.add_row(*(Text(text, style=_style(text)) for text in row))
        return table

    def _plain(self) -> list[str]:
        grid = [[text.replace("\n", " ") for text in row] for row in _transposed(self._grid())]
        widths = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
        lines = ["  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip() for row in grid]
        return [*self._warning(), *lines, *self._reasons(), *self._legend()]

    def _warning(self) -> list[str]:
        """What was not scored of the data, and how it was computed, before any number."""
        limits = ", ".join(map(str, self.report.limits))
        most = f": at most {limits} images a split (or frames a sequence)" if limits else ""
        watermark = [f"LIMITED RUN{most}"] if self.report.limited else []
        return [*watermark, *map(_line, left_out(self.report) + arithmetic(self.report))]

    def _reasons(self) -> list[str]:
        warnings = [
            f"WARNING {_line(f'{who}: {first}')}" + (f" (and {len(more)} more in the report)" if more else "")
            for who, (first, *more) in self.report.warnings
        ]
        return warnings + [
            f"FAILED {_line(checkpoint.label)} on {column.task}/{_line(column.data.name)}"
            f"{f' (seed {result.seed})' if len(column.seeds) > 1 else ''}: {_line(reason(result))}"
            for checkpoint, column, result in self.report.failures
        ]

    def _legend(self) -> list[str]:
        marks = {cell.standing for summary in self.summaries for cell in summary}
        meanings = {
            "best": "* best",
            "close": "~ not told apart from the best on the same items",
            "untested": "? not tested against the best; their intervals overlap",
        }
        legend = "; ".join(meaning for standing, meaning in meanings.items() if standing in marks)
        return [
            *(f"CHANGED {_line(fields)}" for fields in changed(self.report)),
            *([legend] if legend else []),
        ]


def _head(column: Column) -> str:
    row = column.headline
    metric = row.id if row else column.first.headline
    chance = f"\nchance {row.chance}" if row and row.chance else ""
    variant = f"\n{_line(column.variant)}" if column.variant else ""
    return f"{_line(column.task)}/{_line(column.data.name)}\n{_line(metric)}{chance}{variant}"


def _cell(cell: Cell) -> str:
    if cell.reading is None:
        return "FAILED" if cell.state == "failed" else "not run"
    mark = {"best": " *", "close": " ~", "untested": " ?", "": ""}[cell.standing]
    many = f" ({cell.seeds} seeds)" if cell.seeds > 1 else ""
    failed = f" ({len(cell.errors)} FAILED)" if cell.state == "partial" else ""
    return f"{cell.reading.text} {cell.reading.interval}".rstrip() + mark + many + failed


def _style(text: str) -> str:
    if "FAILED" in text:
        return "red"
    return "bold" if text.endswith(" *") or " * (" in text else ""


def _line(text: str) -> str:
    return " ".join(clean(text).split())


def _transposed(grid: Grid) -> Grid:
    head, *rows = [list(row) for row in zip(*grid, strict=True)]
    return [["task", *head[1:]], *rows]
