"""From what was asked to what will be done: tasks, protocols, data sets and cells, resolved and checked.

Nothing here loads a checkpoint or an image: a wrong name or field is refused before any work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tasks import get_task, registry
from .cache import cache_folder
from .config import (
    DEFAULT_SUITE,
    DataConfig,
    RunConfig,
    Suite,
    coerce,
    load_suite,
    validate,
)
from .errors import ConfigError, LmimBenchError, TaskError, did_you_mean, first_line
from .names import cell_id, slug
from .references import at_home
from .types import DataKind, Dataset, Frozen, TaskSpec

if TYPE_CHECKING:
    from .data import Detected


@dataclass(frozen=True)
class Evaluation:
    """A task with its protocol on one data set; a cell is an evaluation of a checkpoint with a seed."""

    task: TaskSpec
    data: str
    config: Frozen
    overrides: tuple[str, ...]
    """The protocol fields that differ from the task's defaults."""


@dataclass(frozen=True)
class RunPlan:
    """Everything chosen, nothing done."""

    config: RunConfig
    out: Path
    data: Mapping[str, DataConfig]
    evaluations: tuple[Evaluation, ...]
    notes: tuple[str, ...] = ()
    """What a user should know before the work starts."""

    def cells(self) -> list[tuple[str, Evaluation, int]]:
        """(checkpoint label, evaluation, seed), in the order in which they run."""
        return [
            (checkpoint.label, evaluation, seed)
            for checkpoint in self.config.checkpoints
            for evaluation in self.evaluations
            for seed in dict.fromkeys(self.config.seeds)
        ]

    def cell_ids(self) -> set[str]:
        """The names of these cells."""
        return {cell_id(label, e.task.name, e.data, seed) for label, e, seed in self.cells()}


def make_plan(config: RunConfig, suite: Suite | None = None) -> RunPlan:
    """Resolve tasks, data sets and protocol fields of a run.

    Args:
        config: what was asked for.
        suite: to be used in the place of the one that it names.

    Raises:
        ConfigError: an unknown task, field, suite or data set, or a task without data.
    """
    from .data import detect_layout, is_embedded

    _check_overrides(config.overrides)
    if suite is None and config.suite:
        suite = load_suite(config.suite)
    fallback = load_suite(DEFAULT_SUITE)
    data: dict[str, DataConfig] = dict(suite.data) if suite else {}
    named: dict[str, tuple[DataKind, Suite | None]] = {}  # data set of --data -> kind, suite of its protocol
    for reference in dict.fromkeys(config.data):
        kind = detect_layout(reference).kind
        name = _unique(_data_name(reference), data)
        data[name] = DataConfig(path=reference, kind=kind)
        named[name] = (kind, fallback if is_embedded(reference) else suite)
    evaluations = []
    for name in suite.tasks if suite else ():
        get_task(name)  # one that there is not is refused, whichever tasks are chosen
    tasks = _selected(config.tasks, suite)
    for name in config.overrides:
        if name not in {task.name for task in tasks}:
            raise ConfigError(f"--set {name}.…: the run has no task {name!r}; add it to --tasks")
    for name, (kind, _) in named.items():
        if kind not in {task.data for task in tasks}:
            chosen = ", ".join(f"{task.name} ({task.data})" for task in tasks)
            raise ConfigError(f"{name} is a {kind} set, and none of the chosen tasks takes one: {chosen}")
    notes = []
    for task in tasks:
        for source, names in _data_of(task, suite, named, fallback):
            protocol = source.tasks[task.name].protocol if source and task.name in source.tasks else {}
            if source is fallback and (suite or named) and not set(names) & set(named):
                embedded = ", ".join(names)
                notes.append(f"no {task.data} data is named: {task.name} runs on the embedded {embedded}")
            for name in names:
                if source is fallback:
                    data.setdefault(name, fallback.data[name])
                evaluations.append(_evaluation(task, name, protocol, config.overrides.get(task.name, {})))
    used = {e.data for e in evaluations}
    return RunPlan(
        config=config,
        out=run_folder(config),
        data={name: entry for name, entry in data.items() if name in used},
        evaluations=tuple(evaluations),
        notes=tuple(notes),
    )


