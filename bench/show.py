"""What the commands print: plans and tables, as text that is never interpreted as markup."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .types import Step, TaskSpec

if TYPE_CHECKING:
    from ..pretrain.recipe import Recipe
    from .doctor import Check
    from .runner import Run

_MARKS = {"pass": "green", "warn": "yellow", "fail": "bold red"}
_PIPE_WIDTH = 200


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    """A table on standard output, wrapped to the terminal."""
    _print(_table(columns, rows, title), _PIPE_WIDTH)


def print_records(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Rows of long texts: a table, each row on one line; on a terminal too narrow for it a block a row."""
    table = _table(columns, rows)
    console = Console()
    if console.is_terminal and _natural_width(table, console) > console.width:
        print_sections({str(row[0]): dict(zip(columns[1:], row[1:], strict=True)) for row in rows})
    else:
        _print(table)


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> Table:
    table = Table(title=Text(title) if title else None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name)
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row))
    return table


def print_checks(checks: Sequence[Check]) -> None:
    """The findings of the doctor, one a row: the mark as a word, what was looked at, what was found."""
    grid, above = _grid(marked=True), ""
    for check in checks:
        found = f"{check.found} -> {check.mend}" if check.mend else check.found
        name = f"{check.area} {check.name}"
        # On a terminal a name stands once for all its findings; in a pipe each line says all by itself.
        shown = "" if name == above and Console().is_terminal else name
        grid.add_row(Text(check.status, style=_MARKS[check.status]), Text(shown), Text(found))
        above = name
    _print(grid)
    counts = {mark: sum(check.status == mark for check in checks) for mark in _MARKS}
    print_line(", ".join(f"{count} {mark}" for mark, count in counts.items()))


