"""The cache folder: where it is, what is in it, how it is cleared."""

from __future__ import annotations

import os
import platform
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import NamedTuple

PARTS = ("features", "manifests", "pixels", "records", "scenes", "torchvision")
"""What this program keeps: a folder for each, one a version for the scenes."""
_FETCHED = "torchvision"
"""The one part that cannot be worked out again: it goes only where it is named."""
_STAGING = re.compile(r"\..+\.(?P<host>[^.]+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp")
_LONGEST_SILENCE = 86_400.0


def cache_folder(chosen: Path | None = None) -> Path:
    """The folder given, else ``$LMIM_BENCH_CACHE``, else the user's cache folder of the platform."""
    if chosen:
        return chosen
    if os.environ.get("LMIM_BENCH_CACHE"):
        return Path(os.environ["LMIM_BENCH_CACHE"])
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("lmim-bench"))


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
    """Entries and bytes below each folder of the cache."""
    return {
        folder.name: (sum(not path.name.startswith(".") for path in folder.iterdir()), _bytes(folder))
        for folder in _folders(root)
    }


class Cleared(NamedTuple):
    """The bytes that were freed, and the names of what lies in the folder still."""

    freed: int
    left: tuple[str, ...]


def clear(root: Path, part: str | None = None) -> Cleared:
    """Delete one of ``PARTS``, or all of them but what was downloaded. What else lies in the folder stays."""
    clear_stale(root)
    chosen = [part] if part else [name for name in PARTS if name != _FETCHED]
    freed, links = 0, []
    for folder in _folders(root):
        if re.sub(r"^scenes-v\d+$", "scenes", folder.name) in chosen:
            freed += _bytes(folder)
            if folder.is_symlink():  # to another disk: the user's to keep
                _empty(folder)
                links.append(folder)
            else:
                shutil.rmtree(folder)
    return Cleared(freed, tuple(sorted(path.name for path in root.glob("*") if path not in links)))


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*") if path.is_dir())


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
