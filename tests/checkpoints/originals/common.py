"""What several recording scripts need."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

OPTIMIZER: dict[str, Any] = {
    "state": {0: {"step": 3, "exp_avg": torch.full((2, 3), 0.5)}},
    "param_groups": [{"lr": 1e-3, "params": [0]}],
}


def fresh(folder: Path) -> None:
    """Make a repository importable, and forget the modules and the path of the one before."""
    peers = str(folder.parent)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(peers) or name in ("src", "models"):
            del sys.modules[name]
    sys.path[:] = [str(folder), *(path for path in sys.path if not path.startswith(peers))]


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict under another prefix, its tensors shared."""
    return {prefix + name: tensor for name, tensor in state.items()}


def normed_tokens(model: Any, images: torch.Tensor, run: Any = None) -> torch.Tensor:
    """The tokens after the model's final norm, caught there: many models return only some of them."""
    caught: list[torch.Tensor] = []
    hook = model.norm.register_forward_hook(lambda module, given, out: caught.append(out))
    (run or model)(images)
    hook.remove()
    return caught[-1]


def token_features(
    tokens: torch.Tensor, grid: tuple[int, int], prefix: int, layer: str = "-1"
) -> dict[str, Any]:
    """Columns of tokens (B, prefix + h*w, D): the class token where there is one, and the patches."""
    columns = {f"patches@{layer}": tokens[:, prefix:].unflatten(1, grid)}
    return columns if prefix == 0 else {f"cls@{layer}": tokens[:, 0], **columns}