def print_sections(sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Groups of named values under titles, all values in one column; what is empty is left out."""
    grid = _grid()
    for title, fields in sections.items():
        rows = [(name, lines) for name, value in fields.items() if (lines := _lines(value))]
        if not rows:
            continue
        grid.add_row(Text(title, style="bold"), Text(""))
        for name, lines in rows:
            for i, line in enumerate(lines):
                grid.add_row(Text(f"  {'' if i else name}"), Text(line))
    _print(grid)


def _grid(marked: bool = False) -> Table:
    """Columns without a frame: where asked one of marks, one of names, and one of text. A long name leaves
    most of a terminal to the text.
    """
    console = Console()
    grid = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    if marked:
        grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold", max_width=console.width // 3 if console.is_terminal else None)
    grid.add_column(overflow="fold")
    return grid


def _print(table: Table, pipe_width: int | None = None) -> None:
    """Print at the terminal's width; in a pipe or file at the given one, or else as wide as the lines are."""
    console = Console()
    if console.is_terminal:
        console.print(table)
        return
    lines = io.StringIO()
    width = pipe_width or max(1, _natural_width(table, console))
    Console(file=lines, width=width).print(table)
    print("\n".join(line.rstrip() for line in lines.getvalue().splitlines()))


def _natural_width(table: Table, console: Console) -> int:
    return console.measure(table, options=console.options.update(max_width=1_000_000)).maximum


def print_plan(opened: Run) -> None:
    """What a run would do: its cells, the fields that differ from the defaults, the data."""
    pending = {cell.id for cell in opened.pending()}
    rows = []
    for cell in opened.cells:
        protocol = cell.evaluation.config.model_dump(mode="json")
        changed = ", ".join(f"{name}={protocol[name]}" for name in cell.evaluation.overrides)
        state = "to do" if cell.id in pending else "scored"
        rows.append(
            (
                cell.checkpoint.label,
                cell.evaluation.task.name,
                cell.evaluation.data,
                cell.seed,
                changed,
                state,
            )
        )
    columns = ("checkpoint", "task", "data", "seed", "changed from the defaults", "state")
    print_table(columns, rows, f"plan for {opened.plan.out} on {opened.device}")
    for name, data in opened.data.items():
        counts = ", ".join(f"{split} {n}" for split, n in data.counts().items())
        print_line(f"{name}: {data.kind}, {counts}, {data.path or 'embedded'}")
    for note in opened.plan.notes:
        print_line(note)
    print_line(f"{len(pending)} of {len(opened.cells)} cells to do")


def print_estimate(steps: Sequence[Step], resident: int, free: int) -> None:
    """What a plan will take, step by step and in all, and whether the cache's disk has the room.

    Args:
        steps: of ``estimate``.
        resident: bytes that the process holds with an encoder loaded.
        free: bytes that the disk of the cache has free.
    """
    rows = [
        (
            step.checkpoint,
            step.what,
            f"{step.images:,}" if step.images else "",
            "not known" if step.seconds is None else duration(step.seconds),
            _size(step.memory),
            _size(step.disk),
        )
        for step in steps
    ]
    columns = ("checkpoint", "step", "images encoded", "time", "memory", "new in the cache")
    print_table(columns, rows, "estimate, for this machine")
    known = [step.seconds for step in steps if step.seconds is not None]
    memory = resident + max(step.memory or 0 for step in steps)
    disk = sum(step.disk for step in steps)
    unknown = f", and {len(steps) - len(known)} steps of unknown time" if len(known) < len(steps) else ""
    room = f"; {_size(disk)} in the cache" if disk else ""
    print_line(f"about {duration(sum(known))}{unknown}; {_size(memory)} of memory{room}")
    if disk > free:
        print_line(
            f"WARNING  the disk of the cache has {_size(free) or 'nothing'} free: free some, or give "
            "--cache-dir on a larger one"
        )
    for step in steps:
        if step.failure:
            print_line(f"{step.checkpoint}: {step.what} will fail: {step.failure}")


def duration(seconds: float) -> str:
    """In the unit that a reader would choose: ``0.4 s``, ``38 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def _size(count: float | None) -> str:
    if not count:
        return ""
    if count < 9.995e5:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.0f} MB" if count < 9.995e8 else f"{count / 1e9:,.1f} GB"


def print_protocol(spec: TaskSpec) -> None:
    """A task's documentation and every field of its protocol with its default."""
    print_line(spec.doc)
    defaults = spec.config().model_dump(mode="json")
    rows = [(name, defaults[name], f.description or "") for name, f in spec.config.model_fields.items()]
    print_table(("field", "default", "meaning"), rows, f"--set {spec.name}.FIELD=VALUE")


def print_recipe(recipe: Recipe, cost: str) -> None:
    """Every field of a recipe with its value and meaning; a star marks what differs from the defaults."""
    defaults = type(recipe)()
    print_line(f"{recipe.name}: {recipe.about}")
    changed = "*" if recipe.seed != defaults.seed else ""
    rows = [("seed", recipe.seed, changed, "of weights, order, crops and masks")]
    for section, model in recipe:
        if not isinstance(model, BaseModel):
            continue
        for name, field in type(model).model_fields.items():
            value = getattr(model, name)
            changed = "*" if value != getattr(getattr(defaults, section), name) else ""
            rows.append((f"{section}.{name}", value, changed, field.description or ""))
    print_table(("field", "value", "", "meaning"), rows, "--set FIELD=VALUE; *: not the default")
    print_line(cost)


def print_fields(fields: dict[str, Any]) -> None:
    """Names and values, one line each; mappings and lists of words take a line an entry."""
    for name, value in fields.items():
        lines = _lines(value) or ["-"]
        for i, line in enumerate(lines):
            print_line(f"{'' if i else name:<16} {line}")


def print_line(text: str) -> None:
    """A line of plain text, never wrapped."""
    Console(soft_wrap=True).print(Text(text))


def _lines(value: Any) -> list[str]:
    if value is None or value == "" or value == []:
        return []
    if isinstance(value, dict):
        return [f"{key}: {item}" for key, item in value.items()]
    if isinstance(value, list | tuple) and not all(isinstance(item, int | float) for item in value):
        return [str(item) for item in value]
    return [str(value)]
