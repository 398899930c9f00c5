"""Files that are there whole or not at all, and JSON in them. Imports neither torch nor numpy."""

from __future__ import annotations

import errno
import json
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import BaseModel, ValidationError

from .errors import DataError, complaint

Model = TypeVar("Model", bound=BaseModel)
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says where a disk, or a user's share of it, has no room."""
_REFUSED = (*FULL, errno.EFBIG)
"""And where a file outgrows what one may be: what a write says of no fault of the writer."""


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file that appears under its name only when it was written whole and synced.

    Raises:
        OSError: it cannot be written, the disk has no room for it, or it outgrows a limit, also where what
            writes into it says something else.
    """
    handled = sys.exc_info()[1]  # what the caller is dealing with: no reason of an error in here
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open(mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch.save complains about its own bookkeeping, with what the disk said behind it.
        reason: BaseException | None = error
        while reason not in (None, handled) and getattr(reason, "errno", None) not in _REFUSED:
            reason = reason.__cause__ or reason.__context__
        named = getattr(error, "filename", None)
        if reason in (None, handled) and named in (None, str(temporary)) and getattr(error, "errno", None):
            reason = error  # of no name, as where a file outgrows a limit, or one that nobody gave
        if isinstance(reason, OSError) and reason is not handled:
            raise OSError(reason.errno, reason.strerror, str(path)) from error
        raise


def remove_unfinished(folder: Path) -> None:
    """Delete what writers that were killed left in a folder, into which nobody else may be writing."""
    for path in folder.glob(f".*.{'[0-9a-f]' * 8}.tmp"):
        path.unlink(missing_ok=True)


def write_json(path: Path, payload: Any) -> None:
    """Write JSON atomically, keys in their given order; NaN is refused."""
    with atomic_write(path) as stream:
        json.dump(payload, stream, indent=1, allow_nan=False, ensure_ascii=False)
        stream.write("\n")


def plain_json(value: Any) -> Any:
    """``default`` of ``json.dumps`` for arrays and scalars of numpy."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be kept as JSON")


def read_json(path: Path, model: type[Model]) -> Model:
    """Read a file as a pydantic model. Raises DataError naming the file where it is not a valid one."""
    try:
        return model.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        cut = isinstance(error, ValidationError) and error.errors()[0]["type"] == "json_invalid"
        what = "is damaged" if cut else f"is not a {model.__name__.lower()} of this version"
        raise DataError(f"{path} {what} ({complaint(error)}); delete it or use another --out") from error
