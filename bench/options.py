"""What several commands have in common: options, exit codes, and the command as it was typed.

Nothing that takes time to import stands here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .references import at_home

EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130


class _Folder(click.Path):
    """A folder; an empty name, most often a variable that was not set, is not the working folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("is empty; name a folder, or leave the option out", param, ctx)
        return super().convert(at_home(value), param, ctx)


FOLDER = _Folder(path_type=Path, file_okay=False)

device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
limit_option = click.option(
    "--limit", type=int, help="Quick look: at most N images a split, N frames a video."
)
tasks_option = click.option(
    "--tasks",
    "-t",
    multiple=True,
    default=("all",),
    show_default=True,
    help="Task names, comma-separated, or all.",
)
suite_option = click.option("--suite", help="Suite YAML, or the name of a built-in suite.")
cache_option = click.option(
    "--cache-dir", type=FOLDER, help="Cached features, decoded images, embedded data."
)


def task_names(texts: Sequence[str]) -> list[str]:
    """The names in ``--tasks knn,vos --tasks linear``."""
    return [name.strip() for text in texts for name in text.split(",") if name.strip()]


def debugging(ctx: click.Context) -> bool:
    """Whether ``lmim-bench --debug`` was asked for."""
    return bool(ctx.find_root().params.get("debug"))


def command_line() -> str:
    """This command as it was typed."""
    return shlex.join(["lmim-bench", *sys.argv[1:]])


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, which schedulers send before they kill, does meanwhile what Ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
