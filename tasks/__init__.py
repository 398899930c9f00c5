"""The task registry. A task is one file here, or an entry point ``lmim_bench.tasks`` of any package."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from ..bench.errors import ConfigError, did_you_mean, first_line
from ..bench.types import (
    Context,
    DataKind,
    Dataset,
    EncoderSpec,
    FeatureRequest,
    Frozen,
    Measurement,
    Metric,
    TaskSpec,
    Work,
)

ENTRY_POINT_GROUP = "lmim_bench.tasks"
_BUILT_IN = ("knn", "linear", "unsup_seg", "vos", "few_shot", "diagnose")


def _no_features(config: Any, spec: EncoderSpec, data: Dataset) -> Sequence[FeatureRequest]:
    return ()


def task(
    name: str,
    *,
    version: int,
    title: str,
    data: DataKind,
    config: type[Frozen],
    metrics: Sequence[Metric],
    headline: Callable[[Any], str],
    features: Callable[[Any, EncoderSpec, Dataset], Sequence[FeatureRequest]] = _no_features,
    scored: bool = True,
    applies: Callable[[str], str | None] = lambda reference: None,
    work: Callable[[Any, EncoderSpec, Dataset], Work] | None = None,
) -> Callable[[Callable[[Context, Any], Sequence[Measurement]]], TaskSpec]:
    """Declare a task. The decorated function takes (context, config) and returns measurements.

    Args:
        name: how the task is called on the command line.
        version: raise it whenever the numbers change for the same protocol.
        title: a few words for tables and the report.
        data: the kind of data set that the task runs on.
        config: frozen pydantic model; every field is a protocol constant with a description.
        metrics: the metric families that the task returns.
        headline: from the config to the one metric id that stands for the task.
        features: from (config, encoder spec, data set) to what must be extracted before the task runs.
        scored: False for a diagnosis, which no summary, ranking or comparison counts as a score.
        applies: from the reference of a checkpoint to the reason why the task says nothing about it, or
            None; a run leaves such cells out and says so.
        work: from (config, encoder spec, data set) to what the task costs, for the estimate of ``run
            --dry-run``; without it a plan says that the time of the task is not known.

    Raises:
        ValueError: a name that no option could hold, fields without defaults, or a headline that is not
            among the metrics.
    """

    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"a task cannot be called {name!r}: letters, digits, - and _ are allowed")
    try:
        standing = headline(config())
    except Exception as error:
        raise ValueError(
            f"the headline of {name} does not follow from its defaults ({first_line(error)}); every field of "
            f"{config.__name__} needs one"
        ) from error
    if standing.split("@")[0] not in {metric.id for metric in metrics}:
        raise ValueError(f"{name} does not declare its headline {standing!r} among its metrics")

    def register(function: Callable[[Context, Any], Sequence[Measurement]]) -> TaskSpec:
        doc = inspect.getdoc(inspect.getmodule(function)) or inspect.getdoc(function) or ""
        return TaskSpec(
            name,
            version,
            title,
            data,
            config,
            tuple(metrics),
            headline,
            features,
            function,
            scored,
            doc,
            applies=applies,
            work=work,
        )

    return register


@cache
def registry() -> tuple[dict[str, TaskSpec], dict[str, str]]:
    """All tasks by name, and the plug-ins that failed to load with the reason.

    Raises:
        ConfigError: two packages supply a task of the same name.
    """
    from .. import __version__

    found: dict[str, TaskSpec] = {}
    broken: dict[str, str] = {}
    for name in _BUILT_IN:
        spec: TaskSpec = import_module(f".{name}", __name__).TASK
        found[spec.name] = replace(spec, origin=f"lmim-bench {__version__}")
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        supplier = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
        try:
            loaded: Any = entry.load()
        except Exception as error:  # noqa: BLE001 - a broken plug-in is reported by name, others still run
            broken[entry.name] = f"{supplier}: {type(error).__name__}: {first_line(error)}"
            continue
        if not isinstance(loaded, TaskSpec):
            broken[entry.name] = f"{supplier}: {entry.value} is not a task (use the @task decorator)"
            continue
        if loaded.name in found:
            raise ConfigError(
                f"two packages supply the task {loaded.name!r}: {found[loaded.name].origin} and {supplier}; "
                "uninstall one of them"
            )
        found[loaded.name] = replace(loaded, origin=supplier)
    return found, broken


def get_task(name: str) -> TaskSpec:
    """The task of that name. Raises ConfigError with the nearest known name."""
    tasks, broken = registry()
    if name in tasks:
        return tasks[name]
    if name in broken:
        raise ConfigError(f"the task {name!r} could not be loaded: {broken[name]}")
    raise ConfigError(f"there is no task {name!r}. {did_you_mean(name, tasks)}")
