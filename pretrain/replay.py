"""A forward and backward pass that a GPU repeats by itself: recorded once as a CUDA graph, then replayed.

A pass of a few hundred small modules is thousands of kernels, and a slow CPU does not start them as fast as
a GPU ends them. Replayed, they are the same kernels on the same memory: the numbers are those of the pass as
it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from lightning.fabric import Fabric
from torch import nn

from ..bench.errors import ConfigError
from .masking import Masks
from .model import Fed
from .recipe import Recipe

Pass = Callable[[Fed, float | torch.Tensor], dict[str, torch.Tensor]]
"""Forward and backward pass of a part, given the aim of the similarity constraint: gradients are added to
those that are there; the loss and what it is made of are returned, scalars on the device.
"""
_WARM = 3
"""Passes before the recorded one, in which all is made that is made once: compiled code, workspaces."""


class Recorder(Protocol):
    """How work on a device is recorded."""

    def warm(self, work: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Do it, so that it can be recorded later."""

    def record(
        self, work: Callable[[], dict[str, torch.Tensor]]
    ) -> tuple[dict[str, torch.Tensor], Callable[[], None]]:
        """What the work returns, which is not computed yet, and what computes it, again and again."""


class GraphRecorder:
    """By CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        stream: Any = torch.cuda.Stream
        self._stream = stream(device)

    def warm(self, work: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)  # as torch asks for: gradients know the stream that they came from
        with torch.cuda.stream(self._stream):
            found = work()
        current.wait_stream(self._stream)
        return found

    def record(
        self, work: Callable[[], dict[str, torch.Tensor]]
    ) -> tuple[dict[str, torch.Tensor], Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = work()
        return found, graph.replay


class Replayed:
    """A pass that is called like the one given, with parts of the same shapes.

    Parts of other shapes are passed as before. Gradients are those of one pass: they must be gone (None) when
    the next one begins.

    Args:
        work: the pass; nothing in it may wait for the device.
        parameters: what gets gradients.
        recorder: how it is recorded.
    """

    def __init__(self, work: Pass, parameters: Iterable[nn.Parameter], recorder: Recorder) -> None:
        self._work, self._recorder = work, recorder
        self._parameters = list(parameters)
        self._calls = 0
        self._replay: Callable[[], None] | None = None
        self._inputs: list[torch.Tensor] = []
        self._gradients: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._names: list[str] = []
        self._values = torch.empty(0)

    def __call__(self, part: Fed, aim: float | torch.Tensor) -> dict[str, torch.Tensor]:
        if self._calls < _WARM:
            self._calls += 1
            return self._recorder.warm(lambda: self._work(part, aim))
        given = [*_tensors(part), torch.full((), float(aim), device=part.images.device)]
        if self._replay is None:
            self._record(part, given)
        if any(x.shape != kept.shape for x, kept in zip(given, self._inputs, strict=True)):
            return self._work(part, aim)
        assert self._replay is not None
        for kept, x in zip(self._inputs, given, strict=True):
            kept.copy_(x)
        self._replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return dict(zip(self._names, self._values.clone().unbind(), strict=True))

    def _record(self, part: Fed, given: list[torch.Tensor]) -> None:
        self._inputs = [x.clone() for x in given]
        *tensors, aim = self._inputs
        kept = _like(part, tensors)

        def work() -> dict[str, torch.Tensor]:
            found = self._work(kept, aim)
            self._names = list(found)
            return {"all": torch.stack([value.float() for value in found.values()])}

        found, self._replay = self._recorder.record(work)
        self._values = found["all"]
        self._gradients = [(p, p.grad) for p in self._parameters if p.grad is not None]


def _tensors(part: Fed) -> list[torch.Tensor]:
    return [x for x in (part.images, part.offsets, *part.masks) if x is not None]


def _like(part: Fed, tensors: list[torch.Tensor]) -> Fed:
    """A part of these tensors, which are in the order of ``_tensors``."""
    left = iter(tensors)
    images = next(left)
    return Fed(images, None if part.offsets is None else next(left), Masks(*left))


def check_replayable(recipe: Recipe, fabric: Fabric) -> None:
    """Raise ConfigError where a pass of this training cannot be recorded, with what to change."""
    engine = recipe.engine
    found = {
        f"runs on {fabric.device}, not on a GPU": fabric.device.type != "cuda",
        f"has {fabric.world_size} processes": fabric.world_size > 1,
        "shards its weights (engine.strategy=fsdp2)": engine.strategy == "fsdp2",
        f"cuts its batch into parts (engine.accumulate={engine.accumulate})": engine.accumulate > 1,
        "scales its loss (engine.precision=fp16)": engine.precision == "fp16",
        "computes activations again (engine.activation_checkpointing)": engine.activation_checkpointing,
        "hides another number of patches in each step (masking.kind=multiblock)": (
            recipe.masking.kind == "multiblock"
        ),
    }
    for reason, holds in found.items():
        if holds:
            raise ConfigError(f"engine.cuda_graph=true is not for a training that {reason}; leave it out")
