"""Scores as tables outside of the page: Markdown and LaTeX of the headline metrics, CSV of everything."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence

from ..bench.results import Result
from .model import Cell, Column, Report
from .readings import clean, show
from .remarks import arithmetic, changed, left_out

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    # A row that begins with a bracket would hand it to the end of the row above.
    "[": "{[}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    **{c: "\\" + c for c in "&%$#_{}"},
}
_LATIN_1 = "\xff"
FORMATS = ("md", "latex", "csv")
_COLUMNS = """
    checkpoint task task_version protocol changed data data_fingerprint broken_left_out seed metric headline
    value low high n chance unit limit precision device status
"""


Grid = Sequence[Sequence[Cell]]
"""The cells of the summary, a row a checkpoint."""


def write_table(report: Report, form: str) -> str:
    """The table of a report as text, with a line's end at its end.

    Args:
        report: what to write.
        form: ``md``, ``latex`` (booktabs) or ``csv``. The first two have a row a checkpoint and a column a
            task, each value with its 95% interval, the best in bold; CSV a row for every metric and seed.

    Raises:
        ValueError: the form is none of these.
    """
    if form == "csv":
        return _csv(report)
    if form == "md":
        return _markdown(report)
    if form == "latex":
        return _latex(report)
    raise ValueError(f"there is no table format {form!r}; known: {', '.join(FORMATS)}")


def _grid(report: Report) -> Grid:
    columns = [column.summary() for column in report.summarised]
    return [[cells[checkpoint.index] for cells in columns] for checkpoint in report.checkpoints]


def _head(column: Column) -> tuple[str, str]:
    row = column.headline
    unit = " (%)" if column.metric.unit == "%" else ""
    better = "" if column.metric.higher_is_better else ", lower is better"
    return _line(column.name), _line((row.id if row else column.first.headline) + unit + better)


def _note(report: Report, grid: Grid) -> str:
    """What holds for the whole table, as one line of sentences."""
    sentences = []
    if report.limited:
        limits = ", ".join(map(str, report.limits))
        sentences.append(f"Limited to {limits} images a split or frames a sequence")
    if fields := changed(report):
        sentences.append(f"Changed from the defaults: {'; '.join(fields)}")
    sentences += left_out(report) + arithmetic(report)
    if (seeds := _common_seeds(grid)) and seeds > 1:
        sentences.append(f"Means of {seeds} seeds")
    bold = "; bold: best of the column" if any(c.standing == "best" for cells in grid for c in cells) else ""
    sentences.append(f"95% intervals in brackets{bold}")
    return " ".join(f"{_line(sentence)}." for sentence in sentences)


def _common_seeds(grid: Grid) -> int | None:
    """The number of seeds behind every cell; None where cells differ, or none has a value."""
    found = {cell.seeds for cells in grid for cell in cells if cell.reading}
    return found.pop() if len(found) == 1 else None


def _seeds(cell: Cell, grid: Grid) -> str:
    """How many seeds a cell stands for, where another of the table stands for fewer or more."""
    return f" ({cell.seeds} seeds)" if cell.seeds > 1 and _common_seeds(grid) is None else ""


def _markdown(report: Report) -> str:
    grid = _grid(report)
    heads = [_head(column) for column in report.summarised]
    lines = [
        "| checkpoint | " + " | ".join(f"{_cell(name)}<br>{_cell(metric)}" for name, metric in heads) + " |",
        "|---|" + "---:|" * len(heads),
    ]
    for checkpoint, cells in zip(report.checkpoints, grid, strict=True):
        values = []
        for cell in cells:
            if cell.reading is None:
                values.append("failed" if cell.state == "failed" else "–")
                continue
            text = f"**{cell.reading.text}**" if cell.standing == "best" else cell.reading.text
            values.append(f"{text} {cell.reading.interval}".rstrip() + _seeds(cell, grid))
        lines.append(f"| {_cell(checkpoint.label)} | " + " | ".join(values) + " |")
    lines += ["", _cell(_note(report, grid))]
    return "\n".join(lines) + "\n"


def _latex(report: Report) -> str:
    grid = _grid(report)
    heads = [_head(column) for column in report.summarised]
    lines = [
        r"\begin{tabular}{l" + "r" * len(heads) + "}",
        r"\toprule",
        " & ".join(["", *(_tex(name) for name, _ in heads)]) + r" \\",
        " & ".join(["checkpoint", *(_tex(metric) for _, metric in heads)]) + r" \\",
        r"\midrule",
    ]
    for checkpoint, cells in zip(report.checkpoints, grid, strict=True):
        values = []
        for cell in cells:
            if cell.reading is None:
                values.append("failed" if cell.state == "failed" else "--")
                continue
            text = rf"\textbf{{{cell.reading.text}}}" if cell.standing == "best" else cell.reading.text
            interval = rf" {{\scriptsize {cell.reading.interval}}}" if cell.reading.interval else ""
            values.append(text + interval + _seeds(cell, grid))
        lines.append(" & ".join([_tex(_line(checkpoint.label)), *values]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", f"% {_note(report, grid)}"]
    text = "\n".join(lines)
    engine = "" if max(text) <= _LATIN_1 else "; lualatex or xelatex, and a font that has all its letters"
    return f"% needs \\usepackage{{booktabs}}{engine}\n{text}\n"


def _csv(report: Report) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_COLUMNS.split())
    for checkpoint in report.checkpoints:
        for column in report.columns:
            for entry in column.cells[checkpoint.index]:
                result = entry.result
                common = [
                    _line(checkpoint.label), result.task, result.task_version, _protocol(result),
                    _line(_changed(result)), _line(result.data.name), result.data.fingerprint,
                    len(result.data.skipped), result.seed,
                ]  # fmt: skip
                limit = "" if result.limit is None else result.limit
                machine = [result.environment.precision, _line(result.environment.device)]
                if result.status == "failed":
                    writer.writerow([*common, *[""] * 8, limit, *machine, "failed"])
                for score in result.scores:
                    unit = result.metrics.get(score.metric.split("@")[0], {}).get("unit", "%")
                    numbers = [score.value, score.low, score.high, score.n, score.chance]
                    shown = ["" if number is None else number for number in numbers]
                    headline = int(score.metric == result.headline)
                    writer.writerow([*common, score.metric, headline, *shown, unit, limit, *machine, "ok"])
    return stream.getvalue()


def _protocol(result: Result) -> str:
    """A mark that rows share where every field of their protocols agrees, changed or not."""
    return hashlib.sha256(json.dumps(result.protocol, sort_keys=True).encode()).hexdigest()[:12]


def _changed(result: Result) -> str:
    return "; ".join(f"{name}={show(result.protocol.get(name))}" for name in result.overrides)


def _line(text: str) -> str:
    return " ".join(clean(text).split())


def _cell(text: str) -> str:
    """Text in a Markdown table: neither a bar nor markup of its own."""
    escaped = _line(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return escaped.replace("`", "\\`").replace("*", "\\*").replace("_", "\\_")


def _tex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
