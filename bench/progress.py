"""Progress of long work: bars with rates and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.progress import Task as RichTask
from rich.text import Text

from .types import Progress

_LINE_EVERY_SECONDS = 10.0


class Reporter:
    """Says what is going on, on standard error; results go to standard output. Each line begins with the
    prefix.
    """

    def __init__(self, console: Console | None = None, prefix: str = "") -> None:
        self.console, self.prefix = console or Console(stderr=True, highlight=False), prefix
        self.interactive = self.console.is_terminal

    def line(self, text: str) -> None:
        """One line of news. The text is data: markup in it is not interpreted."""
        self.console.print(Text(self.prefix + text), soft_wrap=True)

    @contextmanager
    def progress(self, total: int, label: str) -> Iterator[Progress]:
        """A running count up to ``total``."""
        if self.interactive:
            with RichProgress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                _Rate(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            ) as bar:
                task = bar.add_task(label, total=total)
                counter = _Bar(bar, task)
                yield counter
        else:
            lines = _Lines(self, total, label)
            yield lines
            lines.finish()


class _Bar:
    def __init__(self, bar: RichProgress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def advance(self, n: int = 1) -> None:
        self._bar.advance(self._task, n)


class _Lines:
    def __init__(self, reporter: Reporter, total: int, label: str) -> None:
        self._reporter, self._total, self._label = reporter, total, label
        self._started = self._last = time.monotonic()
        self._done = 0

    def advance(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._last >= _LINE_EVERY_SECONDS:
            self._last = now
            rate = self._done / (now - self._started)
            left = (self._total - self._done) / rate
            self._reporter.line(
                f"  {self._label}: {self._done}/{self._total}, {rate:.1f}/s, {left:.0f} s left"
            )

    def finish(self) -> None:
        seconds = time.monotonic() - self._started
        if seconds >= 1:
            self._reporter.line(
                f"  {self._label}: {self._done} in {seconds:.1f} s ({self._done / seconds:.1f}/s)"
            )


class _Rate(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "-/s", style="dim")
