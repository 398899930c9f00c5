"""Errors that a user can mend, and the words that go with them.

Every error of this family ends a command with one line on standard error and exit code 2, without a
traceback (unless ``--debug``). Whatever is not of this family is a bug and keeps its traceback.

    LmimBenchError
    ├── ConfigError       a wrong option, field, suite file or name
    ├── CheckpointError   a checkpoint that cannot be read, is unsafe, or does not fill the encoder
    ├── DataError         a data set that is missing, broken or of the wrong layout
    │   └── UnreadableError   what the system failed to read: nobody knows whether it is broken
    ├── TaskError         a task that cannot be scored on this encoder and data
    │   └── NotFiniteError    features that hold NaN or infinity
    └── TrainingError     a training that cannot go on
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class LmimBenchError(Exception):
    """Base of all errors that a user can mend; its text is the one line that is printed."""


class ConfigError(LmimBenchError):
    """An option, protocol field, suite file or name that is not valid."""


class CheckpointError(LmimBenchError):
    """A checkpoint that cannot be read safely, or that does not fill the encoder completely."""


class DataError(LmimBenchError):
    """A data set that is missing, broken, or laid out in a way that is not known."""


class UnreadableError(DataError):
    """An image or a folder that the system could not read now, so that nobody knows what it holds."""


class TaskError(LmimBenchError):
    """A task that cannot be scored on this encoder and data set."""


class NotFiniteError(TaskError):
    """Features that are not finite."""


class TrainingError(LmimBenchError):
    """A training that cannot go on: its loss is not finite, or there is no room for it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The sentence that names the nearest known name, or the whole list where nothing is near."""
    options = sorted(known)
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if near:
        return f"Did you mean {near[0]!r}?"
    return f"Known: {', '.join(options)}." if options else "None are known."


def said_by_the_system(error: OSError) -> str:
    """What the system says, of which file, in a line."""
    said = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        said += "; where it is to be written, give another --out or --cache-dir"
    return said


def first_line(error: BaseException) -> str:
    """What an error says, in a line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def complaint(error: Exception) -> str:
    """What an error says, in one line: of pydantic's the field and what is wrong with it."""
    from pydantic import ValidationError

    return first_problem(error) if isinstance(error, ValidationError) else first_line(error)


def first_problem(error: ValidationError) -> str:
    """The first complaint of pydantic in one line: the field and what is wrong with it."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")
