"""The cache folder: where it is, what is in it, how it is cleared."""

from __future__ import annotations

import os
import platform
import re
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .errors import ConfigError
from .references import at_home

_KEY = "[0-9a-f]{32}"
_PARTS = {
    "features": _KEY,
    "manifests": rf"{_KEY}-.+\.json",
    "pixels": rf"{_KEY}(-broken\.json)?|\.lock|\.{_KEY}(-broken\.json)?\.lock",
    "records": rf"{_KEY}\.json",
    "scenes": r"scenes(-seg|-video)?|complete\.json",
    "torchvision": ".+",
}
"""The names of what lies in each part. A cache folder may be one that its user keeps other things in."""
_HALF_WRITTEN = r"\..+\.[0-9a-f]{8}\.tmp"
PARTS = tuple(_PARTS)
"""What this program keeps: a folder for each, one a version for the scenes."""
_FETCHED = "torchvision"
"""The one part that cannot be worked out again: it goes only where it is named."""
_STAGING = re.compile(r"\..+\.(?P<host>[^.]+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp")
_LONGEST_SILENCE = 86_400.0
_NAMED = 3
"""Files of others in the folder of a part of which each is named."""


def cache_folder(chosen: Path | None = None) -> Path:
    """The folder given, else ``$LMIM_BENCH_CACHE``, else the user's cache folder of the platform."""
    if chosen:
        return chosen
    if os.environ.get("LMIM_BENCH_CACHE"):
        return at_home(os.environ["LMIM_BENCH_CACHE"])
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("lmim-bench"))


def check_usable(root: Path) -> None:
    """Make a cache folder where there is none. Raises ConfigError where that cannot be done; one that may
    only be read is left to those who write.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the cache folder {root} cannot be made ({error.strerror}); give another --cache-dir"
        ) from error


# ------------------------------------------------------------------------------------------- staging


def staging(folder: Path) -> Path:
    """A new, empty folder beside ``folder``, to be filled and then renamed to it.

    No other process has its name, and ``clear_stale`` leaves it alone while its process lives.
    """
    made = folder.parent / f".{folder.name}.{_here()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    made.mkdir(parents=True)
    return made


def clear_stale(root: Path) -> None:
    """Delete what ``staging`` made and nobody will finish.

    That is known of processes of this host that are gone. Others may share the cache: of their folders those
    go that nothing was written to for a day.
    """
    for half in root.glob(".*.tmp"):
        made = _STAGING.fullmatch(half.name)
        if made is None:
            continue
        gone = made["host"] == _here() and not _alive(int(made["pid"]))
        if gone or time.time() - _last_written(half) > _LONGEST_SILENCE:
            shutil.rmtree(half, ignore_errors=True)


def _here() -> str:
    """This host, and on Linux this container: the number of a process means nothing outside."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{platform.node()} {namespace}")


def _last_written(folder: Path) -> float:
    """The time of the last change in a folder; now, where another process removes it meanwhile."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:
        return time.time()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# ------------------------------------------------------------------------------------------- contents


def usage(root: Path) -> dict[str, tuple[int, int]]:
    """Entries and bytes of each part of the cache, by the name that ``clear`` takes, and of other folders."""
    found: dict[str, tuple[int, int]] = {}
    for folder in _folders(root):
        entries, size = found.get(_part(folder), (0, 0))
        entries += sum(not path.name.startswith(".") for path in folder.iterdir())
        found[_part(folder)] = entries, size + folder_bytes(folder)
    return found


class Cleared(NamedTuple):
    """The bytes that were freed, and in names what lies in the folder still."""

    freed: int
    left: tuple[str, ...]


def clear(root: Path, part: str | None = None) -> Cleared:
    """Delete what this program made of one of ``PARTS``, or of all of them but what was downloaded. What else
    lies in the folder, or in that of a part, stays.
    """
    clear_stale(root)
    chosen = [part] if part else [name for name in PARTS if name != _FETCHED]
    freed, left = 0, []
    for path in sorted(root.glob("*")):
        name = _part(path)
        if name not in chosen or not path.is_dir():
            left.append(path.name)
            continue
        clear_stale(path)
        freed += _empty(path, re.compile(f"{_PARTS[name]}|{_HALF_WRITTEN}"))
        others = sorted(other.name for other in path.iterdir())
        left += [f"{path.name}/{other}" for other in others[:_NAMED]]
        if len(others) > _NAMED:
            left.append(f"{len(others) - _NAMED} more in {path.name}/")
        if not others and not path.is_symlink():  # one to another disk is the user's to keep
            path.rmdir()
    return Cleared(freed, tuple(left))


def _empty(folder: Path, own: re.Pattern[str]) -> int:
    """Delete what has such a name; the bytes that it had."""
    freed = 0
    for path in folder.iterdir():
        if not own.fullmatch(path.name) or _STAGING.fullmatch(path.name):
            continue  # what is staged has been looked at: its process lives
        if path.is_dir() and not path.is_symlink():
            freed += folder_bytes(path)
            shutil.rmtree(path)
        else:
            freed += path.lstat().st_size
            path.unlink()
    return freed


def _part(folder: Path) -> str:
    """The part of the cache that a folder belongs to: the scenes have one for each of their versions."""
    return re.sub(r"^scenes-v\d+$", "scenes", folder.name)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*") if path.is_dir())


def folder_bytes(folder: Path) -> int:
    """The size of the files below a folder; files that vanish meanwhile count nothing."""
    total = 0
    for where, _, names in os.walk(folder):  # which passes over a folder that vanishes
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(where, name).stat().st_size
    return total
