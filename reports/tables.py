"""Scores as tables outside of the page: Markdown and LaTeX of the headline metrics, CSV of everything."""

from __future__ import annotations

import csv
import io

from .model import Cell, Column, Report
from .readings import clean

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{c: "\\" + c for c in "&%$#_{}"},
}
FORMATS = ("md", "latex", "csv")
_COLUMNS = """
    checkpoint task task_version data data_fingerprint seed metric headline value low high n chance unit limit
    status
"""


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


def _grid(report: Report) -> list[list[Cell]]:
    columns = [column.summary() for column in report.summarised]
    return [[cells[checkpoint.index] for cells in columns] for checkpoint in report.checkpoints]


def _head(column: Column) -> tuple[str, str]:
    row = column.headline
    unit = " (%)" if row and row.metric.unit == "%" else ""
    name = f"{column.task} on {column.data.name}" + (f" [{column.variant}]" if column.variant else "")
    return _line(name), _line((row.id if row else column.first.headline) + unit)


def _note(report: Report) -> str:
    limited = ", ".join(map(str, report.limits))
    return f"Limited to {limited} images a split or frames a sequence. " if report.limited else ""


def _markdown(report: Report) -> str:
    heads = [_head(column) for column in report.summarised]
    lines = [
        "| checkpoint | " + " | ".join(f"{_cell(name)}<br>{_cell(metric)}" for name, metric in heads) + " |",
        "|---|" + "---:|" * len(heads),
    ]
    for checkpoint, cells in zip(report.checkpoints, _grid(report), strict=True):
        values = []
        for cell in cells:
            if cell.reading is None:
                values.append("failed" if cell.state == "failed" else "–")
                continue
            text = f"**{cell.reading.text}**" if cell.standing == "best" else cell.reading.text
            values.append(f"{text} {cell.reading.interval}".rstrip())
        lines.append(f"| {_cell(checkpoint.label)} | " + " | ".join(values) + " |")
    lines += ["", f"{_note(report)}95% intervals in brackets; bold: best of the column."]
    return "\n".join(lines) + "\n"


def _latex(report: Report) -> str:
    heads = [_head(column) for column in report.summarised]
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{tabular}{l" + "r" * len(heads) + "}",
        r"\toprule",
        " & ".join(["", *(_tex(name) for name, _ in heads)]) + r" \\",
        " & ".join(["checkpoint", *(_tex(metric) for _, metric in heads)]) + r" \\",
        r"\midrule",
    ]
    for checkpoint, cells in zip(report.checkpoints, _grid(report), strict=True):
        values = []
        for cell in cells:
            if cell.reading is None:
                values.append("failed" if cell.state == "failed" else "--")
                continue
            text = rf"\textbf{{{cell.reading.text}}}" if cell.standing == "best" else cell.reading.text
            interval = rf" {{\scriptsize {cell.reading.interval}}}" if cell.reading.interval else ""
            values.append(text + interval)
        lines.append(" & ".join([_tex(_line(checkpoint.label)), *values]) + r" \\")
    note = f"% {_note(report)}95% intervals in brackets; bold: best of the column."
    lines += [r"\bottomrule", r"\end{tabular}", note]
    return "\n".join(lines) + "\n"


def _csv(report: Report) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_COLUMNS.split())
    for checkpoint in report.checkpoints:
        for column in report.columns:
            for entry in column.cells[checkpoint.index]:
                result = entry.result
                common = [
                    _line(checkpoint.label), result.task, result.task_version, _line(result.data.name),
                    result.data.fingerprint, result.seed,
                ]  # fmt: skip
                limit = "" if result.limit is None else result.limit
                if result.status == "failed":
                    writer.writerow([*common, "", "", "", "", "", "", "", "", limit, "failed"])
                for score in result.scores:
                    unit = result.metrics.get(score.metric.split("@")[0], {}).get("unit", "%")
                    numbers = [score.value, score.low, score.high, score.n, score.chance]
                    shown = ["" if number is None else number for number in numbers]
                    headline = int(score.metric == result.headline)
                    writer.writerow([*common, score.metric, headline, *shown, unit, limit, "ok"])
    return stream.getvalue()


def _line(text: str) -> str:
    return " ".join(clean(text).split())


def _cell(text: str) -> str:
    """Text in a Markdown table: neither a bar nor markup of its own."""
    escaped = _line(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return escaped.replace("`", "\\`").replace("*", "\\*").replace("_", "\\_")


def _tex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
