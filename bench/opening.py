"""Open the data sets and checkpoints of a plan, so that nothing wrong with them is found hours later."""

from __future__ import annotations

from typing import Any

from .cache import cache_folder, check_usable
from .cells import Cell, by_checkpoint_and_data, wanted_by
from .config import RunConfig
from .errors import ConfigError
from .features import FEATURES_VERSION, bank_bytes, pixels_key
from .names import cell_id, digest
from .plan import Evaluation, RunPlan, left_out_because, open_data
from .progress import Reporter
from .records import checkpoint_record
from .results import CheckpointRecord, result_path, warnings_in
from .room import amount
from .runner import Run
from .types import Dataset, ignored_files


def open_run(plan: RunPlan, reporter: Reporter, command: str, debug: bool = False) -> Run:
    """Open the data sets and read every checkpoint, so that nothing wrong is found hours later.

    Raises:
        LmimBenchError: a checkpoint or data set that cannot be used.
    """
    config = plan.config
    check_usable(cache_folder(config.cache_dir))
    records = {}
    for checkpoint in config.checkpoints:
        record = checkpoint_record(checkpoint.label, checkpoint.reference, cache_folder(config.cache_dir))
        for warning in warnings_in(record.info.notes):
            reporter.line(f"{record.label}: WARNING: {warning}")
        records[checkpoint.label] = record
    left_out = _left_out(plan, reporter)
    data: dict[str, Dataset] = {}
    for name, entry in plan.data.items():
        loaded = open_data(name, entry, config)
        data[name] = loaded.limited(config.limit) if config.limit else loaded
        if loaded.ignored:
            reporter.line(f"{name}: {ignored_files(loaded.ignored)}")
    for evaluation in plan.evaluations:
        if data[evaluation.data].kind != evaluation.task.data:
            raise ConfigError(
                f"the task {evaluation.task.name} needs {evaluation.task.data} data, and "
                f"{evaluation.data!r} is a {data[evaluation.data].kind} set"
            )
    cells = [
        Cell(
            id=cell_id(label, evaluation.task.name, evaluation.data, seed),
            checkpoint=records[label],
            evaluation=evaluation,
            seed=seed,
            digest=digest(_identity(records[label], evaluation, data[evaluation.data], seed, config)),
        )
        for label, evaluation, seed in plan.cells()
        if (label, evaluation.task.name) not in left_out
    ]
    if config.keep_pixels:
        _check_room_for_pixels(cells, data, int(config.cache_size_gb * 1e9))
    return Run(plan, reporter, command, data, cells, debug)


def _check_room_for_pixels(cells: list[Cell], data: dict[str, Dataset], bound: int) -> None:
    """Raise ConfigError where the cache may not hold all pixels beside the features of a checkpoint: the ones
    would drive the others out, and nothing would be won.
    """
    pixels: dict[str, int] = {}
    features: dict[str, int] = {}
    for group in by_checkpoint_and_data(cells):
        checkpoint, seen = group[0].checkpoint, data[group[0].evaluation.data]
        for (split, view), columns in wanted_by(group, checkpoint.spec, seen).items():
            images = len(seen.splits[split])
            pixels[pixels_key(seen, split, view)] = images * view.pixel_bytes
            taken = images * bank_bytes(columns, view, checkpoint.spec)
            features[checkpoint.label] = features.get(checkpoint.label, 0) + taken
    beside = max(features.values(), default=0)
    needed = sum(pixels.values()) + beside
    if needed > bound:
        raise ConfigError(
            f"--keep-pixels needs {amount(needed - beside)} for decoded images beside {amount(beside)} of "
            f"features, and the cache is bounded to {amount(bound)}; raise --cache-size, or leave it out"
        )


def _left_out(plan: RunPlan, reporter: Reporter) -> set[tuple[str, str]]:
    """The (label, task) that do not go together, with a line for each reason.

    Raises:
        ConfigError: nothing is left of a task that was asked for by its name, or of the run.
    """
    tasks = {e.task.name: e.task for e in plan.evaluations}
    checkpoints = plan.config.checkpoints
    reasons = {
        (checkpoint.label, name): reason
        for name, task in tasks.items()
        for checkpoint in checkpoints
        if not _scored_before(plan, checkpoint.label, name)
        and (reason := left_out_because(task, checkpoint.reference)) is not None
    }
    nothing_left = len(reasons) == len(tasks) * len(checkpoints)
    for name in tasks:
        labels: dict[str, list[str]] = {}
        for checkpoint in checkpoints:
            if (checkpoint.label, name) in reasons:
                labels.setdefault(reasons[checkpoint.label, name], []).append(checkpoint.label)
        alone = sum(map(len, labels.values())) == len(checkpoints)
        if alone and (nothing_left or name in plan.config.tasks):
            raise ConfigError(f"{name} can run on no checkpoint of this run: {'; '.join(labels)}")
        for reason, where in labels.items():
            reporter.line(f"{name} is left out for {', '.join(where)}: {reason}")
    return set(reasons)


def _scored_before(plan: RunPlan, label: str, task: str) -> bool:
    """Whether the run folder holds a cell of them: to ask again may take as long as opening the file."""
    return any(
        result_path(plan.out, cell_id(label, task, evaluation.data, seed)).is_file()
        for other, evaluation, seed in plan.cells()
        if (other, evaluation.task.name) == (label, task)
    )


def _identity(
    record: CheckpointRecord, evaluation: Evaluation, data: Dataset, seed: int, config: RunConfig
) -> dict[str, Any]:
    return {
        "encoder": record.fingerprint,
        "task": evaluation.task.name,
        "version": evaluation.task.version,
        "protocol": evaluation.config.model_dump(mode="json"),
        "data": data.fingerprint,
        "seed": seed,
        "limit": config.limit,
        "precision": config.precision,
        "features": FEATURES_VERSION,
    }
