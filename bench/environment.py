"""What a number depends on besides the protocol: versions, machine, device, state of the source."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .results import Environment

_PACKAGES = (
    "torch",
    "timm",
    "numpy",
    "scikit-learn",
    "scipy",
    "faiss-cpu",
    "opencv-python-headless",
    "pillow",
    "simplejpeg",
)


@cache
def environment(device: str, precision: str) -> Environment:
    """The environment of this process."""
    import torch

    from .. import __version__

    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor()
    commit, dirty = _git_state()
    return Environment(
        lmim_bench=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        device=f"{device} ({where})" if where else f"{device}, {torch.get_num_threads()} threads",
        precision=precision,
        packages={name: v for name in _PACKAGES if (v := _version(name))},
        git_commit=commit,
        git_dirty=dirty,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state() -> tuple[str | None, bool | None]:
    """Commit and dirtiness of a source checkout; (None, None) for an installed package."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None, None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit, bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(root: Path, *args: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()
