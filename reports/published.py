"""Numbers that others publish, to stand beside measured ones: each with its source and its setting."""

from __future__ import annotations

from importlib.resources import files

import yaml
from pydantic import Field, TypeAdapter

from ..bench.types import Frozen
from .model import Report


class Published(Frozen):
    """One published number.

    Attributes:
        method, arch: what was trained.
        task: the task whose headline it is nearest to.
        data: the data set.
        value: a fraction.
        source: repository, commit and file that it was read in.
        setting: what its authors say of how it came about.
        note: what keeps it from being compared with a measured number, or nothing.
    """

    method: str
    arch: str
    task: str
    data: str = "ImageNet-1K"
    value: float = Field(gt=0, lt=1)
    source: str = Field(pattern=r" @[0-9a-f]{7}")
    setting: str
    note: str = ""


def published() -> tuple[Published, ...]:
    """All published numbers that are kept here, each read first-hand in its authors' repository."""
    text = (files(__package__) / "published.yaml").read_text(encoding="utf-8")
    return tuple(TypeAdapter(list[Published]).validate_python(yaml.safe_load(text)))


def published_for(report: Report) -> tuple[Published, ...]:
    """Those for the tasks of a report, in the order of its tasks, the highest first."""
    order = list(report.tasks)
    rows = [row for row in published() if row.task in order]
    return tuple(sorted(rows, key=lambda row: (order.index(row.task), -row.value)))
