"""The cache folder: where it is, what is in it, how it is cleared."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def cache_folder(chosen: Path | None = None) -> Path:
    """The folder given, else ``$LMIM_BENCH_CACHE``, else the user's cache folder of the platform."""
    if chosen:
        return chosen
    if os.environ.get("LMIM_BENCH_CACHE"):
        return Path(os.environ["LMIM_BENCH_CACHE"])
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("lmim-bench"))


def clear_stale(root: Path) -> None:
    """Delete the half-written folders of processes that are gone."""
    for staging in root.glob(".*.tmp"):
        pid = staging.name.split(".")[-2]
        if not (pid.isdigit() and _alive(int(pid))):
            shutil.rmtree(staging, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def usage(root: Path) -> dict[str, tuple[int, int]]:
    """Entries and bytes below each folder of the cache."""
    found = {}
    for folder in sorted(p for p in root.glob("*") if p.is_dir()):
        sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
        found[folder.name] = (sum(1 for _ in folder.iterdir()), sum(sizes))
    return found


def clear(root: Path, part: str | None = None) -> int:
    """Delete one folder of the cache, or all of it; returns the bytes freed."""
    freed = 0
    for name, (_, size) in usage(root).items():
        if part in (None, name):
            shutil.rmtree(root / name)
            freed += size
    return freed
