"""The contract of coverage between a file and an encoder.

Every parameter and persistent buffer of the encoder is filled exactly once from the file, with its own
shape and finite values; no tensor is left over. Anything else is a CheckpointError that names the keys:
there is no loading with ``strict=False`` in this project, so random weights are never scored by mistake.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch

from ..errors import CheckpointError
from .family import Tensors
from .files import storage_is_honest
from .pages import MappedFiles

_SHOWN = 4
_COUNTER = ".num_batches_tracked"
_UNCOUNTED = "written before torch 0.4.1: batch norms have no num_batches_tracked, set to 0 (it is not used)"
# Norms outside of the numbered blocks, where some begin at zero to leave the residual as it is.
_LAST_NORM = re.compile(r"(?:[a-z_]+\.)*\w*norm(?:\.[a-z]+)?\.weight")
_TIMMS_KEYS = ("timm", "beit", "convnext", "eva02", "resnet", "swin")


@torch.no_grad()
def fill(model: Any, tensors: Tensors, family: str) -> tuple[Any, tuple[str, ...]]:
    """Fill a model with exactly these tensors; returns it and notes on conversions.

    Raises:
        CheckpointError: keys are missing, left over or of another shape, or values are not finite.
    """
    expected = model.state_dict()
    counters = _uncounted(expected, tensors)
    tensors = {**tensors, **counters}
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    wrong = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    if missing or unexpected or wrong:
        parts = [
            f"{len(names)} {what} ({few(names)})"
            for names, what in ((missing, "missing"), (unexpected, "unexpected"), (wrong, "of another shape"))
            if names
        ]
        hint = "; if timm has this very model, name it by #arch=NAME" if family in _TIMMS_KEYS else ""
        if not missing and not wrong:
            hint = ignorable(unexpected, tensors) + hint
        raise CheckpointError(f"the file does not fill the {family} encoder: {'; '.join(parts)}{hint}")
    notes = {_UNCOUNTED} if counters else set()
    empty = {}
    files = MappedFiles()
    for name, tensor in tensors.items():
        target = expected[name]
        _check_kind(name, tensor, target)
        check_values(name, tensor)
        if tensor.dtype != target.dtype:
            notes.add(f"weights converted from {tensor.dtype} to {target.dtype}".replace("torch.", ""))
        # Copies: the file may change or go away, and its pages need not stay in memory beside them.
        if target.is_meta:
            empty[name] = tensor.detach().to(target.dtype, copy=True).contiguous()
        else:
            target.copy_(tensor.detach())
        files.release(tensor)
    if empty:
        model.load_state_dict(empty, strict=True, assign=True)
    return model, tuple(sorted(notes))


def _uncounted(expected: Tensors, tensors: Tensors) -> Tensors:
    """The counters of batch norms at 0, for a file that has none of them beside its statistics."""
    names = [name for name in expected if name.endswith(_COUNTER)]
    if any(name in tensors for name in names):
        return {}
    return {n: torch.tensor(0) for n in names if n.removesuffix(_COUNTER) + ".running_mean" in tensors}


def _check_kind(name: str, tensor: torch.Tensor, target: torch.Tensor) -> None:
    """Refuse what holds no plain numbers of the kind that the encoder computes with."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta:
        raise CheckpointError(f"{name} has a shape but no values (device meta); save the loaded model")
    if tensor.is_quantized or (target.is_floating_point() and not tensor.is_floating_point()):
        raise CheckpointError(f"{name} holds {kind} numbers: quantised weights; give the original ones")
    if tensor.layout != torch.strided:
        raise CheckpointError(f"{name} is a sparse tensor; save tensor.to_dense() instead")


def check_values(name: str, tensor: torch.Tensor) -> None:
    """Raise CheckpointError for more numbers than the file holds, NaN, one number everywhere, or a last
    norm of zeros.
    """
    if not storage_is_honest(tensor):
        raise CheckpointError(
            f"{name} claims {tensor.numel()} numbers but the file holds fewer; it is refused"
        )
    if not tensor.is_floating_point():
        return
    if tensor.element_size() == 1:  # 8-bit floats have no arithmetic of their own
        tensor = tensor.float()
    # The sum is a tenth of the cost of looking at every element, and is finite only if each of them is.
    if not torch.isfinite(tensor.sum(dtype=torch.float64)) and not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{name} holds {count} NaN or infinite values; the training diverged or the file broke"
        )
    if _LAST_NORM.fullmatch(name) and not tensor.any():
        raise CheckpointError(f"{name} is 0.0 everywhere: all features would be the same; the file broke")
    if tensor.ndim > 1 and name.endswith(".weight") and tensor.numel() > 1:
        flat = tensor.reshape(-1)
        if flat[0] == flat[-1] and (flat == flat[0]).all():
            raise CheckpointError(f"{name} is {float(flat[0])} everywhere; these weights were never trained")


def ignorable(unexpected: Collection[str], tensors: Iterable[str]) -> str:
    """How to leave out what is unexpected, where nothing of the encoder begins with the same name."""
    beside = dict.fromkeys(name.partition(".")[0] for name in unexpected)
    if any(name.partition(".")[0] in beside for name in tensors if name not in unexpected):
        return ""
    return f"; if it is no part of the encoder, add #ignore={':'.join(list(beside)[:_SHOWN])}"


def few(names: Sequence[str]) -> str:
    """The first names of a list, and how many there are."""
    more = f", ... {len(names)} in all" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
