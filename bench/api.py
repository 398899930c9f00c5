"""The Python API: the same run as on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .atomic import atomic_write
from .config import CheckpointConfig, RunConfig, RunOptions, validate
from .errors import ConfigError
from .plan import RunPlan, make_plan
from .progress import Reporter
from .results import RunFile

if TYPE_CHECKING:
    from typing_extensions import Unpack


def run(
    ckpt: str | Path | Sequence[str | Path] | Mapping[str, str | Path] | None = None,
    *,
    config: RunConfig | None = None,
    reporter: Reporter | None = None,
    command: str = "lmim_bench.run(...)",
    debug: bool = False,
    **options: Unpack[RunOptions],
) -> RunFile:
    """Score checkpoints and write a run folder with its report.

    Args:
        ckpt: one checkpoint, several, or label -> checkpoint; as ``--ckpt`` takes them.
        config: everything at once, instead of ``ckpt`` and ``options``.
        reporter: where progress goes; standard error unless given.
        command: recorded in the result file.
        debug: let an unexpected error of a task through, with its traceback.
        **options: the fields of ``RunConfig``: tasks, suite, data, overrides, out, limit, device, ...

    Returns:
        The unified result of the run folder; failed cells have ``status == "failed"``.

    Raises:
        LmimBenchError: an option, checkpoint or data set that cannot be used.
    """
    if config is not None and (ckpt is not None or options):
        given = ", ".join([*(["ckpt"] if ckpt is not None else []), *options])
        raise ConfigError(f"config holds everything at once: {given} beside it would have no effect")
    plan = make_plan(make_config(ckpt, **options) if config is None else config)
    return run_plan(plan, reporter or Reporter(), command, debug)


def run_plan(plan: RunPlan, reporter: Reporter, command: str, debug: bool = False) -> RunFile:
    """``run`` of a plan. Raises as it does."""
    from .opening import open_run

    for note in plan.notes:
        reporter.line(note)
    return open_run(plan, reporter, command, debug).execute(_report)


def _report(out: Path) -> None:
    """``results.csv`` for a spreadsheet, and ``report.html``."""
    from ..reports.html import build_report
    from ..reports.model import read_report
    from ..reports.tables import write_table

    with atomic_write(out / "results.csv") as stream:
        stream.write(write_table(read_report([out]), "csv"))
    build_report(out, keep_current=True)


def make_config(
    ckpt: str | Path | Sequence[str | Path] | Mapping[str, str | Path] | None = None,
    **options: Unpack[RunOptions],
) -> RunConfig:
    """The validated configuration of a run.

    Raises:
        ConfigError: an unknown option or a wrong value, named.
    """
    if ckpt is None:
        checkpoints: list[CheckpointConfig] = []
    elif isinstance(ckpt, Mapping):
        checkpoints = [
            validate(CheckpointConfig, {"label": label, "reference": str(ref)}, "ckpt")
            for label, ref in ckpt.items()
        ]
    else:
        listed = [ckpt] if isinstance(ckpt, str | Path) else list(ckpt)
        checkpoints = [CheckpointConfig.parse(str(one)) for one in listed]
    return validate(RunConfig, {"checkpoints": checkpoints, **options}, "")
