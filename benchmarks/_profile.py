"""Where a training step's time on a GPU goes: its kernels by what they do, from torch's own profiler."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _timing import Side
from torch.profiler import ProfilerActivity, profile

KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("matrix products", ("triton_tem",)),  # a kernel of the compiler's has all that it fuses in its name
    ("fused by the compiler", ("triton_",)),
    ("attention", ("flash", "fmha", "sdpa", "attention")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "xmma", "splitk", "wgrad", "dgrad")),
    ("optimiser and EMA", ("multi_tensor_apply",)),
    ("copies", ("memcpy", "memset")),
    ("norms", ("layer_norm", "layernorm", "gammabeta")),
    ("softmax", ("softmax",)),
)
"""What a kernel is for, by the first of these whose words its name holds."""
REST = "other"
_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_MOST = 15


class Kernel(NamedTuple):
    """A kernel's run, in microseconds."""

    name: str
    begun: float
    took: float


@dataclass(frozen=True)
class Profile:
    """A step of one side, milliseconds.

    Attributes:
        step: from the first kernel's start to the last one's end, over the number of steps.
        busy: of it, while at least one kernel ran.
        kinds: what the kernels took, by what they do.
        top: what the longest took, by name.
        waits: for how long the device had nothing to do before a kernel, by its name: the longest.
    """

    label: str
    step: float
    busy: float
    kinds: dict[str, float]
    top: dict[str, float]
    waits: dict[str, float]

    @property
    def counted(self) -> float:
        """The time of matrix products and attention, in which the model's work is counted."""
        return sum(self.kinds.get(name, 0.0) for name in ("matrix products", "attention"))


def profile_side(side: Side, steps: int, device: torch.device) -> Profile | None:
    """Profile a block of steps of a side that is warm; None where the profiler saw no kernel."""
    torch.cuda.synchronize(device)
    # The device alone: what it costs to watch the CPU too, the device waits for.
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        side.block(steps)
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        kernels = read_kernels(json.loads(path.read_bytes())["traceEvents"])
    return summarise(side.label, kernels, steps) if kernels else None


def read_kernels(events: Iterable[dict[str, Any]]) -> list[Kernel]:
    """What ran on the device, of a Chrome trace's events."""
    return [Kernel(e["name"], e["ts"], e["dur"]) for e in events if e.get("cat") in _ON_DEVICE]


def summarise(label: str, kernels: Sequence[Kernel], steps: int) -> Profile:
    """Add up kernels, one at least, of so many steps."""
    kinds, names, waits = (defaultdict[str, float](float) for _ in range(3))
    ordered = sorted(kernels, key=lambda k: k.begun)
    busy, end = 0.0, ordered[0].begun
    for kernel in ordered:
        kinds[kind_of(kernel.name)] += kernel.took
        names[kernel.name] += kernel.took
        waits[kernel.name] += max(0.0, kernel.begun - end)
        last = kernel.begun + kernel.took
        busy += max(0.0, last - max(end, kernel.begun))
        end = max(end, last)
    scale = 1000 * steps
    return Profile(
        label=label,
        step=(end - ordered[0].begun) / scale,
        busy=busy / scale,
        kinds=_longest(kinds, scale, len(kinds)),
        top=_longest(names, scale, _MOST),
        waits=_longest(waits, scale, _MOST),
    )


def _longest(times: Mapping[str, float], scale: float, most: int) -> dict[str, float]:
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return {name: took / scale for name, took in ordered[:most]}


def kind_of(name: str) -> str:
    low = name.lower()
    return next((kind for kind, words in KINDS if any(word in low for word in words)), REST)


def product_peak(device: torch.device, side: int = 8192, times: int = 20) -> float:
    """FLOP/s of large bf16 matrix products here, on random values."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()  # type: ignore[no-untyped-call]
    for _ in range(times):
        a @ b
    ended.record()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    return 2 * side**3 * times / (begun.elapsed_time(ended) / 1000)  # type: ignore[no-untyped-call]
