"""What the commands print: plans and tables, as text that is never interpreted as markup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .types import TaskSpec


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    """A table on standard output."""
    table = Table(title=Text(title) if title else None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name)
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row))
    console = Console()
    # A pipe or file has no width to fit into.
    (console if console.is_terminal else Console(width=200)).print(table)


def print_plan(opened: Any) -> None:
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


def print_protocol(spec: TaskSpec) -> None:
    """A task's documentation and every field of its protocol with its default."""
    print_line(spec.doc)
    defaults = spec.config().model_dump(mode="json")
    rows = [(name, defaults[name], f.description or "") for name, f in spec.config.model_fields.items()]
    print_table(("field", "default", "meaning"), rows, f"--set {spec.name}.FIELD=VALUE")


def print_recipe(recipe: Any, cost: str) -> None:
    """Every field of a recipe with its value and meaning; a star marks what differs from the defaults."""
    defaults = type(recipe)()
    print_line(f"{recipe.name}: {recipe.about}")
    rows = []
    for section, model in recipe:
        if not isinstance(model, BaseModel):
            continue
        for name, field in type(model).model_fields.items():
            value = getattr(model, name)
            changed = "*" if value != getattr(getattr(defaults, section), name) else ""
            rows.append((f"{section}.{name}", value, changed, field.description or ""))
    print_table(("field", "value", "", "meaning"), rows, "--set SECTION.FIELD=VALUE")
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
    if value is None or value == "":
        return []
    if isinstance(value, dict):
        return [f"{key}: {item}" for key, item in value.items()]
    if isinstance(value, list | tuple) and not all(isinstance(item, int | float) for item in value):
        return [str(item) for item in value]
    return [str(value)]
