"""lmim-bench: score any vision checkpoint on five downstream tasks, one command, one report.

The public names load on first use, so that ``import lmim_bench`` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bench.api import run as run
    from .bench.config import RunConfig as RunConfig
    from .bench.encoders import load_encoder as load_encoder
    from .bench.errors import LmimBenchError as LmimBenchError
    from .bench.results import load_run as load_run
    from .tasks import task as task

__version__ = "0.1.0"

_PUBLIC = {
    "run": ".bench.api",
    "RunConfig": ".bench.config",
    "load_encoder": ".bench.encoders",
    "LmimBenchError": ".bench.errors",
    "load_run": ".bench.results",
    "task": ".tasks",
}
__all__ = ["LmimBenchError", "RunConfig", "__version__", "load_encoder", "load_run", "run", "task"]


if not TYPE_CHECKING:  # else every wrong name would be of type Any

    def __getattr__(name: str) -> Any:
        if name in _PUBLIC:
            return getattr(import_module(_PUBLIC[name], __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