def _selected(names: tuple[str, ...], suite: Suite | None) -> list[TaskSpec]:
    chosen: dict[str, TaskSpec] = {}
    for name in names:
        everything = list(suite.tasks) if suite and suite.tasks else list(registry()[0])
        for one in everything if name == "all" else [name]:
            chosen[one] = get_task(one)
    if not chosen:
        raise ConfigError("no task is named; use --tasks all, or names from `lmim-bench tasks`")
    return list(chosen.values())


def _data_of(
    task: TaskSpec, suite: Suite | None, named: Mapping[str, tuple[DataKind, Suite | None]], fallback: Suite
) -> list[tuple[Suite | None, tuple[str, ...]]]:
    """The data sets of a task, each with the suite whose protocol fields hold there."""
    found: list[tuple[Suite | None, tuple[str, ...]]] = []
    if suite:
        if task.name in suite.tasks and suite.tasks[task.name].data:
            found.append((suite, tuple(dict.fromkeys(suite.tasks[task.name].data))))
        else:
            kinds = {name: _kind(entry) for name, entry in suite.data.items()}
            fitting = tuple(name for name, kind in kinds.items() if kind == task.data)
            found += [(suite, fitting)] if fitting else []
    found += [(source, (name,)) for name, (kind, source) in named.items() if kind == task.data]
    if found:
        return found
    if task.name in fallback.tasks:
        return [(fallback, fallback.tasks[task.name].data)]
    return [(fallback, tuple(name for name, entry in fallback.data.items() if entry.kind == task.data))]


def _kind(entry: DataConfig) -> DataKind:
    """What a data set of a suite is: as it says, else by its layout."""
    return entry.kind or layout_of(entry).kind


def layout_of(entry: DataConfig) -> Detected:
    """The layout that an entry gives, else the one that its folder has. Raises DataError as they do."""
    from .data import detect_layout, given_layout

    return given_layout(entry.layout) if entry.layout else detect_layout(entry.path)


def _evaluation(
    task: TaskSpec, data: str, protocol: Mapping[str, Any], overrides: Mapping[str, Any]
) -> Evaluation:
    fields = dict(protocol)
    for field, raw in overrides.items():
        fields[field] = coerce(task.config, field, raw)
    config = validate(task.config, fields, task.name)
    defaults = task.config()
    changed = [name for name in task.config.model_fields if getattr(config, name) != getattr(defaults, name)]
    return Evaluation(task, data, config, tuple(changed))


def _check_overrides(overrides: Mapping[str, Mapping[str, Any]]) -> None:
    for name, fields in overrides.items():
        known = get_task(name).config.model_fields
        for field in fields:
            if field not in known:
                raise ConfigError(f"{name} has no field {field!r}. {did_you_mean(field, known)}")


def _data_name(reference: str) -> str:
    scheme, _, rest = reference.partition(":")
    if scheme == "torchvision":
        return rest.split(":")[0]
    folder = at_home(reference)
    return folder.resolve().name if folder.exists() else reference


def _unique(name: str, taken: Mapping[str, Any]) -> str:
    candidate, n = name, 2
    while candidate in taken:
        candidate, n = f"{name}-{n}", n + 1
    return candidate


def open_data(name: str, entry: DataConfig, config: RunConfig) -> Dataset:
    """A data set of a plan, whole. Raises DataError as ``load_data`` does."""
    from .data import load_data

    return load_data(
        entry.path,
        name=name,
        kind=entry.kind,
        layout=entry.layout,
        train=entry.train,
        test=entry.test,
        void=entry.void,
        classes=entry.classes,
        download=config.download,
        cache_dir=cache_folder(config.cache_dir),
    )


def left_out_because(task: TaskSpec, reference: str) -> str | None:
    """Why a task says nothing about a checkpoint, or None. Raises TaskError where it fails to answer."""
    try:
        return task.applies(reference)
    except LmimBenchError:
        raise
    except Exception as error:
        raise TaskError(
            f"the task {task.name} of {task.origin} failed when it was asked whether it applies to "
            f"{reference}: {type(error).__name__}: {first_line(error)}; mend it, or name other --tasks"
        ) from error


def run_folder(config: RunConfig) -> Path:
    """Where a run is written: as asked, else below ``runs/`` by the labels of its checkpoints."""
    return config.out or Path("runs") / slug("+".join(c.label for c in config.checkpoints))
