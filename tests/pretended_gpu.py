"""A GPU that is only pretended: tensors that say they are on ``cuda:0`` and are computed on the CPU.

It holds what a real one holds a program to: an operation whose tensors are on two devices is an error, numpy
cannot read what is on the GPU, and every time that the program waits for a value is counted. What it cannot
show is a kernel's arithmetic, speed, and memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda:0")
_WAITS = {
    *("item", "tolist", "equal", "allclose", "nonzero", "unique", "unique_consecutive", "masked_select"),
    *("__bool__", "__int__", "__float__", "__index__", "__contains__", "argwhere"),
}
_FOR_THE_CPU = {"numpy", "__array__", "from_numpy"}
_BETWEEN = {"copy_", "_has_compatible_shallow_copy_type"}
_DEVICE_PROPERTIES = {"device": GPU, "is_cuda": True, "is_cpu": False}
waits: Counter[str] = Counter()
"""How often a value was waited for since this was cleared, by what asked for it."""


class OnGpu(torch.Tensor):
    """A tensor that says it is on the GPU."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _call(func, args, kwargs or {})


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _call(func, args, kwargs or {})


@contextmanager
def pretended_gpu() -> Iterator[Counter[str]]:
    """A machine with one GPU, in this thread; gives the counter of waits."""
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "pretended GPU",
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (64 << 30, 80 << 30),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "Event": _Event,
    }
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    waits.clear()
    try:
        with ExitStack() as stack:
            for name, answer in answers.items():
                stack.enter_context(patch.object(torch.cuda, name, answer))
            # Nothing is pinned: that is a matter of the driver's.
            stack.enter_context(patch.object(torch.accelerator, "is_available", lambda: False))
            stack.enter_context(patch.object(torch.accelerator, "current_device_index", lambda: 0))
            stack.enter_context(patch.object(torch._C, "_group_tensors_by_device_and_dtype", _grouped))
            # Other threads pin too, and a mode is one thread's.
            stack.enter_context(patch.object(torch.Tensor, "pin_memory", _pinned))
            stack.enter_context(_Mode())
            yield waits
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


_group = torch._C._group_tensors_by_device_and_dtype


def _grouped(lists: list[list[torch.Tensor | None]], with_indices: bool = False) -> Any:
    """Torch's grouping reads where tensors are from below Python."""
    found = _group(lists, with_indices)
    return {(group[0][0][0].device, dtype): group for (_, dtype), group in found.items()}


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, OnGpu):
        raise TypeError("pin_memory of a tensor on cuda:0; copy it to the CPU first")
    return tensor.clone()


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        del enable_timing

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: _Event) -> float:
        return 1.0


def _call(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return _attribute(func, args)
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
    if name in ("to", "cpu", "cuda") and isinstance(args[0], torch.Tensor):
        return _convert(name, args, kwargs)
    if name in _FOR_THE_CPU and ours:
        raise TypeError(f"{name} of a tensor on cuda:0; copy it to the CPU first")
    if name == "__deepcopy__" and ours:
        func, args = torch.Tensor.clone, args[:1]
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if name in ("__getitem__", "__setitem__"):
        _check_index(name, *args)
    elif name not in _BETWEEN:
        _check_devices(name, tensors, kwargs)
    if ours and (name in _WAITS or (name == "copy_" and not isinstance(args[0], OnGpu))):
        waits[name] += 1
    wanted = kwargs.get("device")
    gpu = bool(ours) if wanted is None else torch.device(wanted).type == "cuda"
    if name == "copy_":
        gpu = isinstance(args[0], OnGpu)
    if wanted is not None and gpu:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    found = _plainly(func, args, kwargs)
    return tree_map(_put_on_gpu, found) if gpu and name not in ("__set__", "backward") else found


def _plainly(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _put_on_gpu(value: Any) -> Any:
    plain = isinstance(value, torch.Tensor) and not isinstance(value, OnGpu)
    return _plainly(torch.Tensor.as_subclass, (value, OnGpu), {}) if plain else value


def _attribute(func: Any, args: Any) -> Any:
    on_gpu, name = isinstance(args[0], OnGpu), func.__self__.__name__
    if on_gpu and name in _DEVICE_PROPERTIES:
        return _DEVICE_PROPERTIES[name]
    found = _plainly(func, args, {})
    return _put_on_gpu(found) if on_gpu else found


def _convert(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """``to``, ``cpu`` and ``cuda``."""
    tensor, *rest = args
    if name != "to":
        rest, kwargs = [GPU if name == "cuda" else torch.device("cpu")], {}
    rest = [x for one in rest for x in ((one.device, one.dtype) if isinstance(one, torch.Tensor) else (one,))]
    named = [x for x in (*rest, kwargs.get("device")) if isinstance(x, str | torch.device)]
    before = isinstance(tensor, OnGpu)
    after = torch.device(named[0]).type == "cuda" if named else before
    here = [torch.device("cpu") if after and isinstance(x, str | torch.device) else x for x in rest]
    if after and "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    moved = _plainly(torch.Tensor.to, (tensor, *here), kwargs)
    if before and not after and not (kwargs.get("non_blocking") or True in rest):
        waits["to the CPU"] += 1
    if before != after and moved is tensor:
        moved = _plainly(torch.Tensor.clone, (tensor,), {})
    if after:
        return _put_on_gpu(moved)
    return _plainly(torch.Tensor.as_subclass, (moved, torch.Tensor), {}) if before else moved


def _check_devices(name: str, tensors: list[torch.Tensor], kwargs: dict[str, Any]) -> None:
    """What torch refuses: tensors of several devices, but that numbers (0-dim) of the CPU go with all."""
    sides = {isinstance(tensor, OnGpu) for tensor in tensors if tensor.ndim or isinstance(tensor, OnGpu)}
    if len(sides) > 1:
        where = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, got {where}")
    generator, device = kwargs.get("generator"), kwargs.get("device")
    if generator is not None and (True in sides or (device and torch.device(device).type == "cuda")):
        raise RuntimeError(f"{name}: a generator of the CPU cannot draw on cuda:0")


def _check_index(name: str, tensor: torch.Tensor, index: Any, *value: Any) -> None:
    """Indices of the CPU may go into a tensor on the GPU, which waits for them; not the other way round."""
    indices = [leaf for leaf in tree_flatten(index)[0] if isinstance(leaf, torch.Tensor)]
    on_gpu = isinstance(tensor, OnGpu)
    if not on_gpu and any(isinstance(leaf, OnGpu) for leaf in indices):
        raise RuntimeError(f"{name}: indices on cuda:0 for a tensor on the CPU")
    if on_gpu and any(leaf.dtype == torch.bool or not isinstance(leaf, OnGpu) for leaf in indices):
        waits["index"] += 1
    for given in value:
        if isinstance(given, torch.Tensor) and given.ndim and isinstance(given, OnGpu) != on_gpu:
            raise RuntimeError(f"{name}: a value of another device than the tensor's")
